"""Effects, masses and errors of blocks on a GPU: attention is recomputed a tile at a time and never leaves the chip."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from calibatt.plans import Blocks
from calibatt.runtime.quantise import SHIFT
from calibatt.tools.calibrate.gradients import EVERY, LEAST_KEPT, LEAST_REST, AttentionCall

LOG2E = 1.4426950408889634
MAX_TILE = 128
ROWS = 128
"""Queries of one program: the measured ones of a query block, or of several blocks where each has few."""
SMALL_BYTES = 8192
"""Of shared memory, beside tiles."""
MOST_GAP = 64.0
"""Of log2 of a probability; 2 to its power is far from the end of float32."""


@triton.jit
def _keys_of(column, k_blocks, video_start, video_stop, tokens, BLOCK_K: tl.constexpr):
    """Where a part of the keys (see `_parts`) starts and stops."""
    other = column - k_blocks
    prefix = tl.cdiv(video_start, BLOCK_K)
    start = tl.where(other < prefix, other * BLOCK_K, video_stop + (other - prefix) * BLOCK_K)
    stop = tl.where(other < prefix, video_start, tokens)
    in_video = column < k_blocks
    return tl.where(in_video, video_start + column * BLOCK_K, start), tl.where(in_video, video_stop, stop)


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


@triton.jit(do_not_specialize=["tokens", "video_start", "video_stop", "parts"])
def _block_statistics(
    q_ptr, k_ptr, v_ptr, mass_ptr, error_ptr,
    tokens, video_start, video_stop, parts, q_blocks, k_blocks,
    stride_qh, stride_qn, stride_kh, stride_kn, stride_vh, stride_vn, query_stride, scale_log2,
    BLOCK_Q: tl.constexpr, GROUP: tl.constexpr, SAMPLES: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program per (GROUP query blocks, head): first their softmax and output, then mass and error of key blocks.

    Each query block has SAMPLES queries, of which those beyond the block or the sequence do not count.
    """
    head = tl.program_id(1).to(tl.int64)
    sample = tl.arange(0, GROUP * SAMPLES)
    dims = tl.arange(0, HEAD_DIM)
    within = sample % SAMPLES * query_stride
    rows = video_start + (tl.program_id(0) * GROUP + sample // SAMPLES) * BLOCK_Q + within
    exists = (within < BLOCK_Q) & (rows < video_stop)
    count = tl.maximum(tl.sum(tl.reshape(exists.to(tl.float32), (GROUP, SAMPLES)), 1), 1.0)
    q = tl.load(
        q_ptr + head * stride_qh + rows[:, None].to(tl.int64) * stride_qn + dims[None], mask=exists[:, None], other=0.0
    )
    keys_ptr = k_ptr + head * stride_kh
    values_ptr = v_ptr + head * stride_vh
    top = tl.full([GROUP * SAMPLES], float("-inf"), tl.float32)
    total = tl.zeros([GROUP * SAMPLES], tl.float32)
    output = tl.zeros([GROUP * SAMPLES, HEAD_DIM], tl.float32)
    for column in range(0, parts):
        start, stop = _keys_of(column, k_blocks, video_start, video_stop, tokens, BLOCK_K)
        scores = _tile(q, keys_ptr, start, stop, stride_kn, scale_log2, BLOCK_K, HEAD_DIM)
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        keys = start + tl.arange(0, BLOCK_K)
        at = values_ptr + keys[:, None].to(tl.int64) * stride_vn + dims[None]
        v = tl.load(at, mask=keys[:, None] < stop, other=0.0)
        output = output * fade[:, None] + tl.dot(p.to(v.dtype), v)
        total = total * fade + tl.sum(p, 1)
        top = higher
    output = output / total[:, None]
    level = top + tl.log2(total)
    whole = tl.sum(output * output, 1)
    block = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    line = (head * q_blocks + block) * k_blocks
    for column in range(0, k_blocks):
        start = video_start + column * BLOCK_K
        scores = _tile(q, keys_ptr, start, video_stop, stride_kn, scale_log2, BLOCK_K, HEAD_DIM)
        p = tl.exp2(scores - level[:, None])
        keys = start + tl.arange(0, BLOCK_K)
        at = values_ptr + keys[:, None].to(tl.int64) * stride_vn + dims[None]
        v = tl.load(at, mask=keys[:, None] < video_stop, other=0.0)
        mass = tl.sum(p, 1)
        part = tl.dot(p.to(v.dtype), v)
        squared = tl.sum(part * part, 1) - 2 * mass * tl.sum(part * output, 1) + mass * mass * whole
        squared = tl.maximum(squared, 0.0)
        tl.store(mass_ptr + line + column, _block_means(mass, exists, count, GROUP, SAMPLES), mask=block < q_blocks)
        tl.store(error_ptr + line + column, _block_means(squared, exists, count, GROUP, SAMPLES), mask=block < q_blocks)


@triton.jit
def _rows(ptr, rows, exists, stride, dims, DIMS: tl.constexpr):
    """Rows ``(M, HEAD_DIM)`` of a head's queries, zero beyond its channels and where there is no query."""
    at = ptr + rows[:, None].to(tl.int64) * stride + dims[None]
    return tl.load(at, mask=exists[:, None] & (dims[None] < DIMS), other=0.0)


@triton.jit
def _as_e4m3(x):
    """Numbers of float32, none negative and at most 448, rounded to e4m3: in steps of an eighth of their power of 2."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    whole = tl.maximum(power * 0.125, 0.001953125) * 12582912.0  # 2^-9, and 1.5 x 2^23: sums end in steps
    return (x + whole) - whole


@triton.jit(do_not_specialize=["tokens", "video_start", "video_stop", "parts"])
def _block_effects(
    q_ptr, k_ptr, v_ptr, g_ptr, o_ptr, total_ptr, mean_ptr, words_ptr, effect_ptr, kept_ptr, rounding_ptr,
    tokens, video_start, video_stop, parts, q_blocks, k_blocks,
    stride_qh, stride_qn, stride_kh, stride_kn, stride_vh, stride_vn, stride_gh, stride_gn, stride_oh, stride_on,
    stride_th, stride_wh, stride_wq, scale_log2,
    LEAST_REST: tl.constexpr, LEAST_KEPT: tl.constexpr, LOG2E: tl.constexpr, SHIFT: tl.constexpr,
    MOST_GAP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DIMS: tl.constexpr,
    HEAD_DIM: tl.constexpr, MASKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per (query block, head): for every key block P, dP and dS of the tile, then their sums.

    Of dS = P (dP - D) only the sums over the keys of a block are needed, beside those of P; `kept` and `mass` add them
    up for each mask, a column each. `rounding` adds up what P in e4m3 changes.
    """
    head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, HEAD_DIM)
    rows = video_start + tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    exists = rows < video_stop
    q = _rows(q_ptr + head * stride_qh, rows, exists, stride_qn, dims, DIMS)
    g = _rows(g_ptr + head * stride_gh, rows, exists, stride_gn, dims, DIMS)
    out = _rows(o_ptr + head * stride_oh, rows, exists, stride_on, dims, DIMS)
    own = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
    level = tl.load(total_ptr + head * stride_th + rows, mask=exists, other=0.0) * LOG2E
    mean = tl.load(mean_ptr + head * DIMS + dims, mask=dims < DIMS, other=0.0)
    of_mean = tl.sum(g.to(tl.float32) * mean[None], 1)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    rounding = tl.zeros([BLOCK_Q], tl.float32)
    bits = tl.arange(0, MASKS)
    kept = tl.zeros([BLOCK_Q, MASKS], tl.float32)
    mass = tl.zeros([BLOCK_Q, MASKS], tl.float32)
    words_ptr += head * stride_wh + block * stride_wq
    effect_ptr += (head * q_blocks + block) * k_blocks
    for column in range(0, parts):
        start, stop = _keys_of(column, k_blocks, video_start, video_stop, tokens, BLOCK_K)
        keys = start + tl.arange(0, BLOCK_K)
        there = keys < stop
        k = _rows(k_ptr + head * stride_kh, keys, there, stride_kn, dims, DIMS)
        v = _rows(v_ptr + head * stride_vh, keys, there, stride_vn, dims, DIMS)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        p = tl.where(there[None], tl.exp2(scores - level[:, None]), 0.0)
        worth = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        change = p * (worth - own[:, None])
        top = tl.maximum(top, tl.max(tl.where(there[None], scores, float("-inf")), 1))
        times = tl.exp2(tl.minimum(level - top, MOST_GAP) + SHIFT)  # a score so far below the others counts as 0
        large = p * times[:, None]
        rounding += tl.sum((_as_e4m3(large) - large) * (worth - of_mean[:, None]), 1) / times
        block_mass = tl.sum(p, 1)
        block_change = tl.sum(change, 1)
        alone = block_change / tl.maximum(1.0 - block_mass, LEAST_REST)
        in_video = column < k_blocks
        tl.store(effect_ptr + column, tl.sum(tl.where(exists, alone, 0.0), 0), mask=in_video)
        keep = ((tl.load(words_ptr + column, mask=in_video, other=-1) >> bits) & 1).to(tl.float32)
        kept += block_change[:, None] * keep[None]
        mass += block_mass[:, None] * keep[None]
    share = tl.where(exists[:, None], kept / tl.maximum(mass, LEAST_KEPT), 0.0)
    tl.store(kept_ptr + (head * q_blocks + block) * MASKS + bits, tl.sum(share, 0))
    tl.store(rounding_ptr + head * q_blocks + block, tl.sum(tl.where(exists, rounding, 0.0), 0))


def fits(q: Tensor, blocks: Blocks) -> bool:
    """Whether the tiles of the kernels here fit into the shared memory of q's device.

    `block_effects` holds a tile each of queries, gradients, keys and values, and `block_statistics` fewer. In fp32 they
    take half as much again, as compiled for sm90 by triton 3.9.
    """
    tile = max(blocks.block_q, blocks.block_k) * triton.next_power_of_2(q.shape[-1]) * q.element_size()
    there = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
    return tile * (6 if q.dtype == torch.float32 else 4) + SMALL_BYTES <= there


def block_effects(
    call: AttentionCall, grad: Tensor, words: Tensor, masks: int, blocks: Blocks
) -> tuple[Tensor, Tensor, Tensor]:
    """Signed effects of blocks, masks and rounding for one gradient by Triton; see `effects.block_effects`.

    Raises:
        ValueError: A block is larger than 128 tokens.
    """
    _check(blocks)
    heads, tokens, channels = call.q.shape
    start, stop = call.span
    assert call.total is not None
    q, k, v, g, out = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (call.q, call.k, call.v, grad.to(call.q.dtype), call.out)
    )
    shape = (heads, blocks.q_blocks(stop - start), blocks.k_blocks(stop - start))
    columns = max(16, triton.next_power_of_2(masks))
    effect = torch.empty(shape, device=q.device, dtype=torch.float32)
    kept = torch.empty(*shape[:2], columns, device=q.device, dtype=torch.float32)
    rounding = torch.empty(shape[:2], device=q.device, dtype=torch.float32)
    words = words if words.stride(-1) == 1 else words.contiguous()
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        _block_effects[shape[1], heads](
            q, k, v, g, out, call.total, v.mean(1, dtype=torch.float32), words, effect, kept, rounding,
            tokens, start, stop, _parts(shape[2], start, stop, tokens, blocks.block_k), shape[1], shape[2],
            *(stride for x in (q, k, v, g, out) for stride in x.stride()[:2]),
            call.total.stride(0), *words.stride()[:2], channels**-0.5 * LOG2E,
            LEAST_REST=LEAST_REST, LEAST_KEPT=LEAST_KEPT, LOG2E=LOG2E, SHIFT=SHIFT, MOST_GAP=MOST_GAP,
            BLOCK_Q=blocks.block_q, BLOCK_K=blocks.block_k, DIMS=channels,
            HEAD_DIM=max(16, triton.next_power_of_2(channels)), MASKS=columns,
            PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
            num_warps=8 if blocks.block_q * blocks.block_k >= 128 * 64 else 4,
            num_stages=1 if q.dtype == torch.float32 else 2,
        )  # fmt: skip
    return effect, kept.double().sum(1).T[:masks], rounding.double().sum(1)


def _parts(k_blocks: int, start: int, stop: int, tokens: int, block_k: int) -> int:
    """How many parts kernels cut the keys into: the blocks of the video, then those of the prefix and of the suffix."""
    return k_blocks + -(-start // block_k) + -(-(tokens - stop) // block_k)


def _check(blocks: Blocks) -> None:
    if max(blocks.block_q, blocks.block_k) > MAX_TILE:
        raise ValueError(f"blocks must be at most {MAX_TILE} tokens to be measured on a GPU, got {blocks}")


def block_statistics(
    q: Tensor, k: Tensor, values: Tensor, blocks: Blocks, stride: int, video: slice = EVERY
) -> tuple[Tensor, Tensor]:
    """Block mass and block error by Triton; arguments and results as in `effects.block_statistics`.

    Raises:
        ValueError: A block is larger than 128 tokens.
    """
    _check(blocks)
    heads, tokens, channels = q.shape
    start, stop, _ = video.indices(tokens)
    head_dim = max(16, triton.next_power_of_2(channels))
    if head_dim != channels:
        q, k, values = (torch.nn.functional.pad(x, (0, head_dim - channels)) for x in (q, k, values))
    q, k, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, values.to(q.dtype)))
    shape = (heads, blocks.q_blocks(stop - start), blocks.k_blocks(stop - start))
    mass, error = (torch.empty(shape, device=q.device, dtype=torch.float32) for _ in range(2))
    samples = triton.next_power_of_2(-(-blocks.block_q // stride))
    group = ROWS // samples
    _block_statistics[(triton.cdiv(shape[1], group), heads)](
        q, k, values, mass, error,
        tokens, start, stop, _parts(shape[2], start, stop, tokens, blocks.block_k), shape[1], shape[2],
        *(stride for x in (q, k, values) for stride in x.stride()[:2]), stride, channels**-0.5 * LOG2E,
        BLOCK_Q=blocks.block_q, GROUP=group, SAMPLES=samples, BLOCK_K=blocks.block_k, HEAD_DIM=head_dim,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return mass, error
