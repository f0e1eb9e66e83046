"""Anchor rows by a threshold: the paper's own method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from calibatt.compiler.bits import count
from calibatt.compiler.ir import Groups, Job, UnitIR, packed_bits
from calibatt.compiler.passes import Findings, Pass
from calibatt.compiler.passes.anchors import copied
from calibatt.plans import ROWS


@dataclass(frozen=True)
class Repeat(Pass):
    """Gives heads whose rows differ little one anchor for every few rows, the middle one.

    Requires: masks chosen, as by `vote`; a store with thresholds.
    Ensures: no head computes more blocks than before.

    Args:
        max_difference: Largest mean squared difference between a copied row and its anchor, relative to the row.
        group: Rows of a group.

    Raises:
        PassError: An option is out of range, or the store has no differences of rows so far apart.
    """

    name: ClassVar[str] = "repeat"
    max_difference: float = 0.1
    group: int = 3

    def __post_init__(self) -> None:
        self.require(self.max_difference >= 0, "max-difference", "not be negative", self.max_difference)
        self.require(self.group >= 2, "group", "be at least 2", self.group)

    def check(self, job: Job, before: Sequence[Pass]) -> None:
        most = 2 * job.manifest.row_radius + 1
        self.require(bool(job.manifest.thresholds), "differences of rows", "have been recorded with thresholds", "none")
        self.require(self.group <= most, "group", f"be at most {most}, as measured", self.group)
        self.refuse_after(before, "anchors", "repeat", "schedule")

    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        difference = unit.means.row_difference
        assert difference is not None
        counts: Findings = {"heads_with_anchors": 0, "heads": unit.heads}
        height = unit.grid.height
        starts = range(0, height, self.group)
        anchors = tuple(start + (min(self.group, height - start) - 1) // 2 for start in starts)
        groups = Groups(ROWS, tuple(starts), anchors)
        unit.copy_error, unit.error = np.zeros(unit.heads), unit.error.copy()
        for head in range(unit.heads):
            packed = packed_bits(unit.keep[head], unit.grid, unit.blocks, groups)
            fewer = int(count(packed, (0, 1))) <= int(count(unit.keep[head], (0, 1)))
            copies = height - len(anchors)
            if copies and fewer and copied(difference[head], groups) <= self.max_difference * copies:
                unit.anchors[head], unit.packed[head] = groups, packed
                unit.copy_error[head] = copied(unit.means.row_error[head], groups)
                unit.error[head] += unit.copy_error[head]
                counts["heads_with_anchors"] += 1
        return counts
