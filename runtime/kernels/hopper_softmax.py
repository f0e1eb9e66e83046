"""The softmax of `kernels.hopper`: its reference, its sums, and the vote on whether they overshoot. Kernels only."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

GROUP_Q = gl.constexpr(64)
"""Queries of a consumer."""
FIRST_NAMED_BARRIER = 8
"""Triton uses those below."""


@gluon.constexpr_function
def vote_bound(dtype):
    """Bits of the fp32 bound on a lane's partial sum of probabilities: 2^40, and 2^15 where P is rounded to fp16.

    fp16 ends at 65,504, and no term of a sum of positives exceeds the sum.
    """
    return "0f47000000" if dtype == gl.float16 else "0f53800000"


@gluon.constexpr_function
def vote_asm(group, bound):
    """Votes among the 128 threads of a consumer on whether one of two values exceeds the bound.

    The result goes to a register of function scope: Gluon turns a tensor into a scalar only by a full reduction.
    """
    return (
        f"\n.reg .b32 overshoot{group};\n"
        "{ .reg .pred p, q; .reg .f32 t; max.f32 t, $2, $3;"
        f" setp.gt.f32 p, t, {bound}; bar.red.or.pred q, {FIRST_NAMED_BARRIER + group}, 128, p;"
        f" selp.b32 overshoot{group}, 1, 0, q; mov.f32 $0, $2; mov.f32 $1, $3; }}"
    )


@gluon.constexpr_function
def verdict_asm(group):
    """Reads the result of a vote; ``vote.sync`` lets ptxas see that it is the same in all lanes."""
    return (
        f"{{ .reg .pred p; setp.ne.u32 p, overshoot{group}, 0; vote.sync.any.pred p, p, 0xffffffff;"
        " selp.b32 $0, 1, 0, p; }"
    )


@gluon.constexpr_function
def hold_asm(group):
    """A barrier of a consumer that depends on two values."""
    return (
        "{ .reg .pred p, q; setp.gt.f32 p, $2, $3;"
        f" bar.red.or.pred q, {FIRST_NAMED_BARRIER + group}, 128, p; mov.f32 $0, $2; mov.f32 $1, $3; }}"
    )


@gluon.jit
def any_overshoots(sums, GROUP: gl.constexpr, BOUND: gl.constexpr):
    """Whether any partial sum of the consumer exceeds the bound; NaN does not."""
    vote: gl.constexpr = vote_asm(GROUP, BOUND)
    gl.inline_asm_elementwise(vote, "=f,=f,f,f", [sums], dtype=gl.float32, is_pure=False, pack=2)
    return gl.inline_asm_elementwise(verdict_asm(GROUP), "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def hold(x, GROUP: gl.constexpr):
    """ptxas moves the wait for a wgmma above arithmetic, which ends the overlap, but not above this."""
    gl.inline_asm_elementwise(hold_asm(GROUP), "=f,=f,f,f", [x], dtype=gl.float32, is_pure=False, pack=2)


@gluon.jit
def row_max(scores, BLOCK_K: gl.constexpr, ROW: gl.constexpr):
    """Row maxima ``[64]``: a tree over registers (gl.max is one serial chain), then over a row's four lanes."""
    x = scores.reshape([GROUP_Q, BLOCK_K // 32, 4, 4, 2])
    x = gl.max(gl.max(gl.max(x, axis=4), axis=2), axis=1)
    return gl.convert_layout(gl.max(x, axis=1), ROW)


@gluon.jit
def lane_sums_of(p, BLOCK_K: gl.constexpr):
    """Row sums of each of the four lanes of a row, ``[64, 4]``: no shuffles."""
    x = p.reshape([GROUP_Q, BLOCK_K // 32, 4, 4, 2])
    return gl.sum(gl.sum(gl.sum(x, axis=4), axis=2), axis=1)


@gluon.jit
def without(scores, valid, BLOCK_K: gl.constexpr, SCORES: gl.constexpr):
    """Scores of a block without the keys that do not exist."""
    key = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, SCORES))
    return gl.where((key < valid)[None, :], scores, float("-inf"))


@gluon.jit
def first_reference(scores, valid, BLOCK_K: gl.constexpr, SCORES: gl.constexpr, ROW: gl.constexpr):
    """Scores of a tile's first block without the keys that do not exist, and their row maxima (0 of an empty row)."""
    scores = without(scores, valid, BLOCK_K, SCORES)
    reference = row_max(scores, BLOCK_K, ROW)
    return scores, gl.where(reference == float("-inf"), 0.0, reference)
