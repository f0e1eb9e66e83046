"""`kernels.hopper` for heads of 8 bits: what `kernels.quantise` made, multiplied. Kernels only.

The frame is that of `kernels.hopper`, which says what is not said here: one CTA an SM, a producer warp, two consumers
of 64 queries, the fixed reference and the vote. A score is the int32 product times the scales of its queries and of its
keys, in units of log2. Two kinds, told by the dtype of the values:

16 bits (INT8): as they are; so are probabilities, and their bound.

e4m3 (INT8_FP8): P = 2^(s - m + SHIFT), so that the largest of a tile's first block is 32 and e4m3 ends at 448: what the
vote looks at is the largest sum of eight probabilities. Tensor cores align every product of e4m3 to the largest term,
the accumulator included, and cut what is 13 bits below: what is small against a sum that has grown is lost. Every
`PROMOTED` blocks of a tile (counted from its first one, so that equal inputs give equal bits, whichever CTA computes a
tile) the accumulator is therefore added to a total in fp32 and starts anew.

Queries are those of the video, packed. Outputs of heads with anchors are stored packed, too, and copied to their groups
afterwards (`kernels.anchors`): copied here as in `kernels.hopper`, they leave ptxas too few registers, which serialises
the products.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from calibatt.runtime.kernels.gluon_compat import store_tile
from calibatt.runtime.kernels.hopper import (
    LN_2,
    MOST_KV_SLOTS,
    NOT_SPECIALIZED,
    SHARED_BYTES,
    SMALL_BYTES,
    registers,
)
from calibatt.runtime.kernels.hopper_eight_products import (
    SHIFT,
    add_product,
    carried_of,
    eight_bound,
    operand_of,
    promoted,
    scores_of,
    sums_of,
    used,
)
from calibatt.runtime.kernels.hopper_producer import CONSUMERS, FACTS, Q_SLOTS, advance, facts_of_tile, producer
from calibatt.runtime.kernels.hopper_softmax import GROUP_Q, any_overshoots, hold, row_max, without


@gluon.jit
def _first(s, c, valid, BLOCK_K: gl.constexpr, SCORES: gl.constexpr, ROW: gl.constexpr, LIFT: gl.constexpr):
    """P of a tile's first block, and the reference: row maxima, LIFT lower."""
    x = without(s.to(gl.float32) * c, valid, BLOCK_K, SCORES)
    reference = row_max(x, BLOCK_K, ROW)
    m = gl.where(reference == float("-inf"), 0.0, reference) - LIFT
    return gl.exp2(x - m[:, None]), m


@gluon.jit
def _step(
    q, acc, total, carried, lane_sums, m, block, lead, facts, first_valid, q_scale, k_slots, v_slots, scale_slots,
    k_full, v_full, kv_read, k_at, k_parity, v_at, v_parity,
    GROUP: gl.constexpr, KV_SLOTS: gl.constexpr, OTHERS: gl.constexpr, SCORES: gl.constexpr, OUTPUT: gl.constexpr,
    OPERAND: gl.constexpr, LANES: gl.constexpr, ONE: gl.constexpr, LIFT: gl.constexpr,
):  # fmt: skip
    """The scores of block `block` + 1 of a tile beside the product of `block`; see `kernels.hopper`."""
    DTYPE: gl.constexpr = v_slots.dtype
    BLOCK_K: gl.constexpr = k_slots.type.shape[1]
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    nothing = gl.zeros([GROUP_Q, BLOCK_K], gl.int32, SCORES)
    mbarrier.wait(k_full.index(k_at), k_parity)
    mbarrier.wait(v_full.index(v_at), v_parity)
    c = q_scale * gl.max(scale_slots.index(k_at).load(ONE), axis=0)
    total = promoted(acc, total, block, DTYPE)
    operand = operand_of(carried, BLOCK_K, DTYPE, OPERAND)
    s = scores_of(q, k_slots.index(k_at), nothing)
    acc = add_product(operand, v_slots.index(v_at), acc, block, DTYPE)
    s = warpgroup_mma_wait(num_outstanding=1, deps=[s])
    x = s.to(gl.float32) * c
    if OTHERS:
        if block < lead:
            x = without(x, gl.max(facts.index(first_valid + block).load(ONE), axis=0), BLOCK_K, SCORES)
    p = gl.exp2(x - m[:, None])
    sums, seen = sums_of(p, BLOCK_K, DTYPE)
    following = carried_of(p, BLOCK_K, DTYPE, OPERAND)
    overshoots = any_overshoots(seen, GROUP, eight_bound(DTYPE))
    acc, carried = warpgroup_mma_wait(num_outstanding=0, deps=[acc, carried])
    if overshoots != 0:
        used(carried, DTYPE)
        s = scores_of(q, k_slots.index(k_at), nothing)
        s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
        x = s.to(gl.float32) * c
        if OTHERS:
            if block < lead:
                x = without(x, gl.max(facts.index(first_valid + block).load(ONE), axis=0), BLOCK_K, SCORES)
        higher = gl.maximum(m, row_max(x, BLOCK_K, ROW) - LIFT)
        fade = gl.exp2(m - higher)
        m = higher
        p = gl.exp2(x - m[:, None])
        sums, seen = sums_of(p, BLOCK_K, DTYPE)
        following = carried_of(p, BLOCK_K, DTYPE, OPERAND)
        lane_sums = lane_sums * gl.convert_layout(fade, LANES)[:, None]
        fade_out = gl.convert_layout(fade, gl.SliceLayout(1, OUTPUT))[:, None]
        acc = acc * fade_out
        if DTYPE == gl.float8e4nv:
            total = total * fade_out
    mbarrier.arrive(kv_read.index(k_at), count=1)
    lane_sums = lane_sums + sums
    k_at, k_parity = advance(k_at, k_parity, KV_SLOTS)
    v_at, v_parity = advance(v_at, v_parity, KV_SLOTS - 1)
    return acc, total, following, lane_sums, m, k_at, k_parity, v_at, v_parity


@gluon.jit
def _consumer(
    out_desc, packed_out_desc, lse_ptr, packed_lse, q_slots, k_slots, v_slots, out_slots, scale_slots, facts, barriers,
    channels, lse_shift, eight_heads, q_groups, tokens, all_tokens, video_start, heads,
    GROUP: gl.constexpr, ANCHORED: gl.constexpr, LSE: gl.constexpr, KV_SLOTS: gl.constexpr, OTHERS: gl.constexpr,
):  # fmt: skip
    """The 64 queries of one warpgroup, of every tile of this CTA."""
    HERE: gl.constexpr = facts_of_tile(OTHERS, True)
    q_full, q_free, k_full, v_full, kv_read, told = barriers
    BLOCK_K: gl.constexpr = k_slots.type.shape[1]
    HEAD_DIM: gl.constexpr = k_slots.type.shape[2]
    DTYPE: gl.constexpr = v_slots.dtype
    IN_E4M3: gl.constexpr = DTYPE == gl.float8e4nv
    LIFT: gl.constexpr = SHIFT if IN_E4M3 else 0.0
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_K, 32]
    )
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 32 if IN_E4M3 else 16]
    )
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=4 if IN_E4M3 else 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUTPUT_ROW: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    nothing = gl.zeros([GROUP_Q, BLOCK_K], gl.int32, SCORES)
    tile = out_slots.index(GROUP)
    q_at = 0
    q_parity = 0
    k_at = 0
    k_parity = 0
    v_at = 0
    v_parity = 0
    mbarrier.wait(told.index(0), 0)
    place = gl.max(facts.index(0).load(ONE), axis=0)
    count = gl.max(facts.index(1).load(ONE), axis=0)
    valid = gl.max(facts.index(2).load(ONE), axis=0)
    batch = gl.max(facts.index(3).load(ONE), axis=0)
    q_scale = gl.max(facts.index(HERE - 3 + GROUP).load(ONE).to(gl.float32, bitcast=True), axis=0)
    # the first block of the first tile; every later tile's first block overlaps the end of the tile before it
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    s = scores_of(q_slots.index(GROUP), k_slots.index(0), nothing)
    s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
    c = q_scale * gl.max(scale_slots.index(0).load(ONE), axis=0)
    mbarrier.arrive(kv_read.index(0), count=1)
    k_at, k_parity = advance(k_at, k_parity, KV_SLOTS)
    p, m = _first(s, c, valid, BLOCK_K, SCORES, ROW, LIFT)
    lane_sums, _ = sums_of(p, BLOCK_K, DTYPE)
    LANES: gl.constexpr = gl.SliceLayout(1, lane_sums.type.layout)
    carried = carried_of(p, BLOCK_K, DTYPE, OPERAND)
    acc = gl.zeros([GROUP_Q, HEAD_DIM], gl.float32, OUTPUT)
    if IN_E4M3:
        total = gl.zeros([GROUP_Q, HEAD_DIM], gl.float32, OUTPUT)
    else:
        total = 0
    while count > 0:
        q = q_slots.index(q_at * CONSUMERS + GROUP)
        lead = 0
        if OTHERS:
            lead = gl.max(facts.index(q_at * HERE + FACTS + 2).load(ONE), axis=0)
        for block in range(count - 1):
            acc, total, carried, lane_sums, m, k_at, k_parity, v_at, v_parity = _step(
                q, acc, total, carried, lane_sums, m, block, lead, facts, q_at * HERE + FACTS, q_scale, k_slots,
                v_slots, scale_slots, k_full, v_full, kv_read, k_at, k_parity, v_at, v_parity,
                GROUP, KV_SLOTS, OTHERS, SCORES, OUTPUT, OPERAND, LANES, ONE, LIFT,
            )  # fmt: skip
        # the last product of this tile beside the first scores of the next one
        next_q, next_parity = advance(q_at, q_parity, Q_SLOTS)
        mbarrier.wait(told.index(next_q), next_parity)
        next_place = gl.max(facts.index(next_q * HERE).load(ONE), axis=0)
        next_count = gl.max(facts.index(next_q * HERE + 1).load(ONE), axis=0)
        valid = gl.max(facts.index(next_q * HERE + 2).load(ONE), axis=0)
        next_batch = gl.max(facts.index(next_q * HERE + 3).load(ONE), axis=0)
        q_scale = gl.max(facts.index(next_q * HERE + HERE - 3 + GROUP).load(ONE).to(gl.float32, bitcast=True), axis=0)
        head = (place >> 16) & 0x7FFF
        slot = gl.max(facts.index(q_at * HERE + HERE - 1).load(ONE), axis=0)
        of_head = batch * eight_heads + slot
        first_query = (place & 0xFFFF) * (GROUP_Q * CONSUMERS) + GROUP * GROUP_Q
        row_sum = gl.convert_layout(gl.sum(lane_sums, axis=1), ROW)
        if LSE:
            row = first_query + gl.arange(0, GROUP_Q, layout=ROW)
            shift = gl.load(lse_shift + of_head.to(gl.int64) * (q_groups * GROUP_Q) + row)
            lse = (m + gl.log2(row_sum)) * LN_2 + shift
            lse_of_head = lse_ptr + (batch * heads + head).to(gl.int64) * all_tokens + video_start
            if ANCHORED:
                if place < 0:
                    gl.store(packed_lse + of_head.to(gl.int64) * (q_groups * GROUP_Q) + row, lse)
                else:
                    gl.store(lse_of_head + row, lse, mask=row < tokens)
            else:
                gl.store(lse_of_head + row, lse, mask=row < tokens)
        share = gl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)
        mbarrier.wait(q_full.index(next_q), next_parity, pred=next_count > 0)
        mbarrier.wait(k_full.index(k_at), k_parity, pred=next_count > 0)
        mbarrier.wait(v_full.index(v_at), v_parity)
        total = promoted(acc, total, count - 1, DTYPE)
        operand = operand_of(carried, BLOCK_K, DTYPE, OPERAND)
        s = scores_of(q_slots.index(next_q * CONSUMERS + GROUP), k_slots.index(k_at), nothing)
        acc = add_product(operand, v_slots.index(v_at), acc, count - 1, DTYPE)
        c = q_scale * gl.max(scale_slots.index(k_at).load(ONE), axis=0)
        s = warpgroup_mma_wait(num_outstanding=1, deps=[s])
        p, m = _first(s, c, valid, BLOCK_K, SCORES, ROW, LIFT)
        lane_sums, _ = sums_of(p, BLOCK_K, DTYPE)
        following = carried_of(p, BLOCK_K, DTYPE, OPERAND)
        hold(lane_sums, GROUP)
        acc, carried = warpgroup_mma_wait(num_outstanding=0, deps=[acc, carried])
        used(carried, DTYPE)
        mbarrier.arrive(kv_read.index(k_at), count=1)
        carried = following
        k_at, k_parity = advance(k_at, k_parity, KV_SLOTS)
        v_at, v_parity = advance(v_at, v_parity, KV_SLOTS - 1)
        share_out = gl.convert_layout(share, OUTPUT_ROW)[:, None]
        if IN_E4M3:
            channel = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, OUTPUT))
            of_channel = channels + of_head * 3 * HEAD_DIM + channel
            mean = gl.load(of_channel + HEAD_DIM)[None, :]
            acc = (acc + total) * share_out * gl.load(of_channel + 2 * HEAD_DIM)[None, :]
            acc = gl.where(share_out == 0.0, acc, acc + mean)
        else:
            acc = acc * share_out
        tile.store(acc.to(out_desc.dtype))
        fence_async_shared()
        at = [batch, head, first_query, 0]
        if ANCHORED:
            if place < 0:
                store_tile(packed_out_desc, [batch, slot, first_query, 0], tile)
            else:
                store_tile(out_desc, at, tile)
        else:
            store_tile(out_desc, at, tile)
        tma.store_wait(pendings=0)
        mbarrier.arrive(q_free.index(q_at), count=1)
        acc = gl.zeros([GROUP_Q, HEAD_DIM], gl.float32, OUTPUT)
        if IN_E4M3:
            total = gl.zeros([GROUP_Q, HEAD_DIM], gl.float32, OUTPUT)
        q_at = next_q
        q_parity = next_parity
        place = next_place
        count = next_count
        batch = next_batch


@gluon.jit(do_not_specialize=(*NOT_SPECIALIZED, "key_blocks"))
def hopper_eight_forward(
    q_desc, k_desc, v_desc, out_desc, packed_out_desc, lse_ptr, packed_lse, lengths, tiles, columns, counter, slots,
    q_scales, k_scales, channels, lse_shift, tokens, all_tokens, video_start, heads, eight_heads, q_groups, key_blocks,
    tiles_of_batch, work,
    ANCHORED: gl.constexpr, LSE: gl.constexpr, KV_SLOTS: gl.constexpr, OTHERS: gl.constexpr, PADDED: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Grid: at most one CTA an SM, and no more than `work`. What is not named is as of `kernels.hopper.hopper_forward`.

    Args:
        q_desc: TMA descriptor of the quantised queries in tiles of GROUP_Q.
        k_desc: Of the quantised keys, in blocks.
        v_desc: Of the values in e4m3, channels first; else of the values themselves, ``(B, H, N, D)``.
        packed_out_desc: Of outputs of heads with anchors, ``(B, quantised heads, q_groups * GROUP_Q, D)``; only with
            ANCHORED.
        packed_lse: fp32 ``(B, quantised heads, q_groups * GROUP_Q)``; only with ANCHORED and LSE.
        tiles: Those of heads of this precision.
        slots: int32 ``(heads,)``: the place of a head among the quantised ones.
        q_scales: As of `kernels.quantise`, and `k_scales`, `channels`, `lse_shift` likewise; the last only with LSE.
        eight_heads: Quantised heads.
        q_groups: Groups of GROUP_Q queries of such a head.
        key_blocks: Quantised blocks of such a head.
    """
    BLOCK_K: gl.constexpr = k_desc.block_type.shape[2]
    HEAD_DIM: gl.constexpr = k_desc.block_type.shape[3]
    V_SLOTS: gl.constexpr = KV_SLOTS - 1
    IN_E4M3: gl.constexpr = v_desc.dtype == gl.float8e4nv
    ROWS: gl.constexpr = row_layout(HEAD_DIM, 8)
    WIDE_ROWS: gl.constexpr = row_layout(HEAD_DIM, 16)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_slots = gl.allocate_shared_memory(gl.int8, [Q_SLOTS * CONSUMERS, GROUP_Q, HEAD_DIM], ROWS)
    k_slots = gl.allocate_shared_memory(gl.int8, [KV_SLOTS, BLOCK_K, HEAD_DIM], ROWS)
    if IN_E4M3:
        v_slots = gl.allocate_shared_memory(v_desc.dtype, [V_SLOTS, HEAD_DIM, BLOCK_K], row_layout(BLOCK_K, 8))
    else:
        v_slots = gl.allocate_shared_memory(v_desc.dtype, [V_SLOTS, BLOCK_K, HEAD_DIM], WIDE_ROWS)
    out_slots = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, GROUP_Q, HEAD_DIM], WIDE_ROWS)
    HERE: gl.constexpr = facts_of_tile(OTHERS, True)
    facts = gl.allocate_shared_memory(gl.int32, [Q_SLOTS * HERE, 1], FLAT)
    scale_slots = gl.allocate_shared_memory(gl.float32, [KV_SLOTS, 1], FLAT)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_SLOTS, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [Q_SLOTS, 1], mbarrier.MBarrierLayout())
    told = gl.allocate_shared_memory(gl.int64, [Q_SLOTS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [KV_SLOTS, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [V_SLOTS, 1], mbarrier.MBarrierLayout())
    kv_read = gl.allocate_shared_memory(gl.int64, [KV_SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(Q_SLOTS):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_free.index(slot), count=CONSUMERS)
        mbarrier.init(told.index(slot), count=1)
    for slot in gl.static_range(KV_SLOTS):
        mbarrier.init(k_full.index(slot), count=2)  # the keys, and their scale
        mbarrier.init(kv_read.index(slot), count=CONSUMERS)
    for slot in gl.static_range(V_SLOTS):
        mbarrier.init(v_full.index(slot), count=1)
    fence_async_shared()
    barriers = (q_full, q_free, k_full, v_full, kv_read, told)
    others = (heads, 0, 0, video_start, all_tokens)
    eight = (q_scales, k_scales, slots, eight_heads, q_groups, key_blocks, scale_slots)
    REGISTERS: gl.constexpr = registers(OTHERS)
    gl.warp_specialize([
        (_consumer, (out_desc, packed_out_desc, lse_ptr, packed_lse, q_slots, k_slots, v_slots, out_slots, scale_slots,
                     facts, barriers, channels, lse_shift, eight_heads, q_groups, tokens, all_tokens, video_start,
                     heads, 0, ANCHORED, LSE, KV_SLOTS, OTHERS)),
        (_consumer, (out_desc, packed_out_desc, lse_ptr, packed_lse, q_slots, k_slots, v_slots, out_slots, scale_slots,
                     facts, barriers, channels, lse_shift, eight_heads, q_groups, tokens, all_tokens, video_start,
                     heads, 1, ANCHORED, LSE, KV_SLOTS, OTHERS)),
        (producer, (q_desc, None, k_desc, v_desc, q_slots, k_slots, v_slots, facts, barriers, tiles, columns, counter,
                     lengths, others, tokens, tiles_of_batch, 0, work, eight,
                     ANCHORED, KV_SLOTS, OTHERS, PADDED, True)),
    ], [4, 1], REGISTERS)  # fmt: skip


@gluon.constexpr_function
def row_layout(row, bits, rank=2):
    """The layout of tiles of such rows in shared memory, and of descriptors' tiles."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, row * bits // 8), element_bitwidth=bits, rank=rank)


def kv_slots(head_dim: int, block_k: int, value_bytes: int) -> int:
    """How many key blocks are kept in shared memory; value blocks, of so many bytes an element, are one fewer."""
    queries = int(Q_SLOTS * CONSUMERS * GROUP_Q) * head_dim
    outputs = 2 * int(CONSUMERS * GROUP_Q) * head_dim
    elements = (SHARED_BYTES - SMALL_BYTES - queries - outputs) // (block_k * head_dim)
    return min(MOST_KV_SLOTS, (elements + value_bytes) // (1 + value_bytes))
