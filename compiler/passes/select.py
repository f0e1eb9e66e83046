"""Each head's mask at each time, from a menu, under one budget over the whole job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from calibatt.compiler.budget import Choice, choose
from calibatt.compiler.ir import Float64, Job, UnitIR, packed_bits
from calibatt.compiler.menu import Menu
from calibatt.compiler.passes import Findings, Pass

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

    A second `select` after `anchors` spends what those saved: all heads choose anew, those with anchors among all masks
    with them (cheaper, as only anchors are computed) and without, and staying as they are.

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
        menu = self._menu(job)
        if unit.menu is None or unit.menu[0] != menu.key:
            unit.menu = (menu.key, *menu.table(job, unit))
            unit.packed_menu = {}
        _, blocks, error = unit.menu
        columns = blocks.shape[1]
        blocks = np.concatenate([blocks, unit.computed()[1][:, None], blocks], 1).astype(np.int32)
        error = np.concatenate([error, np.full((unit.heads, 1 + columns), np.inf)], 1)
        for head, groups in enumerate(unit.anchors):
            if groups is not None:
                packed = unit.packed_menu.get(head)
                blocks[head, columns + 1 :] = menu.packed_blocks(unit, head, groups) if packed is None else packed
                error[head, columns:] = unit.error[head], *error[head, :columns]
        if unit.force_dense:
            error[:, 1:] = np.inf
        return blocks, error, unit.copy_error if unit.anchors else np.zeros(unit.heads)

    def decide(self, job: Job, units: Sequence[int], surveys: Sequence[Any]) -> Sequence[Any]:
        self.require(bool(units), "from-time and to-time", "leave a recorded time", f"{self.from_time}, {self.to_time}")
        estimated = self._menu(job).estimated
        blocks = np.concatenate([blocks for blocks, _, _ in surveys]).astype(np.float64)
        error = np.concatenate([error for _, error, _ in surveys])
        error[:, np.concatenate([estimated, [False], estimated])] *= job.error_factor
        error[:, len(estimated) + 1 :] += np.concatenate([copied for _, _, copied in surveys])[:, None]
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
        menu = self._menu(job)
        now = len(menu.estimated)  # the column of what a head with anchors is; then come the masks with its anchors
        keep, names = np.empty_like(unit.required), []
        for head, column in enumerate(pick.tolist()):
            if column == now:
                assert unit.keep is not None
                name, keep[head] = unit.choice[head], unit.keep[head]
            else:
                name, keep[head] = menu.mask(unit, head, column % (now + 1))
            names.append(name)
            groups = unit.anchors[head] if unit.anchors else None
            if column > now and groups is not None:
                unit.packed[head] = packed_bits(keep[head], unit.grid, unit.blocks, groups)
            elif column < now and groups is not None:
                unit.anchors[head] = None
                del unit.packed[head]
        unit.keep, unit.choice, unit.error = keep, names, error.copy()
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

    def _menu(self, job: Job) -> Menu:
        return Menu(job, "+".join(self._parts()), self.levels_per_octave, self._kinds(job))

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
