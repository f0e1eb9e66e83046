"""The same plane everywhere: what a compiler does that measures no error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from calibatt.compiler.ir import Job
from calibatt.compiler.passes import Pass
from calibatt.compiler.passes.select import plane_error


@dataclass(frozen=True)
class Uniform(Pass):
    """Gives every head at every time the voted plane of one threshold; the baseline that `select` has to beat.

    Requires: `vote`, and a store that recorded the threshold.
    Ensures: every mask keeps the required blocks; units that `protect` keeps dense stay dense.

    Args:
        threshold: One of the store's.

    Raises:
        PassError: The store has no such threshold, or `vote` has not been run.
    """

    name: ClassVar[str] = "uniform"
    threshold: float = 0.9

    def apply(self, job: Job) -> None:
        thresholds = job.manifest.thresholds
        known = ", ".join(f"{each:g}" for each in thresholds)
        self.require(self.threshold in thresholds, "threshold", f"be one of the store's {known}", self.threshold)
        index = thresholds.index(self.threshold)
        for unit in job.units:
            self.require(unit.voted is not None, "planes", "have been voted (vote comes before uniform)", unit.name)
            if unit.force_dense:
                continue
            assert unit.voted is not None
            unit.keep = unit.voted[index] | unit.required
            unit.choice = [f"plane {self.threshold:g}"] * unit.heads
            unit.error = plane_error(job, unit, unit.keep, index)
