"""The triton backend: one launch of `kernels.block_sparse` for all heads of a layer that have 16 bits, and, after those
of `prepass`, one for each precision of 8 bits. CUDA, sm80 and later.

From sm90 on, keys and values come through TMA. What TMA cannot address is copied first, on every device: older ones,
too, read rows whose addresses are no multiples of 16 bytes much more slowly than they copy them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from calibatt.plans.precision import BF16, INT8, INT8_FP8
from calibatt.plans.precision import PRECISIONS as NAMES
from calibatt.runtime import eight_bits
from calibatt.runtime.device_schedule import DeviceSchedule, other_tiles
from calibatt.runtime.kernels.block_sparse import block_sparse_forward
from calibatt.runtime.launch import Call, Given, Moving, make_room, run_again, tile_strides
from calibatt.runtime.prepass import ByPrecision, arrays_for, by_precision, quantising
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


def prepare(bound: DeviceSchedule) -> ByPrecision:
    """What is needed of a schedule besides `DeviceSchedule`, on the same device; nothing waits for that."""
    return ByPrecision(*by_precision(bound, bound.tiles))


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
    calls = partial(_calls, bound, scale, video_start, config)
    facts = (scale, video_start, config)
    return run_again(q, k, v, lengths, return_lse, bound.derived(prepare).made, facts, calls)


def _calls(bound: DeviceSchedule, scale: float, video_start: int, config: Config | None, given: Given) -> list[Call]:
    """What is launched for tensors of this layout."""
    q, out, lse, lengths = given.q, given.out, given.lse, given.lengths
    batch, heads, all_tokens, head_dim = q.value.shape
    ready, blocks, tokens = bound.derived(prepare), bound.core.blocks, bound.core.grid.tokens
    eight, sm = ready.eight, device_sm(q.value.device)
    config = (config or table_row(sm)[head_dim]).fit(blocks.block_q, blocks.block_k)
    calls: list[Call] = []
    room: dict[str, Moving] = {}
    if eight is not None:
        room = make_room(q.value, arrays_for(eight, bound, q.value, video_start, lse is not None))
        calls = quantising(given, room, eight, bound, scale, video_start)

    def keys(x: Moving, tile: tuple[int, int] = (config.block_n, head_dim)) -> Moving:
        if sm < TMA_SINCE:
            return x
        return x.described(TensorDescriptor(x.value, list(x.value.shape), tile_strides(x.value), [1, 1, *tile]))

    def strides(name: str, x: Moving) -> dict[str, int]:
        return {f"{name}_stride_{axis}": stride for axis, stride in zip("bhn", x.value.stride(), strict=False)}

    for precision, count in enumerate(ready.counts):
        in_int8, in_e4m3 = precision != BF16, precision == INT8_FP8
        tiles = ready.tiles_of(precision)
        if not in_int8:
            tiles = ready.tiles  # those of 16 bits come first; never an empty array, of which entries would be read
            count += heads * other_tiles(bound, all_tokens, video_start)
        if count == 0:
            continue
        codes = room if in_int8 else {}
        q, k = codes.get("q_codes", given.q), codes.get("k_codes", given.k)
        v = room["v_codes"] if in_e4m3 else given.v
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
            "slots_ptr": eight.slots if in_int8 else None,
            **{f"{name}_ptr": codes.get(name) for name in ("q_scales", "k_scales", "channels", "lse_shift")},
            **strides("q", q),
            **strides("k", k),
            **strides("v", v),
            **strides("out", out),
            "heads": heads,
            "tokens": tokens,
            "all_tokens": all_tokens,
            "video_start": video_start,
            "scale_log2": scale * math.log2(math.e),
            "eight_heads": len(eight.heads) if in_int8 else None,
            "q_groups": eight.groups if in_int8 else None,
            "key_blocks": room["k_scales"].value.shape[2] if in_int8 else None,
            "BLOCK_Q": blocks.block_q,
            "BLOCK_K": blocks.block_k,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "HEAD_DIM": head_dim,
            "TMA": sm >= TMA_SINCE,
            "PARTIAL": tokens % blocks.block_k != 0,
            "ANCHORED": bound.anchored,
            "LSE": lse is not None,
            "OTHERS": all_tokens > tokens,
            "PADDED": lengths is not None and all_tokens > tokens,
            "IN_INT8": in_int8,
            "IN_E4M3": in_e4m3,
            **config.options,
        }
        grid = (count * (blocks.block_q // config.block_m), batch, 1)
        calls.append(Call(block_sparse_forward, grid, arguments))
    return calls
