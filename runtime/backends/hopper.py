"""The hopper backend: one launch of `kernels.hopper` for all heads of a layer, two small ones for anchor rows. sm90."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton

from calibatt.plans.schedule import NO_ANCHORS
from calibatt.runtime.kernels.anchors import pack_queries, spread_rows
from calibatt.runtime.schedule import DeviceSchedule, Outline

TESTED_RELEASES = ("3.6.0", "3.9.0")
"""Of Triton. Gluon is experimental: the tests compile the kernel under both, and it was executed under the first."""
BLOCKS_Q = (128,)
DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)
BLOCKS_K = (64, 128)
MOST_HEADS = 1 << 15
MOST_TILES = 1 << 16
"""Of a head: a tile's place is one integer."""
ALIGNED_BYTES = 16
"""Of addresses and strides that TMA takes."""
PACKED_ROWS = 64
"""Rows that a program of the anchor kernels moves."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the kernel needs of a schedule besides `DeviceSchedule`, on the same device.

    Args:
        tiles: int32 ``(tiles, 4)``: place, start, stop, last key block; see `kernels.hopper.hopper_forward`.
        anchored: int32, the heads that compute anchor rows only.
        packed_tokens: The most packed queries of such a head.
        compiled: Variants of the kernel that have been launched for this schedule.
    """

    tiles: torch.Tensor
    anchored: torch.Tensor
    packed_tokens: int
    compiled: dict[Any, Any] = field(default_factory=dict)


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
    core = bound.core
    anchored = np.flatnonzero(core.head_anchor != NO_ANCHORS).astype(np.int32)
    packed = max((core.packed_tokens(int(head)) for head in anchored), default=0)
    head, tile, start, stop = bound.tiles.long().unbind(1)
    last = bound.columns.view(torch.int16)[stop - 1].int() & 0xFFFF
    place = (head << 16 | tile).int()
    if len(anchored):
        is_anchored = torch.zeros(core.heads, dtype=torch.bool)
        is_anchored[torch.from_numpy(anchored).long()] = True
        flagged = is_anchored.to(bound.device, non_blocking=True)[head]
        place = torch.where(flagged, place | -(1 << 31), place)
    tiles = torch.stack([place, start.int(), stop.int(), last], 1).contiguous()
    return Prepared(tiles, torch.from_numpy(anchored).to(bound.device, non_blocking=True), packed)


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bound: DeviceSchedule, scale: float, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `runtime.backends`. q, k or v that TMA cannot address (16-byte strides) are copied first.

    Returns:
        out: ``(B, H, N, D)``, laid out in memory as q.
        lse: fp32 ``(B, H, N)`` if asked for.
    """
    from calibatt.runtime.kernels import gluon_compat, hopper  # Gluon: only where it is used

    batch, heads, tokens, head_dim = q.shape
    q, k, v = addressable(q), addressable(k), addressable(v)
    out = torch.empty_like(q)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device) if return_lse else None
    ready = bound.derived(prepare)
    tiles, block_k = len(ready.tiles), bound.core.blocks.block_k
    packed_q = packed_out = packed_lse = None
    packed_grid = (-(-ready.packed_tokens // PACKED_ROWS), len(ready.anchored), batch)
    if bound.anchored:
        packed_q, packed_out = (q.new_empty(batch, heads, ready.packed_tokens, head_dim) for _ in range(2))
        packed_lse = lse.new_empty(batch, heads, ready.packed_tokens) if lse is not None else None
    group_q, layout = hopper.GROUP_Q.value, hopper.described_layout()

    def describe(x: torch.Tensor | None, rows: int) -> Any:
        return None if x is None else gluon_compat.describe(x, tile_strides(x), [1, 1, rows, head_dim], layout)

    arguments = {
        "q_desc": describe(q, group_q),
        "packed_q_desc": describe(packed_q, group_q),
        "k_desc": describe(k, block_k),
        "v_desc": describe(v, block_k),
        "out_desc": describe(out, group_q),
        "packed_out_desc": describe(packed_out, group_q),
        "lse_ptr": lse,
        "packed_lse_ptr": packed_lse,
        "tiles": ready.tiles,
        "columns": bound.columns,
        "counter": torch.zeros(1, dtype=torch.int32, device=q.device),
        "tokens": tokens,
        "packed_tokens": ready.packed_tokens,
        "heads": heads,
        "tiles_of_batch": tiles,
        "work": tiles * batch,
        "scale_log2": scale * math.log2(math.e),
        "ANCHORED": bound.anchored,
        "LSE": return_lse,
        "KV_SLOTS": hopper.kv_slots(head_dim, block_k),
        **hopper.LAUNCH_OPTIONS,
    }
    with torch.cuda.device_of(q):
        if packed_q is not None:
            pack_queries[packed_grid](
                q, packed_q, ready.anchored, bound.heads, bound.query_token, *q.stride()[:3], heads,
                ready.packed_tokens, ROWS=PACKED_ROWS, HEAD_DIM=head_dim,
            )  # fmt: skip
        grid = (min(processors(q.device), tiles * batch), 1, 1)
        gluon_compat.launch(
            hopper.hopper_forward, ready.compiled, (batch, q.dtype, head_dim, return_lse), grid, arguments
        )
        if packed_q is not None:
            spread_rows[packed_grid](
                packed_out, packed_lse, out, lse, ready.anchored, bound.heads, bound.query_first, bound.query_copies,
                *out.stride()[:3], heads, ready.packed_tokens, tokens, bound.core.grid.width,
                ROWS=PACKED_ROWS, HEAD_DIM=head_dim, LSE=return_lse,
            )  # fmt: skip
    return out, lse


def addressable(x: torch.Tensor) -> torch.Tensor:
    """x itself, or a copy if TMA cannot address it: its start and its strides must be multiples of 16 bytes, not 0."""
    unit = ALIGNED_BYTES // x.element_size()
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1]
    if x.data_ptr() % ALIGNED_BYTES == 0 and all(stride > 0 and stride % unit == 0 for stride in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def tile_strides(x: torch.Tensor) -> list[int]:
    """Strides of ``(B, H, N, D)`` for TMA; that of a dimension of one may be any."""
    head_dim = x.shape[3]
    strides = [stride if size > 1 else head_dim for stride, size in zip(x.stride()[:3], x.shape, strict=False)]
    return [*strides, 1]


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
