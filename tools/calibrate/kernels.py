"""Block mass and block error on a GPU: scores are recomputed a tile at a time, twice, and never leave the chip."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from calibatt.plans import Blocks

LOG2E = 1.4426950408889634
MAX_TILE = 128
ROWS = 128
"""Queries of a program: those measured of one query block, or of several where few of each are."""
HEAD_DIMS = (16, 32, 64, 128)


@triton.jit
def _tile(q, k_ptr, start, tokens, stride_kn, scale_log2, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Scores in log2 units ``(M, BLOCK_K)`` of a tile of queries against the keys from `start`."""
    keys = start + tl.arange(0, BLOCK_K)
    dims = tl.arange(0, HEAD_DIM)
    k = tl.load(k_ptr + keys[:, None].to(tl.int64) * stride_kn + dims[None], mask=keys[:, None] < tokens, other=0.0)
    scores = tl.dot(q, tl.trans(k)) * scale_log2
    return tl.where(keys[None] < tokens, scores, float("-inf"))


@triton.jit
def _block_means(x, exists, count, GROUP: tl.constexpr, SAMPLES: tl.constexpr):
    """Means over each block's measured queries, ``(GROUP,)``, of one value a query."""
    return tl.sum(tl.reshape(tl.where(exists, x, 0.0), (GROUP, SAMPLES)), 1) / count


@triton.jit
def _block_statistics(
    q_ptr,
    k_ptr,
    v_ptr,
    mass_ptr,
    error_ptr,
    tokens,
    q_blocks,
    k_blocks,
    stride_qh,
    stride_qn,
    stride_kh,
    stride_kn,
    stride_vh,
    stride_vn,
    query_stride,
    scale_log2,
    BLOCK_Q: tl.constexpr,
    GROUP: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """One program per (GROUP query blocks, head): first their softmax and output, then mass and error of key blocks.

    Each query block has SAMPLES queries, of which those beyond the block or the sequence do not count.
    """
    head = tl.program_id(1).to(tl.int64)
    sample = tl.arange(0, GROUP * SAMPLES)
    dims = tl.arange(0, HEAD_DIM)
    within = sample % SAMPLES * query_stride
    rows = (tl.program_id(0) * GROUP + sample // SAMPLES) * BLOCK_Q + within
    exists = (within < BLOCK_Q) & (rows < tokens)
    count = tl.maximum(tl.sum(tl.reshape(exists.to(tl.float32), (GROUP, SAMPLES)), 1), 1.0)
    q = tl.load(
        q_ptr + head * stride_qh + rows[:, None].to(tl.int64) * stride_qn + dims[None], mask=exists[:, None], other=0.0
    )
    keys_ptr = k_ptr + head * stride_kh
    values_ptr = v_ptr + head * stride_vh
    top = tl.full([GROUP * SAMPLES], float("-inf"), tl.float32)
    total = tl.zeros([GROUP * SAMPLES], tl.float32)
    output = tl.zeros([GROUP * SAMPLES, HEAD_DIM], tl.float32)
    for column in range(0, k_blocks):
        start = column * BLOCK_K
        scores = _tile(q, keys_ptr, start, tokens, stride_kn, scale_log2, BLOCK_K, HEAD_DIM)
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        keys = start + tl.arange(0, BLOCK_K)
        at = values_ptr + keys[:, None].to(tl.int64) * stride_vn + dims[None]
        v = tl.load(at, mask=keys[:, None] < tokens, other=0.0)
        output = output * fade[:, None] + tl.dot(p.to(v.dtype), v)
        total = total * fade + tl.sum(p, 1)
        top = higher
    output = output / total[:, None]
    level = top + tl.log2(total)
    whole = tl.sum(output * output, 1)
    block = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    line = (head * q_blocks + block) * k_blocks
    for column in range(0, k_blocks):
        start = column * BLOCK_K
        scores = _tile(q, keys_ptr, start, tokens, stride_kn, scale_log2, BLOCK_K, HEAD_DIM)
        p = tl.exp2(scores - level[:, None])
        keys = start + tl.arange(0, BLOCK_K)
        at = values_ptr + keys[:, None].to(tl.int64) * stride_vn + dims[None]
        v = tl.load(at, mask=keys[:, None] < tokens, other=0.0)
        mass = tl.sum(p, 1)
        part = tl.dot(p.to(v.dtype), v)
        squared = tl.sum(part * part, 1) - 2 * mass * tl.sum(part * output, 1) + mass * mass * whole
        squared = tl.maximum(squared, 0.0)
        tl.store(mass_ptr + line + column, _block_means(mass, exists, count, GROUP, SAMPLES), mask=block < q_blocks)
        tl.store(error_ptr + line + column, _block_means(squared, exists, count, GROUP, SAMPLES), mask=block < q_blocks)


def block_statistics(q: Tensor, k: Tensor, values: Tensor, blocks: Blocks, stride: int) -> tuple[Tensor, Tensor]:
    """Block mass and block error by Triton; arguments and results as in `statistics.block_statistics`.

    Raises:
        ValueError: A block is larger than 128 tokens or the head dimension is not a power of two from 16 to 128.
    """
    heads, tokens, head_dim = q.shape
    if max(blocks.block_q, blocks.block_k) > MAX_TILE:
        raise ValueError(f"blocks must be at most {MAX_TILE} tokens to be measured on a GPU, got {blocks}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {HEAD_DIMS} to be measured on a GPU, got {head_dim}")
    q, k, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, values.to(q.dtype)))
    shape = (heads, blocks.q_blocks(tokens), blocks.k_blocks(tokens))
    mass, error = (torch.empty(shape, device=q.device, dtype=torch.float32) for _ in range(2))
    samples = triton.next_power_of_2(-(-blocks.block_q // stride))
    group = ROWS // samples
    _block_statistics[(triton.cdiv(shape[1], group), heads)](
        q,
        k,
        values,
        mass,
        error,
        tokens,
        shape[1],
        shape[2],
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        values.stride(0),
        values.stride(1),
        stride,
        head_dim**-0.5 * LOG2E,
        BLOCK_Q=blocks.block_q,
        GROUP=group,
        SAMPLES=samples,
        BLOCK_K=blocks.block_k,
        HEAD_DIM=head_dim,
        num_warps=8,
        num_stages=2,
    )
    return mass, error
