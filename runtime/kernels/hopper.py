"""Block-sparse attention forward for Hopper (sm90) in Gluon: TMA, wgmma and warp specialisation. Kernels only.

One CTA an SM stays for the whole launch and takes tiles of 128 queries, one after the other, in the schedule's order.
It is three partitions: a producer warp that only moves memory, and two consumer warpgroups of 64 queries each that only
compute. They share queues in shared memory and meet at mbarriers:

            ┌─ facts ─────────────▶┐   what a tile is: place, batch, number of blocks, valid keys of the first one
            ├─ q_full ────────────▶│
  producer ─┼─ k_full ────────────▶├─ consumer 0: queries   0 ..  63
   (TMA)    ├─ v_full ────────────▶│  consumer 1: queries  64 .. 127
            │◀── kv_read ──────────┤   step g: K of block g and V of block g - 1 are no longer needed
            └◀── q_free ───────────┘   the tile's output has left the slot that its queries came in

Consumers, step g:   S = Q K_g^T  and  O += P_{g-1} V_{g-1}  are in flight together; the softmax of S runs beside the
second one and makes P_g. A tile's last product runs beside the first scores of the next one: the pipeline never drains.

Softmax without a running maximum. The reference m of a row is the exact maximum of its tile's first block, and stays:
no maximum, no shuffle and no rescaling in the loop. After every step the 128 threads of a warpgroup vote on whether a
partial sum of probabilities overshoots a bound; if one does (rare), they compute the scores again from the keys that
are still in shared memory, take the exact maximum and rescale. The result is an exact softmax in all cases. Lists are
ascending and taken from their end, so that a partial last key block comes first, where a maximum is taken anyway.

A schedule is of the video's tokens. With others in the sequence (OTHERS), the first tiles of a batch are those of
their queries, which attend to all keys, and every tile's list is longer: the last key block of the suffix, the last one
of the prefix, the tile's own list from its end, and what is left of both. Up to three blocks may thus be partial, and
the first three are masked. All are steps of one loop: with a loop of its own for those that are masked, skipped where
there are none, the ptxas of triton 3.6 computed the queries' address in the first loop alone, and the second one used
what the register held before. What is stored beyond a part's end would overwrite the next part: outputs of the video
have a descriptor that ends with it, others are stored by address.

Row sums are kept per lane and added across lanes at the end of a tile; every output is the sum of its blocks in list
order, so that equal inputs give equal bits, whichever CTA computes a tile.
"""

import functools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from calibatt.runtime.kernels.hopper_outputs import receivers_of, store_queries
from calibatt.runtime.kernels.hopper_producer import CONSUMERS, FACTS, Q_SLOTS, advance, facts_of_tile, producer
from calibatt.runtime.kernels.hopper_softmax import (
    GROUP_Q,
    any_overshoots,
    first_reference,
    hold,
    lane_sums_of,
    row_max,
    vote_bound,
    without,
)

BLOCK_Q = 128
"""Queries of a tile."""
PRODUCER_REGISTERS = gl.constexpr(24)
CONSUMER_REGISTERS = gl.constexpr(240)
MORE_REGISTERS = gl.constexpr(16)
"""That the producer has with OTHERS, where it computes more; half of it fewer for the consumers."""
LAUNCH_OPTIONS = {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": True}
"""168 x 384 threads are all registers of an SM; setmaxnreg then moves them from the producer to the consumers."""
SHARED_BYTES = 232_448
"""Of one block on sm90."""
SMALL_BYTES = 1024
"""Facts, barriers, and what warp specialisation keeps."""
MOST_KV_SLOTS = 5
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def registers(others):
    """Of the consumers and of the producer."""
    more = MORE_REGISTERS.value if others else 0
    return [CONSUMER_REGISTERS.value - more // 2, PRODUCER_REGISTERS.value + more]


@gluon.jit
def _step(
    q, acc, p_operand, lane_sums, m, number, lead, facts, first_valid, k_slots, v_slots, k_full, v_full, kv_read, k_at,
    k_parity, v_at, v_parity, scale_log2,
    GROUP: gl.constexpr, KV_SLOTS: gl.constexpr, DTYPE: gl.constexpr, OTHERS: gl.constexpr, SCORES: gl.constexpr,
    OUTPUT: gl.constexpr, LANES: gl.constexpr, ONE: gl.constexpr,
):  # fmt: skip
    """One block: its scores beside the product of the block before.

    With OTHERS, the first `lead` blocks may be partial: the facts from `first_valid` on say how many keys each has.
    """
    BLOCK_K: gl.constexpr = k_slots.type.shape[1]
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    PROBABILITIES: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)
    no_scores = gl.zeros([GROUP_Q, BLOCK_K], gl.float32, SCORES)
    mbarrier.wait(k_full.index(k_at), k_parity)
    mbarrier.wait(v_full.index(v_at), v_parity)
    s = warpgroup_mma(q, k_slots.index(k_at).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    acc = warpgroup_mma(p_operand, v_slots.index(v_at), acc, is_async=True)
    s = warpgroup_mma_wait(num_outstanding=1, deps=[s])
    if OTHERS:
        if number < lead:
            s = without(s, gl.max(facts.index(first_valid + number).load(ONE), axis=0), BLOCK_K, SCORES)
    p = gl.exp2(s * scale_log2 - (m * scale_log2)[:, None])
    sums = lane_sums_of(p, BLOCK_K)
    overshoots = any_overshoots(sums, GROUP, vote_bound(DTYPE))  # also holds the wait below in its place
    acc, p_operand = warpgroup_mma_wait(num_outstanding=0, deps=[acc, p_operand])
    if overshoots != 0:
        s = warpgroup_mma(q, k_slots.index(k_at).permute((1, 0)), no_scores, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
        if OTHERS:
            if number < lead:
                s = without(s, gl.max(facts.index(first_valid + number).load(ONE), axis=0), BLOCK_K, SCORES)
        higher = gl.maximum(m, row_max(s, BLOCK_K, ROW))
        fade = gl.exp2((m - higher) * scale_log2)
        m = higher
        p = gl.exp2(s * scale_log2 - (m * scale_log2)[:, None])
        sums = lane_sums_of(p, BLOCK_K)
        lane_sums = lane_sums * gl.convert_layout(fade, LANES)[:, None]
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, OUTPUT))[:, None]
    mbarrier.arrive(kv_read.index(k_at), count=1)
    lane_sums = lane_sums + sums
    k_at, k_parity = advance(k_at, k_parity, KV_SLOTS)
    v_at, v_parity = advance(v_at, v_parity, KV_SLOTS - 1)
    return acc, gl.convert_layout(p.to(DTYPE), PROBABILITIES), lane_sums, m, k_at, k_parity, v_at, v_parity


@gluon.jit
def _consumer(
    out_desc, out_ptr, out_strides, lse_ptr, receivers, q_slots, k_slots, v_slots, facts, barriers,
    others, row_tokens, frame_tokens, most_copies, tokens, heads, scale_log2,
    GROUP: gl.constexpr, ANCHORED: gl.constexpr, LSE: gl.constexpr, KV_SLOTS: gl.constexpr, OTHERS: gl.constexpr,
):  # fmt: skip
    """The 64 queries of one warpgroup, of every tile of this CTA."""
    HERE: gl.constexpr = facts_of_tile(OTHERS, False)
    q_full, q_free, k_full, v_full, kv_read, told = barriers
    BLOCK_K: gl.constexpr = k_slots.type.shape[1]
    HEAD_DIM: gl.constexpr = k_slots.type.shape[2]
    V_SLOTS: gl.constexpr = KV_SLOTS - 1
    DTYPE: gl.constexpr = out_desc.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_K, 16]
    )
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    PROBABILITIES: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUTPUT_ROW: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    VECTOR: gl.constexpr = 8
    COPIED: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 * VECTOR // HEAD_DIM, HEAD_DIM // VECTOR], [4, 1], [1, 0])
    no_scores = gl.zeros([GROUP_Q, BLOCK_K], gl.float32, SCORES)
    out_stride_b, out_stride_h, out_stride_n = out_strides
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
    # the first block of the first tile; every later tile's first block overlaps the end of the tile before it
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q_slots.index(GROUP), k_slots.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
    mbarrier.arrive(kv_read.index(0), count=1)
    k_at, k_parity = advance(k_at, k_parity, KV_SLOTS)
    s, m = first_reference(s, valid, BLOCK_K, SCORES, ROW)
    p = gl.exp2(s * scale_log2 - (m * scale_log2)[:, None])
    lane_sums = lane_sums_of(p, BLOCK_K)
    LANES: gl.constexpr = gl.SliceLayout(1, lane_sums.type.layout)
    p_operand = gl.convert_layout(p.to(DTYPE), PROBABILITIES)
    acc = gl.zeros([GROUP_Q, HEAD_DIM], gl.float32, OUTPUT)
    while count > 0:
        q = q_slots.index(q_at * CONSUMERS + GROUP)
        lead = 0
        if OTHERS:
            lead = gl.max(facts.index(q_at * HERE + FACTS + 2).load(ONE), axis=0)
        for number in range(count - 1):
            acc, p_operand, lane_sums, m, k_at, k_parity, v_at, v_parity = _step(
                q, acc, p_operand, lane_sums, m, number, lead, facts, q_at * HERE + FACTS, k_slots, v_slots, k_full,
                v_full, kv_read, k_at, k_parity, v_at, v_parity, scale_log2, GROUP, KV_SLOTS, DTYPE, OTHERS, SCORES,
                OUTPUT, LANES, ONE,
            )  # fmt: skip
        # the last product of this tile beside the first scores of the next one
        next_q, next_parity = advance(q_at, q_parity, Q_SLOTS)
        mbarrier.wait(told.index(next_q), next_parity)
        next_place = gl.max(facts.index(next_q * HERE).load(ONE), axis=0)
        next_count = gl.max(facts.index(next_q * HERE + 1).load(ONE), axis=0)
        valid = gl.max(facts.index(next_q * HERE + 2).load(ONE), axis=0)
        next_batch = gl.max(facts.index(next_q * HERE + 3).load(ONE), axis=0)
        mbarrier.wait(q_full.index(next_q), next_parity, pred=next_count > 0)
        mbarrier.wait(k_full.index(k_at), k_parity, pred=next_count > 0)
        mbarrier.wait(v_full.index(v_at), v_parity)
        s = warpgroup_mma(
            q_slots.index(next_q * CONSUMERS + GROUP), k_slots.index(k_at).permute((1, 0)), no_scores,
            use_acc=False, is_async=True,
        )  # fmt: skip
        acc = warpgroup_mma(p_operand, v_slots.index(v_at), acc, is_async=True)
        s = warpgroup_mma_wait(num_outstanding=1, deps=[s])
        row_sum = gl.convert_layout(gl.sum(lane_sums, axis=1), ROW)
        head = (place >> 16) & 0x7FFF
        first_query = (place & 0xFFFF) * (GROUP_Q * CONSUMERS) + GROUP * GROUP_Q
        query_stop = tokens
        if OTHERS:
            _, _, _, video_start, all_tokens = others
            first_query = gl.max(facts.index(q_at * HERE + FACTS + 3).load(ONE), axis=0) + GROUP * GROUP_Q
            other_stop = gl.max(facts.index(q_at * HERE + FACTS + 4).load(ONE), axis=0)
            query_stop = gl.where(other_stop > 0, other_stop, video_start + tokens)
        if LSE:
            row = first_query + gl.arange(0, GROUP_Q, layout=ROW)
            lse = (m * scale_log2 + gl.log2(row_sum)) * LN_2
            lse_of_head = lse_ptr + (batch * heads + head).to(gl.int64) * (all_tokens if OTHERS else tokens)
            if ANCHORED:
                if place < 0:
                    first, copies, step = receivers_of(
                        receivers, facts.index(q_at * HERE + 4), row_tokens, frame_tokens, GROUP, ROW
                    )
                    if OTHERS:
                        first += video_start
                    for copy in range(most_copies):
                        gl.store(lse_of_head + first + copy * step, lse, mask=copy < copies)
                else:
                    gl.store(lse_of_head + row, lse, mask=row < query_stop)
            else:
                gl.store(lse_of_head + row, lse, mask=row < query_stop)
        share = gl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)
        s, m = first_reference(s, valid, BLOCK_K, SCORES, ROW)
        p = gl.exp2(s * scale_log2 - (m * scale_log2)[:, None])
        lane_sums = lane_sums_of(p, BLOCK_K)
        hold(lane_sums, GROUP)
        acc, p_operand = warpgroup_mma_wait(num_outstanding=0, deps=[acc, p_operand])
        mbarrier.arrive(kv_read.index(k_at), count=1)
        k_at, k_parity = advance(k_at, k_parity, KV_SLOTS)
        v_at, v_parity = advance(v_at, v_parity, V_SLOTS)
        acc = acc * gl.convert_layout(share, OUTPUT_ROW)[:, None]
        q.store(acc.to(DTYPE))
        p_operand = gl.convert_layout(p.to(DTYPE), PROBABILITIES)
        fence_async_shared()
        if ANCHORED:
            if place < 0:
                rows = q.load(COPIED)
                COPIED_ROW: gl.constexpr = gl.SliceLayout(1, COPIED)
                first, copies, step = receivers_of(
                    receivers, facts.index(q_at * HERE + 4), row_tokens, frame_tokens, GROUP, COPIED_ROW
                )
                if OTHERS:
                    first += video_start
                channel = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, COPIED))
                out_of_head = out_ptr + batch.to(gl.int64) * out_stride_b + head.to(gl.int64) * out_stride_h
                for copy in range(most_copies):
                    token = (first + copy * step).to(gl.int64)
                    target = out_of_head + (token * out_stride_n)[:, None] + channel[None, :]
                    gl.store(target, rows, mask=(copy < copies)[:, None])
            else:
                store_queries(
                    out_desc,
                    out_ptr,
                    out_strides,
                    q,
                    batch,
                    head,
                    first_query,
                    query_stop,
                    others,
                    tokens,
                    COPIED,
                    OTHERS,
                )
        else:
            store_queries(
                out_desc, out_ptr, out_strides, q, batch, head, first_query, query_stop, others, tokens, COPIED, OTHERS
            )
        tma.store_wait(pendings=0)
        mbarrier.arrive(q_free.index(q_at), count=1)
        acc = gl.zeros([GROUP_Q, HEAD_DIM], gl.float32, OUTPUT)
        q_at = next_q
        q_parity = next_parity
        place = next_place
        count = next_count
        batch = next_batch


NOT_SPECIALIZED = ("all_tokens", "video_start", "head_tiles", "prefix_tiles", "tiles_of_batch", "work")
"""What the length of a text decides: no number is compiled in."""


@gluon.jit(do_not_specialize=NOT_SPECIALIZED)
def hopper_forward(
    q_desc, packed_q_desc, k_desc, v_desc, out_desc, out_ptr, lse_ptr, lengths, tiles, columns, counter,
    receivers, out_stride_b, out_stride_h, out_stride_n, row_tokens, frame_tokens, most_copies,
    tokens, all_tokens, video_start, heads, head_tiles, prefix_tiles, tiles_of_batch, tiles_of_pattern, work,
    scale_log2,
    ANCHORED: gl.constexpr, LSE: gl.constexpr, KV_SLOTS: gl.constexpr, OTHERS: gl.constexpr, PADDED: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Grid: at most one CTA an SM, and no more than `work`.

    Args:
        q_desc: TMA descriptor of ``(B, H, N, D)`` in tiles of GROUP_Q queries; rows past the end read as 0 and are
            never written. So are `packed_q_desc` and `out_desc`, which is of the video's tokens alone.
        packed_q_desc: Of the queries of anchored heads, ``(B, H, packed tokens, D)``; only with ANCHORED.
        k_desc: In tiles of a key block. So is `v_desc`.
        out_ptr: ``(B, H, N, D)``, with its strides in elements; only with ANCHORED or OTHERS.
        lse_ptr: fp32 ``(B, H, N)``; only with LSE.
        lengths: int32 ``(B,)``: keys from there on do not exist; only with PADDED.
        tiles: int32 ``(tiles_of_batch, 4)`` in the order of execution: place, start and stop of the key blocks in
            `columns`, last key block. The place is the head in bits 16 to 30 and the tile of the head in bits 0 to 15;
            it is negative where queries are packed, and the number of the head's pattern then is in bits 16 to 30 of
            the last key block.
        columns: uint16, ascending within a list.
        counter: int32 ``(1,)``, 0; it is 0 again afterwards, so that the next launch on a stream can use it.
        receivers: int64, for each query of each packed tile of a pattern, in bits 0 to 31 the first token that
            receives its output, in bits 32 to 62 how many do; negative where they are `frame_tokens` apart, not
            `row_tokens`. Only with ANCHORED.
        most_copies: The most tokens that receive one.
        tokens: Of the video.
        all_tokens: N.
        video_start: The first token of the video.
        head_tiles: Tiles of a head for the queries of the prefix, `prefix_tiles` of them, and of the suffix.
        tiles_of_batch: `heads` * `head_tiles`, and those in `tiles`.
        tiles_of_pattern: Packed tiles from one pattern to the next in `receivers`.
        work: Batch * tiles_of_batch.
        scale_log2: Scale of the scores * log2(e).
        KV_SLOTS: Key blocks in shared memory; value blocks are one fewer.
    """
    BLOCK_K: gl.constexpr = k_desc.block_type.shape[2]
    HEAD_DIM: gl.constexpr = k_desc.block_type.shape[3]
    V_SLOTS: gl.constexpr = KV_SLOTS - 1
    ROWS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_slots = gl.allocate_shared_memory(q_desc.dtype, [Q_SLOTS * CONSUMERS, GROUP_Q, HEAD_DIM], ROWS)
    k_slots = gl.allocate_shared_memory(q_desc.dtype, [KV_SLOTS, BLOCK_K, HEAD_DIM], ROWS)
    v_slots = gl.allocate_shared_memory(q_desc.dtype, [V_SLOTS, BLOCK_K, HEAD_DIM], ROWS)
    HERE: gl.constexpr = facts_of_tile(OTHERS, False)
    facts = gl.allocate_shared_memory(gl.int32, [Q_SLOTS * HERE, 1], FLAT)
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
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(kv_read.index(slot), count=CONSUMERS)
    for slot in gl.static_range(V_SLOTS):
        mbarrier.init(v_full.index(slot), count=1)
    fence_async_shared()
    barriers = (q_full, q_free, k_full, v_full, kv_read, told)
    out_strides = (out_stride_b, out_stride_h, out_stride_n)
    others = (heads, head_tiles, prefix_tiles, video_start, all_tokens)
    REGISTERS: gl.constexpr = registers(OTHERS)
    gl.warp_specialize([
        (_consumer, (out_desc, out_ptr, out_strides, lse_ptr, receivers, q_slots, k_slots, v_slots, facts, barriers,
                     others, row_tokens, frame_tokens, most_copies, tokens, heads, scale_log2,
                     0, ANCHORED, LSE, KV_SLOTS, OTHERS)),
        (_consumer, (out_desc, out_ptr, out_strides, lse_ptr, receivers, q_slots, k_slots, v_slots, facts, barriers,
                     others, row_tokens, frame_tokens, most_copies, tokens, heads, scale_log2,
                     1, ANCHORED, LSE, KV_SLOTS, OTHERS)),
        (producer, (q_desc, packed_q_desc, k_desc, v_desc, q_slots, k_slots, v_slots, facts, barriers, tiles, columns,
                     counter, lengths, others, tokens, tiles_of_batch, tiles_of_pattern, work, None,
                     ANCHORED, KV_SLOTS, OTHERS, PADDED, False)),
    ], [4, 1], REGISTERS)  # fmt: skip


@functools.cache
def described_layout() -> gl.NVMMASharedLayout:
    """The layout of the tiles of a descriptor of ``(B, H, N, D)``."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


def kv_slots(head_dim: int, block_k: int) -> int:
    """How many key blocks are kept in shared memory; value blocks are one fewer."""
    queries = 2 * int(Q_SLOTS) * BLOCK_Q * head_dim
    tiles = (SHARED_BYTES - SMALL_BYTES - queries) // (2 * block_k * head_dim)
    return min(MOST_KV_SLOTS, (tiles + 1) // 2)
