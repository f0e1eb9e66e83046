"""Block-sparse attention forward over key-block lists, every head of a layer in one launch. Kernels only.

One program computes BLOCK_M packed queries of one head. Its queries are gathered through the packed order (anchors
only, where the head has any), its keys are the blocks of its list, and its output goes to every token that the
query stands for. The schedule was validated when its plan was loaded, so that nothing is checked here.

A schedule is of the video's tokens. Tokens before them, the prefix, and after them, the suffix, are keys of every
program; programs of their own, the first ones, compute their queries, which attend to all keys.

Heads of 8 bits have launches of their own, one a precision, over what `kernels.quantise` made. A score is the int32
product times the scales of its query and of its key block, in units of log2. In e4m3 (INT8_FP8) probabilities are
2^`LIFT` times those whose largest so far is 1. A tensor core's sum of e4m3 products cuts what is 13 bits below its
largest term: each BLOCK_N keys are therefore summed by themselves and then added in fp32.
"""

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
GROUP = tl.constexpr(64)
"""`QUERY_GROUP` of `runtime.quantise`: queries that share a scale."""
LIFT = tl.constexpr(5.0)
"""`SHIFT` there."""


@triton.jit
def _tile(
    x, batch, head, first, tokens, stride,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Keys or values first .. first + BLOCK_N - 1 of a head, ``[BLOCK_N, HEAD_DIM]``.

    With TMA, x is a descriptor, and tokens that do not exist read as 0. Else x is the address of the head; with ENDS,
    some of the tokens may not exist, and the last one takes their place.
    """
    if TMA:
        tile = x.load([batch, head, first, 0]).reshape(BLOCK_N, HEAD_DIM)
    else:
        row = tl.arange(0, BLOCK_N)
        if ENDS:
            row = tl.minimum(row, tokens - 1 - first)
        tile = tl.load(x + first.to(tl.int64) * stride + (row[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]))
    return tile


@triton.jit
def _accumulate(
    acc, row_sum, row_max, q, k, v, batch, head, slot, first, code, tokens, k_stride, v_stride, scale_log2, k_scales,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr, ENDS: tl.constexpr,
    IN_INT8: tl.constexpr, IN_E4M3: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in base 2, over keys first .. first + BLOCK_N - 1.

    With ENDS, keys from `tokens` on do not exist; at least the first one does. IN_INT8: q and k are codes, those of
    the keys begin at row `code` of the quantised head `slot`, and scale_log2 is one for each query. IN_E4M3: so is v.
    row_max is LIFT lower then.
    """
    if IN_INT8:
        codes = _tile(k, batch, slot, code, tokens, k_stride, BLOCK_N, HEAD_DIM, TMA, False)
        scores = tl.dot(q, codes.T).to(tl.float32)
        scale_log2 *= tl.load(k_scales + code // BLOCK_K)
        factor = scale_log2[:, None]
    else:
        scores = tl.dot(q, _tile(k, batch, head, first, tokens, k_stride, BLOCK_N, HEAD_DIM, TMA, ENDS).T)
        factor = scale_log2
    if ENDS:
        if IN_INT8:  # first: a factor may underflow to 0, of which -inf is no multiple
            scores *= factor
            scale_log2, factor = 1.0, 1.0
        scores = tl.where((first + tl.arange(0, BLOCK_N) < tokens)[None, :], scores, -float("inf"))
    new_max = tl.max(scores, 1) * scale_log2
    if IN_E4M3:
        new_max -= LIFT
    new_max = tl.maximum(row_max, new_max)
    p = tl.exp2(scores * factor - new_max[:, None])
    fade = tl.exp2(row_max - new_max)
    row_sum = row_sum * fade + tl.sum(p, 1)
    if IN_E4M3:
        if TMA:
            values = v.load([batch, slot, 0, code]).reshape(HEAD_DIM, BLOCK_N)
        else:
            values = tl.load(v + code + tl.arange(0, HEAD_DIM)[:, None] * v_stride + tl.arange(0, BLOCK_N)[None, :])
        # keys in the order of `quantise_values`, which is that of registers: nothing moves
        p = p.reshape([p.shape[0], BLOCK_N // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([p.shape[0], BLOCK_N])
        acc = tl.fma(acc, fade[:, None], tl.dot(p.to(values.dtype), values.T))  # no sum: it would join the product's
    else:
        values = _tile(v, batch, head, first, tokens, v_stride, BLOCK_N, HEAD_DIM, TMA, ENDS)
        acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None])
    return acc, row_sum, new_max


@triton.jit(do_not_specialize=["all_tokens", "video_start", "key_blocks"])
def block_sparse_forward(
    q_ptr, k, v, out_ptr, lse_ptr, lengths_ptr,
    tiles_ptr, columns_ptr, heads_ptr, query_token_ptr, query_first_ptr, query_copies_ptr,
    slots_ptr, q_scales_ptr, k_scales_ptr, channels_ptr, lse_shift_ptr,
    q_stride_b, q_stride_h, q_stride_n,
    k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n,
    out_stride_b, out_stride_h, out_stride_n,
    heads, tokens, all_tokens, video_start, scale_log2, eight_heads, q_groups, key_blocks,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, TMA: tl.constexpr, PARTIAL: tl.constexpr, ANCHORED: tl.constexpr, LSE: tl.constexpr,
    OTHERS: tl.constexpr, PADDED: tl.constexpr, IN_INT8: tl.constexpr, IN_E4M3: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles * BLOCK_Q / BLOCK_M, batch). BLOCK_M divides BLOCK_Q, BLOCK_N divides BLOCK_K. Tiles are those of
    heads of one precision, and before those of 16 bits, of every head, tiles of the prefix and of the suffix in BLOCK_Q
    tokens.

    The index arrays are those of `runtime.device_schedule.DeviceSchedule`. scale_log2 is scale * log2(e), positive.
    With TMA, k and v are descriptors of ``(B, H, N, D)`` in tiles of BLOCK_N tokens, else addresses like q_ptr.
    lse_ptr: fp32 ``(B, H, N)``; only with LSE. lengths_ptr: int32 ``(B,)``, where padding begins; only with PADDED.
    tokens: of the video; all_tokens: N; video_start: tokens of the prefix.
    PARTIAL: the last key block has fewer than BLOCK_K keys. ANCHORED: some head computes anchors only. OTHERS: there
    are a prefix or a suffix.

    IN_INT8: q_ptr, k and their scales are those of `kernels.quantise`, and so are channels_ptr and, with LSE,
    lse_shift_ptr; IN_E4M3: so is v. slots_ptr: int32 ``(heads,)``, the place of a head among the quantised ones, of
    which there are eight_heads, with q_groups groups of queries and key_blocks blocks of keys each.
    """
    OTHER_TILES: tl.constexpr = OTHERS and not IN_INT8
    parts: tl.constexpr = BLOCK_Q // BLOCK_M
    steps: tl.constexpr = BLOCK_K // BLOCK_N
    index = tl.program_id(0) // parts
    part = tl.program_id(0) % parts * BLOCK_M
    batch = tl.program_id(1)
    batch_offset = batch.to(tl.int64)
    before = 0
    if OTHERS:
        before = video_start
        video_stop = before + tokens
    if OTHER_TILES:
        prefix_tiles = tl.cdiv(before, BLOCK_Q)
        head_tiles = prefix_tiles + tl.cdiv(all_tokens - video_stop, BLOCK_Q)
        other = index
        index -= heads * head_tiles
        is_video = index >= 0
        index = tl.maximum(index, 0)
    tile = tiles_ptr + 4 * index
    head = tl.load(tile)
    first_query = tl.load(tile + 1) * BLOCK_Q + part
    start = tl.load(tile + 2)
    stop = tl.load(tile + 3)
    if OTHER_TILES:
        head = tl.where(is_video, head, other // head_tiles)
        first_query = tl.where(is_video, first_query, 0)
        start = tl.where(is_video, start, 0)
        stop = tl.where(is_video, stop, tl.cdiv(tokens, BLOCK_K))

    packed_tokens = tl.load(heads_ptr + 3 * head)
    query = first_query + tl.arange(0, BLOCK_M)
    exists = query < packed_tokens
    query = tl.minimum(query, packed_tokens - 1)
    token = query
    if ANCHORED:
        packed_start = tl.load(heads_ptr + 3 * head + 1)
        token = tl.load(query_token_ptr + packed_start + query)
    if OTHER_TILES:
        other_tile = other % head_tiles
        in_prefix = other_tile < prefix_tiles
        first_other = tl.where(in_prefix, other_tile * BLOCK_Q, video_stop + (other_tile - prefix_tiles) * BLOCK_Q)
        other_stop = tl.where(in_prefix, before, all_tokens)
        other_token = first_other + part + tl.arange(0, BLOCK_M)
        exists = tl.where(is_video, exists, other_token < other_stop)
        token = tl.where(is_video, before + token, tl.minimum(other_token, other_stop - 1))
    elif OTHERS:
        token += before

    channel = tl.arange(0, HEAD_DIM)
    head_offset = head.to(tl.int64)
    row, slot, code_shift, k_scales = token, head, 0, None
    if IN_INT8:
        row = query
        slot = tl.load(slots_ptr + head)
        quantised = batch_offset * eight_heads + slot
        scale_log2 = tl.load(q_scales_ptr + quantised * q_groups + query // GROUP)
        k_scales = k_scales_ptr + quantised * key_blocks
        if OTHERS:
            code_shift = tl.cdiv(before, BLOCK_K) * BLOCK_K - before
    slot_offset = slot.to(tl.int64)
    q_base = q_ptr + batch_offset * q_stride_b + slot_offset * q_stride_h
    if not TMA:
        k += batch_offset * k_stride_b + slot_offset * k_stride_h
        v += batch_offset * v_stride_b + (slot_offset if IN_E4M3 else head_offset) * v_stride_h
    q = tl.load(q_base + (row.to(tl.int64)[:, None] * q_stride_n + channel[None, :]))

    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    last_column = tokens // BLOCK_K
    last_steps = 0
    if PARTIAL:  # a list is ascending: only its last block can be the partial one
        ends_partial = (tl.load(columns_ptr + stop - 1).to(tl.int32) == last_column) & (stop > start)
        last_steps = tl.where(ends_partial, tl.cdiv(tokens - last_column * BLOCK_K, BLOCK_N), 0)
        stop -= ends_partial.to(tl.int32)
    column = tl.load(columns_ptr + start)
    for step in range(start * steps, stop * steps):
        following = tl.load(columns_ptr + (step + 1) // steps)  # ahead of its use: addresses wait for it
        first = before + column.to(tl.int32) * BLOCK_K + step % steps * BLOCK_N
        acc, row_sum, row_max = _accumulate(
            acc, row_sum, row_max, q, k, v, batch, head, slot, first, first + code_shift, before + tokens,
            k_stride_n, v_stride_n, scale_log2, k_scales, BLOCK_K, BLOCK_N, HEAD_DIM, TMA, False, IN_INT8, IN_E4M3,
        )  # fmt: skip
        column = following
    if PARTIAL or OTHERS:
        masked_steps = last_steps
        if OTHERS:
            all_stop = all_tokens
            if PADDED:
                all_stop = tl.load(lengths_ptr + batch)
            suffix_step = last_steps + tl.cdiv(before, BLOCK_N)
            masked_steps = suffix_step + tl.cdiv(all_stop - video_stop, BLOCK_N)
        for step in range(masked_steps):
            first = before + last_column * BLOCK_K + step * BLOCK_N
            end = before + tokens
            code = first + code_shift
            if OTHERS:
                in_suffix = step >= suffix_step
                other_first = (
                    tl.where(in_suffix, video_stop, 0) + (step - tl.where(in_suffix, suffix_step, last_steps)) * BLOCK_N
                )
                first = tl.where(step < last_steps, first, other_first)
                end = tl.where(step < last_steps, end, tl.where(in_suffix, all_stop, before))
                suffix_shift = code_shift + tl.cdiv(tokens, BLOCK_K) * BLOCK_K - tokens
                other_code = other_first + tl.where(in_suffix, suffix_shift, 0)
                code = tl.where(step < last_steps, code, other_code)
            acc, row_sum, row_max = _accumulate(
                acc, row_sum, row_max, q, k, v, batch, head, slot, first, code, end, k_stride_n, v_stride_n,
                scale_log2, k_scales, BLOCK_K, BLOCK_N, HEAD_DIM, TMA, True, IN_INT8, IN_E4M3,
            )  # fmt: skip

    acc = acc / row_sum[:, None]
    if IN_E4M3:
        of_channel = channels_ptr + quantised * 3 * HEAD_DIM + channel
        acc = acc * tl.load(of_channel + 2 * HEAD_DIM)[None, :] + tl.load(of_channel + HEAD_DIM)[None, :]
    out = tl.where(row_sum[:, None] == 0.0, 0.0, acc).to(out_ptr.dtype.element_ty)  # 0: of an empty list
    out_base = out_ptr + batch_offset * out_stride_b + head_offset * out_stride_h
    if LSE:
        lse = (row_max + tl.log2(row_sum)) * LN_2
        if IN_INT8:
            lse += tl.load(lse_shift_ptr + quantised * (q_groups * GROUP) + query)
        lse_base = lse_ptr + (batch_offset * heads + head_offset) * (all_tokens if OTHERS else tokens)
    if ANCHORED:
        first = tl.load(query_first_ptr + packed_start + query)
        copies = tl.load(query_copies_ptr + packed_start + query, mask=exists, other=0)
        if OTHER_TILES:
            first = tl.where(is_video, before + first, token)
            copies = tl.where(is_video, copies, exists.to(tl.int32))
        elif OTHERS:
            first += before
        step = tl.load(heads_ptr + 3 * head + 2)
        for copy in range(tl.max(copies, 0)):
            target = first + copy * step
            wanted = copy < copies
            tl.store(
                out_base + (target.to(tl.int64)[:, None] * out_stride_n + channel[None, :]), out, mask=wanted[:, None]
            )
            if LSE:
                tl.store(lse_base + target, lse, mask=wanted)
    else:
        tl.store(out_base + (token.to(tl.int64)[:, None] * out_stride_n + channel[None, :]), out, mask=exists[:, None])
        if LSE:
            tl.store(lse_base + token, lse, mask=exists)
