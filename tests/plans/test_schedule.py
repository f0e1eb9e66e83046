"""A schedule's promises: what is valid passes, each broken promise is named, and `dense` is what the words say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.schedules import layer_schedules, random_schedule

from calibatt.plans import (
    DENSE,
    FRAMES,
    NO_ANCHORS,
    PRECISIONS,
    Blocks,
    LayerSchedule,
    ScheduleError,
    TokenGrid,
)

GRID = TokenGrid(frames=2, height=3, width=13)
BLOCKS = Blocks(16, 16)


def example() -> LayerSchedule:
    """Heads: listed, dense, sharing the first one's lists, anchored; 5 query and key blocks of 16 tokens."""
    rng = np.random.default_rng(1)
    made = random_schedule(
        rng, GRID, BLOCKS, 4, 0.4, dense_heads=[1], shared_heads=[2], anchored_heads=[3], anchors="frame"
    )
    assert made.head_list.tolist() == [0, -1, 0, 5]
    assert made.head_tile_ptr.tolist() == [0, 5, 10, 15, 17]
    return made


@given(layer_schedules())
def test_random_schedules_are_valid(schedule: LayerSchedule) -> None:
    schedule.check()


@given(layer_schedules())
def test_dense_is_what_the_vocabulary_says(schedule: LayerSchedule) -> None:
    """`dense` against a reading of the definitions one token at a time."""
    grid, block_q = schedule.grid, schedule.blocks.block_q
    for head in range(schedule.heads):
        source, keep = schedule.dense(head)
        pattern = int(schedule.head_anchor[head])
        packed: list[int] = []
        expected_source = []
        for token in range(grid.tokens):
            row, column = divmod(token, grid.width)
            if pattern == NO_ANCHORS:
                expected_source.append(token)
            else:
                starts, anchors = schedule.groups(pattern)
                frames = schedule.anchor_axis[pattern] == FRAMES
                frame, row_of_frame = divmod(row, grid.height)
                group = max(index for index, start in enumerate(starts) if start <= (frame if frames else row))
                anchor = int(anchors[group])
                computed = anchor * grid.height + row_of_frame if frames else anchor
                expected_source.append(computed * grid.width + column)
            if expected_source[-1] == token:
                packed.append(token)
        assert source.tolist() == expected_source
        assert schedule.packed_queries(head).tolist() == packed
        for token in range(grid.tokens):
            tile = packed.index(expected_source[token]) // block_q
            assert np.flatnonzero(keep[token]).tolist() == schedule.columns(head, tile).tolist()
        computed = sum(len(schedule.columns(head, tile)) for tile in range(schedule.tiles(head)))
        assert schedule.computed_blocks(head) == computed == schedule.tile_keep(head).sum()
        assert 0.0 < schedule.head_density(head) <= 1.0


@given(layer_schedules())
def test_lists_follow_from_bits(schedule: LayerSchedule) -> None:
    row_ptr, col_idx = schedule.row_ptr, schedule.col_idx
    assert (row_ptr.dtype, col_idx.dtype) == (np.int32, np.uint16)
    lists, columns = np.nonzero(np.unpackbits(schedule.list_bits, axis=1, bitorder="little"))
    assert row_ptr.tolist() == [0, *np.bincount(lists, minlength=len(schedule.list_bits)).cumsum()]
    assert col_idx.tolist() == columns.tolist()


@given(st.data(), layer_schedules(heads=st.integers(1, 5), precisions=tuple(PRECISIONS)))
def test_a_selection_is_the_chosen_heads_in_the_order_asked_for(data: st.DataObject, schedule: LayerSchedule) -> None:
    heads = data.draw(st.permutations(range(schedule.heads)))[: data.draw(st.integers(1, schedule.heads))]
    made = schedule.select(heads)
    made.check()
    order = [(head, tile) for head in range(schedule.heads) for tile in range(schedule.tiles(head))]
    order = [order[number] for number in schedule.tile_order if order[number][0] in heads]
    found = [(heads[head], tile) for head in range(made.heads) for tile in range(made.tiles(head))]
    assert [found[number] for number in made.tile_order] == order
    assert made.head_precision.tolist() == [schedule.head_precision[head] for head in heads]
    for head, original in enumerate(heads):
        for mine, wanted in zip(made.dense(head), schedule.dense(original), strict=True):
            assert np.array_equal(mine, wanted)
    listed = {(first, made.tiles(head)) for head, first in enumerate(made.head_list) if first != DENSE}
    assert len(made.list_bits) <= sum(tiles for _, tiles in listed), "lists of nobody are left out"
    assert set(made.head_anchor) - {NO_ANCHORS} == set(range(len(made.anchor_ptr) - 1))


@pytest.mark.parametrize("heads", [[], [4], [-1], [1, 1]])
def test_a_selection_must_be_of_heads_there_are(heads: list[int]) -> None:
    with pytest.raises(ValueError, match=r"heads must be distinct, 0 to 3 and at least one, got \["):
        example().select(heads)


def changed(name: str, **entries: Any) -> LayerSchedule:
    """The example with entries of one array replaced, by position."""
    schedule = example()
    array = getattr(schedule, name).copy()
    for position, value in entries.items():
        array[int(position[1:])] = value
    return replace(schedule, **{name: array})


def without_last(name: str) -> LayerSchedule:
    schedule = example()
    return replace(schedule, **{name: getattr(schedule, name)[:-1]})


BROKEN = {
    "bits of int64": (
        lambda: replace(example(), list_bits=example().list_bits.astype(np.int64)),
        "be uint8 of (lists, 1)",
    ),
    "bits of one dimension": (lambda: replace(example(), list_bits=example().list_bits[:, 0]), "got uint8 of (7,)"),
    "bits too wide": (lambda: replace(example(), list_bits=example().list_bits.repeat(2, 1)), "got uint8 of (7, 2)"),
    "bits beyond": (lambda: changed("list_bits", _0=1 << 5), "list_bits must have zero bits from key block 5 on"),
    "empty list": (lambda: changed("list_bits", _3=0), "list_bits must hold a block in each list, got none in 3"),
    "no heads": (lambda: replace(example(), head_list=np.zeros(0, np.int32)), "head_anchor must have one entry"),
    "head_anchor short": (lambda: without_last("head_anchor"), "one entry for each of 4 heads"),
    "precision of int32": (lambda: replace(example(), head_precision=np.zeros(4, np.int32)), "uint8 array, got int32"),
    "precision short": (lambda: without_last("head_precision"), "head_precision must have one entry for each of 4"),
    "precision 3": (
        lambda: changed("head_precision", _2=3),
        "head_precision must be one of 0 (16 bit), 1 (int8 QK), 2 (int8 QK with fp8 PV), got 3 for head 2",
    ),
    "anchor_ptr from 1": (lambda: changed("anchor_ptr", _0=1), "anchor_ptr must rise from 0 to 2 groups"),
    "anchor_ptr beyond": (lambda: changed("anchor_ptr", _1=3), "anchor_ptr must rise from 0 to 2 groups"),
    "anchor_axis short": (
        lambda: without_last("anchor_axis"),
        "anchor_axis must have one entry for each of 1 patterns",
    ),
    "anchor_axis 2": (lambda: changed("anchor_axis", _0=2), "anchor_axis must be 0 (rows) or 1 (frames), got 2 for"),
    "frames from a row": (lambda: frames(_0=1), "group_start must start at 0 in each pattern, got 1 in pattern 0"),
    "frames beyond": (lambda: frames(_1=2), "group_start must rise and stay below 2 frames, got 2..1 for group 1"),
    "group_anchor short": (
        lambda: without_last("group_anchor"),
        "group_anchor must have one entry for each of 2 groups",
    ),
    "group from row 1": (lambda: changed("group_start", _0=1), "group_start must start at 0 in each pattern"),
    "groups fall": (lambda: changed("group_start", _1=0), "group_start must rise and stay below 6 rows"),
    "group beyond": (lambda: changed("group_start", _1=6), "group_start must rise and stay below 6 rows"),
    "group leaves its frame": (lambda: changed("group_start", _1=4), "keep a group in its frame of 3 rows"),
    "anchor outside": (lambda: changed("group_anchor", _0=3), "group_anchor must lie in its group 0..2, got 3"),
    "anchor negative": (lambda: changed("group_anchor", _0=-1), "group_anchor must lie in its group 0..2, got -1"),
    "pattern beyond": (lambda: changed("head_anchor", _0=1), "head_anchor must be -1 or below 1 patterns"),
    "pattern unused": (lambda: changed("head_anchor", _3=-1), "name each of 1 patterns, got none of pattern 0"),
    "pattern negative": (lambda: changed("head_anchor", _3=-2), "got -2 for head 3"),
    "list beyond": (lambda: changed("head_list", _0=3), "head_list must leave 5 lists of 7"),
    "list negative": (lambda: changed("head_list", _0=-2), "got -2 for head 0"),
    "tile missing": (lambda: without_last("tile_order"), "one entry for each of 17 tiles, got 16"),
    "tile twice": (lambda: changed("tile_order", _0=example().tile_order[1]), "hold every tile once"),
    "tile beyond": (lambda: changed("tile_order", _0=17), "hold tile ids below 17, got 17"),
    "tile negative": (lambda: changed("tile_order", _0=-1), "hold tile ids below 17, got -1"),
    "grid too long": (
        lambda: replace(example(), grid=TokenGrid(2**10, 2**10, 2**10)),
        "grid must have at most 65536 key blocks",
    ),
}


def frames(**starts: Any) -> LayerSchedule:
    """The example with groups of frames."""
    return replace(changed("group_start", **{"_1": 1, **starts}), anchor_axis=np.array([FRAMES], np.int32))


@pytest.mark.parametrize("case", BROKEN)
def test_names_the_broken_promise(case: str) -> None:
    make, words = BROKEN[case]
    with pytest.raises(ScheduleError) as caught:
        make().check()
    assert words in str(caught.value)
