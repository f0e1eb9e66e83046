"""The hopper backend, sm90: one launch of `kernels.hopper` for all heads of a layer that have 16 bits, a small one
before for anchors, and those of `hopper_eight` for each precision of 8 bits.

Queries of the prefix and the suffix are computed in 16 bits, those of all heads in the launch of `kernels.hopper`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
from triton.runtime import driver

from calibatt.plans.precision import BF16, INT8, INT8_FP8
from calibatt.plans.schedule import FRAMES, NO_ANCHORS
from calibatt.runtime.backends import hopper_eight
from calibatt.runtime.backends.hopper_eight import EightHeads
from calibatt.runtime.device_schedule import DeviceSchedule, move, other_tiles
from calibatt.runtime.kernels.anchors import pack_queries
from calibatt.runtime.launch import (
    Launch,
    addressable,
    addressable_lengths,
    keep,
    layout_of,
    on_device,
    tile_strides,
)
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


_counters: dict[tuple[torch.device, int], torch.Tensor] = {}
"""One for each stream of each device."""


@dataclass(frozen=True)
class Launches:
    """Of one layout of q, k and v.

    Args:
        pack: Of `pack_queries`, where some heads of 16 bits compute anchors only.
        forward: Of `hopper_forward`; None where it has nothing to do.
        by_address: Whether that stores some outputs by address.
        eight: Of the heads of each precision of 8 bits.
        rooms: Bytes that each of these works in.
    """

    pack: Launch | None
    forward: Launch | None
    by_address: bool
    eight: list[hopper_eight.Again]
    rooms: list[int]


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the kernel needs of a schedule besides `DeviceSchedule`, on the same device.

    Args:
        all_tiles: int32 ``(tiles, 4)``: place, start, stop, last key block; see `kernels.hopper.hopper_forward`. Those
            of heads of one precision follow each other, by precision.
        anchored: int32, the heads of 16 bits that compute anchors only.
        packed_tokens: The most packed queries of such a head; 0 if there is none.
        receivers: int64 ``(patterns, tiles_of_pattern * 128)``; see `kernels.hopper.hopper_forward`.
        most_copies: The most tokens that receive the output of one query.
        eight: The heads of 8 bits, by precision.
        launches: What was launched for this schedule, by all that decides about it but addresses.
    """

    all_tiles: torch.Tensor
    anchored: torch.Tensor
    packed_tokens: int
    receivers: torch.Tensor
    most_copies: int
    eight: list[EightHeads]
    launches: dict[Any, Launches] = field(default_factory=dict)

    @property
    def tiles(self) -> torch.Tensor:
        """Of the heads of 16 bits."""
        return self.all_tiles[: len(self.all_tiles) - sum(len(eight.tiles) for eight in self.eight)]

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
    head_of_tile = np.repeat(np.arange(core.heads), np.diff(core.head_tile_ptr))[core.tile_order]
    precision_of_tile = core.head_precision[head_of_tile]
    counts = np.bincount(precision_of_tile, minlength=len(PRECISIONS))
    if counts.max() < len(tiles):
        tiles = tiles[move(torch.from_numpy(precision_of_tile.argsort(kind="stable")), device)]
    eight = []
    for precision in sorted(set(core.head_precision.tolist()) - {BF16}):
        heads = np.flatnonzero(core.head_precision == precision)
        slots = np.zeros(core.heads, np.int32)
        slots[heads] = np.arange(len(heads))
        parts = (heads, slots, heads[is_anchored[heads]])
        there = [move(torch.from_numpy(each.astype(np.int32)), device) for each in parts]
        first = int(counts[:precision].sum())
        theirs, most = tiles[first : first + counts[precision]], max(core.tiles(int(each)) for each in heads)
        eight.append(EightHeads(precision, there[0], there[1], theirs, most, there[2]))
    with_anchors = move(torch.from_numpy(anchored), device)
    return Prepared(tiles, with_anchors, longest if len(anchored) else 0, receivers, most_copies, eight)


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
    ready = bound.derived(prepare)
    addresses = [q.data_ptr(), k.data_ptr(), v.data_ptr()]
    lengths = addressable_lengths(lengths)
    layout = (layout_of(q, k, v, addresses), scale, return_lse, video_start, lengths is None)
    launches = ready.launches.get(layout)
    if launches is None:
        fit = addressable(q), addressable(k), addressable(v)
        if any(one is not other for one, other in zip(fit, (q, k, v), strict=True)):
            return run(*fit, bound, scale, return_lse, video_start, lengths)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else None
    packed_q = None
    if ready.packed_tokens > 0:
        packed_q = q.new_empty((q.shape[0], q.shape[1], ready.packed_tokens, q.shape[3]))
    index = q.get_device()
    with on_device(index):
        stream = driver.active.get_current_stream(index)
        counter = work_counter(q.device, stream)
        if launches is None:
            made = _first_launches(q, k, v, out, lse, packed_q, counter, bound, scale, video_start, lengths)
            keep(ready.launches, layout, made)
            return out, lse
        for again, nbytes in zip(launches.eight, launches.rooms, strict=True):
            room = q.new_empty(nbytes, dtype=torch.uint8)
            there = (x.data_ptr() if x is not None else 0 for x in (room, out, lse, lengths, counter))
            again(stream, *addresses, *there)
        if launches.forward is None:
            return out, lse
        q_at, video = addresses[0], video_start * q.element_size()
        addresses += [out.data_ptr() + video * out.stride(2), counter.data_ptr()]
        if packed_q is not None:
            packed_at = packed_q.data_ptr()
            launches.pack(stream, q_at + video * q.stride(2), packed_at)
            addresses.append(packed_at)
        addresses += [x.data_ptr() for x in (out if launches.by_address else None, lse, lengths) if x is not None]
        launches.forward(stream, *addresses)
    return out, lse


def _first_launches(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    packed_q: torch.Tensor | None,
    counter: torch.Tensor,
    bound: DeviceSchedule,
    scale: float,
    video_start: int,
    lengths: torch.Tensor | None,
) -> Launches:
    """Launches with everything that need not be asked again for tensors of this layout."""
    from calibatt.runtime.kernels import gluon_compat, hopper  # Gluon: only where it is used

    batch, heads, all_tokens, head_dim = q.shape
    tokens = bound.core.grid.tokens
    again, rooms = _first_eight(q, k, v, out, lse, counter, bound, scale, video_start, lengths)
    others, padded = all_tokens > tokens, lengths is not None and all_tokens > tokens
    ready, block_k = bound.derived(prepare), bound.core.blocks.block_k
    anchored = ready.packed_tokens > 0
    by_address = others or anchored
    video = slice(video_start, video_start + tokens)
    head_tiles = other_tiles(bound, all_tokens, video_start)
    tiles = len(ready.tiles) + heads * head_tiles
    if tiles == 0:
        return Launches(None, None, False, again, rooms)
    group_q, described = hopper.GROUP_Q.value, hopper.described_layout()
    moving = ["q_desc", "k_desc", "v_desc", "out_desc", "counter"]
    pack = None
    if packed_q is not None:
        moving.append("packed_q_desc")
        arguments = {
            "q_ptr": q[:, :, video],
            "packed_ptr": packed_q,
            "anchored_ptr": ready.anchored,
            "heads_ptr": bound.heads,
            "token_ptr": bound.query_token,
            **dict(zip(("stride_b", "stride_h", "stride_n"), q.stride(), strict=False)),
            "heads": heads,
            "packed_tokens": ready.packed_tokens,
            "ROWS": PACKED_ROWS,
            "HEAD_DIM": head_dim,
            "enable_fp_fusion": True,
        }
        grid = (len(ready.anchored), -(-ready.packed_tokens // PACKED_ROWS), batch)
        pack = Launch(pack_queries, grid, arguments, ["q_ptr", "packed_ptr"])
    for name, is_there in (("out_ptr", by_address), ("lse_ptr", lse is not None), ("lengths", lengths is not None)):
        if is_there:
            moving.append(name)

    def describe(x: torch.Tensor | None, rows: int) -> Any:
        return None if x is None else gluon_compat.describe(x, tile_strides(x), [1, 1, rows, head_dim], described)

    arguments = {
        "q_desc": describe(q, group_q),
        "packed_q_desc": describe(packed_q, group_q),
        "k_desc": describe(k, block_k),
        "v_desc": describe(v, block_k),
        "out_desc": describe(out[:, :, video], group_q),
        "out_ptr": out if by_address else None,
        "lse_ptr": lse,
        "lengths": lengths,
        "tiles": ready.all_tiles,  # those of 16 bits come first; never an empty array, of which entries would be read
        "columns": bound.columns,
        "counter": counter,
        "receivers": ready.receivers if anchored else None,
        **dict(zip(("out_stride_b", "out_stride_h", "out_stride_n"), tile_strides(out), strict=False)),
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
        "PADDED": padded,
        **hopper.LAUNCH_OPTIONS,
    }
    grid = (min(processors(q.device), tiles * batch), 1, 1)
    return Launches(pack, Launch(hopper.hopper_forward, grid, arguments, moving), by_address, again, rooms)


def _first_eight(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    counter: torch.Tensor,
    bound: DeviceSchedule,
    scale: float,
    video_start: int,
    lengths: torch.Tensor | None,
) -> tuple[list[hopper_eight.Again], list[int]]:
    """The launches of the heads of 8 bits, and the bytes that each precision works in."""
    ready, again, rooms = bound.derived(prepare), [], []
    for eight in ready.eight:
        room = hopper_eight.room_for(eight, bound, q, video_start, lse is not None)
        memory = q.new_empty(room.nbytes, dtype=torch.uint8)
        calls = hopper_eight.quantising(q, k, v, lengths, room, memory, eight, bound, scale, video_start)
        last = hopper_eight.forward(
            q, v, out, lse, lengths, counter, room, memory, eight, bound, video_start, processors(q.device)
        )
        copies = hopper_eight.unpacking(out, lse, room, memory, eight, bound, ready.most_copies, video_start)
        again.append(hopper_eight.Again([*calls, last, *copies]))
        rooms.append(room.nbytes)
    return again, rooms


def work_counter(device: torch.device, stream: int) -> torch.Tensor:
    """Where the CTAs of a launch count tiles; 0 before and after.

    Launches on one stream follow each other and share one. A CUDA graph, which may be replayed on any stream, has its
    own for every launch, and sets it itself.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    counter = _counters.get((device, stream))
    if counter is None:
        counter = _counters[device, stream] = torch.zeros(1, dtype=torch.int32, device=device)
    return counter


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
