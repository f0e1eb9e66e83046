"""What the hopper backend launches for heads of one precision of 8 bits: `kernels.quantise`, `kernels.hopper_eight`.

Everything in between is in one piece of memory, the room, which a call takes and gives back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calibatt.plans.precision import INT8_FP8
from calibatt.runtime.device_schedule import DeviceSchedule
from calibatt.runtime.kernels import quantise as kernels
from calibatt.runtime.kernels.anchors import unpack_outputs
from calibatt.runtime.launch import Launch, tile_strides
from calibatt.runtime.quantise import E4M3_MOST, INT8_MOST, QUERY_GROUP, TINY

TILE_GROUPS = 2
"""Groups of `QUERY_GROUP` queries in a tile."""
CHUNK = 512
"""Keys that a program of `survey` adds up."""
SURVEY = {"ROWS": 16, "num_warps": 4}
SETTLE = {"CHUNKS": 32, "CHANNELS": 32, "num_warps": 4}
ROOM_ALIGNED = 256
BASES = ("q", "k", "v", "room", "out", "lse", "lengths", "counter")
"""What moves between calls. An address in a launch is one of these and an offset."""


@dataclass(frozen=True, eq=False)
class EightHeads:
    """The heads of a schedule that have one precision of 8 bits.

    Args:
        precision: `INT8` or `INT8_FP8`.
        heads: int32, their numbers, ascending.
        slots: int32, by head of the schedule, its place in `heads`.
        tiles: int32 ``(tiles, 4)``, as of `hopper.Prepared`: theirs.
        most_tiles: The most tiles of one of them.
        anchored: int32, those that compute anchors only.
    """

    precision: int
    heads: torch.Tensor
    slots: torch.Tensor
    tiles: torch.Tensor
    most_tiles: int
    anchored: torch.Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """A launch to be made.

    Args:
        kernel: The kernel.
        grid: The launch grid.
        arguments: By name, in the kernel's order, launch options included.
        moving: Of the arguments that move, the base of each and the bytes from there.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    moving: dict[str, tuple[str, int]]


class Room:
    """Arrays that follow each other in one piece of memory.

    Args:
        arrays: Name, shape and dtype of each.
    """

    def __init__(self, arrays: dict[str, tuple[Sequence[int], torch.dtype]]) -> None:
        self._arrays, self.offsets, self.nbytes = arrays, {}, 0
        for name, (shape, dtype) in arrays.items():
            self.offsets[name] = self.nbytes
            size = math.prod(shape) * dtype.itemsize
            self.nbytes += -(-size // ROOM_ALIGNED) * ROOM_ALIGNED

    def views(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """The arrays in a piece of memory, uint8 ``(nbytes,)``."""
        return {
            name: memory[self.offsets[name] :][: math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))
            for name, (shape, dtype) in self._arrays.items()
        }


def room_for(eight: EightHeads, bound: DeviceSchedule, q: torch.Tensor, video_start: int, lse: bool) -> Room:
    """The room of a call with q of this shape and dtype."""
    batch, _, all_tokens, head_dim = q.shape
    heads, groups, block_k = len(eight.heads), TILE_GROUPS * eight.most_tiles, bound.core.blocks.block_k
    of_head, blocks = (batch, heads), key_blocks(bound, all_tokens, video_start)
    arrays: dict[str, tuple[Sequence[int], torch.dtype]] = {
        "partial": ((*of_head, -(-all_tokens // CHUNK), 4, head_dim), torch.float32),
        "channels": ((*of_head, 3, head_dim), torch.float32),
        "q_codes": ((*of_head, groups * QUERY_GROUP, head_dim), torch.int8),
        "q_scales": ((*of_head, groups), torch.float32),
        "k_codes": ((*of_head, blocks * block_k, head_dim), torch.int8),
        "k_scales": ((*of_head, blocks), torch.float32),
    }
    if lse:
        arrays["lse_shift"] = ((*of_head, groups * QUERY_GROUP), torch.float32)
    if len(eight.anchored):
        arrays["packed_out"] = ((*of_head, groups * QUERY_GROUP, head_dim), q.dtype)
        arrays["packed_lse"] = ((*of_head, groups * QUERY_GROUP), torch.float32)
    if eight.precision == INT8_FP8:
        arrays["v_codes"] = ((*of_head, head_dim, blocks * block_k), torch.float8_e4m3fn)
    return Room(arrays)


def key_blocks(bound: DeviceSchedule, all_tokens: int, video_start: int) -> int:
    """Quantised blocks of a head: of the prefix, the video and the suffix, each by itself."""
    blocks, tokens = bound.core.blocks, bound.core.grid.tokens
    return sum(blocks.k_blocks(part) for part in (video_start, tokens, all_tokens - video_start - tokens))


def quantising(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor | None,
    room: Room,
    memory: torch.Tensor,
    eight: EightHeads,
    bound: DeviceSchedule,
    scale: float,
    video_start: int,
) -> list[Call]:
    """The launches that fill the room."""
    batch, _, all_tokens, head_dim = q.shape
    views, heads, tokens = room.views(memory), len(eight.heads), bound.core.grid.tokens
    values, anchored, block_k = eight.precision == INT8_FP8, len(eight.anchored) > 0, bound.core.blocks.block_k
    chunks, blocks = views["partial"].shape[2], views["k_scales"].shape[2]
    groups = views["q_scales"].shape[2]
    prefix_blocks = bound.core.blocks.k_blocks(video_start)
    common = {"heads_ptr": eight.heads, "lengths_ptr": lengths, "HEAD_DIM": head_dim}
    int8 = {"MOST": float(INT8_MOST), "TINY": TINY}
    parts = {
        "tokens": tokens, "video_start": video_start, "all_tokens": all_tokens, "prefix_blocks": prefix_blocks,
        "BLOCK_K": block_k, "num_warps": 8 if block_k * head_dim > 1 << 13 else 4,
    }  # fmt: skip

    def strides(name: str, x: torch.Tensor) -> dict[str, int]:
        return {f"{name}_stride_{axis}": stride for axis, stride in zip("bhn", tile_strides(x), strict=False)}

    def call(kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any], moving: dict[str, str]) -> Call:
        offset = {"q": video_start * q.stride(2) * q.element_size(), **room.offsets}
        places = {
            name: (source if source in BASES else "room", offset.get(source, 0)) for name, source in moving.items()
        }
        if lengths is not None and "lengths_ptr" in kernel.arg_names:
            places["lengths_ptr"] = ("lengths", 0)
        arrays = {name: views[source] for name, source in moving.items() if source in views}
        found = {**common, **arguments, **arrays}
        kept = {name: found[name] for name in kernel.arg_names if name in found}
        return Call(kernel, grid, {**kept, "num_warps": found["num_warps"], "enable_fp_fusion": False}, places)

    made = [
        call(
            kernels.survey, (heads, chunks, batch),
            {"k_ptr": k, "v_ptr": v, **strides("k", k), **strides("v", v), "all_tokens": all_tokens, "VALUES": values,
             "CHUNK": CHUNK, **SURVEY},
            {"k_ptr": "k", "v_ptr": "v", "partial_ptr": "partial"},
        ),
        call(
            kernels.settle, (heads, batch, head_dim // int(SETTLE["CHANNELS"])),
            {"all_tokens": all_tokens, "chunks": chunks, "MOST": float(E4M3_MOST), "TINY": TINY, "VALUES": values,
             **SETTLE},
            {"partial_ptr": "partial", "channels_ptr": "channels"},
        ),
        call(
            kernels.quantise_queries, (heads, groups, batch),
            {"q_ptr": q[:, :, video_start:], "packed_ptr": bound.heads if anchored else None,
             "query_token_ptr": bound.query_token if anchored else None, "lse_shift_ptr": None,
             **strides("q", q), "tokens": tokens, "scale": scale, "scale_log2": scale * math.log2(math.e), **int8,
             "ROWS": QUERY_GROUP, "ANCHORED": anchored, "num_warps": 4},
            {"q_ptr": "q", "channels_ptr": "channels", "codes_ptr": "q_codes", "scales_ptr": "q_scales",
             **({"lse_shift_ptr": "lse_shift"} if "lse_shift" in views else {})},
        ),
        call(
            kernels.quantise_keys, (heads, blocks, batch), {"k_ptr": k, **strides("k", k), **int8, **parts},
            {"k_ptr": "k", "channels_ptr": "channels", "codes_ptr": "k_codes", "scales_ptr": "k_scales"},
        ),
    ]  # fmt: skip
    if values:
        moving = {"v_ptr": "v", "channels_ptr": "channels", "codes_ptr": "v_codes"}
        made.append(
            call(kernels.quantise_values, (heads, blocks, batch), {"v_ptr": v, **strides("v", v), **parts}, moving)
        )
    return made


def forward(
    q: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    lengths: torch.Tensor | None,
    counter: torch.Tensor,
    room: Room,
    memory: torch.Tensor,
    eight: EightHeads,
    bound: DeviceSchedule,
    video_start: int,
    processors: int,
) -> Call:
    """The launch that computes, from the room."""
    from calibatt.runtime.kernels import gluon_compat, hopper, hopper_eight  # Gluon: only where it is used

    batch, heads, all_tokens, head_dim = q.shape
    tokens, block_k, views = bound.core.grid.tokens, bound.core.blocks.block_k, room.views(memory)
    values, others, anchored = "v_codes" in views, all_tokens > tokens, len(eight.anchored) > 0
    tiles = len(eight.tiles)

    def describe(x: torch.Tensor | None, rows: int, row: int) -> Any:
        if x is None:
            return None
        layout = hopper_eight.row_layout(row, 8 * x.element_size(), 4)
        return gluon_compat.describe(x, tile_strides(x), [1, 1, rows, row], layout)

    arguments = {
        "q_desc": describe(views["q_codes"], QUERY_GROUP, head_dim),
        "k_desc": describe(views["k_codes"], block_k, head_dim),
        "v_desc": describe(views["v_codes"], head_dim, block_k) if values else describe(v, block_k, head_dim),
        "out_desc": describe(out[:, :, video_start : video_start + tokens], QUERY_GROUP, head_dim),
        "packed_out_desc": describe(views.get("packed_out"), QUERY_GROUP, head_dim),
        "lse_ptr": lse,
        "packed_lse": views.get("packed_lse") if lse is not None else None,
        "lengths": lengths,
        "tiles": eight.tiles,
        "columns": bound.columns,
        "counter": counter,
        "slots": eight.slots,
        "q_scales": views["q_scales"],
        "k_scales": views["k_scales"],
        "channels": views["channels"],
        "lse_shift": views.get("lse_shift"),
        "tokens": tokens,
        "all_tokens": all_tokens,
        "video_start": video_start,
        "heads": heads,
        "eight_heads": len(eight.heads),
        "q_groups": views["q_scales"].shape[2],
        "key_blocks": views["k_scales"].shape[2],
        "tiles_of_batch": tiles,
        "work": tiles * batch,
        "ANCHORED": anchored,
        "LSE": lse is not None,
        "KV_SLOTS": hopper_eight.kv_slots(head_dim, block_k, 1 if values else 2),
        "OTHERS": others,
        "PADDED": others and lengths is not None,
        **hopper.LAUNCH_OPTIONS,
    }
    sources = {"q_desc": "q_codes", "k_desc": "k_codes", "packed_out_desc": "packed_out"}
    moving = {
        "v_desc": ("room", room.offsets["v_codes"]) if values else ("v", 0),
        "out_desc": ("out", video_start * out.stride(2) * out.element_size()),
        "lse_ptr": ("lse", 0),
        "lengths": ("lengths", 0),
        "counter": ("counter", 0),
        **{
            name: ("room", room.offsets[source])
            for name in arguments
            if (source := sources.get(name, name)) in room.offsets
        },
    }
    there = {name: place for name, place in moving.items() if arguments[name] is not None}
    return Call(hopper_eight.hopper_eight_forward, (min(processors, tiles * batch), 1, 1), arguments, there)


def unpacking(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    room: Room,
    memory: torch.Tensor,
    eight: EightHeads,
    bound: DeviceSchedule,
    most_copies: int,
    video_start: int,
) -> list[Call]:
    """The launch that copies outputs of anchors to their groups, where there are any."""
    if len(eight.anchored) == 0:
        return []
    batch, heads, all_tokens, head_dim = out.shape
    views = room.views(memory)
    packed_tokens = views["packed_out"].shape[2]
    arguments = {
        "packed_ptr": views["packed_out"],
        "packed_lse_ptr": views["packed_lse"] if lse is not None else None,
        "heads_ptr": eight.anchored,
        "slots_ptr": eight.slots,
        "packed_heads_ptr": bound.heads,
        "first_ptr": bound.query_first,
        "copies_ptr": bound.query_copies,
        "out_ptr": out,
        "lse_ptr": lse,
        **dict(zip(("stride_b", "stride_h", "stride_n"), tile_strides(out), strict=False)),
        "eight_heads": len(eight.heads),
        "packed_tokens": packed_tokens,
        "heads": heads,
        "all_tokens": all_tokens,
        "video_start": video_start,
        "most_copies": most_copies,
        "ROWS": QUERY_GROUP,
        "HEAD_DIM": head_dim,
        "num_warps": 4,
    }
    moving = {"packed_ptr": ("room", room.offsets["packed_out"]), "out_ptr": ("out", 0)}
    if lse is not None:
        moving.update({"packed_lse_ptr": ("room", room.offsets["packed_lse"]), "lse_ptr": ("lse", 0)})
    grid = (len(eight.anchored), packed_tokens // QUERY_GROUP, batch)
    return [Call(unpack_outputs, grid, arguments, moving)]


class Again:
    """Launches that were made once, to be made again.

    Args:
        calls: What to launch, in order; it is launched.
    """

    def __init__(self, calls: list[Call]) -> None:
        self._launches = [
            (
                Launch(call.kernel, call.grid, call.arguments, list(call.moving)),
                [(BASES.index(base), offset) for base, offset in call.moving.values()],
            )
            for call in calls
        ]

    def __call__(self, stream: int, *bases: int) -> None:
        """Launches on a stream of the current device; `bases` are the addresses of `BASES`."""
        for launch, places in self._launches:
            launch(stream, *(bases[base] + offset for base, offset in places))
