"""Each head's mask at each time, from a menu, under one budget over the whole job."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from calibatt.compiler.bits import Bits, count, pack, unpack
from calibatt.compiler.budget import Choice, choose
from calibatt.compiler.error_model import CODES, HeadErrors, head_errors
from calibatt.compiler.ir import Float64, Int64, Job, UnitIR, query_weights
from calibatt.compiler.passes import Pass
from calibatt.compiler.stats import window_keep
from calibatt.compiler.stats.unit import STEPS_PER_OCTAVE

KINDS = ("planes", "windows", "cuts")
DEFAULT_DENSITY = 0.5
LADDER_OCTAVES = 48
NO_BUDGET_BINDS = 1e100
"""The multiplier where an error budget leaves every head its fewest blocks."""


@dataclass(frozen=True)
class Select(Pass):
    """Picks masks so that the whole job loses least within its budget.

    A head may be dense, keep a voted plane, a window, or a *cut*: the blocks whose mean block error times the time
    weight is above a level. All heads and times share one ladder of levels, so that one multiplier cuts the whole job.
    A mask costs its predicted milliseconds and loses its output error, relative to the residual stream, times w(t).

    A second `select` after `anchors` spends what those saved: all heads choose anew, those with anchors also among
    staying as they are.

    Requires: `vote` for planes; block error in the store for cuts.
    Ensures: every mask keeps the required blocks; the budget holds.

    Args:
        target_density: Most blocks computed, as a share of dense attention over all times, layers and heads; 0.5 if
            neither budget is given.
        max_error: Most error times weight, summed over all times, layers and heads (with probed weights: the
            predicted squared error of the final latent, relative to its size).
        menu: What heads may choose beside dense: `planes`, `windows`, `cuts`, joined by ``+``.
        levels_per_octave: Steps of the ladder of cuts in a factor of 2.

    Raises:
        PassError: Both budgets, one out of range or too small for the required blocks, or a menu that cannot be had.
    """

    name: ClassVar[str] = "select"
    target_density: float | None = None
    max_error: float | None = None
    menu: str = "planes+windows+cuts"
    levels_per_octave: int = 4

    def __post_init__(self) -> None:
        both = self.target_density is not None and self.max_error is not None
        self.require(not both, "target-density and max-error", "not both be given", "both")
        if self.target_density is None and self.max_error is None:
            object.__setattr__(self, "target_density", DEFAULT_DENSITY)
        density, error = self.target_density, self.max_error
        self.require(density is None or 0 < density <= 1, "target-density", "be in (0, 1]", density)
        self.require(error is None or error >= 0, "max-error", "not be negative", error)
        parts = self.menu.split("+")
        known = set(parts) <= set(KINDS) and len(set(parts)) == len(parts)
        self.require(known, "menu", f"name some of {', '.join(KINDS)}, joined by +", self.menu)
        self.require(1 <= self.levels_per_octave <= 8, "levels-per-octave", "be 1 to 8", self.levels_per_octave)

    def apply(self, job: Job) -> None:
        parts = self.menu.split("+")
        for unit in job.units:
            self.require(unit.tile_order is None, "schedule", "come after", unit.name)
            voted = unit.voted is not None or "planes" not in parts
            self.require(voted, "planes", "have been voted (vote comes before select)", unit.name)
        has_error = job.manifest.has_block_error
        rule = "have block error in the store (menu=planes+windows does without)"
        self.require(has_error or "cuts" not in parts, "cuts", rule, "none")
        levels = self._ladder(job) if "cuts" in parts else np.zeros(0)
        tables = [_Menu(job, unit, parts, levels) for unit in job.units]
        blocks = np.concatenate([table.blocks for table in tables]).astype(np.float64)
        loss = np.concatenate([table.error * unit.weight for table, unit in zip(tables, job.units, strict=True)])
        choice = self._solve(job, blocks, loss)
        picks = choice.pick.reshape(len(job.units), -1)
        for unit, table, pick in zip(job.units, tables, picks, strict=True):
            table.take(unit, pick)
        kinds = Counter(choice_name.split()[0].split("(")[0] for unit in job.units for choice_name in unit.choice)
        job.findings[self.name] = {
            "lambda_per_ms": job.multiplier,
            "predicted_error": float(loss[np.arange(len(loss)), choice.pick].sum()),
            "density": float(blocks[np.arange(len(loss)), choice.pick].sum() / _dense_blocks(job)),
            "duality_gap": choice.gap,
            "duality_gap_of": "blocks" if self.target_density is None else "error",
            "candidates": int(np.isfinite(loss).sum()),
            "heads_by_kind": dict(sorted(kinds.items())),
            "heads_with_anchors": sum(groups is not None for unit in job.units for groups in unit.anchors),
            "weights": "probed" if job.weights_probed else "never probed: 1 at every time",
            "error_estimate": f"block error x {job.error_factor:.3g}"
            if has_error
            else "measured errors of planes and windows",
        }

    def _solve(self, job: Job, blocks: Float64, loss: Float64) -> Choice:
        block_ms = job.device.block_ms(job.manifest.blocks, job.manifest.model.head_dim)
        if self.target_density is not None:
            dense = _dense_blocks(job)
            limit = float(np.floor(self.target_density * dense))
            limit += (limit + 1) / dense <= self.target_density  # 0.3 of 1000 is 300, not 299
            choice = choose(loss, blocks, limit)
            least = float(np.where(np.isfinite(loss), blocks, np.inf).min(1).sum()) / dense
            rule = f"leave room for the least that the menu can keep, density {least:.4f}"
            self.require(choice is not None, "target-density", rule, self.target_density)
            assert choice is not None
            job.multiplier = choice.multiplier / block_ms
            return choice
        assert self.max_error is not None
        usable = np.isfinite(loss)
        limit = self.max_error * (1 - 1e-12)  # sums in another order differ
        choice = choose(np.where(usable, blocks, np.inf), np.where(usable, loss, 0.0), limit)
        assert choice is not None, "dense heads lose nothing"
        saved = choice.multiplier * block_ms
        job.multiplier = 1 / saved if saved > 0 else NO_BUDGET_BINDS
        job.error_budget = self.max_error
        return choice

    def _ladder(self, job: Job) -> Float64:
        """Levels of mean block error x weight, falling, that all cuts of the job share."""
        peaks = np.array([unit.means.error_peak * unit.weight for unit in job.units])
        top = float(peaks.max())
        self.require(top > 0, "block error", "not be 0 everywhere (cuts need it)", top)
        octaves = min(LADDER_OCTAVES, np.log2(top / peaks[peaks > 0].min()) + CODES / STEPS_PER_OCTAVE)
        steps = int(np.ceil(octaves * self.levels_per_octave))
        return top * 2.0 ** (-np.arange(1, steps + 1) / self.levels_per_octave)


def _dense_blocks(job: Job) -> float:
    return float(sum(unit.heads * unit.dense_blocks for unit in job.units))


class _Menu:
    """Blocks and errors of all candidates of all heads of one unit, and how to make the masks of those picked.

    Candidates: dense, planes, windows, cuts, and, for a head with anchors, what it is. `blocks` int64 and `error`
    float64 are ``(H, candidates)``; the error of what there is not is infinite.
    """

    def __init__(self, job: Job, unit: UnitIR, parts: list[str], levels: Float64) -> None:
        manifest, means = job.manifest, unit.means
        thresholds = manifest.thresholds if "planes" in parts else ()
        windows = manifest.windows if "windows" in parts else ()
        self.planes = [(f"plane {threshold:g}", index) for index, threshold in enumerate(thresholds)]
        self.windows = [
            (str(window), index, pack(window_keep(window, unit.grid, unit.blocks)))
            for index, window in enumerate(windows, len(manifest.thresholds))
        ]
        errors = [np.zeros((unit.heads, 1))]
        queries = query_weights(unit.grid, unit.blocks)
        models = [head_errors(means, head, queries, job.error_factor) for head in range(unit.heads)]
        blocks = [np.full((unit.heads, 1), unit.dense_blocks, dtype=np.int64)]
        for _, index in self.planes:
            keep = self.plane(unit, index)
            blocks.append(count(keep, (1, 2))[:, None])
            errors.append(_plane_error(unit, models, keep, index)[:, None])
        for _, index, window in self.windows:
            blocks.append(count(window | unit.required, (1, 2))[:, None])
            errors.append(means.menu_residual_error[index][:, None])
        if len(levels):
            self.codes = cut_codes(unit, levels)
            pairs = [_cuts(unit, head, models[head], self.codes[head]) for head in range(unit.heads)]
            blocks.append(np.stack([kept for kept, _ in pairs]))
            errors.append(np.stack([error for _, error in pairs]))
        anchored = np.array([groups is not None for groups in unit.anchors] or [False] * unit.heads)
        errors.append(np.where(anchored, unit.error if unit.anchors else 0.0, np.inf)[:, None])
        blocks.append(unit.computed()[1][:, None])
        self.blocks: Int64 = np.concatenate(blocks, 1)
        self.error: Float64 = np.concatenate(errors, 1)
        if unit.force_dense:
            self.error[:, 1:] = np.inf

    def plane(self, unit: UnitIR, index: int) -> Bits:
        assert unit.voted is not None
        keep: Bits = unit.voted[index] | unit.required
        return keep

    def take(self, unit: UnitIR, pick: Int64) -> None:
        """Gives the unit the masks picked, int64 ``(H,)``."""
        full = pack(np.ones((unit.q_blocks, unit.k_blocks), dtype=np.bool_))
        keep = np.empty((unit.heads, *full.shape), dtype=np.uint8)
        choice = []
        for head, candidate in enumerate(pick.tolist()):
            at = candidate - 1
            if candidate == self.blocks.shape[1] - 1:
                assert unit.keep is not None
                choice.append(unit.choice[head])
                keep[head] = unit.keep[head]
                continue
            if unit.anchors:
                unit.anchors[head] = None
            if candidate == 0:
                name, mask = "dense", full
            elif at < len(self.planes):
                name, index = self.planes[at]
                mask = self.plane(unit, index)[head]
            elif (at := at - len(self.planes)) < len(self.windows):
                name, mask = self.windows[at][0], self.windows[at][2] | unit.required[head]
            else:
                assert unit.means.error_code is not None
                below = self.codes[head, at - len(self.windows)]
                name, mask = "cut", pack(unit.means.error_code[head] < below) | unit.required[head]
            choice.append(name)
            keep[head] = mask
        unit.keep, unit.choice = keep, choice
        unit.error = self.error[np.arange(unit.heads), pick]


def cut_codes(unit: UnitIR, levels: Float64) -> Int64:
    """int64 ``(H, levels)``: a cut keeps the blocks whose code is below this."""
    with np.errstate(divide="ignore"):
        octaves = np.log2(unit.means.error_peak.astype(np.float64) * unit.weight)[:, None] - np.log2(levels)[None, :]
    kept: Int64 = np.clip(np.ceil(octaves * STEPS_PER_OCTAVE), 0, CODES - 1).astype(np.int64)
    return kept


def _cuts(unit: UnitIR, head: int, model: HeadErrors, below: Int64) -> tuple[Int64, Float64]:
    """Blocks and errors of the cuts that keep the codes below each of `below`, without making a mask."""
    assert unit.means.error_code is not None
    assert model.block_error is not None
    optional = ~unpack(unit.required[head], unit.k_blocks)
    codes = unit.means.error_code[head][optional]
    kept = np.append(0, np.cumsum(np.bincount(codes, minlength=CODES)))
    by_code = np.bincount(codes, model.block_error[optional], minlength=CODES)
    dropped = np.append(np.cumsum(by_code[::-1])[::-1], 0.0)
    blocks: Int64 = unit.dense_blocks - int(optional.sum()) + kept[below]
    return blocks, dropped[below]


def plane_error(job: Job, unit: UnitIR, keep: Bits, index: int) -> Float64:
    """float64 ``(H,)``: errors of a voted plane by the model, or, without block error, as measured on each sample."""
    queries = query_weights(unit.grid, unit.blocks)
    models = [head_errors(unit.means, head, queries, job.error_factor) for head in range(unit.heads)]
    return _plane_error(unit, models, keep, index)


def _plane_error(unit: UnitIR, models: list[HeadErrors], keep: Bits, index: int) -> Float64:
    if unit.means.error_code is None:
        measured: Float64 = unit.means.menu_residual_error[index]
        return measured
    return np.array([model.of_mask(unpack(keep[head], unit.k_blocks)) for head, model in enumerate(models)])
