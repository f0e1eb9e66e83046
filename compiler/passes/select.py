"""Each head's mask at each time, from a menu, under one budget over the whole job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from calibatt.compiler.bits import count, pack, unpack
from calibatt.compiler.budget import Choice, choose
from calibatt.compiler.error_model import CODES, code_counts, row_weights
from calibatt.compiler.ir import Float64, Int64, Job, UnitIR, full_bits
from calibatt.compiler.ladders import level_in
from calibatt.compiler.passes import Findings, Pass
from calibatt.compiler.stats import window_keep
from calibatt.compiler.stats.unit import STEPS_PER_OCTAVE

KINDS = ("planes", "windows", "cuts", "ladders")
UNREFINED_MENU, REFINED_MENU = "windows+cuts", "windows+ladders"
DEFAULT_DENSITY = 0.5
NO_BUDGET_BINDS = 1e100
"""The multiplier where an error budget leaves every head its fewest blocks."""


@dataclass(frozen=True)
class Select(Pass):
    """Picks masks so that the whole job loses least within its budget.

    A head may be dense, keep a voted plane, a window, a *cut*: the blocks whose mean block error is above a level, or,
    in a refined store, a level of a *ladder*, whose error was measured itself, as that of windows was then. A mask
    costs its predicted milliseconds and loses its output error, relative to the residual stream, times its weight. One
    multiplier, the price of a millisecond, decides for all heads and times at once; what it leaves of the budget is
    spent on single changes, and the distance to a proven bound is reported.

    With a range of times the budget is that of the range.

    A second `select` after `anchors` spends what those saved: all heads choose anew, those with anchors also among
    staying as they are.

    Requires: `vote` for planes; block error in the store for cuts; a refinement of it for ladders.
    Ensures: every mask keeps the required blocks; the budget holds.

    Args:
        target_density: Most blocks computed, as a share of dense attention over all times, layers and heads; 0.5 if
            no budget is given.
        max_error: Most error times weight, summed over all times, layers and heads (with probed weights: the
            predicted squared error of the final latent, relative to its size).
        target_speedup: Least predicted speed-up of a whole forward, not of attention alone.
        attention_share: Share of dense attention in the time of a dense forward; only for `target_speedup`.
        menu: What heads may choose beside dense: `planes`, `windows`, `cuts`, `ladders`, joined by ``+``. If absent,
            ladders and windows where the store is refined, cuts and windows where it is not. Without planes, which no
            cut of as many blocks loses to, those of the samples need not be read.
        levels_per_octave: Steps of the cuts' levels in a factor of 2.
        ladder_kinds: Which of the refinement's ladders, joined by ``+``; all if absent.

    Raises:
        PassError: Several budgets, one out of range or beyond the best that can be reached (which is named), or a menu
            that cannot be had.
    """

    name: ClassVar[str] = "select"
    decides: ClassVar[bool] = True
    target_density: float | None = None
    max_error: float | None = None
    target_speedup: float | None = None
    attention_share: float = 0.75
    menu: str | None = None
    levels_per_octave: int = 4
    ladder_kinds: str | None = None

    def __post_init__(self) -> None:
        density, error, speedup = self.target_density, self.max_error, self.target_speedup
        given = sum(each is not None for each in (density, error, speedup))
        self.require(given <= 1, "target-density, max-error and target-speedup", "not be given together", given)
        if not given:
            object.__setattr__(self, "target_density", DEFAULT_DENSITY)
        self.require(density is None or 0 < density <= 1, "target-density", "be in (0, 1]", density)
        self.require(error is None or 0 <= error < np.inf, "max-error", "be finite and not negative", error)
        rule = "be finite and at least 1"
        self.require(speedup is None or 1 <= speedup < np.inf, "target-speedup", rule, speedup)
        self.require(0 < self.attention_share <= 1, "attention-share", "be in (0, 1]", self.attention_share)
        parts = self.menu.split("+") if self.menu is not None else []
        known = set(parts) <= set(KINDS) and len(set(parts)) == len(parts)
        self.require(known, "menu", f"name some of {', '.join(KINDS)}, joined by +", self.menu)
        whole = self.levels_per_octave in (1, 2, 4, 8)
        self.require(whole, "levels-per-octave", "be 1, 2, 4 or 8", self.levels_per_octave)

    @property
    def codes(self) -> bool:
        return bool({"cuts", "planes"} & set(self._parts()))

    @property
    def ladders(self) -> bool:
        return self.menu is not None and "ladders" in self.menu.split("+")

    def settled(self, job: Job) -> Select:
        menu = UNREFINED_MENU if job.ladders is None else REFINED_MENU
        return self if self.menu is not None else replace(self, menu=menu)

    def _parts(self) -> list[str]:
        return (self.menu or UNREFINED_MENU).split("+")

    def _kinds(self, job: Job) -> tuple[str, ...]:
        if not self.ladders or job.ladders is None:
            return ()
        return job.ladders.kinds if self.ladder_kinds is None else tuple(self.ladder_kinds.split("+"))

    def survey(self, job: Job, unit: UnitIR) -> Any:
        parts = self._parts()
        self.require(unit.tile_order is None, "schedule", "come after", unit.name)
        voted = unit.voted is not None or "planes" not in parts
        self.require(voted, "planes", "have been voted (vote comes before select)", unit.name)
        has_error = job.manifest.has_block_error
        rule = "have block error in the store (menu=planes+windows does without)"
        self.require(has_error or "cuts" not in parts, "cuts", rule, "none")
        refined = unit.means.refined_error is not None or "ladders" not in parts
        self.require(refined, "ladders", "have been measured (calibatt-calibrate --refine)", unit.name)
        if self.ladders and job.ladders is not None:
            known = set(self._kinds(job)) <= set(job.ladders.kinds)
            rule = f"be some of those measured, {'+'.join(job.ladders.kinds)}"
            self.require(known, "ladder-kinds", rule, self.ladder_kinds)
        columns = self._columns(job)
        if unit.menu is None or unit.menu[0] != columns.key:
            unit.menu = (columns.key, *columns.table(job, unit))
        _, blocks, error = unit.menu
        anchored = np.array([groups is not None for groups in unit.anchors] or [False] * unit.heads)
        now = np.where(anchored, unit.error if unit.anchors else 0.0, np.inf)
        error = np.concatenate([error, now[:, None]], 1)
        if unit.force_dense:
            error[:, 1:] = np.inf
        return np.concatenate([blocks, unit.computed()[1][:, None]], 1).astype(np.int32), error

    def decide(self, job: Job, units: Sequence[int], surveys: Sequence[Any]) -> Sequence[Any]:
        self.require(bool(units), "from-time and to-time", "leave a recorded time", f"{self.from_time}, {self.to_time}")
        columns = self._columns(job)
        blocks = np.concatenate([blocks for blocks, _ in surveys]).astype(np.float64)
        error = np.concatenate([error for _, error in surveys])
        error[:, columns.estimated] *= job.error_factor
        heads = job.manifest.model.heads
        weight = np.repeat(job.unit_weights.reshape(-1)[list(units)], heads)
        if job.head_weights is not None:
            weight = job.head_weights.reshape(-1, heads)[list(units)].reshape(-1)
        loss = error * weight[:, None]
        choice = self._solve(job, blocks, loss)
        rows = np.arange(len(loss))
        spent = float(loss[rows, choice.pick].sum())
        of = "error" if self.max_error is None else "blocks"
        job.findings[self.name] = {
            "lambda_per_ms": job.multiplier,
            "predicted_error": spent,
            "density": float(blocks[rows, choice.pick].sum() / (job.unit_dense_blocks * len(units))),
            "duality_gap": choice.gap,
            "duality_gap_of": of,
            "relative_gap": choice.gap / choice.loss if choice.loss else 0.0,
            "candidates": int(np.isfinite(loss).sum()),
            "weights": "probed" if job.weights_probed else "never probed: 1 at every time",
            "error_estimate": self._estimate(job),
        }
        shape = (len(surveys), -1)
        return list(zip(choice.pick.reshape(shape), error[rows, choice.pick].reshape(shape), strict=True))

    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        pick, error = decision
        self._columns(job).take(unit, pick)
        unit.error = error.copy()
        found: Findings = {"with anchors": sum(groups is not None for groups in unit.anchors)}
        for choice in unit.choice:
            kind = choice.split()[0].split("(")[0]
            found[kind] = found.get(kind, 0) + 1
        return found

    def report(self, job: Job, total: Findings) -> dict[str, Any]:
        anchored = total.pop("with anchors")
        kinds = {kind: int(number) for kind, number in sorted(total.items())}
        return {**job.findings[self.name], "heads_by_kind": kinds, "heads_with_anchors": int(anchored)}

    def _estimate(self, job: Job) -> str:
        """Where the errors of the menu come from, in words."""
        if self.ladders and job.ladders is not None:
            ladders = job.ladders
            told = (
                f"{len(self._kinds(job))} ladders of {len(ladders.shares)} masks and windows, on {len(ladders.samples)}"
            )
            measured = f"measured errors of {told} samples"
            if not self.codes:
                return measured
            return f"{measured}; of others (sum of roots of block errors)^2 x {job.error_factor:.3g}"
        if job.manifest.has_block_error:
            return f"(sum of roots of block errors)^2 x {job.error_factor:.3g}"
        return "measured errors of planes and windows"

    def _columns(self, job: Job) -> _Columns:
        return _Columns(job, self._parts(), self.levels_per_octave, self._kinds(job))

    def _solve(self, job: Job, blocks: Float64, loss: Float64) -> Choice:
        block_ms = job.device.block_ms(job.manifest.blocks, job.manifest.model.head_dim)
        if self.max_error is not None:
            usable = np.isfinite(loss)
            limit = self.max_error * (1 - 1e-12)  # sums in another order differ
            choice = choose(np.where(usable, blocks, np.inf), np.where(usable, loss, 0.0), limit)
            assert choice is not None, "dense heads lose nothing"
            saved = choice.multiplier * block_ms
            job.multiplier = 1 / saved if saved > 0 else NO_BUDGET_BINDS
            whole = self.from_time is None and self.to_time is None
            job.error_budget = self.max_error if whole else None
            return choice
        dense = job.unit_dense_blocks * len(blocks) // job.manifest.model.heads
        least = float(np.where(np.isfinite(loss), blocks, np.inf).min(1).sum()) / dense
        what, target, best = "target-density", self.target_density, f"density {least:.4f}"
        if self.target_speedup is not None:
            most = job.forward_speedup(least, self.attention_share)
            what, target, best = "target-speedup", self.target_speedup, f"a speed-up of {most:.4f}"
            density = job.density_for(self.target_speedup, self.attention_share)
        else:
            assert self.target_density is not None
            density = self.target_density
        limit = float(np.floor(density * dense))
        limit += (limit + 1) / dense <= density  # 0.3 of 1000 is 300, not 299
        found = choose(loss, blocks, limit)
        self.require(found is not None, what, f"leave room for the least that the menu can keep, {best}", target)
        assert found is not None
        job.multiplier = found.multiplier / block_ms
        return found


class _Columns:
    """The candidates of every head, in the order of a table's columns, and the masks of those picked.

    Dense, planes, windows, cuts, ladders; and last, not in the table, what a head with anchors is now.
    """

    def __init__(self, job: Job, parts: list[str], levels_per_octave: int, kinds: tuple[str, ...]) -> None:
        manifest = job.manifest
        self.key = ("+".join(parts), levels_per_octave, kinds)
        self.planes = manifest.thresholds if "planes" in parts else ()
        self.windows = manifest.windows if "windows" in parts else ()
        step = STEPS_PER_OCTAVE // levels_per_octave
        self.cuts = np.arange(0, CODES, step) if "cuts" in parts else np.zeros(0, np.int64)
        """A cut keeps the blocks whose code is below this."""
        self.ladders = job.ladders if kinds else None
        self.kinds = [] if self.ladders is None else [self.ladders.kinds.index(kind) for kind in kinds]
        """Which of the unit's ladders are in the menu."""
        self.shares = 0 if self.ladders is None else len(self.ladders.shares)
        first = 1 + len(self.planes) + len(self.windows)
        self.first_rung = first + len(self.cuts)
        estimated = np.zeros(self.first_rung + len(self.kinds) * self.shares + 1, np.bool_)
        estimated[first : self.first_rung] = True
        estimated[1 : 1 + len(self.planes)] = manifest.has_block_error
        self.estimated = estimated
        """bool ``(columns,)``: errors that are sums of block errors, still without the job's factor."""

    def table(self, job: Job, unit: UnitIR) -> tuple[Int64, Float64]:
        """Blocks int64 and errors float64 of all candidates but the last, both ``(H, columns - 1)``."""
        blocks = np.full((unit.heads, len(self.estimated) - 1), unit.dense_blocks, np.int64)
        error = np.zeros(blocks.shape)
        planes, at = len(self.planes), 1 + len(self.planes)
        if unit.means.error_code is not None and (planes or len(self.cuts)):
            for head in range(unit.heads):
                self._from_codes(unit, head, blocks[head], error[head])
        elif planes:
            assert unit.voted is not None
            blocks[:, 1:at] = count(unit.voted | unit.required, (2, 3)).T
            error[:, 1:at] = unit.means.menu_residual_error[:planes].T
        required = [np.flatnonzero(unpack(bits, unit.k_blocks)) for bits in unit.required]
        places, starts = np.concatenate(required), np.cumsum([0, *map(len, required[:-1])])
        for index, window in enumerate(self.windows):
            keep = window_keep(window, unit.grid, unit.blocks)
            outside = np.add.reduceat(~keep.reshape(-1).take(places), starts, dtype=np.int64)
            blocks[:, at + index] = np.count_nonzero(keep) + outside
            error[:, at + index] = unit.means.menu_residual_error[len(job.manifest.thresholds) + index]
        if self.ladders is not None:
            assert unit.means.refined_error is not None
            windows = len(unit.means.refined_error) - len(job.manifest.windows)
            rungs = unit.means.refined_error[:windows].reshape(-1, self.shares, unit.heads)[self.kinds]
            error[:, self.first_rung :] = rungs.reshape(-1, unit.heads).T
            if self.windows:
                error[:, at : at + len(self.windows)] = unit.means.refined_error[windows:].T
            for head in range(unit.heads):
                blocks[head, self.first_rung :] = self._rung_blocks(unit, head, required[head]).reshape(-1)
        return blocks, error

    def _rung_blocks(self, unit: UnitIR, head: int, required: Int64) -> Int64:
        """Blocks of every level of every ladder of a head, int64 ``(kinds, shares)``, with those at `required`."""
        assert unit.means.level_words is not None
        assert unit.means.level_blocks is not None
        words = unit.means.level_words[head].reshape(-1).take(required)
        found = []
        for kind in self.kinds:
            levels = level_in(words, kind, self.shares)
            kept = np.bincount(levels, minlength=self.shares + 1)[: self.shares].cumsum()
            found.append(unit.means.level_blocks[kind, head] + len(required) - kept)
        return np.stack(found)

    def _from_codes(self, unit: UnitIR, head: int, blocks: Int64, error: Float64) -> None:
        """Planes and cuts of one head from counts of its codes: no mask is made.

        The class of a block is the number of planes that keep it, or, for a required block, one more than there are.
        """
        planes = len(self.planes)
        required = unpack(unit.required[head], unit.k_blocks).view(np.uint8)
        classes = required * np.uint8(planes + 1)
        if planes:
            assert unit.voted is not None
            for plane in unpack(unit.voted[:, head], unit.k_blocks).view(np.uint8):
                classes += plane * (1 - required)
        number, sums = code_counts(unit, head, classes, planes + 2)
        weights = row_weights(unit)
        blocks[1 : 1 + planes] = unit.dense_blocks - np.cumsum(number[:planes].sum(1))[::-1]
        error[1 : 1 + planes] = (weights @ np.cumsum(sums[:, :planes].sum(2), 1) ** 2)[::-1]
        if len(self.cuts):
            dropped = np.cumsum(number[:-1].sum(0)[::-1])[::-1]
            cuts = slice(self.first_rung - len(self.cuts), self.first_rung)
            blocks[cuts] = unit.dense_blocks - dropped[self.cuts]
            by_code = np.cumsum(sums[:, :-1].sum(1)[:, ::-1], 1)[:, ::-1]
            error[cuts] = (weights @ by_code**2)[self.cuts]

    def take(self, unit: UnitIR, pick: Int64) -> None:
        """Gives the unit the masks picked, int64 ``(H,)``."""
        keep = np.empty_like(unit.required)
        choice = []
        for head, candidate in enumerate(pick.tolist()):
            if candidate == len(self.estimated) - 1:
                assert unit.keep is not None
                choice.append(unit.choice[head])
                keep[head] = unit.keep[head]
                continue
            if unit.anchors:
                unit.anchors[head] = None
                unit.packed.pop(head, None)
            at = candidate - 1
            if candidate == 0:
                name, mask = "dense", full_bits(unit.q_blocks, unit.k_blocks)
            elif at < len(self.planes):
                assert unit.voted is not None
                name, mask = f"plane {self.planes[at]:g}", unit.voted[at, head] | unit.required[head]
            elif (at := at - len(self.planes)) < len(self.windows):
                bits = pack(window_keep(self.windows[at], unit.grid, unit.blocks))
                name, mask = str(self.windows[at]), bits | unit.required[head]
            elif candidate >= self.first_rung:
                assert self.ladders is not None
                assert unit.means.level_words is not None
                index, level = divmod(candidate - self.first_rung, self.shares)
                kind = self.kinds[index]
                name = f"ladder {self.ladders.kinds[kind]}"
                levels = level_in(unit.means.level_words[head], kind, self.shares)
                mask = pack(levels <= level) | unit.required[head]
            else:
                assert unit.means.error_code is not None
                below = self.cuts[at - len(self.windows)]
                name, mask = "cut", pack(unit.means.error_code[head] < below) | unit.required[head]
            choice.append(name)
            keep[head] = mask
        unit.keep, unit.choice = keep, choice
