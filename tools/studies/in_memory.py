"""Compiling in one process and without a folder: for small jobs, many times over."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from calibatt.compiler.cost import Device
from calibatt.compiler.emit import make_plan, require_lowered
from calibatt.compiler.gather import Samplings, StatisticsSource
from calibatt.compiler.ir import UnitIR
from calibatt.compiler.passes import Pass
from calibatt.compiler.pipeline import Source, in_turn, run
from calibatt.plans import PlanFile


class MemoryShelf:
    """Keeps the units of a job between stages, as `compiler.shelf.Shelf` says."""

    def __init__(self) -> None:
        self.units: dict[int, UnitIR] = {}

    def unit(self, index: int) -> UnitIR:
        unit = copy.copy(self.units[index])
        unit.anchors, unit.packed, unit.choice = list(unit.anchors), dict(unit.packed), list(unit.choice)
        unit.menu = unit.menu and unit.menu._replace(packed=dict(unit.menu.packed))
        return unit

    def put(self, index: int, unit: UnitIR) -> None:
        self.units[index] = unit


def compile_in_memory(store: Samplings, source: Source, passes: Sequence[Pass], device: Device) -> PlanFile:
    """What `calibatt-compile` makes of a store, in this process and without a folder: for small jobs.

    Args:
        store: The statistics.
        source: `StatisticsSource` of them.
        passes: What to run; the last one is `lower`.
        device: What predicts milliseconds.

    Raises:
        CompileError: A pass lacks what it requires.
        StoreError: The statistics are damaged.
    """
    require_lowered(passes)
    job, shelf = StatisticsSource(store).make_job(device), MemoryShelf()
    found = run(source, job, passes, shelf, in_turn)
    return make_plan(job, store, passes, found, shelf, in_turn)
