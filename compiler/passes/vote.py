"""The blocks that the samples agree on: the paper's own method."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from calibatt.compiler.bits import pack
from calibatt.compiler.ir import Job, UnitIR
from calibatt.compiler.passes import Findings, Pass


@dataclass(frozen=True)
class Vote(Pass):
    """Marks the blocks that at least `agreement` of the samples need to reach the mass of a threshold.

    Requires: a store with thresholds, which calibration records on request.

    Args:
        agreement: Share of the samples, in (0, 1]; at least one sample in any case.
        threshold: One of the store's.

    Raises:
        PassError: `agreement` is out of range, or the store has no such threshold.
    """

    name: ClassVar[str] = "vote"
    votes: ClassVar[bool] = True
    agreement: float = 0.5
    threshold: float = 0.9

    def __post_init__(self) -> None:
        self.require(0 < self.agreement <= 1, "agreement", "be in (0, 1]", self.agreement)

    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        thresholds = job.manifest.thresholds
        known = ", ".join(f"{each:g}" for each in thresholds) or "none"
        self.require(self.threshold in thresholds, "threshold", f"be one of the store's {known}", self.threshold)
        self.require(unit.means.votes is not None, "vote", "come once, before select", unit.name)
        assert unit.means.votes is not None
        needed = max(1, math.ceil(self.agreement * unit.means.vote_samples - 1e-9))
        unit.voted = pack(unit.means.votes[thresholds.index(self.threshold)] >= needed)
        unit.means = replace(unit.means, votes=None)
        return {}
