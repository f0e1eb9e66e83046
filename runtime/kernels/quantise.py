"""What `runtime.quantise` defines, as kernels. Of q, k and v they read each once, and k and v once more before.

    survey -> quantise

Programs of one block of all heads follow each other, since channels of heads lie side by side in a token. Arrays of
quantised heads have the heads in the order of `heads_ptr`: those whose values are quantised too come first. Blocks of
keys begin anew with the prefix, the video and the suffix and are whole: what no key fills is 0. Divisions are exact and
no product is fused with a sum (launchers say so), so that codes are those of the definition, bit by bit. Kernels only.
"""

import triton
import triton.language as tl

NOT_SPECIALIZED = (
    "video_start", "all_tokens", "prefix_blocks", "key_blocks", "chunks", "heads", "value_heads", "q_groups"
)  # fmt: skip
"""What the length of a text decides, or the precisions of a layer: no number is compiled in."""


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


@triton.jit
def _as_bf16(x):
    """Rounded to 8 bits in fp32 (Veltkamp's splitting): to nearest also in triton's interpreter, whose bf16 is not."""
    stretched = x * 65537.0
    return stretched - (stretched - x)


@triton.jit
def _survey(
    x_of_head, stride_n, partial_of_head, arrivals, target, end, chunk, chunks, MOST: tl.constexpr, TINY: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """The sums of a chunk, and with VALUES the largest and the least, by channel. The program that comes last finds
    from those of all chunks what a channel loses, in bf16, and what a value is divided by.
    """
    stop = tl.minimum(end, (chunk + 1) * CHUNK)
    row, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, HEAD_DIM)[None, :]
    total = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    most = tl.full([ROWS, HEAD_DIM], -float("inf"), tl.float32)
    least = tl.full([ROWS, HEAD_DIM], float("inf"), tl.float32)
    for i in range(0, CHUNK, ROWS):
        token = chunk * CHUNK + i + row
        exists = token < stop
        x = tl.load(x_of_head + token.to(tl.int64) * stride_n + channel, mask=exists, other=0.0).to(tl.float32)
        total += x
        if VALUES:
            most = tl.where(exists, tl.maximum(most, x), most)
            least = tl.where(exists, tl.minimum(least, x), least)
    to = partial_of_head + chunk * 3 * HEAD_DIM + tl.arange(0, HEAD_DIM)
    tl.store(to, tl.sum(total, 0))
    if VALUES:
        tl.store(to + HEAD_DIM, tl.max(most, 0))
        tl.store(to + 2 * HEAD_DIM, tl.min(least, 0))
    tl.debug_barrier()  # one thread tells what all have stored
    if tl.atomic_add(arrivals, 1, sem="acq_rel") == chunks - 1:
        tl.store(arrivals, 0)
        for part in range(HEAD_DIM // CHANNELS):
            of_part = part * CHANNELS + tl.arange(0, CHANNELS)
            sums = tl.zeros([CHUNKS, CHANNELS], tl.float32)
            highest = tl.full([CHUNKS, CHANNELS], -float("inf"), tl.float32)
            lowest = tl.full([CHUNKS, CHANNELS], float("inf"), tl.float32)
            for first in range(0, chunks, CHUNKS):
                at = first + tl.arange(0, CHUNKS)[:, None]
                here = partial_of_head + at * 3 * HEAD_DIM + of_part[None, :]
                sums += tl.load(here, mask=at < chunks, other=0.0, cache_modifier=".cg")
                if VALUES:
                    found = tl.load(here + HEAD_DIM, mask=at < chunks, other=-float("inf"), cache_modifier=".cg")
                    highest = tl.maximum(highest, found)
                    found = tl.load(here + 2 * HEAD_DIM, mask=at < chunks, other=float("inf"), cache_modifier=".cg")
                    lowest = tl.minimum(lowest, found)
            mean = _as_bf16(tl.sum(sums, 0) / end.to(tl.float32))
            tl.store(target + of_part, mean)
            if VALUES:
                widest = tl.maximum(tl.max(highest, 0) - mean, mean - tl.min(lowest, 0))
                tl.store(target + HEAD_DIM + of_part, tl.div_rn(tl.maximum(widest, TINY), MOST))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def survey(
    k_ptr, v_ptr, heads_ptr, lengths_ptr, arrivals_ptr, partial_ptr, channels_ptr, k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n, all_tokens, heads, chunks, MOST: tl.constexpr, TINY: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Means of keys; means and scales of values that are quantised.

    Grid: keys of all quantised heads, then values of the first ones; chunks of CHUNK tokens; batch.

    Args:
        arrivals_ptr: int32 ``(B, keys and values)``, 0 before and after.
        partial_ptr: fp32 ``(B, keys and values, chunks, 3, D)``: sums, largest and least; of keys sums only.
        channels_ptr: fp32 ``(B, heads, 3, D)``: mean of the keys; mean and scale of the values that are quantised.
        heads: Quantised heads.
        CHUNKS: How many partial sums are read at a time, of CHANNELS channels.
    """
    part, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot = part % heads
    head = tl.load(heads_ptr + slot).to(tl.int64)
    end = _end_of(lengths_ptr, batch, all_tokens)
    of_all = batch * tl.num_programs(0) + part
    partial_of_head = partial_ptr + of_all * chunks * 3 * HEAD_DIM
    target = channels_ptr + (batch * heads + slot) * 3 * HEAD_DIM
    if part < heads:
        k_of_head = k_ptr + batch * k_stride_b + head * k_stride_h
        _survey(
            k_of_head, k_stride_n, partial_of_head, arrivals_ptr + of_all, target, end, chunk, chunks, MOST, TINY,
            CHUNK, ROWS, CHUNKS, CHANNELS, HEAD_DIM, False,
        )  # fmt: skip
    else:
        v_of_head = v_ptr + batch * v_stride_b + head * v_stride_h
        _survey(
            v_of_head, v_stride_n, partial_of_head, arrivals_ptr + of_all, target + HEAD_DIM, end, chunk, chunks, MOST,
            TINY, CHUNK, ROWS, CHUNKS, CHANNELS, HEAD_DIM, True,
        )  # fmt: skip


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


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def quantise(
    q_ptr, k_ptr, v_ptr, heads_ptr, lengths_ptr, packed_ptr, query_token_ptr, channels_ptr, q_codes_ptr, q_scales_ptr,
    lse_shift_ptr, k_codes_ptr, k_scales_ptr, v_codes_ptr, q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h,
    k_stride_n, v_stride_b, v_stride_h, v_stride_n, tokens, video_start, all_tokens, prefix_blocks, key_blocks,
    q_groups, value_heads, scale, scale_log2, MOST: tl.constexpr, TINY: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr, ANCHORED: tl.constexpr,
):  # fmt: skip
    """Codes and scales of one block of keys, one group of queries, or one block of values.

    Grid: quantised heads; blocks of keys, groups of queries, and, where values are quantised, blocks of keys; batch.

    Args:
        q_ptr: The first query of the video.
        packed_ptr: `DeviceSchedule.heads`, and `query_token_ptr` likewise; only with ANCHORED.
        channels_ptr: As of `survey`.
        q_codes_ptr: int8 ``(B, heads, q_groups * ROWS, D)``, of the queries that are computed.
        q_scales_ptr: fp32 ``(B, heads, q_groups)``; `scale_log2` is in them.
        lse_shift_ptr: fp32 ``(B, heads, q_groups * ROWS)``, what the mean of the keys adds to the lse; may be absent.
        k_codes_ptr: int8 ``(B, heads, key_blocks * BLOCK_K, D)``, of keys less their mean.
        k_scales_ptr: fp32 ``(B, heads, key_blocks)``.
        v_codes_ptr: e4m3 ``(B, value_heads, D, key_blocks * BLOCK_K)``; absent where value_heads is 0.
        key_blocks: Of the prefix, the video and the suffix.
        value_heads: How many heads, the first ones, have quantised values.
    """
    slot, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = tl.load(heads_ptr + slot)
    of_head = batch * tl.num_programs(0) + slot
    mean_ptr = channels_ptr + of_head * 3 * HEAD_DIM
    if part < key_blocks:
        end = _end_of(lengths_ptr, batch, all_tokens)
        k_of_head = k_ptr + batch * k_stride_b + head.to(tl.int64) * k_stride_h
        to = of_head * key_blocks + part
        _quantise_keys(
            k_of_head, k_stride_n, mean_ptr, k_codes_ptr + to * BLOCK_K * HEAD_DIM, k_scales_ptr + to, part, end,
            video_start, tokens, prefix_blocks, MOST, TINY, BLOCK_K, HEAD_DIM,
        )  # fmt: skip
    elif part < key_blocks + q_groups:
        group = part - key_blocks
        row = group * ROWS + tl.arange(0, ROWS)
        token, exists = row, row < tokens
        if ANCHORED:
            exists = row < tl.load(packed_ptr + head * 3)
            token = tl.load(query_token_ptr + tl.load(packed_ptr + head * 3 + 1) + row, mask=exists, other=0)
        q_of_head = q_ptr + batch * q_stride_b + head.to(tl.int64) * q_stride_h
        to = of_head * q_groups + group
        _quantise_queries(
            q_of_head, q_stride_n, mean_ptr, q_codes_ptr + to * ROWS * HEAD_DIM, q_scales_ptr + to, lse_shift_ptr,
            to * ROWS, token, exists, scale, scale_log2, MOST, TINY, ROWS, HEAD_DIM,
        )  # fmt: skip
    elif v_codes_ptr is not None:
        if slot < value_heads:
            block = part - key_blocks - q_groups
            end = _end_of(lengths_ptr, batch, all_tokens)
            v_of_head = v_ptr + batch * v_stride_b + head.to(tl.int64) * v_stride_h
            to = (batch * value_heads + slot) * HEAD_DIM * key_blocks + block
            _quantise_values(
                v_of_head, v_stride_n, mean_ptr + HEAD_DIM, v_codes_ptr + to * BLOCK_K, key_blocks * BLOCK_K, block,
                end, video_start, tokens, prefix_blocks, BLOCK_K, HEAD_DIM,
            )  # fmt: skip


@triton.jit
def _quantise_queries(
    q_of_head, stride_n, mean_ptr, codes_ptr, scale_ptr, lse_shift_ptr, shift_at, token, exists, scale, scale_log2,
    MOST: tl.constexpr, TINY: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Int8 of one group of queries."""
    row, channel = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    source = q_of_head + (token.to(tl.int64) * stride_n)[:, None] + channel[None, :]
    x = tl.load(source, mask=exists[:, None], other=0.0).to(tl.float32)
    most = _largest(x, TINY)
    tl.store(codes_ptr + row[:, None] * HEAD_DIM + channel[None, :], _as_int8(x * tl.div_rn(MOST, most)))
    tl.store(scale_ptr, tl.div_rn(most, MOST) * scale_log2)
    if lse_shift_ptr is not None:
        mean = tl.load(mean_ptr + channel)
        tl.store(lse_shift_ptr + shift_at + row, tl.sum(x * mean[None, :], 1) * scale)


@triton.jit
def _quantise_keys(
    k_of_head, stride_n, mean_ptr, codes_ptr, scale_ptr, block, end, video_start, tokens, prefix_blocks,
    MOST: tl.constexpr, TINY: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Int8 of one block of keys less their mean."""
    at, channel = tl.arange(0, BLOCK_K), tl.arange(0, HEAD_DIM)
    token, exists = _keys_of(block, at, end, video_start, tokens, prefix_blocks, BLOCK_K)
    source = k_of_head + (token.to(tl.int64) * stride_n)[:, None] + channel[None, :]
    x = tl.load(source, mask=exists[:, None], other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + channel)
    x = tl.where(exists[:, None], x - mean[None, :], 0.0)
    most = _largest(x, TINY)
    tl.store(codes_ptr + at[:, None] * HEAD_DIM + channel[None, :], _as_int8(x * tl.div_rn(MOST, most)))
    tl.store(scale_ptr, tl.div_rn(most, MOST))


@triton.jit
def _quantise_values(
    v_of_head, stride_n, mean_ptr, codes_ptr, code_stride, block, end, video_start, tokens, prefix_blocks,
    BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Values of one block in e4m3, channel by channel, as tensor cores take them.

    The keys of every 16 are in the order 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15: that in which probabilities lie in the
    registers of a warp as one product leaves them, if the next one takes them as its operand.
    """
    at, channel = tl.arange(0, BLOCK_K), tl.arange(0, HEAD_DIM)
    within = at % 16
    at_key = at - within + ((within >> 1) & 1) * 8 + (within >> 2) * 2 + (within & 1)
    token, exists = _keys_of(block, at_key, end, video_start, tokens, prefix_blocks, BLOCK_K)
    source = v_of_head + (token.to(tl.int64) * stride_n)[:, None] + channel[None, :]
    x = tl.load(source, mask=exists[:, None], other=0.0).to(tl.float32)
    mean, scale = tl.load(mean_ptr + channel), tl.load(mean_ptr + HEAD_DIM + channel)
    x = tl.where(exists[:, None], (x - mean[None, :]) * tl.div_rn(1.0, scale)[None, :], 0.0)
    to = codes_ptr + (channel.to(tl.int64) * code_stride)[:, None] + at[None, :]
    tl.store(to, tl.trans(x.to(tl.float8e4nv)))
