"""From masks and anchors to the arrays that the file stores and the runtime executes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from calibatt.compiler.ir import Groups, Job, UnitIR
from calibatt.compiler.passes import Pass
from calibatt.plans import DENSE, NO_ANCHORS, LayerSchedule


@dataclass(frozen=True)
class Lower(Pass):
    """Makes every unit's `LayerSchedule`: dense heads list nothing, identical heads share lists and anchor patterns.

    Requires: nothing; what no pass has decided stays dense, and in order.
    Ensures: every schedule keeps the promises of `LayerSchedule`.
    """

    name: ClassVar[str] = "lower"

    def apply(self, job: Job) -> None:
        for unit in job.units:
            unit.lowered = lowered(unit)
            unit.lowered.check()


def lowered(unit: UnitIR) -> LayerSchedule:
    """The unit's schedule."""
    grid, blocks = unit.grid, unit.blocks
    columns: list[np.ndarray[tuple[int], np.dtype[np.uint16]]] = []
    lengths: list[int] = []
    lists: dict[bytes, int] = {}
    patterns: dict[Groups, int] = {}
    head_list, head_anchor, tiles = [], [], 0
    for head in range(unit.heads):
        groups = unit.anchors[head] if unit.anchors else None
        head_anchor.append(NO_ANCHORS if groups is None else patterns.setdefault(groups, len(patterns)))
        keep = unit.tile_keep(head)
        tiles += len(keep)
        if keep.all():
            head_list.append(DENSE)
            continue
        key = np.packbits(keep, axis=1).tobytes()
        if key not in lists:
            lists[key] = len(lengths)
            lengths += keep.sum(1).tolist()
            columns.append(np.nonzero(keep)[1].astype(np.uint16))
        head_list.append(lists[key])
    frames = np.arange(grid.frames)[:, None] * grid.height
    starts = [(frames + np.array(start)).reshape(-1) for start, _ in patterns]
    rows = [(frames + np.array(anchor)).reshape(-1) for _, anchor in patterns]
    empty = [np.zeros(0, np.int64)]
    order = np.arange(tiles, dtype=np.int32) if unit.tile_order is None else unit.tile_order
    return LayerSchedule(
        grid=grid,
        blocks=blocks,
        row_ptr=np.append(0, np.cumsum(lengths)).astype(np.int32),
        col_idx=np.concatenate([np.zeros(0, np.uint16), *columns]),
        head_list=np.array(head_list, np.int32),
        head_anchor=np.array(head_anchor, np.int32),
        anchor_ptr=np.append(0, np.cumsum([len(part) for part in starts])).astype(np.int32),
        group_start=np.concatenate(starts or empty).astype(np.int32),
        anchor_row=np.concatenate(rows or empty).astype(np.int32),
        tile_order=order,
    )
