"""Queries of anchor rows side by side before a kernel that takes whole tiles, and copies of their outputs after it.

The index arrays are those of `runtime.schedule.DeviceSchedule`. Kernels only.
"""

import triton
import triton.language as tl


@triton.jit
def pack_queries(
    q_ptr, packed_ptr, anchored_ptr, heads_ptr, token_ptr,
    stride_b, stride_h, stride_n, heads, packed_tokens,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """``packed[b, h, p] = q[b, h, token[p]]`` of anchored heads, 0 past a head's last packed query.

    Grid: (packed_tokens / ROWS, anchored heads, batch). anchored int32: which heads. packed has the shape
    ``(B, H, packed_tokens, D)``.
    """
    head = tl.load(anchored_ptr + tl.program_id(1))
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, HEAD_DIM)
    exists = row < tl.load(heads_ptr + 2 * head)
    token = tl.load(token_ptr + tl.load(heads_ptr + 2 * head + 1) + row, mask=exists, other=0)
    source = q_ptr + batch * stride_b + head.to(tl.int64) * stride_h
    q = tl.load(source + token.to(tl.int64)[:, None] * stride_n + channel[None, :], mask=exists[:, None], other=0.0)
    target = packed_ptr + ((batch * heads + head) * packed_tokens + row)[:, None] * HEAD_DIM + channel[None, :]
    tl.store(target, q, mask=(row < packed_tokens)[:, None])


@triton.jit
def spread_rows(
    packed_ptr, packed_lse_ptr, out_ptr, lse_ptr, anchored_ptr, heads_ptr, first_ptr, copies_ptr,
    stride_b, stride_h, stride_n, heads, packed_tokens, tokens, width,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Every token's output from the packed query that stands for it; the same grid as `pack_queries`."""
    head = tl.load(anchored_ptr + tl.program_id(1))
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, HEAD_DIM)
    exists = row < tl.load(heads_ptr + 2 * head)
    at = tl.load(heads_ptr + 2 * head + 1) + row
    first = tl.load(first_ptr + at, mask=exists, other=0)
    copies = tl.load(copies_ptr + at, mask=exists, other=0)
    line = batch * heads + head
    source = packed_ptr + (line * packed_tokens + row)[:, None] * HEAD_DIM + channel[None, :]
    out = tl.load(source, mask=exists[:, None], other=0.0)
    target = out_ptr + batch * stride_b + head.to(tl.int64) * stride_h
    if LSE:
        lse = tl.load(packed_lse_ptr + line * packed_tokens + row, mask=exists, other=0.0)
    for copy in range(tl.max(copies, 0)):
        token = first + copy * width
        wanted = copy < copies
        tl.store(target + token.to(tl.int64)[:, None] * stride_n + channel[None, :], out, mask=wanted[:, None])
        if LSE:
            tl.store(lse_ptr + line * tokens + token, lse, mask=wanted)
