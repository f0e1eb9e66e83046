"""Queries of anchors side by side, for a kernel that takes whole tiles, and outputs from there. Kernels only."""

import triton
import triton.language as tl


@triton.jit
def pack_queries(
    q_ptr, packed_ptr, anchored_ptr, heads_ptr, token_ptr, stride_b, stride_h, stride_n, heads, packed_tokens,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """``packed[b, h, p] = q[b, h, token[p]]`` of anchored heads, 0 past a head's last packed query.

    Grid: (anchored heads, packed_tokens / ROWS, batch), so that programs of one time read all heads of a token, which
    lie side by side in a model's tensors. anchored int32: which heads. packed has the shape
    ``(B, H, packed_tokens, D)``. `heads_ptr` and `token_ptr`: `heads` and `query_token` of
    `runtime.device_schedule.DeviceSchedule`.
    """
    head = tl.load(anchored_ptr + tl.program_id(0))
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, HEAD_DIM)
    exists = row < tl.load(heads_ptr + 3 * head)
    token = tl.load(token_ptr + tl.load(heads_ptr + 3 * head + 1) + row, mask=exists, other=0)
    source = q_ptr + batch * stride_b + head.to(tl.int64) * stride_h
    q = tl.load(source + token.to(tl.int64)[:, None] * stride_n + channel[None, :], mask=exists[:, None], other=0.0)
    target = packed_ptr + ((batch * heads + head) * packed_tokens + row)[:, None] * HEAD_DIM + channel[None, :]
    tl.store(target, q, mask=(row < packed_tokens)[:, None])


@triton.jit(do_not_specialize=("all_tokens", "video_start"))
def unpack_outputs(
    packed_ptr, packed_lse_ptr, heads_ptr, slots_ptr, packed_heads_ptr, first_ptr, copies_ptr, out_ptr, lse_ptr,
    stride_b, stride_h, stride_n, eight_heads, packed_tokens, heads, all_tokens, video_start, most_copies,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Copies packed outputs of heads with anchors to all tokens that receive them.

    Grid: such heads, ROWS of packed queries, batch.

    Args:
        packed_ptr: ``(B, eight_heads, packed_tokens, D)``.
        packed_lse_ptr: fp32 ``(B, eight_heads, packed_tokens)``; absent where no lse is asked for.
        heads_ptr: int32, the heads with anchors.
        slots_ptr: int32, by head, its place among the packed ones.
        packed_heads_ptr: `DeviceSchedule.heads`; `first_ptr` and `copies_ptr` are its `query_first` and `query_copies`.
        out_ptr: ``(B, H, N, D)``, of which the strides are.
        lse_ptr: fp32 ``(B, H, N)``.
        most_copies: The most tokens that receive one.
    """
    head = tl.load(heads_ptr + tl.program_id(0))
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, HEAD_DIM)[None, :]
    count = tl.load(packed_heads_ptr + head * 3)
    start = tl.load(packed_heads_ptr + head * 3 + 1)
    step = tl.load(packed_heads_ptr + head * 3 + 2)
    first = tl.load(first_ptr + start + row, mask=row < count, other=0)
    copies = tl.load(copies_ptr + start + row, mask=row < count, other=0)
    of_head = (batch * eight_heads + tl.load(slots_ptr + head)) * packed_tokens
    outputs = tl.load(packed_ptr + (of_head + row)[:, None] * HEAD_DIM + channel, mask=(row < count)[:, None])
    out_of_head = out_ptr + batch * stride_b + head.to(tl.int64) * stride_h
    lse_of_head = (batch * heads + head) * all_tokens
    for copy in range(most_copies):
        token = (video_start + first + copy * step).to(tl.int64)
        tl.store(out_of_head + (token * stride_n)[:, None] + channel, outputs, mask=(copy < copies)[:, None])
        if lse_ptr is not None:
            lse = tl.load(packed_lse_ptr + of_head + row, mask=row < count)
            tl.store(lse_ptr + lse_of_head + token, lse, mask=copy < copies)
