"""From masks and anchors to what the file stores and the runtime executes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from calibatt.compiler.bits import Bits, count
from calibatt.compiler.ir import Groups, Job, UnitIR
from calibatt.compiler.passes import Findings, Pass
from calibatt.plans import DENSE, NO_ANCHORS, PackedLayer


@dataclass(frozen=True)
class Lower(Pass):
    """Makes every unit's `PackedLayer`: dense heads list nothing, identical heads share lists and anchor patterns.

    Requires: nothing; what no pass has decided stays dense, and in order.
    Ensures: every schedule keeps the promises of `LayerSchedule`.
    """

    name: ClassVar[str] = "lower"

    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        unit.lowered = lowered(unit)
        return {}


def lowered(unit: UnitIR) -> PackedLayer:
    """The unit's schedule."""
    grid = unit.grid
    masks: list[Bits] = []
    lists: dict[bytes, int] = {}
    patterns: dict[Groups, int] = {}
    head_list, head_anchor, tiles, listed = [], [], 0, 0
    for head in range(unit.heads):
        groups = unit.anchors[head]
        head_anchor.append(NO_ANCHORS if groups is None else patterns.setdefault(groups, len(patterns)))
        bits = unit.tile_bits(head)
        tiles += len(bits)
        if count(bits, (0, 1)) == len(bits) * unit.k_blocks:
            head_list.append(DENSE)
            continue
        key = bits.tobytes()
        if key not in lists:
            lists[key] = listed
            listed += len(bits)
            masks.append(bits)
        head_list.append(lists[key])
    empty = np.zeros(0, np.int64)
    every = [groups.in_video(grid) for groups in patterns]
    return PackedLayer(
        grid=grid,
        blocks=unit.blocks,
        list_bits=np.concatenate([np.zeros((0, -(-unit.k_blocks // 8)), np.uint8), *masks]),
        head_list=np.array(head_list, np.int32),
        head_anchor=np.array(head_anchor, np.int32),
        anchor_ptr=np.append(0, np.cumsum([len(starts) for starts, _ in every])).astype(np.int32),
        anchor_axis=np.array([groups.axis for groups in patterns], np.int32),
        group_start=np.concatenate([empty, *(starts for starts, _ in every)]).astype(np.int32),
        group_anchor=np.concatenate([empty, *(anchors for _, anchors in every)]).astype(np.int32),
        tile_order=np.arange(tiles, dtype=np.int32) if unit.tile_order is None else unit.tile_order,
        head_precision=unit.precision,
    )
