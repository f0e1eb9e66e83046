"""Lists of key blocks from bits, and queries from runs of them. Kernels only."""

import triton
import triton.language as tl

COLUMNS_AT_ONCE = 512
"""Key blocks that a program looks at in a step."""
QUERIES_AT_ONCE = 128


@triton.jit(do_not_specialize=["lists", "k_blocks"])
def unpack_lists(bits_ptr, starts_ptr, columns_ptr, lists, k_blocks, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """``columns[starts[i]:starts[i + 1]]`` = the places of the ones in row i of bits, ascending.

    Grid: (lists + 1,). The last program writes 0, 1, ... k_blocks - 1 at the start of the columns and a 0 after their
    end, ``starts[lists]``. bits: uint8 ``(lists, WIDTH)``, little-endian. starts: int32 ``(lists + 1,)``. columns:
    uint16.
    """
    row = tl.program_id(0)
    start = tl.load(starts_ptr + row)
    column = tl.arange(0, COLUMNS)
    if row == lists:
        for first in range(0, k_blocks, COLUMNS):
            value = first + column
            tl.store(columns_ptr + value, value.to(tl.uint16), mask=value < k_blocks)
        tl.store(columns_ptr + start, 0)
    else:
        row_bits = bits_ptr + row.to(tl.int64) * WIDTH
        for first in range(0, k_blocks, COLUMNS):
            value = first + column
            byte = tl.load(row_bits + value // 8, mask=value < k_blocks, other=0).to(tl.int32)
            kept = byte >> value % 8 & 1
            before = tl.cumsum(kept, 0) - kept
            tl.store(columns_ptr + start + before, value.to(tl.uint16), mask=kept == 1)
            start += tl.sum(kept, 0)


@triton.jit
def expand_runs(runs_ptr, token_ptr, first_ptr, copies_ptr, QUERIES: tl.constexpr):
    """`runtime.workspace.expanded`. Grid: (runs,). All int32."""
    run = runs_ptr + 5 * tl.program_id(0)
    start = tl.load(run)
    length = tl.load(run + 1)
    token = tl.load(run + 2)
    first = tl.load(run + 3)
    copies = tl.load(run + 4)
    for done in range(0, length, QUERIES):
        place = done + tl.arange(0, QUERIES)
        exists = place < length
        tl.store(token_ptr + start + place, token + place, mask=exists)
        tl.store(first_ptr + start + place, first + place, mask=exists)
        tl.store(copies_ptr + start + place, place * 0 + copies, mask=exists)
