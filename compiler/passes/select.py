"""Each head's mask at each time, from a menu, under one budget over the whole job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from calibatt.compiler.budget import Choice, choose, reach
from calibatt.compiler.ir import Float64, Int64, Job, UnitIR, packed_bits
from calibatt.compiler.menu import Menu
from calibatt.compiler.passes import Findings, Pass
from calibatt.compiler.prediction import CUT, Masks, Prediction, cannot_predict, predict

KINDS = ("windows", "cuts")
DEFAULT_DENSITY = 0.5


@dataclass(frozen=True)
class Select(Pass):
    """Picks masks so that the whole job loses least within its budget.

    A head may be dense, keep a window, whose error was measured, or a *cut*: the blocks whose price is above a level. A
    mask costs its predicted milliseconds and loses its error. One multiplier, the price of a millisecond, decides for
    all heads and times at once; what it leaves of the budget is spent on single changes, and the distance to a proven
    bound is reported. Where a signal-to-noise of the final latent is the target instead, the budget is bisected.

    A second `select` after `anchors` spends what those saved: all heads choose anew, those with anchors among all masks
    with them (cheaper, as only anchors are computed) and without.

    Ensures: every mask keeps the required blocks; the budget holds.

    Args:
        target_density: Most blocks computed, as a share of dense attention over all times, layers and heads; 0.5 if
            no target is given.
        target_db: Least predicted signal-to-noise of the final latent, with the fewest blocks that reach it.
        menu: What heads may choose beside dense: `windows` and `cuts`, joined by ``+``.

    Raises:
        PassError: Both targets, one out of range or beyond the best that can be reached (which is named), or a menu
            that cannot be had.
    """

    name: ClassVar[str] = "select"
    decides: ClassVar[bool] = True
    target_density: float | None = None
    target_db: float | None = None
    menu: str = "windows+cuts"

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

    def check(self, job: Job, before: Sequence[Pass]) -> None:
        self.refuse_after(before, "schedule")
        if self.target_db is not None and (why := cannot_predict(job.table)):
            self.require(False, "target-db", "have a prediction to go by", f"{self.target_db}: it {why}")

    def survey(self, job: Job, unit: UnitIR) -> Any:
        menu = Menu(job, self.menu)
        if unit.menu is None or unit.menu[0] != menu.key:
            unit.menu = (menu.key, *menu.table(unit))
            unit.packed_menu = {}
        _, blocks, error = unit.menu
        columns = menu.columns
        blocks = np.concatenate([blocks, blocks], 1).astype(np.int32)
        error = np.concatenate([error, np.full((unit.heads, columns), np.inf)], 1)
        for head, groups in enumerate(unit.anchors):
            if groups is not None:
                packed = unit.packed_menu.get(head)
                blocks[head, columns:] = menu.packed_blocks(unit, head, groups) if packed is None else packed
                error[head, columns:] = error[head, :columns]
        return blocks, error, unit.copy_error, unit.share_error

    def decide(self, job: Job, surveys: Sequence[Any]) -> Sequence[Any]:
        menu = Menu(job, self.menu)
        blocks, error, copied = (np.concatenate([each[part] for each in surveys]) for part in range(3))
        blocks = blocks.astype(np.float64)
        masks_of = _masks_of(job, menu, blocks, error.copy(), copied, np.stack([each[3] for each in surveys]))
        error[:, menu.columns :] += copied[:, None]

        def predicted(pick: Int64) -> Prediction | str:
            return predict(job.table, job.levels, job.manifest.shares, masks_of(pick))

        choice = self._solve(job, blocks, error, predicted)
        rows = np.arange(len(error))
        shape = (len(surveys), -1)
        picked = choice.pick.reshape(shape)
        job.findings[self.name] = {
            "lambda_per_ms": job.multiplier,
            "predicted_error": float(error[rows, choice.pick].sum()),
            "predicted_snr": str(predicted(choice.pick)),
            "density": float(blocks[rows, choice.pick].sum() / (job.unit_dense_blocks * job.units)),
            "duality_gap": choice.gap,
            "relative_gap": choice.gap / choice.loss if choice.loss else 0.0,
            "candidates": int(np.isfinite(error).sum()),
        }
        return list(zip(picked, error[rows, choice.pick].reshape(shape), strict=True))

    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        pick, error = decision
        menu = Menu(job, self.menu)
        keep, names = np.empty_like(unit.required), []
        copy_error = unit.copy_error.copy()
        for head, column in enumerate(pick.tolist()):
            name, keep[head] = menu.mask(unit, head, column % menu.columns)
            names.append(name)
            groups = unit.anchors[head]
            if column >= menu.columns and groups is not None:
                unit.packed[head] = packed_bits(keep[head], unit.grid, unit.blocks, groups)
            elif groups is not None:
                unit.anchors[head] = None
                copy_error[head] = 0.0
                del unit.packed[head]
        unit.copy_error = copy_error
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

    def _solve(
        self, job: Job, blocks: Float64, loss: Float64, predicted: Callable[[Int64], Prediction | str]
    ) -> Choice:
        dense = job.unit_dense_blocks * len(blocks) // job.manifest.model.heads
        least = float(np.where(np.isfinite(loss), blocks, np.inf).min(1).sum())
        if self.target_db is not None:
            found = self._reach(loss, blocks, predicted)
        else:
            assert self.target_density is not None
            limit = float(np.floor(self.target_density * dense))
            limit += (limit + 1) / dense <= self.target_density  # 0.3 of 1000 is 300, not 299
            chosen = choose(loss, blocks, limit)
            rule = f"leave room for the least that the menu can keep, density {least / dense:.4f}"
            self.require(chosen is not None, "target-density", rule, self.target_density)
            assert chosen is not None
            found = chosen
        job.multiplier = found.multiplier / job.block_ms
        return found

    def _reach(self, loss: Float64, blocks: Float64, predicted: Callable[[Int64], Prediction | str]) -> Choice:
        """The choice of fewest blocks whose prediction reaches the target."""
        seen = []

        def enough(pick: Int64) -> bool:
            told = predicted(pick)
            if isinstance(told, str):
                self.require(False, "target-db", "have a prediction to go by", f"{self.target_db}: it {told}")
            seen.append(told)
            return isinstance(told, Prediction) and self.target_db is not None and told.mean >= self.target_db

        found = reach(loss, blocks, enough)
        self.require(
            found is not None, "target-db", f"be at most the best that can be reached, {seen[0]}", self.target_db
        )
        assert found is not None
        return found


def _masks_of(
    job: Job, menu: Menu, blocks: Float64, error: Float64, copied: Float64, share_error: Float64
) -> Callable[[Int64], Masks]:
    """How picks are told to `predict`.

    Args:
        job: Whose units.
        menu: From which they choose.
        blocks: ``(units x heads, 2 columns)``; the second half is with anchors.
        error: The same shape, without that of copies.
        copied: ``(units x heads,)``, error of copies.
        share_error: ``(units, C, H)``.
    """
    model = job.manifest.model
    shape = (len(job.manifest.times), model.layers, -1)
    kinds = np.concatenate([np.arange(-1, menu.first_cut - 1), np.full(len(menu.cuts), CUT)])
    per_head = blocks[:, : menu.columns] / (job.unit_dense_blocks / model.heads)
    rows = np.arange(len(error))

    def masks_of(pick: Int64) -> Masks:
        column = pick % menu.columns
        return Masks(
            kind=kinds[column].reshape(shape),
            density=per_head[rows, column].reshape(shape),
            error=error[rows, column].reshape(shape),
            copied=np.where(pick >= menu.columns, copied, 0.0).reshape(shape),
            share_error=share_error.reshape(*shape[:2], *share_error.shape[1:]),
        )

    return masks_of
