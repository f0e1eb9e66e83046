"""The planes that the samples agree on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from calibatt.compiler.ir import Job, UnitIR
from calibatt.compiler.passes import Findings, Pass


@dataclass(frozen=True)
class Vote(Pass):
    """Keeps a block of a plane if at least `agreement` of the samples keep it.

    Requires: nothing.
    Ensures: `voted` planes are nested, as those of every sample are.

    Args:
        agreement: Share of the samples, in (0, 1]; at least one sample in any case.

    Raises:
        PassError: `agreement` is out of range.
    """

    name: ClassVar[str] = "vote"
    planes: ClassVar[bool] = True
    agreement: float = 0.5

    def __post_init__(self) -> None:
        self.require(0 < self.agreement <= 1, "agreement", "be in (0, 1]", self.agreement)

    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        self.require(bool(unit.means.votes), "vote", "come once, before select", unit.name)
        needed = self._needed(job)
        unit.voted = np.stack([votes.at_least(needed) for votes in unit.means.votes], axis=1)
        unit.means = replace(unit.means, votes=[])
        return {}

    def report(self, job: Job, total: Findings) -> dict[str, Any]:
        return {"samples": len(job.samples), "votes_needed": self._needed(job)}

    def _needed(self, job: Job) -> int:
        return max(1, math.ceil(self.agreement * len(job.samples) - 1e-9))
