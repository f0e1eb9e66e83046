"""Block-sparse attention forward over key-block lists, every head of a layer in one launch. Kernels only.

One program computes BLOCK_M packed queries of one head. Its queries are gathered through the packed order (anchor rows
only, where the head has anchors), its keys are the blocks of its list, and its output goes to every token that the
query stands for. The schedule was validated when its plan was loaded, so that nothing is checked here.
"""

import triton
import triton.language as tl


@triton.jit
def _accumulate(
    acc, row_sum, row_max, q, k_base, v_base, first_key, k_stride, v_stride, tokens, scale_log2,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in base 2, over keys first_key .. first_key + BLOCK_N - 1.

    With MASKED, keys from `tokens` on do not exist; at least the first one does.
    """
    key = tl.arange(0, BLOCK_N)
    channel = tl.arange(0, HEAD_DIM)
    k_offset = first_key.to(tl.int64) * k_stride
    v_offset = first_key.to(tl.int64) * v_stride
    k_tile = k_base + k_offset + (key[:, None] * k_stride + channel[None, :])
    v_tile = v_base + v_offset + (key[:, None] * v_stride + channel[None, :])
    if MASKED:
        exists = first_key + key < tokens
        k = tl.load(k_tile, mask=exists[:, None], other=0.0)
        scores = tl.where(exists[None, :], tl.dot(q, tl.trans(k)), -float("inf"))
    else:
        scores = tl.dot(q, tl.trans(tl.load(k_tile)))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    p = tl.exp2(scores * scale_log2 - new_max[:, None])
    fade = tl.exp2(row_max - new_max)
    row_sum = row_sum * fade + tl.sum(p, 1)
    if MASKED:
        v = tl.load(v_tile, mask=exists[:, None], other=0.0)
    else:
        v = tl.load(v_tile)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None])
    return acc, row_sum, new_max


@triton.jit
def block_sparse_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    tiles_ptr, columns_ptr, heads_ptr, query_token_ptr, query_first_ptr, query_copies_ptr,
    q_stride_b, q_stride_h, q_stride_n,
    k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n,
    out_stride_b, out_stride_h, out_stride_n,
    lse_stride_b, lse_stride_h,
    tokens, width, scale_log2,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, PARTIAL: tl.constexpr, ANCHORED: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles * BLOCK_Q / BLOCK_M, batch). BLOCK_M divides BLOCK_Q, BLOCK_N divides BLOCK_K.

    The index arrays are those of `runtime.schedule.DeviceSchedule`. scale_log2 is scale * log2(e), positive.
    PARTIAL: the last key block has fewer than BLOCK_K keys. ANCHORED: some head computes anchor rows only.
    """
    parts: tl.constexpr = BLOCK_Q // BLOCK_M
    steps: tl.constexpr = BLOCK_K // BLOCK_N
    tile = tiles_ptr + 4 * (tl.program_id(0) // parts)
    batch = tl.program_id(1).to(tl.int64)
    head = tl.load(tile)
    first_query = tl.load(tile + 1) * BLOCK_Q + tl.program_id(0) % parts * BLOCK_M
    start = tl.load(tile + 2)
    stop = tl.load(tile + 3)

    packed_tokens = tl.load(heads_ptr + 2 * head)
    query = first_query + tl.arange(0, BLOCK_M)
    exists = query < packed_tokens
    query = tl.minimum(query, packed_tokens - 1)
    token = query
    if ANCHORED:
        packed_start = tl.load(heads_ptr + 2 * head + 1)
        token = tl.load(query_token_ptr + packed_start + query)

    channel = tl.arange(0, HEAD_DIM)
    head_offset = head.to(tl.int64)
    q_base = q_ptr + batch * q_stride_b + head_offset * q_stride_h
    k_base = k_ptr + batch * k_stride_b + head_offset * k_stride_h
    v_base = v_ptr + batch * v_stride_b + head_offset * v_stride_h
    q = tl.load(q_base + (token.to(tl.int64)[:, None] * q_stride_n + channel[None, :]))

    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    last_steps = 0
    if PARTIAL:  # a list is ascending: only its last block can be the partial one
        last_column = tokens // BLOCK_K
        ends_partial = tl.load(columns_ptr + stop - 1).to(tl.int32) == last_column
        last_steps = tl.where(ends_partial, tl.cdiv(tokens - last_column * BLOCK_K, BLOCK_N), 0)
        stop -= ends_partial.to(tl.int32)
    column = tl.load(columns_ptr + start)
    for step in range(start * steps, stop * steps):
        following = tl.load(columns_ptr + (step + 1) // steps)  # ahead of its use: addresses wait for it
        acc, row_sum, row_max = _accumulate(
            acc, row_sum, row_max, q, k_base, v_base, column.to(tl.int32) * BLOCK_K + step % steps * BLOCK_N,
            k_stride_n, v_stride_n, tokens, scale_log2, BLOCK_N, HEAD_DIM, False,
        )  # fmt: skip
        column = following
    if PARTIAL:
        for step in range(last_steps):
            acc, row_sum, row_max = _accumulate(
                acc, row_sum, row_max, q, k_base, v_base, last_column * BLOCK_K + step * BLOCK_N,
                k_stride_n, v_stride_n, tokens, scale_log2, BLOCK_N, HEAD_DIM, True,
            )  # fmt: skip

    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    lse = (row_max + tl.log2(row_sum)) * 0.6931471805599453
    out_base = out_ptr + batch * out_stride_b + head_offset * out_stride_h
    lse_base = lse_ptr + batch * lse_stride_b + head_offset * lse_stride_h
    if ANCHORED:
        first = tl.load(query_first_ptr + packed_start + query)
        copies = tl.load(query_copies_ptr + packed_start + query, mask=exists, other=0)
        for copy in range(tl.max(copies, 0)):
            target = first + copy * width
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
