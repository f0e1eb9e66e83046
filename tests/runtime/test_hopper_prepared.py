"""What the hopper backend derives from a schedule, read as its kernel reads it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.schedules import layer_schedules, random_schedule

from calibatt.plans import BF16, INT8, INT8_FP8, PRECISIONS, Blocks, LayerSchedule, TokenGrid
from calibatt.plans.schedule import NO_ANCHORS
from calibatt.runtime.backends import hopper
from calibatt.runtime.backends.hopper import BLOCKS_K, BLOCKS_Q, prepare
from calibatt.runtime.launch import ALIGNED_BYTES, BASES, Given, Moving
from calibatt.runtime.schedule import ListedSchedule

BLOCKS = st.builds(Blocks, st.sampled_from(BLOCKS_Q), st.sampled_from(BLOCKS_K))


@given(layer_schedules(blocks=BLOCKS, precisions=tuple(PRECISIONS)))
def test_tiles_and_receivers(core: LayerSchedule) -> None:
    """Following every tile to who receives its outputs gives the oracle's view of every head."""
    core.check()
    bound = ListedSchedule(core).bind("cpu")
    ready = prepare(bound)
    block_q = core.blocks.block_q
    source = torch.full((core.heads, core.grid.tokens), -1)
    parts = [(precision, ready.tiles_of(precision)) for precision in PRECISIONS]
    assert sum(ready.counts) == len(ready.tiles) == len(bound.tiles)
    for precision, (place, start, stop, last) in ((of, tile) for of, tiles in parts for tile in tiles.tolist()):
        head, tile = place >> 16 & 0x7FFF, place & 0xFFFF
        assert bound.columns[start:stop].tolist() == core.columns(head, tile).tolist()
        assert core.head_precision[head] == precision
        assert last & 0xFFFF == bound.columns[stop - 1]
        query = torch.arange(tile * block_q, (tile + 1) * block_q)
        assert (place < 0) == (core.head_anchor[head] != NO_ANCHORS)
        if place >= 0:
            query = query[query < core.grid.tokens]
            source[head, query] = query
            continue
        row = ((last >> 16) * ready.tiles_of_pattern + tile) * block_q + torch.arange(block_q)
        both = ready.receivers.view(-1)[row]
        packed, start_of_head, step = bound.heads[head].tolist()
        for at, receives in zip(query.tolist(), both.tolist(), strict=True):
            first, copies = receives & 0xFFFFFFFF, receives >> 32 & 0x7FFFFFFF
            grid = core.grid
            assert step == (grid.height * grid.width if receives < 0 else grid.width) or copies == 0
            assert copies <= ready.most_copies
            assert (copies > 0) == (at < packed)
            for copy in range(copies):
                source[head, first + copy * step] = bound.query_token[start_of_head + at]
    for head in range(core.heads):
        assert source[head].tolist() == core.token_source(head).tolist()
    of_precision = {each: np.flatnonzero(core.head_precision == each).tolist() for each in PRECISIONS}
    heads = of_precision[INT8_FP8] + of_precision[INT8]
    assert (ready.eight is None) == (heads == [])
    if ready.eight is not None:
        eight = ready.eight
        assert eight.heads.tolist() == heads
        assert eight.value_heads == len(of_precision[INT8_FP8])
        assert eight.slots[heads].tolist() == list(range(len(heads)))
        assert eight.anchored.tolist() == [head for head in heads if core.head_anchor[head] != NO_ANCHORS]
        assert eight.groups == 2 * max(core.tiles(head) for head in heads)


@pytest.mark.parametrize("precision", [BF16, INT8, INT8_FP8])
@pytest.mark.parametrize("others", [0, 40])
def test_no_kernel_gets_an_empty_array(monkeypatch: pytest.MonkeyPatch, precision: int, others: int) -> None:
    """Kernels read entries that they do not use; an empty array has no address."""
    monkeypatch.setattr(hopper, "processors", lambda device: 132)
    core = random_schedule(
        np.random.default_rng(0), TokenGrid(2, 4, 26), Blocks(128, 128), 2, precisions=[precision] * 2
    )
    q = torch.zeros(1, 2, core.grid.tokens + others, 64, dtype=torch.float16)
    lengths = torch.full((1,), q.shape[2], dtype=torch.int32)
    given = Given.of(q, q, q, q, torch.zeros(8, dtype=torch.int32), torch.zeros(q.shape[:3]), lengths)
    calls = hopper._calls(ListedSchedule(core).bind("cpu"), 1.0, others // 3, given)
    eight = 0 if precision == BF16 else 3
    assert len(calls) == eight + (precision == BF16 or others > 0)
    for call in calls:
        assert min(call.grid) > 0
        moving = [value for value in call.arguments.values() if isinstance(value, Moving)]
        assert {each.base for each in moving} <= set(BASES)
        assert all(each.offset >= 0 and each.offset % ALIGNED_BYTES == 0 for each in moving)
        for value in (value.value if isinstance(value, Moving) else value for value in call.arguments.values()):
            assert not isinstance(value, torch.Tensor) or value.data_ptr() != 0
