"""The order in which a layer's tiles are executed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from calibatt.compiler.bits import count
from calibatt.compiler.ir import Job, UnitIR
from calibatt.compiler.passes import Findings, Pass
from calibatt.plans import longest_first


@dataclass(frozen=True)
class Schedule(Pass):
    """Orders tiles: heads one after the other, in a head the longest list first, lists of one length in their order.

    One head's keys and values fill most of a GPU's L2, so heads stay together; longest first shortens the tail.

    Requires: nothing; masks and anchors are not changed after it.
    Ensures: `tile_order` is a permutation of the layer's tile ids.
    """

    name: ClassVar[str] = "schedule"

    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        lengths = [count(unit.tile_bits(head)) for head in range(unit.heads)]
        unit.tile_order = longest_first(lengths)
        return {}
