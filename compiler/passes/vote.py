"""Keeps the blocks on which the samples agree: the paper's own method, which measures no error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from calibatt.compiler.bits import pack
from calibatt.compiler.error_model import at_shares, cuts, mask_errors
from calibatt.compiler.ir import Job, UnitIR
from calibatt.compiler.passes import Findings, Pass


@dataclass(frozen=True)
class Vote(Pass):
    """Gives every head at every time the blocks that `agreement` of the samples need to reach the mass of a threshold.

    Requires: a store with thresholds, which calibration records on request.
    Ensures: every mask keeps the required blocks.

    Args:
        agreement: Share of the samples, in (0, 1]; at least one sample in any case.
        threshold: One of the store's thresholds.

    Raises:
        PassError: `agreement` is out of range, or the store has no such threshold.
    """

    name: ClassVar[str] = "vote"
    agreement: float = 0.5
    threshold: float = 0.9

    def __post_init__(self) -> None:
        self.require(0 < self.agreement <= 1, "agreement", "be in (0, 1]", self.agreement)

    def check(self, job: Job, before: Sequence[Pass]) -> None:
        known = ", ".join(f"{each:g}" for each in job.manifest.thresholds) or "none"
        right = self.threshold in job.manifest.thresholds
        self.require(right, "threshold", f"be one of the store's {known}", self.threshold)
        self.refuse_after(before, *(each.name for each in before if each.decides), "anchors", "repeat", "schedule")

    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        thresholds = job.manifest.thresholds
        assert unit.means.votes is not None
        needed = max(1, math.ceil(self.agreement * unit.means.vote_samples - 1e-9))
        unit.keep = pack(unit.means.votes[thresholds.index(self.threshold)] >= needed) | unit.required
        unit.choice = ["voted"] * unit.heads
        unit.error = mask_errors(unit, unit.keep)
        shares, dense = job.manifest.shares, unit.dense_blocks
        unit.share_error = np.stack([at_shares(*cuts(unit, head), shares, dense) for head in range(unit.heads)], 1)
        return {}
