"""What goes before the attention of heads of 8 bits, whichever backend computes it: which heads these are, the arrays
that are made for them, and the launches of `kernels.quantise` that fill these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from calibatt.plans.precision import BF16, INT8_FP8, PRECISIONS
from calibatt.plans.schedule import NO_ANCHORS
from calibatt.runtime.device_schedule import DeviceSchedule, move
from calibatt.runtime.kernels import quantise as kernels
from calibatt.runtime.launch import ARRIVALS, Call, Given, Launches, Moving, tile_strides
from calibatt.runtime.quantise import E4M3_MOST, INT8_MOST, QUERY_GROUP, TINY

TILE_GROUPS = 2
"""Groups of `QUERY_GROUP` queries in a tile of `hopper`; arrays end with a whole one."""
SURVEY = {"CHUNK": 512, "ROWS": 16, "CHUNKS": 32, "CHANNELS": 32}
"""Tokens that a program of `survey` adds up, and how many at a time; then sums at a time, of so many channels."""

Arrays = dict[str, tuple[Sequence[int], torch.dtype]]


@dataclass(frozen=True, eq=False)
class EightHeads:
    """The heads of a schedule that have 8 bits; those of `INT8_FP8` come first.

    Args:
        heads: int32, their numbers.
        value_heads: How many are of `INT8_FP8`.
        slots: int32, by head of the schedule, its place in `heads`.
        groups: Groups of `QUERY_GROUP` queries, of the head that computes most.
        anchored: int32, the numbers of those that compute anchors only.
    """

    heads: torch.Tensor
    value_heads: int
    slots: torch.Tensor
    groups: int
    anchored: torch.Tensor


@dataclass(frozen=True, eq=False)
class ByPrecision:
    """A schedule's tiles, those of heads of one precision after those of another.

    Args:
        tiles: int32 ``(tiles, 4)``, of all heads.
        counts: How many are of each precision.
        eight: The heads of 8 bits; absent if there are none.
        made: What was launched for this schedule, by all that decides about it but addresses.
    """

    tiles: torch.Tensor
    counts: list[int]
    eight: EightHeads | None
    made: dict[Any, Launches] = field(default_factory=dict, init=False)

    def tiles_of(self, precision: int) -> torch.Tensor:
        first = sum(self.counts[:precision])
        return self.tiles[first : first + self.counts[precision]]


def by_precision(bound: DeviceSchedule, tiles: torch.Tensor) -> tuple[torch.Tensor, list[int], EightHeads | None]:
    """The first three of `ByPrecision`; nothing waits for the device.

    Args:
        bound: The schedule.
        tiles: Of all heads, in execution order.
    """
    core = bound.core

    def there(numbers: Any) -> torch.Tensor:
        return move(torch.from_numpy(numbers.astype(np.int32)), bound.device)

    head_of_tile = np.repeat(np.arange(core.heads), np.diff(core.head_tile_ptr))[core.tile_order]
    precision_of_tile = core.head_precision[head_of_tile]
    counts = np.bincount(precision_of_tile, minlength=len(PRECISIONS)).tolist()
    if max(counts) < len(tiles):
        tiles = tiles[there(precision_of_tile.argsort(kind="stable"))]
    in_e4m3 = core.head_precision == INT8_FP8
    heads = np.concatenate([np.flatnonzero(in_e4m3), np.flatnonzero(~in_e4m3 & (core.head_precision != BF16))])
    if len(heads) == 0:
        return tiles, counts, None
    slots = np.zeros(core.heads)
    slots[heads] = np.arange(len(heads))
    most_queries = max(core.tiles(int(head)) for head in heads) * core.blocks.block_q
    groups = TILE_GROUPS * -(-most_queries // (TILE_GROUPS * QUERY_GROUP))
    anchored = there(heads[core.head_anchor[heads] != NO_ANCHORS])
    return tiles, counts, EightHeads(there(heads), int(in_e4m3.sum()), there(slots), groups, anchored)


def arrays_for(eight: EightHeads, bound: DeviceSchedule, q: torch.Tensor, video_start: int, lse: bool) -> Arrays:
    """What a call with q of this shape makes for its heads of 8 bits."""
    batch, _, all_tokens, head_dim = q.shape
    blocks = bound.core.blocks
    parts = video_start, bound.core.grid.tokens, all_tokens - video_start - bound.core.grid.tokens
    key_blocks = sum(blocks.k_blocks(part) for part in parts)
    of_head, keys = (batch, len(eight.heads)), key_blocks * blocks.block_k
    chunks = -(-all_tokens // SURVEY["CHUNK"])
    arrays: Arrays = {
        "partial": ((batch, len(eight.heads) + eight.value_heads, chunks, 3, head_dim), torch.float32),
        "channels": ((*of_head, 3, head_dim), torch.float32),
        "q_codes": ((*of_head, eight.groups * QUERY_GROUP, head_dim), torch.int8),
        "q_scales": ((*of_head, eight.groups), torch.float32),
        "k_codes": ((*of_head, keys, head_dim), torch.int8),
        "k_scales": ((*of_head, key_blocks), torch.float32),
    }
    if lse:
        arrays["lse_shift"] = ((*of_head, eight.groups * QUERY_GROUP), torch.float32)
    if eight.value_heads:
        arrays["v_codes"] = ((batch, eight.value_heads, head_dim, keys), torch.float8_e4m3fn)
    return arrays


def quantising(
    given: Given,
    room: dict[str, Moving],
    eight: EightHeads,
    bound: DeviceSchedule,
    scale: float,
    video_start: int,
) -> list[Call]:
    """The launches that fill the arrays of `arrays_for`, which are in the room, from q, k and v."""
    q, k, v = given.q, given.k, given.v
    batch, _, all_tokens, head_dim = q.value.shape
    heads, chunks = len(eight.heads), room["partial"].value.shape[2]
    key_blocks, groups = room["k_scales"].value.shape[2], room["q_scales"].value.shape[2]
    blocks, anchored = bound.core.blocks, len(eight.anchored) > 0
    fixed = {"TINY": TINY, "HEAD_DIM": head_dim, "enable_fp_fusion": False}
    strides = {
        f"{name}_stride_{axis}": stride
        for name, x in (("q", q), ("k", k), ("v", v))
        for axis, stride in zip("bhn", tile_strides(x.value), strict=False)
    }
    from_k = {name: stride for name, stride in strides.items() if name[0] != "q"}
    common = {"k_ptr": k, "v_ptr": v, "heads_ptr": eight.heads, "lengths_ptr": given.lengths}
    survey = {
        **common,
        "arrivals_ptr": given.counters.view(given.counters.value[ARRIVALS:]),
        "partial_ptr": room["partial"],
        "channels_ptr": room["channels"],
        **from_k,
        "all_tokens": all_tokens,
        "heads": heads,
        "chunks": chunks,
        "MOST": float(E4M3_MOST),
        **SURVEY,
        **fixed,
        "num_warps": 4,
    }
    names = ("channels", "q_codes", "q_scales", "lse_shift", "k_codes", "k_scales", "v_codes")
    quantise = {
        "q_ptr": q.view(q.value[:, :, video_start:]),
        **common,
        "packed_ptr": bound.heads if anchored else None,
        "query_token_ptr": bound.query_token if anchored else None,
        **{f"{name}_ptr": room.get(name) for name in names},
        **strides,
        "tokens": bound.core.grid.tokens,
        "video_start": video_start,
        "all_tokens": all_tokens,
        "prefix_blocks": blocks.k_blocks(video_start),
        "key_blocks": key_blocks,
        "q_groups": groups,
        "value_heads": eight.value_heads,
        "scale": scale,
        "scale_log2": scale * math.log2(math.e),
        "MOST": float(INT8_MOST),
        "ROWS": QUERY_GROUP,
        "BLOCK_K": blocks.block_k,
        "ANCHORED": anchored,
        **fixed,
        "num_warps": 8 if blocks.block_k * head_dim > 1 << 13 else 4,
    }
    parts = key_blocks * (2 if eight.value_heads else 1) + groups
    return [
        Call(kernels.survey, (heads + eight.value_heads, chunks, batch), survey),
        Call(kernels.quantise, (heads, parts, batch), quantise),
    ]
