"""Masks shared by neighbouring times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from calibatt.compiler.bits import Bits, count
from calibatt.compiler.ir import Float64, Int64, Job, UnitIR
from calibatt.compiler.passes import Findings, Pass, UnitAt

Range = tuple[int, int]
"""First and last time index, both included."""
WORTHS = tuple(2.0**power for power in range(-4, 12))


@dataclass(frozen=True)
class MergeTimes(Pass):
    """Lets a head keep one mask over contiguous times, the union of theirs, where that saves more than it costs.

    A plan stores what changes from time to time; a mask that stays takes no bytes. For each head, dynamic programming
    finds the partition of the times of least added blocks x worth + blocks that change where a group ends. The worth is
    the smallest power of 2 with which the head grows by at most `max_growth` over all its times.

    Requires: masks chosen. Heads with anchors are left alone.
    Ensures: the kept set only grows, that of a head over all times by at most `max_growth`.

    Args:
        max_growth: Most blocks added to a head, relative to those it has over all times.
        max_times: Most times of a group.

    Raises:
        PassError: An option is out of range, or there are no masks, or tiles are ordered already.
    """

    name: ClassVar[str] = "merge-times"
    by_layer: ClassVar[bool] = True
    max_growth: float = 0.01
    max_times: int = 8

    def __post_init__(self) -> None:
        self.require(self.max_growth >= 0, "max-growth", "not be negative", self.max_growth)
        self.require(self.max_times >= 1, "max-times", "be at least 1", self.max_times)

    def decide_layer(self, job: Job, layer: int, unit_at: UnitAt) -> Sequence[Any]:
        times = len(job.manifest.times)
        units = [unit_at(time) for time in range(times)]
        decided: list[dict[int, Range]] = [{} for _ in units]
        for unit in units:
            self.require(unit.keep is not None, "masks", "be chosen before", unit.name)
            self.require(unit.tile_order is None, "schedule", "come after", unit.name)
        for head in range(job.manifest.model.heads):
            masks = [unit.keep[head] for unit in units if unit.keep is not None]
            free = [head not in unit.packed and self.covers(job.manifest.times[unit.time_index]) for unit in units]
            for first, last in groups(masks, free, self.max_growth, self.max_times):
                for time in range(first, last + 1) if last > first else ():
                    decided[time][head] = (first, last)
        return decided

    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        ranges, unit_at = decision
        assert unit.keep is not None
        keep = unit.keep.copy()
        needed = sorted({time for first, last in ranges.values() for time in range(first, last + 1)})
        for time in needed:
            if time == unit.time_index:
                continue
            other = unit_at(time).keep
            assert other is not None
            for head, (first, last) in ranges.items():
                if first <= time <= last:
                    keep[head] |= other[head]
        added = int(count(keep, (0, 1, 2))) - int(count(unit.keep, (0, 1, 2)))
        unit.keep = keep
        starts = sum(first == unit.time_index for first, _ in ranges.values())
        return {"masks_shared": len(ranges), "masks_saved": len(ranges) - starts, "blocks_added": added}


def groups(masks: Sequence[Bits], free: Sequence[bool], max_growth: float, max_times: int) -> list[Range]:
    """The partition of the times of one head.

    Args:
        masks: One packed mask a time.
        free: Times that may share; others stay alone.
        max_growth: Most blocks added over all times, relative to those of the masks.
        max_times: Most times of a group.
    """
    times = len(masks)
    most = min(max_times, times)
    added = np.full((times, most), np.inf)
    sizes = np.array([int(count(mask, (0, 1))) for mask in masks])
    for first in range(times):
        added[first, 0] = 0
        union = masks[first]
        for span in range(2, min(most, times - first) + 1):
            if not all(free[first : first + span]):
                break
            union = union | masks[first + span - 1]
            added[first, span - 1] = span * int(count(union, (0, 1))) - sizes[first : first + span].sum()
    changed = [int(count(one ^ other, (0, 1))) for one, other in pairwise(masks)]
    ends = np.array([*changed, 0])
    for worth in WORTHS:
        found = _partition(added * worth, ends)
        total = sum(added[first, last - first] for first, last in found)
        if total <= max_growth * sizes.sum():
            return found
    return [(time, time) for time in range(times)]


def _partition(cost: Float64, ends: Int64) -> list[Range]:
    """The exact cheapest partition: `cost` of groups by first time and span - 1, `ends` of a group that ends there."""
    times, most = cost.shape
    best = np.zeros(times + 1)
    span_at = np.ones(times + 1, np.int64)
    for stop in range(1, times + 1):
        spans = np.arange(1, min(most, stop) + 1)
        total = best[stop - spans] + cost[stop - spans, spans - 1] + ends[stop - 1]
        at = int(total.argmin())
        best[stop], span_at[stop] = total[at], spans[at]
    found, stop = [], times
    while stop:
        span = int(span_at[stop])
        found.append((stop - span, stop - 1))
        stop -= span
    return found[::-1]
