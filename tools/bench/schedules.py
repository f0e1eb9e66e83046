"""Synthetic schedules of a stated density, for benches of speed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from calibatt.plans import NO_ANCHORS, ROWS, Blocks, LayerSchedule, TokenGrid
from calibatt.runtime.schedule import AttentionSchedule, ListedSchedule

Ints = npt.NDArray[Any]
GROUP = 3
"""Rows, or frames, of an anchor group in the anchored cases."""


def plain_core(
    grid: TokenGrid, blocks: Blocks, lengths: Ints, columns: Ints, head_list: Ints, tile_order: Ints
) -> LayerSchedule:
    """A schedule without anchors.

    Args:
        grid: The token sequence.
        blocks: Block sizes.
        lengths: Of every list.
        columns: All lists, one after the other.
        head_list: Each head's first list, or `plans.DENSE`.
        tile_order: In which order tiles are taken.
    """
    nothing = np.zeros(0, np.int32)
    return LayerSchedule(
        grid=grid,
        blocks=blocks,
        row_ptr=np.append(0, lengths.cumsum()).astype(np.int32),
        col_idx=columns.astype(np.uint16),
        head_list=head_list.astype(np.int32),
        head_anchor=np.full(len(head_list), NO_ANCHORS, np.int32),
        anchor_ptr=np.zeros(1, np.int32),
        anchor_axis=nothing,
        group_start=nothing,
        group_anchor=nothing,
        tile_order=tile_order.astype(np.int32),
    )


def structured_schedule(
    grid: TokenGrid, blocks: Blocks, heads: int, density: float, seed: int = 0, neighbours: int = 8
) -> AttentionSchedule:
    """A schedule of listed heads, longest tiles first within a head, whose masks change slowly from tile to tile.

    Args:
        grid: The token sequence.
        blocks: Block sizes.
        heads: Number of heads.
        density: Mean share of key blocks kept; a tile keeps up to 20 % more or fewer.
        seed: Of the generator.
        neighbours: Over how many tiles the random scores of a key block are averaged; 1: masks are random.
    """
    rng = np.random.default_rng(seed)
    tiles, columns = blocks.q_blocks(grid.tokens), blocks.k_blocks(grid.tokens)
    lists = []
    for _ in range(heads):
        total = rng.standard_normal((tiles + neighbours, columns), dtype=np.float32).cumsum(axis=0)
        ranking = (total[neighbours:] - total[:-neighbours]).argsort(axis=1)
        spread = 0.2 * (density < 1)
        kept = density * columns * rng.uniform(1 - spread, 1 + spread, tiles)
        lists += [
            np.sort(row[-n:]) for row, n in zip(ranking, np.clip(kept.round(), 1, columns).astype(int), strict=True)
        ]
    lengths = np.array([len(each) for each in lists])
    order = np.lexsort((-lengths, np.repeat(np.arange(heads), tiles)))
    core = plain_core(grid, blocks, lengths, np.concatenate(lists), np.arange(heads) * tiles, order)
    core.check()
    return ListedSchedule(core)


def in_precision(schedule: AttentionSchedule, precision: int) -> AttentionSchedule:
    """The same with all heads in a precision."""
    core = schedule.core
    return ListedSchedule(replace(core, head_precision=np.full(core.heads, precision, np.uint8)))


def anchored_schedule(schedule: AttentionSchedule, axis: int) -> AttentionSchedule:
    """The same with groups of `GROUP` rows or frames in every head, the second of each computed; a packed tile keeps
    what its first query's tile did.
    """
    core = schedule.core
    grid, blocks, heads = core.grid, core.blocks, core.heads
    if axis == ROWS:
        starts = (np.arange(grid.frames)[:, None] * grid.height + np.arange(0, grid.height, GROUP)).reshape(-1)
    else:
        starts = np.arange(0, grid.frames, GROUP)
    size = grid.width if axis == ROWS else grid.height * grid.width
    last = np.append(starts[1:], grid.tokens // size) - 1
    anchors = np.minimum(starts + 1, last)
    packed = len(anchors) * size
    token = (anchors[:, None] * size + np.arange(size)).reshape(-1)
    source = token[:: blocks.block_q] // blocks.block_q
    lists = [
        core.col_idx[core.row_ptr[core.head_list[head] + tile] : core.row_ptr[core.head_list[head] + tile + 1]]
        for head in range(heads)
        for tile in source
    ]
    lengths, tiles = np.array([len(each) for each in lists]), blocks.q_blocks(packed)
    made = replace(
        core,
        row_ptr=np.append(0, lengths.cumsum()).astype(np.int32),
        col_idx=np.concatenate(lists),
        head_list=np.arange(heads, dtype=np.int32) * tiles,
        head_anchor=np.zeros(heads, np.int32),
        anchor_ptr=np.array([0, len(anchors)], np.int32),
        anchor_axis=np.array([axis], np.int32),
        group_start=starts.astype(np.int32),
        group_anchor=anchors.astype(np.int32),
        tile_order=np.lexsort((-lengths, np.repeat(np.arange(heads), tiles))).astype(np.int32),
    )
    made.check()
    return ListedSchedule(made)
