"""Schedules of block masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from calibatt.plans.precision import BF16
from calibatt.plans.schedule import DENSE, NO_ANCHORS, Int32, LayerSchedule, UInt8
from calibatt.plans.schema import Blocks, TokenGrid


def schedule_of(
    grid: TokenGrid,
    blocks: Blocks,
    heads: Sequence[UInt8],
    *,
    precision: UInt8 | None = None,
    patterns: Sequence[tuple[int, npt.ArrayLike, npt.ArrayLike]] = (),
    head_anchor: Sequence[int] | None = None,
    tile_order: Int32 | None = None,
) -> LayerSchedule:
    """The schedule of these masks: dense heads list nothing, and heads with equal masks share their lists.

    Args:
        grid: The video's tokens.
        blocks: Block sizes.
        heads: The mask of each head, uint8 ``(tiles, ceil(K / 8))``, a bit for each key block; no row is empty.
        precision: uint8 ``(heads,)``; all `BF16` if absent.
        patterns: For each anchor pattern its axis, the first members of its groups, and their anchors.
        head_anchor: The pattern of each head, or `NO_ANCHORS`; all `NO_ANCHORS` if absent.
        tile_order: The order in which tiles are executed; `natural_order` if absent.
    """
    full = np.packbits(np.ones(blocks.k_blocks(grid.tokens), np.bool_), bitorder="little")
    firsts: dict[bytes, int] = {}
    head_list, listed = [], [np.zeros((0, len(full)), np.uint8)]
    for bits in heads:
        if (bits == full).all():
            head_list.append(DENSE)
        elif (key := bits.tobytes()) in firsts:
            head_list.append(firsts[key])
        else:
            head_list.append(firsts.setdefault(key, sum(map(len, listed))))
            listed.append(bits)
    starts, anchors = ([np.asarray(each[which]) for each in patterns] for which in (1, 2))
    none = np.zeros(0, np.int64)
    made = LayerSchedule(
        grid=grid,
        blocks=blocks,
        list_bits=np.concatenate(listed),
        head_list=np.array(head_list, np.int32),
        head_anchor=np.array([NO_ANCHORS] * len(heads) if head_anchor is None else head_anchor, np.int32),
        anchor_ptr=np.append(0, np.cumsum([len(each) for each in starts])).astype(np.int32),
        anchor_axis=np.array([axis for axis, _, _ in patterns], np.int32),
        group_start=np.concatenate([none, *starts]).astype(np.int32),
        group_anchor=np.concatenate([none, *anchors]).astype(np.int32),
        tile_order=np.zeros(0, np.int32) if tile_order is None else tile_order,
        head_precision=np.full(len(heads), BF16, np.uint8) if precision is None else precision,
    )
    return replace(made, tile_order=natural_order(made)) if tile_order is None else made


def natural_order(schedule: LayerSchedule) -> Int32:
    """The tile order that a plan file need not store: `longest_first`."""
    return longest_first([schedule.tile_lengths(head) for head in range(schedule.heads)])


def longest_first(lengths: Sequence[npt.NDArray[np.int64]]) -> Int32:
    """Tile ids: head after head, in a head the longest list first, lists of one length in their order."""
    order, first = [np.zeros(0, np.int64)], 0
    for each in lengths:
        falling = (each.max(initial=0) - each).astype(np.uint16)  # lengths are 1 to 65536; a radix sort is stable
        order.append(first + np.argsort(falling, kind="stable"))
        first += len(each)
    return np.concatenate(order).astype(np.int32)
