"""The producer of `kernels.hopper` and `kernels.hopper_eight`, which moves memory and says what a tile is.

With EIGHT, queries, keys, and values in e4m3 are those that `kernels.quantise` made: of some heads, which have places
of their own (slots), of the video's queries alone, packed, and of keys in whole blocks. Kernels only.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from calibatt.runtime.kernels.gluon_compat import load_tile
from calibatt.runtime.kernels.hopper_softmax import GROUP_Q

Q_SLOTS = gl.constexpr(2)
"""Tiles of queries in shared memory."""
CONSUMERS = gl.constexpr(2)
FACTS = gl.constexpr(5)
"""Integers that the producer tells of a tile."""
MORE_FACTS = gl.constexpr(5)
"""The same with OTHERS, beyond `FACTS`."""
EIGHT_FACTS = gl.constexpr(3)
"""The same with EIGHT, beyond those: the scales of both consumers' queries as bits, and the head's slot."""


@gluon.constexpr_function
def facts_of_tile(others, eight):
    """How many integers the producer tells of a tile."""
    return FACTS.value + (MORE_FACTS.value if others else 0) + (EIGHT_FACTS.value if eight else 0)


@gluon.jit
def advance(index, parity, SLOTS: gl.constexpr):
    """The next slot of a ring and the parity of its barrier."""
    index += 1
    wraps = index == SLOTS
    return gl.where(wraps, 0, index), gl.where(wraps, parity ^ 1, parity)


@gluon.jit
def _blocks_of(length, BLOCK_K: gl.constexpr):
    return (length + BLOCK_K - 1) // BLOCK_K


@gluon.jit
def _tile_of(tiles, index, batch, others, tokens, tiles_of_batch, exists, BLOCK_K: gl.constexpr, OTHERS: gl.constexpr):
    """Entry of a tile: place, start, stop, last key block; this one is negative for other tokens than the video's."""
    number = index - batch * tiles_of_batch
    if OTHERS:
        heads, head_tiles, _, _, _ = others
        other = number
        number -= heads * head_tiles
        is_other = number < 0
        number = gl.maximum(number, 0)
    entry = tiles + number * 4
    place = gl.load(entry, mask=exists, other=0)
    start = gl.load(entry + 1, mask=exists, other=0)
    stop = gl.load(entry + 2, mask=exists, other=0)
    last = gl.load(entry + 3, mask=exists, other=0)
    if OTHERS:
        blocks = _blocks_of(tokens, BLOCK_K)
        place = gl.where(is_other, (other // head_tiles) << 16 | other % head_tiles, place)
        start = gl.where(is_other, 0, start)
        stop = gl.where(is_other, blocks, stop)
        last = gl.where(is_other, (blocks - 1) | -2147483648, last)
    return place, start, stop, last


@gluon.jit
def producer(
    q_desc, packed_q_desc, k_desc, v_desc, q_slots, k_slots, v_slots, facts, barriers, tiles, columns, counter,
    lengths, others, tokens, tiles_of_batch, tiles_of_pattern, work, eight,
    ANCHORED: gl.constexpr, KV_SLOTS: gl.constexpr, OTHERS: gl.constexpr, PADDED: gl.constexpr, EIGHT: gl.constexpr,
):  # fmt: skip
    """Steps run over the blocks of all tiles of this CTA: step g brings K of block g and V of block g - 1."""
    HERE: gl.constexpr = facts_of_tile(OTHERS, EIGHT)
    E4M3_VALUES: gl.constexpr = v_desc.dtype == gl.float8e4nv
    OTHER_TILES: gl.constexpr = OTHERS and not EIGHT
    q_full, q_free, k_full, v_full, kv_read, told = barriers
    BLOCK_K: gl.constexpr = k_slots.type.shape[1]
    V_SLOTS: gl.constexpr = KV_SLOTS - 1
    Q_BYTES: gl.constexpr = q_desc.block_type.nbytes
    K_BYTES: gl.constexpr = k_desc.block_type.nbytes
    V_BYTES: gl.constexpr = v_desc.block_type.nbytes
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
    place, start, stop, last = _tile_of(tiles, index, batch, others, tokens, tiles_of_batch, True, BLOCK_K, OTHER_TILES)
    if EIGHT:
        q_scales, k_scales, slots, eight_heads, q_groups, key_blocks, scale_slots = eight
    while index < work:
        head = (place >> 16) & 0x7FFF
        packed_query = (place & 0xFFFF) * (GROUP_Q * CONSUMERS)
        first_query = packed_query
        column = last & 0xFFFF
        count = gl.maximum(stop - start, 1)  # an empty list is one block without valid keys
        valid = gl.where(stop > start, tokens - column * BLOCK_K, 0)
        if EIGHT:
            slot_of_head = gl.load(slots + head)
            of_head = batch * eight_heads + slot_of_head
            q_scale = gl.load(q_scales + of_head * q_groups + (place & 0xFFFF) * CONSUMERS)
            next_q_scale = gl.load(q_scales + of_head * q_groups + (place & 0xFFFF) * CONSUMERS + 1)
        if OTHERS:
            _, _, prefix_tiles, video_start, all_tokens = others
            video_stop = video_start + tokens
            all_stop = all_tokens
            if PADDED:
                all_stop = gl.load(lengths + batch)
            prefix = _blocks_of(video_start, BLOCK_K)
            suffix = _blocks_of(all_stop - video_stop, BLOCK_K)
            video_key = video_start  # where the keys of the video start, and those of the suffix
            suffix_key = video_stop
            if EIGHT:
                video_key = prefix * BLOCK_K
                suffix_key = video_key + _blocks_of(tokens, BLOCK_K) * BLOCK_K
            lead = gl.minimum(prefix, 1) + gl.minimum(suffix, 1)
            count += prefix + suffix
            in_prefix = (place & 0xFFFF) < prefix_tiles
            other_query = gl.where(
                in_prefix, packed_query, video_stop + packed_query - prefix_tiles * (GROUP_Q * CONSUMERS)
            )
            first_query = gl.where(last < 0, other_query, video_start + packed_query)
            query_stop = gl.where(last < 0, gl.where(in_prefix, video_start, all_tokens), 0)
            second = gl.where(lead == 2, video_start - (prefix - 1) * BLOCK_K, valid)
            third = valid
            valid = gl.where(lead == 0, valid, video_start - (prefix - 1) * BLOCK_K)
            valid = gl.where(suffix > 0, all_stop - video_stop - (suffix - 1) * BLOCK_K, valid)
        mbarrier.wait(q_free.index(q_at), q_parity)
        facts.index(q_at * HERE).store(gl.full([1], place, gl.int32, ONE))
        facts.index(q_at * HERE + 1).store(gl.full([1], count, gl.int32, ONE))
        facts.index(q_at * HERE + 2).store(gl.full([1], valid, gl.int32, ONE))
        facts.index(q_at * HERE + 3).store(gl.full([1], batch, gl.int32, ONE))
        if ANCHORED and not EIGHT:
            packed_tile = (last >> 16) * tiles_of_pattern + (place & 0xFFFF)
            facts.index(q_at * HERE + 4).store(gl.full([1], packed_tile, gl.int32, ONE))
        if OTHERS:
            facts.index(q_at * HERE + FACTS).store(gl.full([1], second, gl.int32, ONE))
            facts.index(q_at * HERE + FACTS + 1).store(gl.full([1], third, gl.int32, ONE))
            facts.index(q_at * HERE + FACTS + 2).store(gl.full([1], lead, gl.int32, ONE))
            facts.index(q_at * HERE + FACTS + 3).store(gl.full([1], first_query, gl.int32, ONE))
            facts.index(q_at * HERE + FACTS + 4).store(gl.full([1], query_stop, gl.int32, ONE))
        if EIGHT:
            bits = q_scale.to(gl.int32, bitcast=True)
            next_bits = next_q_scale.to(gl.int32, bitcast=True)
            facts.index(q_at * HERE + HERE - 3).store(gl.full([1], bits, gl.int32, ONE))
            facts.index(q_at * HERE + HERE - 2).store(gl.full([1], next_bits, gl.int32, ONE))
            facts.index(q_at * HERE + HERE - 1).store(gl.full([1], slot_of_head, gl.int32, ONE))
        mbarrier.arrive(told.index(q_at), count=1)
        full = q_full.index(q_at)
        mbarrier.expect(full, CONSUMERS * Q_BYTES)
        for group in gl.static_range(CONSUMERS):
            slot = q_slots.index(q_at * CONSUMERS + group)
            coord = [batch, head, first_query + group * GROUP_Q, 0]
            if EIGHT:
                load_tile(q_desc, [batch, slot_of_head, packed_query + group * GROUP_Q, 0], full, slot)
            elif ANCHORED:
                if place < 0:
                    load_tile(packed_q_desc, [batch, head, packed_query + group * GROUP_Q, 0], full, slot)
                else:
                    load_tile(q_desc, coord, full, slot)
            else:
                load_tile(q_desc, coord, full, slot)
        q_at, q_parity = advance(q_at, q_parity, Q_SLOTS)
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
            if OTHERS:
                own = i - lead
                left = own - (stop - start)  # of the suffix, then of the prefix, where the list is done
                left_of_suffix = gl.maximum(suffix - 1, 0)
                key = gl.where(own < 0, (prefix - 1) * BLOCK_K, video_key + key)
                key = gl.where((i == 0) & (suffix > 0), suffix_key + (suffix - 1) * BLOCK_K, key)
                rest = gl.where(left < left_of_suffix, suffix_key + left * BLOCK_K, (left - left_of_suffix) * BLOCK_K)
                key = gl.where(left >= 0, rest, key)
                before = stop - 1 - gl.maximum(own + 1, 0)
            column = gl.load(columns + before, mask=before >= start, other=0).to(gl.int32)
            full = k_full.index(k_at)
            mbarrier.expect(full, K_BYTES)
            if EIGHT:
                k_scale = gl.load(k_scales + of_head * key_blocks + key // BLOCK_K)
                load_tile(k_desc, [batch, slot_of_head, key, 0], full, k_slots.index(k_at))
                scale_slots.index(k_at).store(gl.full([1], k_scale, gl.float32, ONE))
                mbarrier.arrive(full, count=1)
            else:
                load_tile(k_desc, [batch, head, key, 0], full, k_slots.index(k_at))
            k_at = gl.where(k_at == KV_SLOTS - 1, 0, k_at + 1)
            if step > KV_SLOTS - 2:
                mbarrier.wait(kv_read.index(read_at), read_parity)
                read_at, read_parity = advance(read_at, read_parity, KV_SLOTS)
            if step > 0:
                full = v_full.index(v_at)
                mbarrier.expect(full, V_BYTES)
                if E4M3_VALUES:
                    load_tile(v_desc, [v_batch, v_head, 0, v_key], full, v_slots.index(v_at))
                else:
                    load_tile(v_desc, [v_batch, v_head, v_key, 0], full, v_slots.index(v_at))
                v_at = gl.where(v_at == V_SLOTS - 1, 0, v_at + 1)
            step += 1
            v_batch = batch
            v_head = head
            v_key = key
            if E4M3_VALUES:
                v_head = slot_of_head
            elif EIGHT and OTHERS:  # values are where they were
                v_key -= gl.where(key >= video_key, video_key - video_start, 0)
                v_key -= gl.where(key >= suffix_key, suffix_key - video_key - tokens, 0)
            # the next tile while the consumers are busy: first its number, one step later its entry
            if i == 0:
                next_index = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
            if i == gl.minimum(1, count - 1):
                # every tile adds once: the last number is the last use of the counter
                gl.store(counter, 0, mask=next_index == gl.num_programs(0) + work - 1)
                next_batch = next_index // tiles_of_batch
                next_place, next_start, next_stop, next_last = _tile_of(
                    tiles, next_index, next_batch, others, tokens, tiles_of_batch, next_index < work, BLOCK_K,
                    OTHER_TILES,
                )  # fmt: skip
        index = next_index
        batch = next_batch
        place = next_place
        start = next_start
        stop = next_stop
        last = next_last
    # no more tiles; the last V
    mbarrier.wait(q_free.index(q_at), q_parity)
    facts.index(q_at * HERE + 1).store(gl.full([1], 0, gl.int32, ONE))
    mbarrier.arrive(told.index(q_at), count=1)
    if step > KV_SLOTS - 2:
        mbarrier.wait(kv_read.index(read_at), read_parity)
    full = v_full.index(v_at)
    mbarrier.expect(full, V_BYTES)
    if E4M3_VALUES:
        load_tile(v_desc, [v_batch, v_head, 0, v_key], full, v_slots.index(v_at))
    else:
        load_tile(v_desc, [v_batch, v_head, v_key, 0], full, v_slots.index(v_at))
