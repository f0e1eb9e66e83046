"""Block lists shared by heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import networkx as nx
import numpy as np

from calibatt.compiler.bits import count
from calibatt.compiler.ir import Int64, Job, UnitIR
from calibatt.compiler.passes import Findings, Pass


@dataclass(frozen=True)
class MergeHeads(Pass):
    """Gives pairs of heads of a layer that differ little the union of their masks at all times.

    Pairs of heads that are alike at every time are the edges of a graph, weighted by the blocks that need not be
    stored; a matching of largest weight is taken. `lower` makes such heads share their lists.

    Heads with anchors at any time are left alone.

    Ensures: the kept set only grows, that of a pair over all times by at most `max_growth`.

    Args:
        max_growth: Most blocks added to a pair, relative to those both have over all recorded times, each of which
            counts once, however many steps of a sampling it stands for.

    Raises:
        PassError: The option is out of range, or tiles are ordered already.
    """

    name: ClassVar[str] = "merge-heads"
    decides: ClassVar[bool] = True
    max_growth: float = 0.01

    def __post_init__(self) -> None:
        self.require(self.max_growth >= 0, "max-growth", "not be negative", self.max_growth)

    def check(self, job: Job, before: Sequence[Pass]) -> None:
        self.refuse_after(before, "schedule")

    def survey(self, job: Job, unit: UnitIR) -> Any:
        """Blocks of the union of any two heads (on the diagonal, of one head), and which heads may share."""
        union, free = np.zeros((unit.heads, unit.heads), np.int64), np.ones(unit.heads, np.bool_)
        free[list(unit.packed)] = False
        for head in range(unit.heads):
            union[head, head:] = count(unit.keep[head] | unit.keep[head:], (1, 2))
        return union, free

    def decide(self, job: Job, surveys: Sequence[Any]) -> Sequence[Any]:
        layers, decisions = job.manifest.model.layers, []
        for layer in range(layers):
            unions, free = zip(*surveys[layer::layers], strict=True)
            union = np.sum(unions, 0)
            decisions.append(pairs(union.diagonal(), union, np.all(free, 0), self.max_growth))
        return decisions * len(job.manifest.times)

    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        keep = unit.keep.copy()
        for one, other in decision:
            keep[one] = keep[other] = unit.keep[one] | unit.keep[other]
        added = int(count(keep, (0, 1, 2))) - int(count(unit.keep, (0, 1, 2)))
        unit.keep = keep
        return {"pairs": len(decision), "blocks_added": added}


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
    matching = nx.max_weight_matching(graph)
    return sorted((min(pair), max(pair)) for pair in matching)
