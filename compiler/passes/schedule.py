"""The order in which a layer's tiles are executed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from calibatt.compiler.ir import Job
from calibatt.compiler.passes import Pass


@dataclass(frozen=True)
class Schedule(Pass):
    """Orders tiles head by head, within a head longest first, equal ones by their place.

    One head's keys and values fill most of a GPU's L2, so heads stay together; longest first shortens the tail.

    Requires: nothing; masks and anchors are not changed after it.
    Ensures: `tile_order` is a permutation of the layer's tile ids.
    """

    name: ClassVar[str] = "schedule"

    def apply(self, job: Job) -> None:
        for unit in job.units:
            order, first = [], 0
            for head in range(unit.heads):
                length = unit.tile_keep(head).sum(1)
                order.append(first + np.argsort(-length, kind="stable"))
                first += len(length)
            unit.tile_order = np.concatenate(order).astype(np.int32)
