"""Lowers masks and anchors to what the file stores and the runtime executes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from calibatt.compiler.ir import Groups, Job, UnitIR
from calibatt.compiler.passes import Findings, Pass
from calibatt.plans import NO_ANCHORS, LayerSchedule, schedule_of


@dataclass(frozen=True)
class Lower(Pass):
    """Makes every unit's `LayerSchedule`: dense heads list nothing, identical heads share lists and anchor patterns.

    Requires: nothing; heads without a decision stay dense, and tiles in their natural order.
    Ensures: every schedule keeps the promises of `LayerSchedule`.
    """

    name: ClassVar[str] = "lower"

    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        unit.lowered = lowered(unit)
        return {}


def lowered(unit: UnitIR) -> LayerSchedule:
    """The unit's schedule."""
    patterns: dict[Groups, int] = {}
    head_anchor = [
        NO_ANCHORS if groups is None else patterns.setdefault(groups, len(patterns)) for groups in unit.anchors
    ]
    heads = [unit.tile_bits(head) for head in range(unit.heads)]
    in_order = np.arange(sum(map(len, heads)), dtype=np.int32)
    return schedule_of(
        unit.grid,
        unit.blocks,
        heads,
        precision=unit.precision,
        patterns=[(groups.axis, *groups.in_video(unit.grid)) for groups in patterns],
        head_anchor=head_anchor,
        tile_order=in_order if unit.tile_order is None else unit.tile_order,
    )
