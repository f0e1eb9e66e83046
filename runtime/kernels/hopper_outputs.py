"""Where outputs of `kernels.hopper` go. Kernels only."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from calibatt.runtime.kernels.gluon_compat import store_tile
from calibatt.runtime.kernels.hopper_producer import CONSUMERS
from calibatt.runtime.kernels.hopper_softmax import GROUP_Q


@gluon.jit
def receivers_of(
    receivers, tile_fact, row_tokens, frame_tokens, GROUP: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """The first token that receives the output of each query of a packed tile, how many do (0 of no query), how far
    apart.
    """
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    tile = gl.max(tile_fact.load(ONE), axis=0)
    row = tile * (GROUP_Q * CONSUMERS) + GROUP * GROUP_Q + gl.arange(0, GROUP_Q, layout=ROW)
    both = gl.load(receivers + row)
    step = gl.where(both < 0, frame_tokens, row_tokens)
    return both.to(gl.int32), (both >> 32).to(gl.int32) & 0x7FFFFFFF, step


@gluon.jit
def store_queries(
    out_desc, out_ptr, out_strides, q, batch, head, first_query, query_stop, others, tokens,
    COPIED: gl.constexpr, OTHERS: gl.constexpr,
):  # fmt: skip
    """Outputs of queries that follow each other in the sequence, of one part of it."""
    if OTHERS:
        _, _, _, video_start, _ = others
        if query_stop == video_start + tokens:
            store_tile(out_desc, [batch, head, first_query - video_start, 0], q)
        else:
            out_stride_b, out_stride_h, out_stride_n = out_strides
            rows = q.load(COPIED)
            token = first_query + gl.arange(0, GROUP_Q, layout=gl.SliceLayout(1, COPIED))
            channel = gl.arange(0, rows.shape[1], layout=gl.SliceLayout(0, COPIED))
            out_of_head = out_ptr + batch.to(gl.int64) * out_stride_b + head.to(gl.int64) * out_stride_h
            target = out_of_head + (token.to(gl.int64) * out_stride_n)[:, None] + channel[None, :]
            gl.store(target, rows, mask=(token < query_stop)[:, None])
    else:
        store_tile(out_desc, [batch, head, first_query, 0], q)
