"""What the samples agree on, everywhere: what a compiler does that measures no error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from calibatt.compiler.error_model import at_shares, cuts, mask_errors
from calibatt.compiler.ir import Job, UnitIR
from calibatt.compiler.passes import Findings, Pass


@dataclass(frozen=True)
class Uniform(Pass):
    """Gives every head at every time the mask that was voted; the baseline that `select` has to beat.

    Requires: `vote`.
    Ensures: every mask keeps the required blocks; units that `protect` keeps dense stay dense.

    Raises:
        PassError: `vote` has not been run.
    """

    name: ClassVar[str] = "uniform"

    @property
    def codes(self) -> bool:
        return True

    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        self.require(unit.voted is not None, "masks", "have been voted (vote comes before uniform)", unit.name)
        if unit.force_dense:
            return {}
        assert unit.voted is not None
        unit.keep = unit.voted | unit.required
        unit.choice = ["voted"] * unit.heads
        unit.error = mask_errors(unit, unit.keep)
        shares, dense = job.manifest.shares, unit.dense_blocks
        unit.share_error = np.stack([at_shares(*cuts(unit, head), shares, dense) for head in range(unit.heads)], 1)
        return {}
