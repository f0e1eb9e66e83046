"""The triton backend: one launch of `kernels.block_sparse` for all heads of a layer that have 16 bits, and, after those
of `kernels.quantise`, one for each precision of 8 bits. CUDA, sm80 and later.

From sm90 on, keys and values come through TMA. What TMA cannot address is copied first, on every device: older ones,
too, read rows whose addresses are no multiples of 16 bytes much more slowly than they copy them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import triton
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from calibatt.plans.precision import BF16, INT8, INT8_FP8
from calibatt.plans.precision import PRECISIONS as NAMES
from calibatt.plans.schedule import NO_ANCHORS
from calibatt.runtime import eight_bits
from calibatt.runtime.backends.hopper_eight import TILE_GROUPS, Again, Call, EightHeads, quantising, room_for
from calibatt.runtime.device_schedule import DeviceSchedule, move, other_tiles
from calibatt.runtime.kernels.block_sparse import block_sparse_forward
from calibatt.runtime.launch import (
    addressable,
    addressable_lengths,
    is_known_release,
    keep,
    layout_of,
    on_device,
    tile_strides,
)
from calibatt.runtime.quantise import QUERY_GROUP
from calibatt.runtime.schedule import Outline

PRECISIONS = {BF16, INT8, INT8_FP8}
DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 32, 64, 128, 256)
EIGHT_HEAD_DIMS = (64, 128)
EIGHT_LEAST_BLOCK_K = 32
"""What a product of 8 bits sums."""
E4M3_SINCE = 89
"""The first sm that multiplies e4m3."""
TMA_SINCE = 90
"""The first sm with TMA."""
FEWEST_WARPS = 4
"""Of a program: wgmma takes four together."""


@dataclass(frozen=True)
class Config:
    """How the kernel cuts a block, and how it is compiled.

    Args:
        block_m: Queries at a time.
        block_n: Keys at a time.
        num_warps: Of a program.
        num_stages: Of the loop over keys.
        maxnreg: The most registers of a thread; None: as many as it asks for.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def fit(self, block_q: int, block_k: int) -> Config:
        """The same for blocks that may be smaller. Half the queries need half the warps, not fewer registers each."""
        if block_q < self.block_m:
            warps = max(FEWEST_WARPS, self.num_warps * block_q // self.block_m)
            return replace(self, block_m=block_q, num_warps=warps, maxnreg=None).fit(block_q, block_k)
        return replace(self, block_n=min(block_k, self.block_n))

    @property
    def options(self) -> dict[str, int | bool]:
        """What Triton is told besides the arguments."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


AMPERE = {
    16: Config(128, 64, 4, 3),
    32: Config(128, 64, 4, 3),
    64: Config(128, 64, 4, 3),
    128: Config(64, 64, 4, 2),
    256: Config(64, 32, 8, 2),
}
ADA = {**AMPERE, 128: Config(64, 32, 4, 2)}
HOPPER = {
    16: Config(128, 64, 8, 3, 128),
    32: Config(128, 64, 8, 3, 128),
    64: Config(128, 128, 8, 2, 128),
    128: Config(128, 64, 8, 2, 128),
    256: Config(128, 64, 8, 2),
}
BLACKWELL = {
    16: Config(128, 64, 4, 3),
    32: Config(128, 64, 4, 3),
    64: Config(128, 64, 4, 3),
    128: Config(128, 64, 8, 2, 128),
    256: Config(128, 64, 8, 2),
}
TABLE = {80: AMPERE, 86: ADA, 87: AMPERE, 89: ADA, 90: HOPPER, 100: BLACKWELL, 120: ADA}
"""Configurations by sm, then by head_dim, for two bytes an element; another sm takes the row of the last one before it.

Two were measured on an H200 with triton 3.6.0: HOPPER at head_dim 128, fastest of nine, and at 64, fastest of seven.
All others are arithmetic on what the compiler says (`tests/runtime/test_compile.py`): two programs an SM wherever
registers (65,536 an SM) and shared memory (164 KB on sm80 and sm87, 100 KB on sm86, sm89 and sm120, 228 KB on sm90 and
sm100) allow, since one then computes while the other waits; the largest tiles that leave them, with few spills (most on
sm100 at head_dim 128: up to 192 bytes a thread). Accumulators of 256 channels leave room for one.
"""


def supports(outline: Outline, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Why this backend cannot execute the schedule; empty if it can."""
    reasons, verdicts = judged(outline, device, dtype, head_dim)
    return reasons + [told for is_faster, told in verdicts if not is_faster]


def judged(
    outline: Outline, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[list[str], list[tuple[bool, str]]]:
    """Why this backend cannot execute the schedule, whatever was measured; and, of each precision of 8 bits that it can
    execute, `eight_bits.verdict`.
    """
    reasons, verdicts = [], []
    if device.type == "cuda":
        if not torch.cuda.is_available():
            reasons.append("no CUDA device is available")
        elif torch.cuda.get_device_capability(device) < (8, 0):
            major, minor = torch.cuda.get_device_capability(device)
            reasons.append(f"the device must be sm80 or later, got sm{major}{minor}")
    elif not (device.type == "cpu" and triton.knobs.runtime.interpret):
        reasons.append(f"the device must be cuda (or cpu with TRITON_INTERPRET=1), got {device}")
    if dtype not in DTYPES:
        reasons.append(f"the dtype must be float16 or bfloat16, got {dtype}")
    elif device.type == "cpu" and dtype == torch.bfloat16:
        reasons.append("triton's interpreter does not compute in bfloat16")
    if head_dim not in HEAD_DIMS:
        reasons.append(f"head_dim must be one of {HEAD_DIMS}, got {head_dim}")
    for precision in [] if reasons else sorted(outline.precisions - {BF16}):
        against = _eight_reasons(precision, outline, device, head_dim)
        reasons += against
        if not against and device.type == "cuda":
            verdicts.append(eight_bits.verdict(precision, device, head_dim, outline.grid.tokens))
    return reasons, verdicts


def _eight_reasons(precision: int, outline: Outline, device: torch.device, head_dim: int) -> list[str]:
    """Why heads of a precision of 8 bits cannot be executed."""
    reasons, name = [], NAMES[precision]
    if precision == INT8_FP8 and device_sm(device) < E4M3_SINCE:
        reasons.append(f"heads in {name} need a device of sm{E4M3_SINCE} or later, got sm{device_sm(device)}")
    if head_dim not in EIGHT_HEAD_DIMS:
        reasons.append(f"heads in {name} must have head_dim {' or '.join(map(str, EIGHT_HEAD_DIMS))}, got {head_dim}")
    if outline.blocks.block_k < EIGHT_LEAST_BLOCK_K:
        block_k = outline.blocks.block_k
        reasons.append(f"block_k must be at least {EIGHT_LEAST_BLOCK_K} for heads in {name}, got {block_k}")
    return reasons


def table_row(sm: int) -> dict[int, Config]:
    """The row of `TABLE` for an sm, 80 or later."""
    return TABLE[max(known for known in TABLE if known <= sm)]


@functools.cache
def device_sm(device: torch.device) -> int:
    """The device's sm; the interpreter is taken for the first one with TMA."""
    if device.type != "cuda":
        return TMA_SINCE
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@dataclass(frozen=True, eq=False)
class Prepared:
    """What is needed of a schedule besides `DeviceSchedule`, on the same device.

    Args:
        tiles: `DeviceSchedule.tiles`, by the precision of their heads.
        sixteen: How many of them, the first ones, are of heads of 16 bits.
        eight: The heads of 8 bits, by precision; their tiles likewise.
        launches: What was launched for this schedule, by all that decides about it but addresses: of each precision,
            with the bytes that it works in.
    """

    tiles: torch.Tensor
    sixteen: int
    eight: list[EightHeads]
    launches: dict[Any, list[tuple[Again, int]]] = field(default_factory=dict)


def prepare(bound: DeviceSchedule) -> Prepared:
    """`Prepared` of a schedule; nothing waits for the device."""
    core, tiles = bound.core, bound.tiles

    def there(numbers: Any) -> torch.Tensor:
        return move(torch.from_numpy(numbers.astype(np.int32)), bound.device)

    head_of_tile = np.repeat(np.arange(core.heads), np.diff(core.head_tile_ptr))[core.tile_order]
    precision_of_tile = core.head_precision[head_of_tile]
    counts = np.bincount(precision_of_tile, minlength=len(PRECISIONS)).tolist()
    if max(counts) < len(tiles):
        tiles = tiles[there(precision_of_tile.argsort(kind="stable"))]
    of_precision, eight = tiles.split(counts), []
    for precision in sorted(set(core.head_precision.tolist()) - {BF16}):
        heads = np.flatnonzero(core.head_precision == precision)
        slots = np.zeros(core.heads)
        slots[heads] = np.arange(len(heads))
        most_queries = max(core.tiles(int(head)) for head in heads) * core.blocks.block_q
        pairs = -(-most_queries // (TILE_GROUPS * QUERY_GROUP))
        anchored = there(heads[core.head_anchor[heads] != NO_ANCHORS])
        eight.append(EightHeads(precision, there(heads), there(slots), of_precision[precision], pairs, anchored))
    return Prepared(tiles, counts[BF16], eight)


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bound: DeviceSchedule,
    scale: float,
    return_lse: bool,
    video_start: int = 0,
    lengths: torch.Tensor | None = None,
    *,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `runtime.backends`; a config other than the table's is for measurements.

    Returns:
        out: ``(B, H, N, D)``, laid out in memory as q.
        lse: fp32 ``(B, H, N)`` if asked for.
    """
    addresses = [q.data_ptr(), k.data_ptr(), v.data_ptr()]
    ready = bound.derived(prepare)
    lengths = addressable_lengths(lengths)
    layout = (layout_of(q, k, v, addresses), scale, return_lse, video_start, lengths is None, config)
    launches = ready.launches.get(layout)
    if launches is None:
        fit = addressable(q), addressable(k), addressable(v)
        if any(one is not other for one, other in zip(fit, (q, k, v), strict=True)):
            return run(*fit, bound, scale, return_lse, video_start, lengths, config=config)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else None
    index = q.get_device()
    with on_device(index):
        if launches is not None:
            stream = driver.active.get_current_stream(index)
            for again, nbytes in launches:
                room = q.new_empty(nbytes, dtype=torch.uint8) if nbytes else None
                there = [x.data_ptr() if x is not None else 0 for x in (room, out, lse, lengths)]
                again(stream, *addresses, *there, 0)
            return out, lse
        made = []
        for eight in (*ready.eight, None):
            calls, nbytes = _calls(q, k, v, out, lse, bound, eight, scale, video_start, lengths, config)
            if is_known_release() and not triton.knobs.runtime.interpret:
                made.append((Again(calls), nbytes))
            else:
                for call in calls:
                    call.kernel[call.grid](**call.arguments)
        if made:
            keep(ready.launches, layout, made)
    return out, lse


def _calls(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    bound: DeviceSchedule,
    eight: EightHeads | None,
    scale: float,
    video_start: int,
    lengths: torch.Tensor | None,
    config: Config | None,
) -> tuple[list[Call], int]:
    """The launches for the heads of one precision, and the bytes of the room that they work in.

    Args:
        eight: The heads of 8 bits; None: those of 16, and the queries of the prefix and the suffix.
    """
    batch, heads, all_tokens, head_dim = q.shape
    tokens = bound.core.grid.tokens
    blocks, sm = bound.core.blocks, device_sm(q.device)
    config = (config or table_row(sm)[head_dim]).fit(blocks.block_q, blocks.block_k)
    tma, in_e4m3 = sm >= TMA_SINCE, eight is not None and eight.precision == INT8_FP8
    calls: list[Call] = []
    codes: dict[str, Any] = {}
    moving, nbytes, ready = {"q_ptr": ("q", 0), "k": ("k", 0), "v": ("v", 0)}, 0, bound.derived(prepare)
    tiles = ready.tiles  # those of 16 bits come first; never an empty array, of which entries would be read
    count = ready.sixteen + heads * other_tiles(bound, all_tokens, video_start)
    if eight is not None:
        # outputs of anchors are not packed here: their room is not needed
        room = room_for(replace(eight, anchored=eight.anchored[:0]), bound, q, video_start, lse is not None)
        tiles, count, nbytes = eight.tiles, len(eight.tiles), room.nbytes
        memory = q.new_empty(nbytes, dtype=torch.uint8)
        calls = quantising(q, k, v, lengths, room, memory, eight, bound, scale, video_start)
        codes = room.views(memory)
        q, k, v = codes["q_codes"], codes["k_codes"], codes.get("v_codes", v)
        sources = {"q_ptr": "q_codes", "k": "k_codes", "v": "v_codes", "lse_shift_ptr": "lse_shift"}
        sources |= {f"{name}_ptr": name for name in ("q_scales", "k_scales", "channels")}
        moving |= {name: ("room", room.offsets[source]) for name, source in sources.items() if source in room.offsets}
    elif count == 0:
        return [], 0

    def keys(x: torch.Tensor, tile: tuple[int, int] = (config.block_n, head_dim)) -> torch.Tensor | TensorDescriptor:
        tile = [1, 1, *tile]
        return TensorDescriptor(x, list(x.shape), tile_strides(x), tile) if tma else x

    def strides(name: str, x: torch.Tensor) -> dict[str, int]:
        return {f"{name}_stride_{axis}": stride for axis, stride in zip("bhn", x.stride(), strict=False)}

    arguments = {
        "q_ptr": q,
        "k": keys(k),
        "v": keys(v, (head_dim, config.block_n)) if in_e4m3 else keys(v),
        "out_ptr": out,
        "lse_ptr": lse,
        "lengths_ptr": lengths,
        "tiles_ptr": tiles,
        "columns_ptr": bound.columns,
        "heads_ptr": bound.heads,
        "query_token_ptr": bound.query_token,
        "query_first_ptr": bound.query_first,
        "query_copies_ptr": bound.query_copies,
        "slots_ptr": None if eight is None else eight.slots,
        "q_scales_ptr": codes.get("q_scales"),
        "k_scales_ptr": codes.get("k_scales"),
        "channels_ptr": codes.get("channels"),
        "lse_shift_ptr": codes.get("lse_shift"),
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **strides("out", out),
        "heads": heads,
        "tokens": tokens,
        "all_tokens": all_tokens,
        "video_start": video_start,
        "scale_log2": scale * math.log2(math.e),
        "eight_heads": None if eight is None else len(eight.heads),
        "q_groups": None if eight is None else codes["q_scales"].shape[2],
        "key_blocks": None if eight is None else codes["k_scales"].shape[2],
        "BLOCK_Q": blocks.block_q,
        "BLOCK_K": blocks.block_k,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "HEAD_DIM": head_dim,
        "TMA": tma,
        "PARTIAL": tokens % blocks.block_k != 0,
        "ANCHORED": bound.anchored,
        "LSE": lse is not None,
        "OTHERS": all_tokens > tokens,
        "PADDED": lengths is not None and all_tokens > tokens,
        "IN_INT8": eight is not None,
        "IN_E4M3": in_e4m3,
        **config.options,
    }
    moving["out_ptr"] = "out", 0
    moving |= {f"{name}_ptr": (name, 0) for name in ("lse", "lengths") if arguments[f"{name}_ptr"] is not None}
    grid = (count * (blocks.block_q // config.block_m), batch, 1)
    return [*calls, Call(block_sparse_forward, grid, arguments, moving)], nbytes
