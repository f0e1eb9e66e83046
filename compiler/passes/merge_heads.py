"""Block lists shared by heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import networkx as nx
import numpy as np

from calibatt.compiler.bits import count
from calibatt.compiler.ir import Int64, Job, UnitIR
from calibatt.compiler.passes import Findings, Pass, UnitAt


@dataclass(frozen=True)
class MergeHeads(Pass):
    """Lets two heads of a layer keep the union of their masks at all times, where they differ little.

    Heads that are alike at every time are the edges of a graph, weighted by the blocks whose storage is saved; a
    matching of most weight is taken. Lowered, such heads share their lists.

    Requires: masks chosen. Heads with anchors at any time are left alone.
    Ensures: the kept set only grows, that of a pair over all times by at most `max_growth`.

    Args:
        max_growth: Most blocks added to a pair, relative to those both have over all times.

    Raises:
        PassError: The option is out of range, or there are no masks, or tiles are ordered already.
    """

    name: ClassVar[str] = "merge-heads"
    by_layer: ClassVar[bool] = True
    max_growth: float = 0.01

    def __post_init__(self) -> None:
        self.require(self.max_growth >= 0, "max-growth", "not be negative", self.max_growth)

    def decide_layer(self, job: Job, layer: int, unit_at: UnitAt) -> Sequence[Any]:
        heads, times = job.manifest.model.heads, len(job.manifest.times)
        size, union, free = np.zeros(heads, np.int64), np.zeros((heads, heads), np.int64), np.ones(heads, np.bool_)
        for time in range(times):
            unit = unit_at(time)
            self.require(unit.keep is not None, "masks", "be chosen before", unit.name)
            self.require(unit.tile_order is None, "schedule", "come after", unit.name)
            assert unit.keep is not None
            free[list(unit.packed)] = False
            size += count(unit.keep, (1, 2))
            for head in range(heads - 1):
                union[head, head + 1 :] += count(unit.keep[head] | unit.keep[head + 1 :], (1, 2))
        return [pairs(size, union, free, self.max_growth)] * times

    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        found, _ = decision
        assert unit.keep is not None
        keep = unit.keep.copy()
        for one, other in found:
            keep[one] = keep[other] = unit.keep[one] | unit.keep[other]
        added = int(count(keep, (0, 1, 2))) - int(count(unit.keep, (0, 1, 2)))
        unit.keep = keep
        return {"pairs": len(found), "blocks_added": added}


def pairs(size: Int64, union: Int64, free: np.ndarray[Any, np.dtype[np.bool_]], growth: float) -> list[tuple[int, int]]:
    """Pairs of heads that share, each head in one pair at most.

    Args:
        size: int64 ``(H,)``: blocks of each head over all times.
        union: int64 ``(H, H)``: blocks of the union of two, above the diagonal.
        free: bool ``(H,)``: heads that may share.
        growth: Most blocks added to a pair, relative to those both have.
    """
    graph = nx.Graph()
    for one in range(len(size)):
        for other in range(one + 1, len(size)):
            both = int(size[one] + size[other])
            added = 2 * int(union[one, other]) - both
            if free[one] and free[other] and added <= growth * both:
                graph.add_edge(one, other, weight=both - added)
    found = nx.max_weight_matching(graph)
    return sorted((min(pair), max(pair)) for pair in found)
