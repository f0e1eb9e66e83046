"""What `runtime.quantise` defines, as kernels. Of q, k and v they read each once, and k and v once more before.

    survey -> settle -> quantise_queries, quantise_keys, quantise_values

Programs of one block of all heads follow each other, since channels of heads lie side by side in a token. Arrays of
quantised heads have the heads in the order of `heads_ptr`. Blocks of keys begin anew with the prefix, the video and the
suffix and are whole: what no key fills is 0. Divisions are exact and no product is fused with a sum (launchers say so),
so that codes are those of the definition, bit by bit. Kernels only.
"""

import triton
import triton.language as tl

BY_CALL = ("video_start", "all_tokens", "prefix_blocks", "chunks")
"""What the length of a text decides: no number is compiled in."""


@triton.jit
def _end_of(lengths_ptr, batch, all_tokens):
    """Where the keys of a sample end."""
    if lengths_ptr is not None:
        return tl.load(lengths_ptr + batch)
    else:
        return all_tokens


@triton.jit
def _keys_of(block, at, end, video_start, tokens, prefix_blocks, BLOCK_K: tl.constexpr):
    """The tokens that are keys `at` of a padded block, and which of them exist."""
    video_blocks = tl.cdiv(tokens, BLOCK_K)
    in_prefix = block < prefix_blocks
    in_video = block < prefix_blocks + video_blocks
    first = tl.where(in_video, video_start, video_start + tokens - video_blocks * BLOCK_K) - prefix_blocks * BLOCK_K
    first = tl.where(in_prefix, 0, first)
    stop = tl.where(in_prefix, video_start, tl.where(in_video, video_start + tokens, end))
    token = first + block * BLOCK_K + at
    return token, token < stop


@triton.jit(do_not_specialize=BY_CALL)
def survey(
    k_ptr, v_ptr, heads_ptr, lengths_ptr, partial_ptr, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h,
    v_stride_n, all_tokens, CHUNK: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Sums of k and v, the largest and the least of v, each by channel, of CHUNK keys.

    Grid: quantised heads, chunks, batch.

    Args:
        partial_ptr: fp32 ``(B, quantised heads, chunks, 4, D)``; only the first of the four without VALUES.
    """
    slot, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = tl.load(heads_ptr + slot).to(tl.int64)
    end = tl.minimum(_end_of(lengths_ptr, batch, all_tokens), (chunk + 1) * CHUNK)
    row, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, HEAD_DIM)[None, :]
    k_of_head = k_ptr + batch.to(tl.int64) * k_stride_b + head * k_stride_h + channel
    v_of_head = v_ptr + batch.to(tl.int64) * v_stride_b + head * v_stride_h + channel
    k_sum = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    v_sum = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    v_most = tl.full([ROWS, HEAD_DIM], -float("inf"), tl.float32)
    v_least = tl.full([ROWS, HEAD_DIM], float("inf"), tl.float32)
    for i in range(0, CHUNK, ROWS):
        token = chunk * CHUNK + i + row
        exists = token < end
        k_sum += tl.load(k_of_head + token.to(tl.int64) * k_stride_n, mask=exists, other=0.0).to(tl.float32)
        if VALUES:
            v = tl.load(v_of_head + token.to(tl.int64) * v_stride_n, mask=exists, other=0.0).to(tl.float32)
            v_sum += v
            v_most = tl.where(exists, tl.maximum(v_most, v), v_most)
            v_least = tl.where(exists, tl.minimum(v_least, v), v_least)
    place = ((batch * tl.num_programs(0) + slot) * tl.num_programs(1) + chunk).to(tl.int64) * 4 * HEAD_DIM
    target = partial_ptr + place + tl.arange(0, HEAD_DIM)
    tl.store(target, tl.sum(k_sum, 0))
    if VALUES:
        tl.store(target + HEAD_DIM, tl.sum(v_sum, 0))
        tl.store(target + 2 * HEAD_DIM, tl.max(v_most, 0))
        tl.store(target + 3 * HEAD_DIM, tl.min(v_least, 0))


@triton.jit
def _as_bf16(x):
    """Rounded to 8 bits in fp32 (Veltkamp's splitting): to nearest also in triton's interpreter, whose bf16 is not."""
    stretched = x * 65537.0
    return stretched - (stretched - x)


@triton.jit(do_not_specialize=BY_CALL)
def settle(
    partial_ptr, lengths_ptr, channels_ptr, all_tokens, chunks, MOST: tl.constexpr, TINY: tl.constexpr,
    CHUNKS: tl.constexpr, CHANNELS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """From what `survey` found: what a channel loses, in bf16, and what it is divided by.

    Grid: quantised heads, batch, D / CHANNELS.

    Args:
        channels_ptr: fp32 ``(B, quantised heads, 3, D)``: mean of the keys; mean and scale of the values, which are
            only written with VALUES.
    """
    slot, batch, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    of_head = (batch * tl.num_programs(0) + slot).to(tl.int64)
    row, channel = tl.arange(0, CHUNKS)[:, None], (part * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    source = partial_ptr + of_head * chunks * 4 * HEAD_DIM + channel
    k_sum = tl.zeros([CHUNKS, CHANNELS], tl.float32)
    v_sum = tl.zeros([CHUNKS, CHANNELS], tl.float32)
    v_most = tl.full([CHUNKS, CHANNELS], -float("inf"), tl.float32)
    v_least = tl.full([CHUNKS, CHANNELS], float("inf"), tl.float32)
    for first in range(0, chunks, CHUNKS):
        at = first + row
        here = source + at.to(tl.int64) * 4 * HEAD_DIM
        k_sum += tl.load(here, mask=at < chunks, other=0.0)
        if VALUES:
            v_sum += tl.load(here + HEAD_DIM, mask=at < chunks, other=0.0)
            v_most = tl.maximum(v_most, tl.load(here + 2 * HEAD_DIM, mask=at < chunks, other=-float("inf")))
            v_least = tl.minimum(v_least, tl.load(here + 3 * HEAD_DIM, mask=at < chunks, other=float("inf")))
    count = _end_of(lengths_ptr, batch, all_tokens).to(tl.float32)
    target = channels_ptr + of_head * 3 * HEAD_DIM + part * CHANNELS + tl.arange(0, CHANNELS)
    tl.store(target, _as_bf16(tl.sum(k_sum, 0) / count))
    if VALUES:
        mean = _as_bf16(tl.sum(v_sum, 0) / count)
        most = tl.maximum(tl.max(v_most, 0) - mean, mean - tl.min(v_least, 0))
        tl.store(target + HEAD_DIM, mean)
        tl.store(target + 2 * HEAD_DIM, tl.div_rn(tl.maximum(most, TINY), MOST))


@triton.jit
def _largest(x, TINY: tl.constexpr):
    """The largest magnitude, at least TINY; not finite if any is not: of bits, since a maximum of floats drops NaN."""
    bits = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF).reshape([x.shape[0] * x.shape[1]])
    most = tl.max(bits, 0).to(tl.float32, bitcast=True)
    return tl.where(most < TINY, TINY, most)


@triton.jit
def _as_int8(x):
    """To the nearest, ties to even."""
    return ((x + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit(do_not_specialize=BY_CALL)
def quantise_queries(
    q_ptr, heads_ptr, packed_ptr, query_token_ptr, channels_ptr, codes_ptr, scales_ptr, lse_shift_ptr, q_stride_b,
    q_stride_h, q_stride_n, tokens, scale, scale_log2, MOST: tl.constexpr, TINY: tl.constexpr, ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, ANCHORED: tl.constexpr,
):  # fmt: skip
    """Int8 of the queries of a head that are computed, ROWS of them.

    Grid: quantised heads, groups, batch.

    Args:
        q_ptr: The first query of the video.
        packed_ptr: `DeviceSchedule.heads`, and `query_token_ptr` likewise; only with ANCHORED.
        channels_ptr: As of `settle`.
        codes_ptr: int8 ``(B, quantised heads, groups * ROWS, D)``.
        scales_ptr: fp32 ``(B, quantised heads, groups)``; `scale_log2` is in them.
        lse_shift_ptr: fp32 ``(B, quantised heads, groups * ROWS)``, what the mean of the keys adds to the lse; may be
            absent.
    """
    slot, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = tl.load(heads_ptr + slot)
    row, channel = group * ROWS + tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    token = row
    exists = row < tokens
    if ANCHORED:
        count = tl.load(packed_ptr + head * 3)
        start = tl.load(packed_ptr + head * 3 + 1)
        exists = row < count
        token = tl.load(query_token_ptr + start + row, mask=exists, other=0)
    q_of_head = q_ptr + batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    source = q_of_head + (token.to(tl.int64) * q_stride_n)[:, None] + channel[None, :]
    x = tl.load(source, mask=exists[:, None], other=0.0).to(tl.float32)
    of_head = (batch * tl.num_programs(0) + slot).to(tl.int64)
    groups = tl.num_programs(1)
    most = _largest(x, TINY)
    to = (of_head * groups * ROWS + row) * HEAD_DIM
    tl.store(codes_ptr + to[:, None] + channel[None, :], _as_int8(x * tl.div_rn(MOST, most)))
    tl.store(scales_ptr + of_head * groups + group, tl.div_rn(most, MOST) * scale_log2)
    if lse_shift_ptr is not None:
        mean = tl.load(channels_ptr + of_head * 3 * HEAD_DIM + channel)
        tl.store(lse_shift_ptr + of_head * groups * ROWS + row, tl.sum(x * mean[None, :], 1) * scale)


@triton.jit(do_not_specialize=BY_CALL)
def quantise_keys(
    k_ptr, heads_ptr, lengths_ptr, channels_ptr, codes_ptr, scales_ptr, k_stride_b, k_stride_h, k_stride_n, tokens,
    video_start, all_tokens, prefix_blocks, MOST: tl.constexpr, TINY: tl.constexpr, BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Int8 of one block of keys less their mean.

    Grid: quantised heads, blocks of all parts, batch.

    Args:
        channels_ptr: As of `settle`.
        codes_ptr: int8 ``(B, quantised heads, blocks * BLOCK_K, D)``.
        scales_ptr: fp32 ``(B, quantised heads, blocks)``.
    """
    slot, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = tl.load(heads_ptr + slot).to(tl.int64)
    at, channel = tl.arange(0, BLOCK_K), tl.arange(0, HEAD_DIM)
    end = _end_of(lengths_ptr, batch, all_tokens)
    token, exists = _keys_of(block, at, end, video_start, tokens, prefix_blocks, BLOCK_K)
    k_of_head = k_ptr + batch.to(tl.int64) * k_stride_b + head * k_stride_h
    source = k_of_head + (token.to(tl.int64) * k_stride_n)[:, None] + channel[None, :]
    x = tl.load(source, mask=exists[:, None], other=0.0).to(tl.float32)
    of_head = (batch * tl.num_programs(0) + slot).to(tl.int64)
    mean = tl.load(channels_ptr + of_head * 3 * HEAD_DIM + channel)
    x = tl.where(exists[:, None], x - mean[None, :], 0.0)
    most = _largest(x, TINY)
    to = (of_head * tl.num_programs(1) + block) * BLOCK_K + at
    tl.store(codes_ptr + to[:, None] * HEAD_DIM + channel[None, :], _as_int8(x * tl.div_rn(MOST, most)))
    tl.store(scales_ptr + of_head * tl.num_programs(1) + block, tl.div_rn(most, MOST))


@triton.jit(do_not_specialize=BY_CALL)
def quantise_values(
    v_ptr, heads_ptr, lengths_ptr, channels_ptr, codes_ptr, v_stride_b, v_stride_h, v_stride_n, tokens, video_start,
    all_tokens, prefix_blocks, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Values of one block in e4m3, channel by channel, as tensor cores take them.

    The keys of every 16 are in the order 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15: that in which probabilities lie in the
    registers of a warp as one product leaves them, if the next one takes them as its operand.

    Grid: quantised heads, blocks of all parts, batch.

    Args:
        channels_ptr: As of `settle`.
        codes_ptr: e4m3 ``(B, quantised heads, D, blocks * BLOCK_K)``.
    """
    slot, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = tl.load(heads_ptr + slot).to(tl.int64)
    at, channel = tl.arange(0, BLOCK_K), tl.arange(0, HEAD_DIM)
    within = at % 16
    at_key = at - within + ((within >> 1) & 1) * 8 + (within >> 2) * 2 + (within & 1)
    end = _end_of(lengths_ptr, batch, all_tokens)
    token, exists = _keys_of(block, at_key, end, video_start, tokens, prefix_blocks, BLOCK_K)
    v_of_head = v_ptr + batch.to(tl.int64) * v_stride_b + head * v_stride_h
    source = v_of_head + (token.to(tl.int64) * v_stride_n)[:, None] + channel[None, :]
    x = tl.load(source, mask=exists[:, None], other=0.0).to(tl.float32)
    of_head = (batch * tl.num_programs(0) + slot).to(tl.int64)
    mean = tl.load(channels_ptr + (of_head * 3 + 1) * HEAD_DIM + channel)
    scale = tl.load(channels_ptr + (of_head * 3 + 2) * HEAD_DIM + channel)
    factor = tl.div_rn(1.0, scale)
    x = tl.where(exists[:, None], (x - mean[None, :]) * factor[None, :], 0.0)
    to = (of_head * HEAD_DIM + channel) * tl.num_programs(1) * BLOCK_K + block * BLOCK_K
    tl.store(codes_ptr + to[:, None] + at[None, :], tl.trans(x.to(tl.float8e4nv)))
