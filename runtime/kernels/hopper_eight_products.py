"""The products of `kernels.hopper_eight`: their operands and their sums. Kernels only.

For ptxas: P is carried through the loop as words of four bytes (single ones would take a register each), becomes an
operand before the products that it runs beside are issued, and is used once more after them in the rare branch; else
its registers are written while a product reads them, which ptxas sees and mends by serialising the products.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from calibatt.runtime.kernels.hopper_softmax import GROUP_Q, vote_bound

SHIFT = gl.constexpr(5.0)
"""As of `runtime.quantise`."""
PROMOTED = gl.constexpr(4)
"""Blocks of keys that are summed in e4m3's accumulator; a power of two."""


@gluon.constexpr_function
def eight_bound(dtype):
    """As `vote_bound`; of e4m3, whose last number is 448."""
    return "0f43E00000" if dtype == gl.float8e4nv else vote_bound(dtype)


@gluon.jit
def sums_of(p, BLOCK_K: gl.constexpr, DTYPE: gl.constexpr):
    """As `lane_sums_of`, and what the vote looks at."""
    x = p.reshape([GROUP_Q, BLOCK_K // 32, 4, 4, 2])
    x = gl.sum(gl.sum(x, axis=4), axis=2)
    sums = gl.sum(x, axis=1)
    if DTYPE == gl.float8e4nv:
        return sums, gl.max(x, axis=1)
    else:
        return sums, sums


@gluon.jit
def carried_of(p, BLOCK_K: gl.constexpr, DTYPE: gl.constexpr, OPERAND: gl.constexpr):
    """What the loop carries of P: 16 bits as an operand, e4m3 by four as int32 ``[64, BLOCK_K / 4]``."""
    if DTYPE == gl.float8e4nv:
        x = p.reshape([GROUP_Q, BLOCK_K // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([GROUP_Q, BLOCK_K // 4, 2, 2])
        even, odd = gl.split(x)
        p0, p2 = gl.split(even)
        p1, p3 = gl.split(odd)
        return gl.inline_asm_elementwise(
            "{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 h, $4, $3;"
            " mov.b32 $0, {l, h}; }",
            "=r,f,f,f,f", [p0, p1, p2, p3], dtype=gl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return gl.convert_layout(p.to(DTYPE), OPERAND)


@gluon.jit
def operand_of(carried, BLOCK_K: gl.constexpr, DTYPE: gl.constexpr, OPERAND: gl.constexpr):
    """Carried P as the operand of a product: four equal words become their four bytes, without an instruction."""
    if DTYPE == gl.float8e4nv:
        twice = gl.join(carried, carried)
        words = gl.convert_layout(gl.join(twice, twice).reshape([GROUP_Q, BLOCK_K]), OPERAND)
        bytes_of = gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r,r,r", [words], dtype=gl.int8, is_pure=False, pack=4
        )
        return bytes_of.to(gl.float8e4nv, bitcast=True)
    else:
        return carried


@gluon.jit
def used(carried, DTYPE: gl.constexpr):
    """A use without effect, since P has no signs."""
    if DTYPE == gl.float8e4nv:
        gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.eq.u32 p, $1, 0xffffffff; @p nanosleep.u32 $1; mov.b32 $0, $1; }",
            "=r,r", [carried], dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def scores_of(q, k, NOTHING):
    return warpgroup_mma(q, k.permute((1, 0)), NOTHING, use_acc=False, is_async=True)


@gluon.jit
def add_product(operand, v, acc, block, DTYPE: gl.constexpr):
    """Begins to add P V of a tile's block to the sum; 16 bits have one accumulator."""
    if DTYPE == gl.float8e4nv:
        return warpgroup_mma(operand, v.permute((1, 0)), acc, use_acc=block % PROMOTED != 0, is_async=True)
    else:
        return warpgroup_mma(operand, v, acc, is_async=True)


@gluon.jit
def promoted(acc, total, block, DTYPE: gl.constexpr):
    """The total, before the product of a tile's block is begun."""
    if DTYPE == gl.float8e4nv:
        if block % PROMOTED == 0:
            total = total + acc
    return total
