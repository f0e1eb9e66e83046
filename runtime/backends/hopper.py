"""The hopper backend, sm90: one launch of `kernels.hopper` for all heads of a layer that have 16 bits, a small one
before for anchors; before those, where some heads have 8 bits, the launches of `prepass` and of `hopper_eight`.

Queries of the prefix and the suffix are computed in 16 bits, those of all heads in the launch of `kernels.hopper`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import triton

from calibatt.plans.precision import BF16, INT8, INT8_FP8
from calibatt.plans.schedule import FRAMES, NO_ANCHORS
from calibatt.runtime.backends import hopper_eight
from calibatt.runtime.device_schedule import DeviceSchedule, move, other_tiles
from calibatt.runtime.kernels.anchors import pack_queries
from calibatt.runtime.launch import Call, Given, Moving, make_room, run_again, tile_strides
from calibatt.runtime.prepass import Arrays, ByPrecision, arrays_for, by_precision, quantising
from calibatt.runtime.quantise import QUERY_GROUP
from calibatt.runtime.schedule import Outline

TESTED_RELEASES = ("3.6.0", "3.9.0")
"""Of Triton. Gluon is experimental: the tests compile the kernel under both, and it was executed under the first."""
BLOCKS_Q = (128,)
PRECISIONS = {BF16, INT8, INT8_FP8}
DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)
BLOCKS_K = (64, 128)
MOST_HEADS = 1 << 15
MOST_TILES = 1 << 16
"""Of a head: a tile's place is one integer."""
PACKED_ROWS = 64
"""Rows that a program of the anchor kernels moves."""


@dataclass(frozen=True, eq=False)
class Prepared(ByPrecision):
    """What the kernel needs of a schedule besides `DeviceSchedule`, on the same device.

    `tiles` are int32 ``(tiles, 4)``: place, start, stop, last key block; see `kernels.hopper.hopper_forward`.

    Args:
        anchored: int32, the heads of 16 bits that compute anchors only.
        packed_tokens: The most packed queries of such a head; 0 if there is none.
        receivers: int64 ``(patterns, tiles_of_pattern * 128)``; see `kernels.hopper.hopper_forward`.
        most_copies: The most tokens that receive the output of one query.
    """

    anchored: torch.Tensor
    packed_tokens: int
    receivers: torch.Tensor
    most_copies: int

    @property
    def tiles_of_pattern(self) -> int:
        return self.receivers.shape[1] // BLOCKS_Q[0]


def supports(outline: Outline, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Why this backend cannot execute the schedule; empty if it can."""
    reasons = [refusal] if (refusal := refused_release()) else []
    if device.type != "cuda":
        reasons.append(f"the device must be cuda, got {device}")
    elif not torch.cuda.is_available():
        reasons.append("no CUDA device is available")
    elif torch.cuda.get_device_capability(device) != (9, 0):
        major, minor = torch.cuda.get_device_capability(device)
        reasons.append(f"the device must be sm90, got sm{major}{minor}")
    blocks = outline.blocks
    for what, known, value in (
        ("the dtype", DTYPES, dtype),
        ("head_dim", HEAD_DIMS, head_dim),
        ("block_q", BLOCKS_Q, blocks.block_q),
        ("block_k", BLOCKS_K, blocks.block_k),
    ):
        if value not in known:
            reasons.append(f"{what} must be {' or '.join(str(each) for each in known)}, got {value}")
    for what, most, value in (("heads", MOST_HEADS, outline.heads), ("query blocks", MOST_TILES, outline.q_blocks)):
        if value > most:
            reasons.append(f"the number of {what} must be at most {most}, got {value}")
    return reasons


def refused_release(version: str = triton.__version__) -> str | None:
    """Why the kernel must not be used with a release of Triton; None if it may."""
    if version.split("+")[0] in TESTED_RELEASES:
        return None
    return f"triton must be {' or '.join(TESTED_RELEASES)}, for which the kernel was tested, got {version}"


def prepare(bound: DeviceSchedule) -> Prepared:
    """`Prepared` of a schedule; nothing waits for the device."""
    core, device = bound.core, bound.device
    is_anchored = core.head_anchor != NO_ANCHORS
    anchored = np.flatnonzero(is_anchored & (core.head_precision == BF16)).astype(np.int32)
    sizes = core.pattern_tokens.tolist()
    longest = max(sizes, default=0) if is_anchored.any() else 0
    most_copies = max((int(core.group_sizes(pattern).max()) for pattern in range(len(sizes))), default=1)
    head, tile, start, stop = bound.tiles.long().unbind(1)
    last = bound.columns.view(torch.int16)[stop - 1].int() & 0xFFFF
    place = (head << 16 | tile).int()
    of_pattern = -(-longest // BLOCKS_Q[0]) * BLOCKS_Q[0]
    receivers = torch.zeros(len(sizes), of_pattern, dtype=torch.int64, device=device)
    if is_anchored.any():
        pattern = move(torch.from_numpy(core.head_anchor.astype(np.int32)), device)[head]
        is_packed = pattern != NO_ANCHORS
        place = torch.where(is_packed, place | -(1 << 31), place)
        last = torch.where(is_packed, pattern << 16 | last, last)
        used = np.concatenate([number * of_pattern + np.arange(size) for number, size in enumerate(sizes)])
        far = move(torch.from_numpy(np.repeat(np.where(core.anchor_axis == FRAMES, -1, 0), sizes)), device) << 63
        both = bound.query_copies.long() << 32 | bound.query_first.long()
        receivers.view(-1)[move(torch.from_numpy(used), device)] = both[: len(used)] | far
    tiles = torch.stack([place, start.int(), stop.int(), last], 1).contiguous()
    parts = by_precision(bound, tiles)
    with_anchors = move(torch.from_numpy(anchored), device)
    return Prepared(*parts, with_anchors, longest if len(anchored) else 0, receivers, most_copies)


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bound: DeviceSchedule,
    scale: float,
    return_lse: bool,
    video_start: int = 0,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `runtime.backends`. q, k or v that TMA cannot address (16-byte strides) are copied first.

    Returns:
        out: ``(B, H, N, D)``, laid out in memory as q.
        lse: fp32 ``(B, H, N)`` if asked for.
    """
    made = bound.derived(prepare).made
    return run_again(
        q, k, v, lengths, return_lse, made, (scale, video_start), partial(_calls, bound, scale, video_start)
    )


def _calls(bound: DeviceSchedule, scale: float, video_start: int, given: Given) -> list[Call]:
    """What is launched for tensors of this layout."""
    from calibatt.runtime.kernels import gluon_compat, hopper  # Gluon: only where it is used

    q, k, v, out, counters, lse, lengths = given
    batch, heads, all_tokens, head_dim = q.value.shape
    ready, block_k, tokens = bound.derived(prepare), bound.core.blocks.block_k, bound.core.grid.tokens
    eight, anchored, others = ready.eight, ready.packed_tokens > 0, all_tokens > tokens
    arrays: Arrays = {}
    if eight is not None:
        arrays |= arrays_for(eight, bound, q.value, video_start, lse is not None)
        if len(eight.anchored):
            rows = (batch, len(eight.heads), eight.groups * QUERY_GROUP)
            arrays |= {"packed_out": ((*rows, head_dim), q.value.dtype)}
            arrays |= {} if lse is None else {"packed_lse": (rows, torch.float32)}
    if anchored:
        arrays["packed_q"] = (batch, heads, ready.packed_tokens, head_dim), q.value.dtype
    room, calls = make_room(q.value, arrays), []
    if eight is not None:
        calls = quantising(given, room, eight, bound, scale, video_start)
        calls += hopper_eight.forward(given, room, ready, eight, bound, video_start, processors(q.value.device))
        if len(eight.anchored):
            calls.append(hopper_eight.unpacking(given, room, eight, bound, ready.most_copies, video_start))
    head_tiles = other_tiles(bound, all_tokens, video_start)
    tiles = ready.counts[BF16] + heads * head_tiles
    if tiles == 0:
        return calls
    video = slice(video_start, video_start + tokens)
    if anchored:
        arguments = {
            "q_ptr": q.view(q.value[:, :, video]),
            "packed_ptr": room["packed_q"],
            "anchored_ptr": ready.anchored,
            "heads_ptr": bound.heads,
            "token_ptr": bound.query_token,
            **dict(zip(("stride_b", "stride_h", "stride_n"), q.value.stride(), strict=False)),
            "heads": heads,
            "packed_tokens": ready.packed_tokens,
            "ROWS": PACKED_ROWS,
            "HEAD_DIM": head_dim,
            "enable_fp_fusion": True,
        }
        grid = (len(ready.anchored), -(-ready.packed_tokens // PACKED_ROWS), batch)
        calls.append(Call(pack_queries, grid, arguments))
    group_q, described = hopper.GROUP_Q.value, hopper.described_layout()

    def describe(x: Moving | None, rows: int) -> Moving | None:
        if x is None:
            return None
        return x.described(gluon_compat.describe(x.value, tile_strides(x.value), [1, 1, rows, head_dim], described))

    arguments = {
        "q_desc": describe(q, group_q),
        "packed_q_desc": describe(room.get("packed_q"), group_q),
        "k_desc": describe(k, block_k),
        "v_desc": describe(v, block_k),
        "out_desc": describe(out.view(out.value[:, :, video]), group_q),
        "out_ptr": out if others or anchored else None,
        "lse_ptr": lse,
        "lengths": lengths,
        "tiles": ready.tiles,  # those of 16 bits come first; never an empty array, of which entries would be read
        "columns": bound.columns,
        "counter": counters,
        "receivers": ready.receivers if anchored else None,
        **dict(zip(("out_stride_b", "out_stride_h", "out_stride_n"), tile_strides(out.value), strict=False)),
        "row_tokens": bound.core.grid.width,
        "frame_tokens": bound.core.grid.height * bound.core.grid.width,
        "most_copies": ready.most_copies,
        "tokens": tokens,
        "all_tokens": all_tokens,
        "video_start": video_start,
        "heads": heads,
        "head_tiles": head_tiles,
        "prefix_tiles": bound.core.blocks.q_blocks(video_start),
        "tiles_of_batch": tiles,
        "tiles_of_pattern": ready.tiles_of_pattern,
        "work": tiles * batch,
        "scale_log2": scale * math.log2(math.e),
        "ANCHORED": anchored,
        "LSE": lse is not None,
        "KV_SLOTS": hopper.kv_slots(head_dim, block_k),
        "OTHERS": others,
        "PADDED": others and lengths is not None,
        **hopper.LAUNCH_OPTIONS,
    }
    grid = (min(processors(q.value.device), tiles * batch), 1, 1)
    return [*calls, Call(hopper.hopper_forward, grid, arguments)]


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
