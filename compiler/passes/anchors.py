"""Rows, or whole frames, that are computed once and copied to their neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from calibatt.compiler.bits import Bits, count
from calibatt.compiler.ir import Float64, Groups, Int64, Job, UnitIR, packed_bits
from calibatt.compiler.passes import Findings, Pass
from calibatt.plans import FRAMES, ROWS


@dataclass(frozen=True)
class Anchors(Pass):
    """Gives heads whose output repeats anchors, rows or frames, where that is cheaper than computing every token.

    For each head, dynamic programming finds the partition of a frame's rows into groups, and an anchor in each, of
    least copy error x weight x `safety` + price of the computed rows (a row at its share of the head's predicted
    milliseconds); every frame has the same groups. Likewise the partition of the video's frames. The head adopts the
    better of the two if that is still cheaper when lowered: a packed tile keeps what any of its queries' blocks keeps,
    so packing rows apart can cost more than it saves.

    Another `select` after it spends what was saved: milliseconds are then worth less, and heads whose anchors are no
    longer worth their error lose them again; where the error is bounded, it brings the job back within the bound.

    Requires: `select`, whose multiplier prices a millisecond.
    Ensures: no head computes more blocks than before.

    Args:
        safety: Factor on the copy error; 1: a copy costs what was measured (docs/ablations.md compares others).
        max_group_rows: Most rows of a group, its anchor included; 1: no anchor rows.
        max_group_frames: Most frames of a group; 1: no anchor frames.

    Raises:
        PassError: An option is out of range, or `select` has not been run.
    """

    name: ClassVar[str] = "anchors"
    safety: float = 1.0
    max_group_rows: int = 4
    max_group_frames: int = 8

    def __post_init__(self) -> None:
        self.require(self.safety > 0, "safety", "be positive", self.safety)
        self.require(self.max_group_rows >= 1, "max-group-rows", "be at least 1", self.max_group_rows)
        self.require(self.max_group_frames >= 1, "max-group-frames", "be at least 1", self.max_group_frames)

    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        multiplier = job.multiplier
        self.require(multiplier is not None and unit.keep is not None, "select", "come before", "no multiplier")
        assert multiplier is not None
        self.require(not unit.anchors, "anchors", "come once", unit.name)
        unit.anchors = [None] * unit.heads
        counts = {"heads_with_anchors": 0.0, "of_frames": 0.0, "heads": unit.heads, "dearer_when_lowered": 0.0}
        found = counts | {"computed": 0.0}
        if unit.force_dense:
            return found
        grid = unit.grid
        weight = np.full(unit.heads, unit.weight) if unit.head_weight is None else unit.head_weight
        best: dict[int, tuple[float, float, Groups, Bits]] = {}
        offered = set()
        for head, groups, error in self._offers(job, unit, multiplier, weight):
            offered.add(head)
            before = unit.tile_bits(head)
            after = packed_bits(before, grid, unit.blocks, groups)
            gain = multiplier * saved_ms(job, unit, before, after) - error
            if gain > 0 and (head not in best or gain > best[head][0]):
                best[head] = gain, error, groups, after
        for head, (_, error, groups, after) in best.items():
            unit.anchors[head], unit.packed[head] = groups, after
            unit.error[head] += error / weight[head]
            found["of_frames"] += groups.axis == FRAMES
            found["computed"] += len(groups.anchors) / (grid.height if groups.axis == ROWS else grid.frames)
        found["heads_with_anchors"] = len(best)
        found["dearer_when_lowered"] = len(offered) - len(best)
        return found

    def _offers(
        self, job: Job, unit: UnitIR, multiplier: float, weight: Float64
    ) -> Iterator[tuple[int, Groups, float]]:
        """Heads with what seems cheaper than all of it, and the weighted error of that: for each axis one at most."""
        grid = unit.grid
        price = multiplier * head_ms(job, unit)
        for axis, errors, most in (
            (ROWS, unit.means.row_residual_error, self.max_group_rows),
            (FRAMES, unit.means.frame_residual_error, self.max_group_frames),
        ):
            if errors is None or errors.shape[2] == 0 or most == 1:
                continue
            members = errors.shape[1]
            share = self.safety * grid.video_tokens / (members * grid.tokens)
            weighted = copy_errors(errors * (share * weight)[:, None, None], most)
            for head, (starts, anchors, error) in enumerate(best_groups(weighted, price / members)):
                if len(starts) < members:
                    yield head, Groups(axis, starts, anchors), error

    def report(self, job: Job, total: Findings) -> dict[str, Any]:
        adopted, computed = total["heads_with_anchors"], total.pop("computed")
        found: dict[str, Any] = {name: int(value) for name, value in total.items()}
        return {**found, "computed_in_them": computed / adopted if adopted else 1.0}


def copy_errors(member_error: Float64, most_members: int) -> Float64:
    """Error of every short group of members, rows of a frame or frames, with each of them as its anchor.

    Args:
        member_error: float64 ``(H, Y, 2 R)``: error of member r + d standing for member r; offsets -R..-1, 1..R.
        most_members: Longest group.

    Returns:
        float64 ``(H, Y, G, G)``: of the group of ``g + 1`` members from y with its anchor at ``y + a``, the sum of
        its members' errors; infinite where one of them does not exist or is beyond the radius.
    """
    heads, members, offsets = member_error.shape
    radius = offsets // 2
    most = min(most_members, 2 * radius + 1, members)
    stands = np.full((heads, members, members), np.inf)  # [member, anchor]
    stands[:, np.arange(members), np.arange(members)] = 0.0
    for index, offset in enumerate((*range(-radius, 0), *range(1, radius + 1))):
        those = np.arange(max(0, -offset), min(members, members - offset))
        stands[:, those, those + offset] = member_error[:, those, index]
    errors = np.full((heads, members, most, most), np.inf)
    for first in range(members):
        for size in range(1, min(most, members - first) + 1):
            group = slice(first, first + size)
            errors[:, first, size - 1, :size] = stands[:, group, group].sum(1)
    return errors


def best_groups(errors: Float64, price: Float64) -> list[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """The cheapest partition of the members for each head: exact, by dynamic programming.

    Args:
        errors: float64 ``(H, Y, G, G)`` of `copy_errors`, weighted.
        price: float64 ``(H,)``, of an anchor.

    Returns:
        For each head starts and anchors of the groups, and the sum of their errors. Of equals the shortest last group,
        the first anchor.
    """
    heads, members, most, _ = errors.shape
    anchor = errors.argmin(3)
    group = errors.min(3)
    best = np.zeros((heads, members + 1))
    size_at = np.zeros((heads, members + 1), dtype=np.int64)
    for stop in range(1, members + 1):
        sizes = np.arange(1, min(most, stop) + 1)
        cost = best[:, stop - sizes] + group[:, stop - sizes, sizes - 1] + price[:, None]
        at = cost.argmin(1)
        best[:, stop], size_at[:, stop] = cost[np.arange(heads), at], sizes[at]
    return [_trace(size_at[head], anchor[head], group[head]) for head in range(heads)]


def _trace(size_at: Int64, anchor: Int64, group: Float64) -> tuple[tuple[int, ...], tuple[int, ...], float]:
    starts, anchors, error, stop = [], [], 0.0, len(size_at) - 1
    while stop:
        size = int(size_at[stop])
        stop -= size
        starts.append(stop)
        anchors.append(stop + int(anchor[stop, size - 1]))
        error += float(group[stop, size - 1])
    return tuple(reversed(starts)), tuple(reversed(anchors)), error


def head_ms(job: Job, unit: UnitIR) -> Float64:
    """float64 ``(H,)``: milliseconds that fall with the rows computed."""
    tiles, blocks = unit.computed()
    dim = job.manifest.model.head_dim
    ms = [
        job.device.predict_ms(t, b, 0, unit.blocks, dim) for t, b in zip(tiles.tolist(), blocks.tolist(), strict=True)
    ]
    return np.array(ms)


def saved_ms(job: Job, unit: UnitIR, before: Bits, after: Bits) -> float:
    """Milliseconds that a head saves with these anchors, as lowered; negative if it would compute more blocks."""
    blocks = int(count(before, (0, 1))) - int(count(after, (0, 1)))
    if blocks < 0:
        return -1.0
    return job.device.predict_ms(len(before) - len(after), blocks, 0, unit.blocks, job.manifest.model.head_dim)
