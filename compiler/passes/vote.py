"""The planes that the samples agree on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from calibatt.compiler.ir import Job
from calibatt.compiler.passes import Pass


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
    agreement: float = 0.5

    def __post_init__(self) -> None:
        self.require(0 < self.agreement <= 1, "agreement", "be in (0, 1]", self.agreement)

    def apply(self, job: Job) -> None:
        votes = max(1, math.ceil(self.agreement * len(job.samples) - 1e-9))
        for unit in job.units:
            unit.voted = unit.means.votes.at_least(votes)
        job.findings[self.name] = {"samples": len(job.samples), "votes_needed": votes}
