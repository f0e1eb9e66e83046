"""The triton backend: one launch of `kernels.block_sparse` for all heads of a layer. CUDA, sm80 and later."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton

from calibatt.runtime.kernels.block_sparse import block_sparse_forward
from calibatt.runtime.schedule import DeviceSchedule, Outline

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Config:
    """How the kernel cuts a block: BLOCK_M x BLOCK_N scores at a time, and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, head_dim: int) -> int:
        """Shared memory of q and of the keys and values in flight (two bytes an element)."""
        return 2 * head_dim * (self.block_m + 2 * self.num_stages * self.block_n)


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


def choose_config(block_q: int, block_k: int, head_dim: int, shared_bytes: int) -> Config:
    """The largest key tile, then the deepest pipeline, that fits into `shared_bytes`; else the smallest."""
    block_m = min(block_q, 128)
    num_warps = 8 if block_m >= 128 and head_dim >= 128 else 4
    for block_n in (64, 32, 16):
        for num_stages in (3, 2):
            config = Config(block_m, min(block_k, block_n), num_warps, num_stages)
            if config.shared_bytes(head_dim) <= shared_bytes:
                return config
    return config


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one block may use on the device."""
    if device.type != "cuda":
        return 1 << 17  # the interpreter has no limit
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bound: DeviceSchedule,
    scale: float,
    return_lse: bool,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `runtime.backends`; a config other than the chosen one is for measurements.

    Returns:
        out: ``(B, H, N, D)``, laid out in memory as q.
        lse: fp32 ``(B, H, N)`` if asked for.
    """
    batch, heads, tokens, head_dim = q.shape
    blocks = bound.core.blocks
    config = config or choose_config(blocks.block_q, blocks.block_k, head_dim, shared_bytes(q.device))
    out = torch.empty_like(q)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device) if return_lse else None
    grid = (len(bound.tiles) * (blocks.block_q // config.block_m), batch)
    with torch.cuda.device_of(q):
        block_sparse_forward[grid](
            q, k, v, out, lse if return_lse else out,
            bound.tiles, bound.columns, bound.heads, bound.query_token, bound.query_first, bound.query_copies,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], heads * tokens, tokens,
            tokens, bound.core.grid.width, scale * math.log2(math.e),
            BLOCK_Q=blocks.block_q, BLOCK_K=blocks.block_k, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            HEAD_DIM=head_dim, PARTIAL=tokens % blocks.block_k != 0, ANCHORED=bound.anchored, LSE=return_lse,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse
