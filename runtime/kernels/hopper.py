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

from calibatt.runtime.kernels.gluon_compat import load_tile, store_tile

BLOCK_Q = 128
"""Queries of a tile."""
GROUP_Q = gl.constexpr(64)
"""Queries of a consumer."""
Q_SLOTS = gl.constexpr(2)
"""Tiles of queries in shared memory."""
CONSUMERS = gl.constexpr(2)
FACTS = gl.constexpr(5)
"""Integers that the producer tells of a tile."""
PRODUCER_REGISTERS = gl.constexpr(24)
CONSUMER_REGISTERS = gl.constexpr(240)
LAUNCH_OPTIONS = {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": True}
"""168 x 384 threads are all registers of an SM; setmaxnreg then moves them from the producer to the consumers."""
FIRST_NAMED_BARRIER = 8
"""Triton uses those below."""
SHARED_BYTES = 232_448
"""Of one block on sm90."""
SMALL_BYTES = 1024
"""Facts, barriers, and what warp specialisation keeps."""
MOST_KV_SLOTS = 5
LN_2 = gl.constexpr(0.6931471805599453)


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
def _any_overshoots(sums, GROUP: gl.constexpr, BOUND: gl.constexpr):
    """Whether any partial sum of the consumer exceeds the bound; NaN does not."""
    gl.inline_asm_elementwise(vote_asm(GROUP, BOUND), "=f,=f,f,f", [sums], dtype=gl.float32, is_pure=False, pack=2)
    return gl.inline_asm_elementwise(verdict_asm(GROUP), "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _hold(x, GROUP: gl.constexpr):
    """ptxas moves the wait for a wgmma above arithmetic, which ends the overlap, but not above this."""
    gl.inline_asm_elementwise(hold_asm(GROUP), "=f,=f,f,f", [x], dtype=gl.float32, is_pure=False, pack=2)


@gluon.jit
def _advance(index, parity, SLOTS: gl.constexpr):
    """The next slot of a ring and the parity of its barrier."""
    index += 1
    wraps = index == SLOTS
    return gl.where(wraps, 0, index), gl.where(wraps, parity ^ 1, parity)


@gluon.jit
def _row_max(scores, BLOCK_K: gl.constexpr, ROW: gl.constexpr):
    """Row maxima ``[64]``: a tree over registers (gl.max is one serial chain), then over a row's four lanes."""
    x = scores.reshape([GROUP_Q, BLOCK_K // 32, 4, 4, 2])
    x = gl.max(gl.max(gl.max(x, axis=4), axis=2), axis=1)
    return gl.convert_layout(gl.max(x, axis=1), ROW)


@gluon.jit
def _lane_sums(p, BLOCK_K: gl.constexpr):
    """Row sums of each of the four lanes of a row, ``[64, 4]``: no shuffles."""
    x = p.reshape([GROUP_Q, BLOCK_K // 32, 4, 4, 2])
    return gl.sum(gl.sum(gl.sum(x, axis=4), axis=2), axis=1)


@gluon.jit
def _first_reference(scores, valid, BLOCK_K: gl.constexpr, SCORES: gl.constexpr, ROW: gl.constexpr):
    """Scores of a tile's first block without the keys that do not exist, and their row maxima (0 of an empty row)."""
    key = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, SCORES))
    scores = gl.where((key < valid)[None, :], scores, float("-inf"))
    reference = _row_max(scores, BLOCK_K, ROW)
    return scores, gl.where(reference == float("-inf"), 0.0, reference)


@gluon.jit
def _producer(
    q_desc, packed_q_desc, k_desc, v_desc, q_slots, k_slots, v_slots, facts, barriers, tiles, columns, counter,
    tokens, tiles_of_batch, tiles_of_pattern, work,
    ANCHORED: gl.constexpr, KV_SLOTS: gl.constexpr,
):  # fmt: skip
    """Steps run over the blocks of all tiles of this CTA: step g brings K of block g and V of block g - 1."""
    q_full, q_free, k_full, v_full, kv_read, told = barriers
    BLOCK_K: gl.constexpr = k_slots.type.shape[1]
    V_SLOTS: gl.constexpr = KV_SLOTS - 1
    Q_BYTES: gl.constexpr = q_desc.block_type.nbytes
    KV_BYTES: gl.constexpr = k_desc.block_type.nbytes
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    index = gl.program_id(0)
    q_at = 0
    q_parity = 1
    k_at = 0
    v_at = 0
    read_at = 0
    read_parity = 0
    step = 0
    v_batch = 0
    v_head = 0
    v_key = 0
    batch = index // tiles_of_batch
    entry = tiles + (index - batch * tiles_of_batch) * 4
    place = gl.load(entry)
    start = gl.load(entry + 1)
    stop = gl.load(entry + 2)
    last = gl.load(entry + 3)
    while index < work:
        head = (place >> 16) & 0x7FFF
        first_query = (place & 0xFFFF) * (GROUP_Q * CONSUMERS)
        column = last & 0xFFFF
        count = gl.maximum(stop - start, 1)  # an empty list is one block without valid keys
        mbarrier.wait(q_free.index(q_at), q_parity)
        facts.index(q_at * FACTS).store(gl.full([1], place, gl.int32, ONE))
        facts.index(q_at * FACTS + 1).store(gl.full([1], count, gl.int32, ONE))
        facts.index(q_at * FACTS + 2).store(
            gl.full([1], gl.where(stop > start, tokens - column * BLOCK_K, 0), gl.int32, ONE)
        )
        facts.index(q_at * FACTS + 3).store(gl.full([1], batch, gl.int32, ONE))
        if ANCHORED:
            packed_tile = (last >> 16) * tiles_of_pattern + (place & 0xFFFF)
            facts.index(q_at * FACTS + 4).store(gl.full([1], packed_tile, gl.int32, ONE))
        mbarrier.arrive(told.index(q_at), count=1)
        full = q_full.index(q_at)
        mbarrier.expect(full, CONSUMERS * Q_BYTES)
        for group in gl.static_range(CONSUMERS):
            slot = q_slots.index(q_at * CONSUMERS + group)
            coord = [batch, head, first_query + group * GROUP_Q, 0]
            if ANCHORED:
                if place < 0:
                    load_tile(packed_q_desc, coord, full, slot)
                else:
                    load_tile(q_desc, coord, full, slot)
            else:
                load_tile(q_desc, coord, full, slot)
        q_at, q_parity = _advance(q_at, q_parity, Q_SLOTS)
        next_index = index
        next_batch = batch
        next_place = place
        next_start = start
        next_stop = stop
        next_last = last
        for i in range(count):
            key = column * BLOCK_K
            # the next column early: its latency hides behind the waits below
            before = stop - 2 - i
            column = gl.load(columns + before, mask=before >= start, other=0).to(gl.int32)
            full = k_full.index(k_at)
            mbarrier.expect(full, KV_BYTES)
            load_tile(k_desc, [batch, head, key, 0], full, k_slots.index(k_at))
            k_at = gl.where(k_at == KV_SLOTS - 1, 0, k_at + 1)
            if step > KV_SLOTS - 2:
                mbarrier.wait(kv_read.index(read_at), read_parity)
                read_at, read_parity = _advance(read_at, read_parity, KV_SLOTS)
            if step > 0:
                full = v_full.index(v_at)
                mbarrier.expect(full, KV_BYTES)
                load_tile(v_desc, [v_batch, v_head, v_key, 0], full, v_slots.index(v_at))
                v_at = gl.where(v_at == V_SLOTS - 1, 0, v_at + 1)
            step += 1
            v_batch = batch
            v_head = head
            v_key = key
            # the next tile while the consumers are busy: first its number, one step later its entry
            if i == 0:
                next_index = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
            if i == gl.minimum(1, count - 1):
                # every tile adds once: the last number is the last use of the counter
                gl.store(counter, 0, mask=next_index == gl.num_programs(0) + work - 1)
                exists = next_index < work
                next_batch = next_index // tiles_of_batch
                entry = tiles + (next_index - next_batch * tiles_of_batch) * 4
                next_place = gl.load(entry, mask=exists, other=0)
                next_start = gl.load(entry + 1, mask=exists, other=0)
                next_stop = gl.load(entry + 2, mask=exists, other=0)
                next_last = gl.load(entry + 3, mask=exists, other=0)
        index = next_index
        batch = next_batch
        place = next_place
        start = next_start
        stop = next_stop
        last = next_last
    # no more tiles; the last V
    mbarrier.wait(q_free.index(q_at), q_parity)
    facts.index(q_at * FACTS + 1).store(gl.full([1], 0, gl.int32, ONE))
    mbarrier.arrive(told.index(q_at), count=1)
    if step > KV_SLOTS - 2:
        mbarrier.wait(kv_read.index(read_at), read_parity)
    full = v_full.index(v_at)
    mbarrier.expect(full, KV_BYTES)
    load_tile(v_desc, [v_batch, v_head, v_key, 0], full, v_slots.index(v_at))


@gluon.jit
def _receivers(receivers, facts, q_at, row_tokens, frame_tokens, GROUP: gl.constexpr, ROW: gl.constexpr):
    """The first token that receives the output of each query of a packed tile, how many do (0 of no query), how far
    apart.
    """
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    tile = gl.max(facts.index(q_at * FACTS + 4).load(ONE), axis=0)
    row = tile * (GROUP_Q * CONSUMERS) + GROUP * GROUP_Q + gl.arange(0, GROUP_Q, layout=ROW)
    both = gl.load(receivers + row)
    step = gl.where(both < 0, frame_tokens, row_tokens)
    return both.to(gl.int32), (both >> 32).to(gl.int32) & 0x7FFFFFFF, step


@gluon.jit
def _consumer(
    out_desc, out_ptr, out_strides, lse_ptr, receivers, q_slots, k_slots, v_slots, facts, barriers,
    row_tokens, frame_tokens, most_copies, tokens, heads, scale_log2,
    GROUP: gl.constexpr, ANCHORED: gl.constexpr, LSE: gl.constexpr, KV_SLOTS: gl.constexpr,
):  # fmt: skip
    """The 64 queries of one warpgroup, of every tile of this CTA."""
    q_full, q_free, k_full, v_full, kv_read, told = barriers
    BLOCK_K: gl.constexpr = k_slots.type.shape[1]
    HEAD_DIM: gl.constexpr = k_slots.type.shape[2]
    V_SLOTS: gl.constexpr = KV_SLOTS - 1
    DTYPE: gl.constexpr = out_desc.dtype
    BOUND: gl.constexpr = vote_bound(DTYPE)
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
    k_at, k_parity = _advance(k_at, k_parity, KV_SLOTS)
    s, m = _first_reference(s, valid, BLOCK_K, SCORES, ROW)
    p = gl.exp2(s * scale_log2 - (m * scale_log2)[:, None])
    lane_sums = _lane_sums(p, BLOCK_K)
    LANES: gl.constexpr = gl.SliceLayout(1, lane_sums.type.layout)
    p_operand = gl.convert_layout(p.to(DTYPE), PROBABILITIES)
    acc = gl.zeros([GROUP_Q, HEAD_DIM], gl.float32, OUTPUT)
    while count > 0:
        q = q_slots.index(q_at * CONSUMERS + GROUP)
        for _ in range(count - 1):
            mbarrier.wait(k_full.index(k_at), k_parity)
            mbarrier.wait(v_full.index(v_at), v_parity)
            s = warpgroup_mma(q, k_slots.index(k_at).permute((1, 0)), no_scores, use_acc=False, is_async=True)
            acc = warpgroup_mma(p_operand, v_slots.index(v_at), acc, is_async=True)
            s = warpgroup_mma_wait(num_outstanding=1, deps=[s])
            p = gl.exp2(s * scale_log2 - (m * scale_log2)[:, None])
            sums = _lane_sums(p, BLOCK_K)
            overshoots = _any_overshoots(sums, GROUP, BOUND)  # also holds the wait below in its place
            acc, p_operand = warpgroup_mma_wait(num_outstanding=0, deps=[acc, p_operand])
            if overshoots != 0:
                s = warpgroup_mma(q, k_slots.index(k_at).permute((1, 0)), no_scores, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
                higher = gl.maximum(m, _row_max(s, BLOCK_K, ROW))
                fade = gl.exp2((m - higher) * scale_log2)
                m = higher
                p = gl.exp2(s * scale_log2 - (m * scale_log2)[:, None])
                sums = _lane_sums(p, BLOCK_K)
                lane_sums = lane_sums * gl.convert_layout(fade, LANES)[:, None]
                acc = acc * gl.convert_layout(fade, OUTPUT_ROW)[:, None]
            mbarrier.arrive(kv_read.index(k_at), count=1)
            lane_sums = lane_sums + sums
            k_at, k_parity = _advance(k_at, k_parity, KV_SLOTS)
            v_at, v_parity = _advance(v_at, v_parity, V_SLOTS)
            p_operand = gl.convert_layout(p.to(DTYPE), PROBABILITIES)
        # the last product of this tile beside the first scores of the next one
        next_q, next_parity = _advance(q_at, q_parity, Q_SLOTS)
        mbarrier.wait(told.index(next_q), next_parity)
        next_place = gl.max(facts.index(next_q * FACTS).load(ONE), axis=0)
        next_count = gl.max(facts.index(next_q * FACTS + 1).load(ONE), axis=0)
        valid = gl.max(facts.index(next_q * FACTS + 2).load(ONE), axis=0)
        next_batch = gl.max(facts.index(next_q * FACTS + 3).load(ONE), axis=0)
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
        if LSE:
            row = first_query + gl.arange(0, GROUP_Q, layout=ROW)
            lse = (m * scale_log2 + gl.log2(row_sum)) * LN_2
            lse_of_head = lse_ptr + (batch * heads + head).to(gl.int64) * tokens
            if ANCHORED:
                if place < 0:
                    first, copies, step = _receivers(receivers, facts, q_at, row_tokens, frame_tokens, GROUP, ROW)
                    for copy in range(most_copies):
                        gl.store(lse_of_head + first + copy * step, lse, mask=copy < copies)
                else:
                    gl.store(lse_of_head + row, lse, mask=row < tokens)
            else:
                gl.store(lse_of_head + row, lse, mask=row < tokens)
        share = gl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)
        s, m = _first_reference(s, valid, BLOCK_K, SCORES, ROW)
        p = gl.exp2(s * scale_log2 - (m * scale_log2)[:, None])
        lane_sums = _lane_sums(p, BLOCK_K)
        _hold(lane_sums, GROUP)
        acc, p_operand = warpgroup_mma_wait(num_outstanding=0, deps=[acc, p_operand])
        mbarrier.arrive(kv_read.index(k_at), count=1)
        k_at, k_parity = _advance(k_at, k_parity, KV_SLOTS)
        v_at, v_parity = _advance(v_at, v_parity, V_SLOTS)
        acc = acc * gl.convert_layout(share, OUTPUT_ROW)[:, None]
        q.store(acc.to(DTYPE))
        p_operand = gl.convert_layout(p.to(DTYPE), PROBABILITIES)
        fence_async_shared()
        if ANCHORED:
            if place < 0:
                rows = q.load(COPIED)
                COPIED_ROW: gl.constexpr = gl.SliceLayout(1, COPIED)
                first, copies, step = _receivers(receivers, facts, q_at, row_tokens, frame_tokens, GROUP, COPIED_ROW)
                channel = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, COPIED))
                out_of_head = out_ptr + batch.to(gl.int64) * out_stride_b + head.to(gl.int64) * out_stride_h
                for copy in range(most_copies):
                    token = (first + copy * step).to(gl.int64)
                    target = out_of_head + (token * out_stride_n)[:, None] + channel[None, :]
                    gl.store(target, rows, mask=(copy < copies)[:, None])
            else:
                store_tile(out_desc, [batch, head, first_query, 0], q)
        else:
            store_tile(out_desc, [batch, head, first_query, 0], q)
        tma.store_wait(pendings=0)
        mbarrier.arrive(q_free.index(q_at), count=1)
        acc = gl.zeros([GROUP_Q, HEAD_DIM], gl.float32, OUTPUT)
        q_at = next_q
        q_parity = next_parity
        place = next_place
        count = next_count
        batch = next_batch


@gluon.jit
def hopper_forward(
    q_desc, packed_q_desc, k_desc, v_desc, out_desc, out_ptr, lse_ptr, tiles, columns, counter,
    receivers, out_stride_b, out_stride_h, out_stride_n, row_tokens, frame_tokens, most_copies,
    tokens, heads, tiles_of_batch, tiles_of_pattern, work, scale_log2,
    ANCHORED: gl.constexpr, LSE: gl.constexpr, KV_SLOTS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Grid: at most one CTA an SM, and no more than `work`.

    Args:
        q_desc: TMA descriptor of ``(B, H, N, D)`` in tiles of GROUP_Q queries; rows past the end read as 0 and are
            never written. So are `packed_q_desc` and `out_desc`.
        packed_q_desc: Of the queries of anchored heads, ``(B, H, packed tokens, D)``; only with ANCHORED.
        k_desc: In tiles of a key block. So is `v_desc`.
        out_ptr: What `out_desc` describes, with its strides in elements; only with ANCHORED.
        lse_ptr: fp32 ``(B, H, N)``; only with LSE.
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
    facts = gl.allocate_shared_memory(gl.int32, [Q_SLOTS * FACTS, 1], FLAT)
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
    gl.warp_specialize([
        (_consumer, (out_desc, out_ptr, out_strides, lse_ptr, receivers, q_slots, k_slots, v_slots, facts, barriers,
                     row_tokens, frame_tokens, most_copies, tokens, heads, scale_log2, 0, ANCHORED, LSE, KV_SLOTS)),
        (_consumer, (out_desc, out_ptr, out_strides, lse_ptr, receivers, q_slots, k_slots, v_slots, facts, barriers,
                     row_tokens, frame_tokens, most_copies, tokens, heads, scale_log2, 1, ANCHORED, LSE, KV_SLOTS)),
        (_producer, (q_desc, packed_q_desc, k_desc, v_desc, q_slots, k_slots, v_slots, facts, barriers, tiles, columns,
                     counter, tokens, tiles_of_batch, tiles_of_pattern, work, ANCHORED, KV_SLOTS)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


@functools.cache
def described_layout() -> gl.NVMMASharedLayout:
    """The layout of the tiles of a descriptor of ``(B, H, N, D)``."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


def kv_slots(head_dim: int, block_k: int) -> int:
    """How many key blocks are kept in shared memory; value blocks are one fewer."""
    queries = 2 * int(Q_SLOTS) * BLOCK_Q * head_dim
    tiles = (SHARED_BYTES - SMALL_BYTES - queries) // (2 * block_k * head_dim)
    return min(MOST_KV_SLOTS, (tiles + 1) // 2)
