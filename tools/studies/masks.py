"""Block masks as tensors, executed by the very kernels that execute plans."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from calibatt.compiler.bits import pack
from calibatt.compiler.ir import full_bits
from calibatt.plans import Blocks, LayerSchedule, TokenGrid, schedule_of
from calibatt.runtime.backends import load_backend
from calibatt.runtime.device_schedule import DeviceSchedule
from calibatt.runtime.schedule import ListedSchedule

KERNEL_DTYPE = torch.float16
"""On a GPU, queries, keys and values are rounded to it: normalised values keep 11 bits, and the kernel adds in fp32."""


@lru_cache(maxsize=16)
def _dense_core(heads: int, grid: TokenGrid, blocks: Blocks) -> LayerSchedule:
    """What a kernel reads of a core: grid and blocks; its lists are those of dense heads."""
    return schedule_of(grid, blocks, [full_bits(blocks.q_blocks(grid.tokens), blocks.k_blocks(grid.tokens))] * heads)


def bind_mask(keep: Tensor, grid: TokenGrid, blocks: Blocks) -> DeviceSchedule:
    """A mask ready for a kernel; on a GPU it never leaves the device, and nothing waits for it.

    Args:
        keep: bool ``(H, Q, K)``, a block in every row.
        grid: The token sequence.
        blocks: Block sizes.
    """
    if keep.device.type != "cuda":
        return ListedSchedule(schedule_of(grid, blocks, [*pack(keep.numpy())])).bind("cpu")
    heads, q_blocks, k_blocks = keep.shape
    device, rows = keep.device, heads * q_blocks
    kept_first = keep.byte().argsort(dim=2, descending=True, stable=True).to(torch.int16).flatten()
    row = torch.arange(rows, device=device)
    count = keep.sum(2).flatten()
    start = row * k_blocks
    tiles = torch.stack([row // q_blocks, row % q_blocks, start, start + count], 1).to(torch.int32)
    queries = torch.tensor([grid.tokens, 0, 0], dtype=torch.int32, device=device).repeat(heads, 1)
    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    columns = torch.cat([kept_first, kept_first[:1]]).view(torch.uint16)
    core = _dense_core(heads, grid, blocks)
    return DeviceSchedule(core, device, tiles, columns, queries, nothing, nothing, nothing)


def kernel_dtype(q: Tensor) -> torch.dtype:
    """The dtype in which q is multiplied: its own where it has 16 bits or is on a CPU."""
    return KERNEL_DTYPE if q.is_cuda and q.element_size() > 2 else q.dtype


def attend(q: Tensor, k: Tensor, v: Tensor, bound: DeviceSchedule) -> Tensor:
    """Attention ``(B, H, N, D)`` over a bound schedule of H heads by the kernel for the device, in q's dtype.

    Raises:
        ValueError: There are other tokens than those of the video, which these masks do not know.
    """
    return _run(q, k, v, bound, False)[0]


def _run(q: Tensor, k: Tensor, v: Tensor, bound: DeviceSchedule, lse: bool) -> tuple[Tensor, Tensor | None]:
    if q.shape[2] != (tokens := bound.core.grid.tokens):
        raise ValueError(f"masks must be of all tokens, {tokens} of the video, got {q.shape[2]}")
    inputs = (x.to(kernel_dtype(q)) for x in (q, k, v))
    out, sums = load_backend("triton" if q.is_cuda else "torch").run(*inputs, bound, q.shape[-1] ** -0.5, lse)
    return out.to(q.dtype), sums


def masked_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, grid: TokenGrid, blocks: Blocks) -> Tensor:
    """Attention ``(B, H, N, D)`` with a mask for each sample, bool ``(B, H, Q, K)``; all of them in one launch."""
    return masked_with_lse(q, k, v, keep, grid, blocks)[0]


def masked_with_lse(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, grid: TokenGrid, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """`masked_attention`, and log of the sum of exponentials of the kept, scaled scores ``(B, H, N)``."""
    shape = q.shape
    bound = bind_mask(keep.flatten(0, 1), grid, blocks)
    folded = [x.reshape(1, shape[0] * shape[1], *shape[2:]) for x in (q, k, v)]
    out, lse = _run(*folded, bound, True)
    assert lse is not None
    return out.view(shape), lse.view(shape[:3])


def with_top(keep: Tensor, score: Tensor) -> Tensor:
    """The mask with at least the block of the highest score in every row."""
    return keep | torch.zeros_like(keep).scatter_(-1, score.argmax(-1, keepdim=True), True)
