"""Chooses each head's mask and precision at each time, from a menu, under one budget over the whole job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from calibatt.compiler.budget import Choice, choose, reach
from calibatt.compiler.ir import Float64, Int64, Job, UnitIR, packed_bits
from calibatt.compiler.menu import Candidate, Menu
from calibatt.compiler.passes import Findings, Pass
from calibatt.compiler.prediction import Masks, Prediction, cannot_predict, predict
from calibatt.plans import BF16

KINDS = ("windows", "cuts")
CHOICES = ("bf16", "auto")
DEFAULT_DENSITY = 0.5


class Survey(NamedTuple):
    """The candidates of a unit's heads; H heads, M masks, C shares of the ladder.

    Args:
        blocks: int32 ``(H, 2, M)``: blocks that each mask computes, without the head's anchors and with them.
        error: float64 ``(H, M)``: error of each mask.
        copied: float64 ``(H,)``: error that copies of the head's anchors add; infinite where it has none.
        rounding: float64 ``(H, 3)``: error that each of `plans.PRECISIONS` adds.
        share_error: float64 ``(C, H)``; see `UnitIR`.
    """

    blocks: npt.NDArray[np.int32]
    error: Float64
    copied: Float64
    rounding: Float64
    share_error: Float64


@dataclass(frozen=True)
class Select(Pass):
    """Picks masks, and precisions, with the least error of the whole job within its budget.

    A head may be dense, keep a window, whose error was measured, or keep a *cut*: the blocks whose price is above a
    level. With `precision` auto it may compute in 8 bits, whose error was measured as well, and is added. A candidate
    costs its predicted milliseconds in every step of its segment and loses its error. One multiplier, the price of a
    millisecond, decides for all heads and times at once. The rest of the budget is spent on single changes, and the
    distance to a proven bound is reported. If the target is a signal-to-noise of the final latent instead, the budget
    is bisected.

    A second `select` after `anchors` spends what those saved. All heads choose anew; heads with anchors choose among
    all masks with them, which are cheaper since only anchors are computed, and without them.

    Ensures: every mask keeps the required blocks; the budget holds.

    Args:
        target_density: Most that attention may cost, as a share of dense attention in 16 bit over all steps of the
            sampling, layers and heads; 0.5 if no target is given. Where all heads are in 16 bit, cost is density, the
            share of blocks.
        target_db: Least predicted signal-to-noise of the final latent, at the least cost that reaches it.
        menu: What heads may choose beside dense: `windows` and `cuts`, joined by ``+``.
        precision: ``bf16``: all heads compute in the 16 bits of their inputs; ``auto``: some in 8 bits of `Job.device`.

    Raises:
        PassError: Both targets are given, one is out of range or beyond what can be reached (which is named), or there
            is no such menu or precision.
    """

    name: ClassVar[str] = "select"
    decides: ClassVar[bool] = True
    target_density: float | None = None
    target_db: float | None = None
    menu: str = "windows+cuts"
    precision: str = "bf16"

    def __post_init__(self) -> None:
        density, decibels = self.target_density, self.target_db
        both = density is not None and decibels is not None
        self.require(not both, "target-density and target-db", "not be given together", f"{density}, {decibels}")
        if density is None and decibels is None:
            object.__setattr__(self, "target_density", DEFAULT_DENSITY)
        self.require(density is None or 0 < density <= 1, "target-density", "be in (0, 1]", density)
        self.require(decibels is None or np.isfinite(decibels), "target-db", "be finite", decibels)
        parts = self.menu.split("+")
        known = set(parts) <= set(KINDS) and len(set(parts)) == len(parts)
        self.require(known, "menu", f"name some of {', '.join(KINDS)}, joined by +", self.menu)
        self.require(self.precision in CHOICES, "precision", f"be {' or '.join(CHOICES)}", self.precision)

    def check(self, job: Job, before: Sequence[Pass]) -> None:
        self.refuse_after(before, "schedule")
        if self.target_db is not None and (why := cannot_predict(job.table)):
            self.require(False, "target-db", "have a prediction to go by", f"{self.target_db}: it {why}")
        if self.precision == "auto":
            rule, given = "be bf16 on a device whose 8 bits were not measured", f"auto, {job.device.name}"
            self.require(bool(job.device.eight_bit), "precision", rule, given)

    def survey(self, job: Job, unit: UnitIR) -> Survey:
        menu = Menu(job, self.menu)
        if unit.menu is None or unit.menu.parts != menu.parts:
            unit.menu = menu.table(unit)
        blocks = np.stack([unit.menu.blocks] * 2, 1).astype(np.int32)
        copied = np.full(unit.heads, np.inf)
        for head, groups in enumerate(unit.anchors):
            if groups is not None:
                packed = unit.menu.packed.get(head)
                blocks[head, 1] = menu.packed_blocks(unit, head, groups) if packed is None else packed
                copied[head] = unit.copy_error[head]
        return Survey(blocks, unit.menu.error, copied, unit.means.precision_error.T, unit.share_error)

    def decide(self, job: Job, surveys: Sequence[Survey]) -> Sequence[list[Candidate]]:
        masks = Menu(job, self.menu).masks
        precisions = sorted(job.device.speeds) if self.precision == "auto" else [BF16]
        *parts, share_errors = zip(*surveys, strict=True)
        blocks, of_masks, copied, rounding = map(np.concatenate, parts)
        error = of_masks[:, None] + np.stack([np.zeros(len(copied)), copied], 1)[:, :, None]
        error = np.stack([error + rounding[:, each, None, None] for each in precisions], 1)
        steps = np.repeat(job.unit_steps, job.manifest.model.heads)
        cost: Float64 = np.stack([job.cost(blocks, each) for each in precisions], 1) * steps[:, None, None, None]
        heads, (things, *axes) = np.arange(len(error)), error.shape
        kinds, head_blocks = np.array([mask.kind for mask in masks]), job.manifest.q_blocks * job.manifest.k_blocks

        def predicted(pick: Int64) -> Prediction | str:
            precision, anchored, mask = np.unravel_index(pick, axes)
            chosen = Masks(
                kind=kinds[mask],
                density=blocks[heads, 0, mask] / head_blocks,
                error=of_masks[heads, mask],
                copied=np.where(anchored, copied, 0.0),
                share_error=np.stack(share_errors),
                precision=np.array(precisions)[precision],
            )
            return predict(job.table, job.levels, job.manifest.shares, chosen)

        choice = self._solve(job, cost.reshape(things, -1), error.reshape(things, -1), predicted)
        precision, anchored, mask = np.unravel_index(choice.pick, axes)
        lost = error[heads, precision, anchored, mask]
        job.findings[self.name] = {
            "lambda_per_ms": job.multiplier,
            "predicted_error": float(lost.sum()),
            "predicted_snr": str(predicted(choice.pick)),
            "density": float(steps @ blocks[heads, anchored, mask] / job.dense_blocks),
            "cost": float(cost[heads, precision, anchored, mask].sum() / job.dense_blocks),
            "duality_gap": choice.gap,
            "relative_gap": choice.gap / choice.loss if choice.loss else 0.0,
            "candidates": int(np.isfinite(error).sum()),
        }
        picked = [
            Candidate(masks[each], bool(with_anchors), precisions[bits], float(one))
            for bits, with_anchors, each, one in zip(precision, anchored, mask, lost, strict=True)
        ]
        size = len(picked) // len(surveys)
        return [picked[start : start + size] for start in range(0, len(picked), size)]

    def change(self, job: Job, unit: UnitIR, decision: list[Candidate]) -> Findings:
        menu = Menu(job, self.menu)
        unit.keep = np.stack([menu.bits(each.mask, unit, head) for head, each in enumerate(decision)])
        unit.choice = [each.mask.name for each in decision]
        unit.precision = np.array([each.precision for each in decision], np.uint8)
        unit.error, unit.copy_error = np.array([each.error for each in decision]), unit.copy_error.copy()
        for head, groups in enumerate(unit.anchors):
            if decision[head].anchored and groups is not None:
                unit.packed[head] = packed_bits(unit.keep[head], unit.grid, unit.blocks, groups)
            elif groups is not None:
                unit.anchors[head] = None
                unit.copy_error[head] = 0.0
                del unit.packed[head]
        return {"heads_with_anchors": sum(groups is not None for groups in unit.anchors)}

    def report(self, job: Job, total: Findings) -> dict[str, Any]:
        return {**job.findings[self.name], **total}

    def _solve(self, job: Job, cost: Float64, loss: Float64, predicted: Callable[[Int64], Prediction | str]) -> Choice:
        dense = job.dense_blocks
        least = float(np.where(np.isfinite(loss), cost, np.inf).min(1).sum())
        if self.target_db is not None:
            choice = self._reach(loss, cost, predicted)
        else:
            assert self.target_density is not None
            limit = float(np.floor(self.target_density * dense))
            limit += (limit + 1) / dense <= self.target_density  # 0.3 of 1000 is 300, not 299
            chosen = choose(loss, cost, limit)
            what = "density" if self.precision == "bf16" else "cost"
            rule = f"leave room for the least that the menu can keep, {what} {least / dense:.4f}"
            self.require(chosen is not None, "target-density", rule, self.target_density)
            assert chosen is not None
            choice = chosen
        job.multiplier = choice.multiplier / job.block_ms
        return choice

    def _reach(self, loss: Float64, cost: Float64, predicted: Callable[[Int64], Prediction | str]) -> Choice:
        """The choice of least cost whose prediction reaches the target."""
        seen = []

        def enough(pick: Int64) -> bool:
            prediction = predicted(pick)
            if isinstance(prediction, str):
                self.require(False, "target-db", "have a prediction to go by", f"{self.target_db}: it {prediction}")
            seen.append(prediction)
            assert isinstance(prediction, Prediction)
            return self.target_db is not None and prediction.mean >= self.target_db

        choice = reach(loss, cost, enough)
        self.require(
            choice is not None, "target-db", f"be at most the best that can be reached, {seen[0]}", self.target_db
        )
        assert choice is not None
        return choice
