"""Rows that are computed once and copied to their neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from calibatt.compiler.bits import Bits, count, pack, unpack
from calibatt.compiler.ir import Float64, Groups, Int64, Job, UnitIR, packed_keep
from calibatt.compiler.passes import Findings, Pass
from calibatt.plans import Blocks, TokenGrid


@dataclass(frozen=True)
class Anchors(Pass):
    """Gives heads with repetitive output rows anchor rows, where that is cheaper than computing every row.

    For each head, dynamic programming finds the partition of a frame's rows into groups, and an anchor in each, of
    least copy error x weight x `safety` + price of the computed rows (a row at its share of the head's predicted
    milliseconds); every frame has the same groups. The head adopts it only if that is still cheaper when lowered:
    a packed tile keeps what any of its queries' blocks keeps, so packing rows apart can cost more than it saves.

    Another `select` after it spends what was saved: milliseconds are then worth less, and heads whose anchors are no
    longer worth their error lose them again; where the error is bounded, it brings the job back within the bound.

    Requires: `select`, whose multiplier prices a millisecond.
    Ensures: no head computes more blocks than before.

    Args:
        safety: Factor on the copy error; 1: a copy costs what was measured (docs/ablations.md compares others).
        max_group_rows: Most rows of a group, its anchor included; 1 does nothing.

    Raises:
        PassError: An option is out of range, or `select` has not been run.
    """

    name: ClassVar[str] = "anchors"
    safety: float = 1.0
    max_group_rows: int = 4

    def __post_init__(self) -> None:
        self.require(self.safety > 0, "safety", "be positive", self.safety)
        self.require(self.max_group_rows >= 1, "max-group-rows", "be at least 1", self.max_group_rows)

    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        multiplier = job.multiplier
        self.require(multiplier is not None and unit.keep is not None, "select", "come before", "no multiplier")
        assert multiplier is not None
        self.require(not unit.anchors, "anchors", "come once", unit.name)
        grid, radius = unit.grid, job.manifest.row_radius
        unit.anchors = [None] * unit.heads
        found = {"heads_with_anchors": 0.0, "heads": unit.heads, "dearer_when_lowered": 0.0, "rows": 0.0}
        if radius == 0 or self.max_group_rows == 1 or unit.force_dense:
            return found
        share = self.safety * grid.frames * grid.width / grid.tokens
        weight = np.full(unit.heads, unit.weight) if unit.head_weight is None else unit.head_weight
        errors = copy_errors(unit.means.row_residual_error, self.max_group_rows)
        errors *= (share * weight)[:, None, None, None]
        price = multiplier * head_ms(job, unit) / grid.height
        for head, (groups, error) in enumerate(best_groups(errors, price)):
            if len(groups[0]) == grid.height:
                continue
            before = unit.tile_bits(head)
            after = packed_bits(before, unit.k_blocks, grid, unit.blocks, groups[1])
            if multiplier * saved_ms(job, unit, before, after) <= error:
                found["dearer_when_lowered"] += 1
                continue
            unit.anchors[head], unit.packed[head] = groups, after
            unit.error[head] += error / weight[head]
            found["heads_with_anchors"] += 1
            found["rows"] += len(groups[0])
        return found

    def report(self, job: Job, total: Findings) -> dict[str, Any]:
        adopted, rows = total["heads_with_anchors"], total.pop("rows")
        found: dict[str, Any] = {name: int(value) for name, value in total.items()}
        return {**found, "rows_computed_in_them": rows / (adopted * job.manifest.grid.height) if adopted else 1.0}


def copy_errors(row_error: Float64, most_rows: int) -> Float64:
    """Error of every short group with its best anchor.

    Args:
        row_error: float64 ``(H, Y, 2 R)``: error of row r + d standing for row r; offsets -R..-1, 1..R.
        most_rows: Longest group.

    Returns:
        float64 ``(H, Y, G, G)``: of the group of ``g + 1`` rows from row y with its anchor at ``y + a``, the sum of
        its rows' errors; infinite where the group leaves the frame or its rows are beyond the radius.
    """
    heads, height, offsets = row_error.shape
    radius = offsets // 2
    most = min(most_rows, 2 * radius + 1, height)
    stands = np.full((heads, height, height), np.inf)  # [row, anchor]
    stands[:, np.arange(height), np.arange(height)] = 0.0
    for index, offset in enumerate((*range(-radius, 0), *range(1, radius + 1))):
        rows = np.arange(max(0, -offset), min(height, height - offset))
        stands[:, rows, rows + offset] = row_error[:, rows, index]
    errors = np.full((heads, height, most, most), np.inf)
    for first in range(height):
        for size in range(1, min(most, height - first) + 1):
            group = slice(first, first + size)
            errors[:, first, size - 1, :size] = stands[:, group, group].sum(1)
    return errors


def best_groups(errors: Float64, row_price: Float64) -> list[tuple[Groups, float]]:
    """The cheapest partition of the rows of a frame for each head: exact, by dynamic programming.

    Args:
        errors: float64 ``(H, Y, G, G)`` of `copy_errors`, weighted.
        row_price: float64 ``(H,)``, the price of an anchor row.

    Returns:
        For each head the groups, and the sum of their errors. Of equals the shortest last group, the first anchor.
    """
    heads, height, most, _ = errors.shape
    anchor = errors.argmin(3)
    group = errors.min(3)
    best = np.zeros((heads, height + 1))
    size_at = np.zeros((heads, height + 1), dtype=np.int64)
    for stop in range(1, height + 1):
        sizes = np.arange(1, min(most, stop) + 1)
        cost = best[:, stop - sizes] + group[:, stop - sizes, sizes - 1] + row_price[:, None]
        at = cost.argmin(1)
        best[:, stop], size_at[:, stop] = cost[np.arange(heads), at], sizes[at]
    return [_trace(size_at[head], anchor[head], group[head]) for head in range(heads)]


def _trace(size_at: Int64, anchor: Int64, group: Float64) -> tuple[Groups, float]:
    starts, rows, error, stop = [], [], 0.0, len(size_at) - 1
    while stop:
        size = int(size_at[stop])
        stop -= size
        starts.append(stop)
        rows.append(stop + int(anchor[stop, size - 1]))
        error += float(group[stop, size - 1])
    return (tuple(reversed(starts)), tuple(reversed(rows))), error


def head_ms(job: Job, unit: UnitIR) -> Float64:
    """float64 ``(H,)``: milliseconds that fall with the rows computed."""
    tiles, blocks = unit.computed()
    dim = job.manifest.model.head_dim
    ms = [
        job.device.predict_ms(t, b, 0, unit.blocks, dim) for t, b in zip(tiles.tolist(), blocks.tolist(), strict=True)
    ]
    return np.array(ms)


def packed_bits(bits: Bits, k_blocks: int, grid: TokenGrid, blocks: Blocks, frame_anchors: tuple[int, ...]) -> Bits:
    """`packed_keep` of a packed mask."""
    return pack(packed_keep(unpack(bits, k_blocks), grid, blocks, frame_anchors))


def saved_ms(job: Job, unit: UnitIR, before: Bits, after: Bits) -> float:
    """Milliseconds that a head saves with these anchors, as lowered; negative if it would compute more blocks."""
    blocks = int(count(before, (0, 1))) - int(count(after, (0, 1)))
    if blocks < 0:
        return -1.0
    return job.device.predict_ms(len(before) - len(after), blocks, 0, unit.blocks, job.manifest.model.head_dim)
