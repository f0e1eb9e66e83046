"""Queries of anchors side by side, for a kernel that takes whole tiles. Kernels only."""

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
    `runtime.schedule.DeviceSchedule`.
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
