"""The same plane everywhere: what a compiler does that measures no error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from calibatt.compiler.error_model import mask_errors
from calibatt.compiler.ir import Job, UnitIR
from calibatt.compiler.passes import Findings, Pass


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
    decides: ClassVar[bool] = True
    threshold: float = 0.9

    @property
    def codes(self) -> bool:
        return True

    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        thresholds = job.manifest.thresholds
        known = ", ".join(f"{each:g}" for each in thresholds)
        self.require(self.threshold in thresholds, "threshold", f"be one of the store's {known}", self.threshold)
        self.require(unit.voted is not None, "planes", "have been voted (vote comes before uniform)", unit.name)
        if unit.force_dense:
            return {}
        assert unit.voted is not None
        index = thresholds.index(self.threshold)
        unit.keep = unit.voted[index] | unit.required
        unit.choice = [f"plane {self.threshold:g}"] * unit.heads
        unit.error = mask_errors(unit, unit.keep, job.error_factor, index)
        return {}
