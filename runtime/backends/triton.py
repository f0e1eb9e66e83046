"""The triton backend: one launch of `kernels.block_sparse` for all heads of a layer. CUDA, sm80 and later.

From sm90 on, keys and values come through TMA. What TMA cannot address is copied first, on every device: older ones,
too, read rows whose addresses are no multiples of 16 bytes much more slowly than they copy them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from calibatt.runtime.device_schedule import DeviceSchedule, other_tiles
from calibatt.runtime.kernels.block_sparse import block_sparse_forward
from calibatt.runtime.launch import (
    Launch,
    addressable,
    addressable_lengths,
    is_known_release,
    keep,
    layout_of,
    on_device,
    tile_strides,
)
from calibatt.runtime.schedule import Outline

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 32, 64, 128, 256)
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
    reasons = []
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
    launches = bound.derived(_no_launches)
    lengths = addressable_lengths(lengths)
    layout = (layout_of(q, k, v, addresses), scale, return_lse, video_start, lengths is None, config)
    launch = launches.get(layout)
    if launch is None:
        fit = addressable(q), addressable(k), addressable(v)
        if any(one is not other for one, other in zip(fit, (q, k, v), strict=True)):
            return run(*fit, bound, scale, return_lse, video_start, lengths, config=config)
    out = torch.empty_like(q)
    addresses.append(out.data_ptr())
    lse = None
    if return_lse:
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        addresses.append(lse.data_ptr())
    if lengths is not None:
        addresses.append(lengths.data_ptr())
    index = q.get_device()
    with on_device(index):
        if launch is not None:
            launch(driver.active.get_current_stream(index), *addresses)
            return out, lse
        grid, arguments = _first_launch(q, k, v, out, lse, bound, scale, video_start, lengths, config)
        if is_known_release() and not triton.knobs.runtime.interpret:
            moving = ["q_ptr", "k", "v", "out_ptr"]
            moving += [name for name in ("lse_ptr", "lengths_ptr") if arguments[name] is not None]
            keep(launches, layout, Launch(block_sparse_forward, grid, arguments, moving))
        else:
            block_sparse_forward[grid](**arguments)
    return out, lse


def _no_launches(bound: DeviceSchedule) -> dict[Any, Launch]:
    """Of a schedule: what was launched for it, by all that decides about it but addresses."""
    return {}


def _first_launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    bound: DeviceSchedule,
    scale: float,
    video_start: int,
    lengths: torch.Tensor | None,
    config: Config | None,
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The grid and the arguments of the kernel, launch options included."""
    batch, heads, all_tokens, head_dim = q.shape
    tokens = bound.core.grid.tokens
    blocks, sm = bound.core.blocks, device_sm(q.device)
    config = (config or table_row(sm)[head_dim]).fit(blocks.block_q, blocks.block_k)
    tma = sm >= TMA_SINCE

    def keys(x: torch.Tensor) -> torch.Tensor | TensorDescriptor:
        tile = [1, 1, config.block_n, head_dim]
        return TensorDescriptor(x, list(x.shape), tile_strides(x), tile) if tma else x

    def strides(name: str, x: torch.Tensor) -> dict[str, int]:
        return {f"{name}_stride_{axis}": stride for axis, stride in zip("bhn", x.stride(), strict=False)}

    arguments = {
        "q_ptr": q,
        "k": keys(k),
        "v": keys(v),
        "out_ptr": out,
        "lse_ptr": lse,
        "lengths_ptr": lengths,
        "tiles_ptr": bound.tiles,
        "columns_ptr": bound.columns,
        "heads_ptr": bound.heads,
        "query_token_ptr": bound.query_token,
        "query_first_ptr": bound.query_first,
        "query_copies_ptr": bound.query_copies,
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **strides("out", out),
        "heads": heads,
        "tokens": tokens,
        "all_tokens": all_tokens,
        "video_start": video_start,
        "scale_log2": scale * math.log2(math.e),
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
        **config.options,
    }
    tiles = len(bound.tiles) + heads * other_tiles(bound, all_tokens, video_start)
    return (tiles * (blocks.block_q // config.block_m), batch, 1), arguments
