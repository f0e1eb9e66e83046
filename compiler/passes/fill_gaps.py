"""Short gaps between kept blocks, filled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from calibatt.compiler.bits import Bits, Bool, count, pack, unpack
from calibatt.compiler.ir import Job, UnitIR
from calibatt.compiler.passes import Findings, Pass


@dataclass(frozen=True)
class FillGaps(Pass):
    """Keeps runs of dropped key blocks that are short and lie between kept ones of the same tile.

    Longer runs are cheaper to store, and to fetch for a kernel that reads neighbouring blocks together; each filled
    block is computed. Heads are taken only where they grow by at most `max_growth`.

    Requires: nothing; what has no mask has no gaps.
    Ensures: the kept set only grows, a head by at most `max_growth` of its blocks.

    Args:
        max_gap_blocks: Longest run to fill; 0 does nothing.
        max_growth: Most blocks added to a head, relative to those it has.

    Raises:
        PassError: An option is out of range, or tiles are ordered already.
    """

    name: ClassVar[str] = "fill-gaps"
    max_gap_blocks: int = 1
    max_growth: float = 0.01

    def __post_init__(self) -> None:
        self.require(self.max_gap_blocks >= 0, "max-gap-blocks", "not be negative", self.max_gap_blocks)
        self.require(self.max_growth >= 0, "max-growth", "not be negative", self.max_growth)

    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        self.require(unit.tile_order is None, "schedule", "come after", unit.name)
        found: Findings = {"heads_filled": 0, "blocks_added": 0}
        if unit.keep is None or self.max_gap_blocks == 0:
            return found
        keep = unit.keep.copy()
        for head in range(unit.heads):
            before = unit.tile_bits(head)
            after = filled(before, unit.k_blocks, self.max_gap_blocks)
            had = int(count(before, (0, 1)))
            added = int(count(after, (0, 1))) - had
            if not 0 < added <= self.max_growth * had:
                continue
            if head in unit.packed:
                unit.packed[head] = after
            else:
                keep[head] = after
            found["heads_filled"] += 1
            found["blocks_added"] += added
        unit.keep = keep
        return found


def filled(bits: Bits, k_blocks: int, most: int) -> Bits:
    """Packed masks ``(tiles, ceil(K / 8))`` with runs of at most `most` dropped blocks between kept ones filled."""
    keep = unpack(bits, k_blocks)
    reach = _within(keep, most)
    back = _within(keep[:, ::-1], most)[:, ::-1]
    # A dropped block in a run of n has a kept one within a to the left and within b to the right, a + b = n + 1.
    near: Bool = keep | ((reach + back <= most + 1) & (reach > 0) & (back > 0))
    return pack(near)


def _within(keep: Bool, most: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Distance to the nearest kept block on the left, 1 to `most`; 0 where there is none so near, or it is kept."""
    distance = np.zeros(keep.shape, np.int32)
    for step in range(most, 0, -1):
        distance[:, step:][keep[:, :-step]] = step
    distance[keep] = 0
    return distance
