"""Synthetic schedules of a stated density, for benches of speed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from calibatt.plans import NO_ANCHORS, ROWS, Blocks, LayerSchedule, TokenGrid, longest_first
from calibatt.runtime.schedule import AttentionSchedule, ListedSchedule

GROUP = 3
"""Rows, or frames, of an anchor group in the anchored cases."""


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
    keep = np.zeros((heads, tiles, columns), np.bool_)
    for head in range(heads):
        total = rng.standard_normal((tiles + neighbours, columns), dtype=np.float32).cumsum(axis=0)
        ranking = (total[neighbours:] - total[:-neighbours]).argsort(axis=1)
        spread = 0.2 * (density < 1)
        kept = density * columns * rng.uniform(1 - spread, 1 + spread, tiles)
        most = np.clip(kept.round(), 1, columns).astype(int)
        np.put_along_axis(keep[head], ranking, np.arange(columns) >= columns - most[:, None], axis=1)
    core = LayerSchedule(
        grid=grid,
        blocks=blocks,
        list_bits=np.packbits(keep.reshape(-1, columns), axis=1, bitorder="little"),
        head_list=np.arange(heads, dtype=np.int32) * tiles,
        head_anchor=np.full(heads, NO_ANCHORS, dtype=np.int32),
        anchor_ptr=np.zeros(1, dtype=np.int32),
        anchor_axis=np.zeros(0, dtype=np.int32),
        group_start=np.zeros(0, dtype=np.int32),
        group_anchor=np.zeros(0, dtype=np.int32),
        tile_order=longest_first([*keep.sum(2)]),
        head_precision=np.zeros(heads, np.uint8),
    )
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
    token = (anchors[:, None] * size + np.arange(size)).reshape(-1)
    source = token[:: blocks.block_q] // blocks.block_q
    bits = [core.list_bits[core.head_list[head] + source] for head in range(heads)]
    tiles = len(source)
    made = replace(
        core,
        list_bits=np.concatenate(bits),
        head_list=np.arange(heads, dtype=np.int32) * tiles,
        head_anchor=np.zeros(heads, np.int32),
        anchor_ptr=np.array([0, len(anchors)], np.int32),
        anchor_axis=np.array([axis], np.int32),
        group_start=starts.astype(np.int32),
        group_anchor=anchors.astype(np.int32),
        tile_order=longest_first([np.bitwise_count(each).sum(1, dtype=np.int64) for each in bits]),
    )
    made.check()
    return ListedSchedule(made)
