"""Anchor rows: the exact partition, what it costs when lowered, and when a head takes it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import stats
from support.jobs import (
    DEVICE,
    Compiled,
    MemoryStore,
    check_packed_blocks,
    compile_store,
    compiled,
    mask,
    memory_store,
    random_anchors,
    tiles,
)

from calibatt.compiler.bits import pack, unpack
from calibatt.compiler.errors import PassError
from calibatt.compiler.ir import Groups, packed_bits
from calibatt.compiler.menu import Menu
from calibatt.compiler.passes.anchors import Market, best_groups, copied, group_errors
from calibatt.plans import FRAMES, ROWS, Blocks, TokenGrid

PASSES = "select{target-density=0.9},anchors,schedule,lower"
CHEAP = {"copies": 1e-3}
"""Copies that cost so little that most heads take anchors."""


def row_errors(seed: int, heads: int, height: int, radius: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    offsets = np.array([*range(-radius, 0), *range(1, radius + 1)])
    errors = rng.exponential(1.0, (heads, height, 2 * radius))
    errors[rng.random(errors.shape) < 0.2] = 0.0
    row = np.arange(height)[:, None] + offsets
    errors[:, (row < 0) | (row >= height)] = np.nan
    return errors


def brute_force(errors: np.ndarray, radius: int, most: int, price: float) -> float:
    """Least cost over all partitions of the rows and all anchors; `errors` of one head, ``(Y, 2 R)``."""
    height = len(errors)

    def cost(rows: range) -> float:
        if len(rows) > most:
            return np.inf
        found = np.inf
        for anchor in rows:
            if max(abs(row - anchor) for row in rows) > radius:
                continue
            offsets = [anchor - row for row in rows]
            columns = [offset + radius - (offset > 0) for offset in offsets]
            pairs = zip(rows, offsets, columns, strict=True)
            found = min(found, sum(errors[row, column] for row, offset, column in pairs if offset))
        return found

    best = np.inf
    for cuts in product((False, True), repeat=height - 1):
        edges = [0, *(row + 1 for row, cut in enumerate(cuts) if cut), height]
        best = min(best, sum(cost(range(a, b)) + price for a, b in pairwise(edges)))
    return best


@given(st.integers(0, 2**32), st.integers(1, 7), st.integers(1, 3), st.integers(1, 5), st.floats(0, 4))
def test_the_partition_is_the_best_of_all(seed: int, height: int, radius: int, most: int, price: float) -> None:
    radius = min(radius, max(1, height - 1))
    errors = row_errors(seed, 2, height, radius)
    found = best_groups(group_errors(errors, most), np.array([price, price]))
    for head, (starts, anchors) in enumerate(found):
        stops = (*starts[1:], height)
        assert starts[0] == 0
        assert all(start <= row < stop for start, row, stop in zip(starts, anchors, stops, strict=True))
        error = copied(errors[head], Groups(ROWS, starts, anchors))
        assert error + price * len(starts) == pytest.approx(brute_force(errors[head], radius, most, price))


@given(st.integers(0, 2**32), st.sampled_from((ROWS, FRAMES)), st.integers(1, 19))
def test_a_packed_tile_keeps_what_its_queries_keep(seed: int, axis: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    grid, blocks = TokenGrid(4, 5, width), Blocks(16, 16)
    keep = rng.random((blocks.q_blocks(grid.tokens), blocks.k_blocks(grid.tokens))) < 0.3
    members = 5 if axis == ROWS else 4
    anchors = tuple(np.flatnonzero(rng.random(members) < 0.5).tolist()) or (2,)
    rows = [frame * 5 + row for frame in range(4) for row in anchors]
    if axis == FRAMES:
        rows = [frame * 5 + row for frame in anchors for row in range(5)]
    queries = [row * width + column for row in rows for column in range(width)]
    tiles = [queries[at : at + 16] for at in range(0, len(queries), 16)]
    expected = [np.any([keep[query // 16] for query in tile], axis=0) for tile in tiles]
    packed = packed_bits(pack(keep), grid, blocks, Groups(axis, anchors, anchors))
    np.testing.assert_array_equal(unpack(packed, keep.shape[1]), expected)


def test_a_group_reaches_no_further_than_was_measured() -> None:
    errors = group_errors(np.zeros((1, 6, 2)), 6)
    assert errors.shape == (1, 6, 3, 3)
    assert errors[0, 1, 2].tolist() == [np.inf, 0.0, np.inf]
    assert np.isinf(errors[0, 5, 1]).all()


def test_heads_that_repeat_take_anchors_and_the_schedule_says_so() -> None:
    job, accounts = compiled(PASSES, **CHEAP)
    taken = [(unit, head) for unit in job.all for head in range(unit.heads) if unit.anchors[head] is not None]
    assert taken
    assert job.findings["anchors"]["heads_with_anchors"] == len(taken)
    assert accounts[2].blocks < accounts[1].blocks
    for unit, head in taken:
        schedule = unit.lowered
        schedule.check()
        starts, anchors = schedule.groups(schedule.head_anchor[head])
        groups, repeats = unit.anchors[head], unit.grid.frames if unit.anchors[head].axis == ROWS else 1
        assert schedule.anchor_axis[schedule.head_anchor[head]] == groups.axis
        first = np.arange(repeats)[:, None] * unit.grid.height
        assert starts.tolist() == (first + np.array(groups.starts)).reshape(-1).tolist()
        assert anchors.tolist() == (first + np.array(groups.anchors)).reshape(-1).tolist()
        np.testing.assert_array_equal(schedule.tile_keep(head), tiles(unit, head))


def test_what_copies_cost_is_the_sum_over_what_is_copied() -> None:
    text = "select{target-density=0.7}"
    before = compiled(text, copies=5)[0]
    after = compiled(f"{text},anchors", copies=5)[0]
    grid, taken = before.manifest.grid, []
    for old, new in zip(before.all, after.all, strict=True):
        for head, groups in enumerate(new.anchors):
            if groups is None:
                continue
            taken.append(groups.axis)
            rows = groups.axis == ROWS
            members, radius = (grid.height, 2) if rows else (grid.frames, 1)
            source = np.repeat(groups.anchors, np.diff([*groups.starts, members]))
            offset = source - np.arange(members)
            errors = (old.means.row_error if rows else old.means.frame_error)[head]
            added = sum(errors[at, d + radius - (d > 0)] for at, d in enumerate(offset.tolist()) if d)
            assert new.copy_error[head] == pytest.approx(added)
            assert np.isclose(old.menu.error[head], new.error[head] - added, rtol=1e-9, atol=1e-12).any()
            blocks = int(mask(old, head).sum()) - int(tiles(new, head).sum())
            worth = before.multiplier * blocks * DEVICE.block_ms(old.blocks, 8)
            assert new.error[head] - old.error[head] <= worth * (1 + 1e-9)
    assert 0 < len(taken) < 12
    assert set(taken) == {ROWS, FRAMES}


@given(st.sampled_from((ROWS, FRAMES)), st.integers(0, 2**32))
def test_what_each_mask_computes_with_anchors_is_counted_without_making_it(axis: int, seed: int) -> None:
    job = anything_chosen()
    unit, rng = job.all[0], np.random.default_rng(seed)
    menu, head = Menu(job, unit.menu.parts), int(rng.integers(unit.heads))
    check_packed_blocks(menu, unit, head, random_anchors(rng, axis, unit.grid))


@lru_cache(maxsize=1)
def anything_chosen() -> Compiled:
    return compiled("select{target-density=0.9}")[0]


def test_anchors_that_would_compute_more_blocks_save_nothing() -> None:
    of = stats.manifest(grid=TokenGrid(1, 10, 8), row_radius=4, frame_radius=0)
    job = compiled("select", of)[0]
    unit = job.all[0]
    keep = np.zeros((5, 5), bool)
    keep[:, 0] = keep[::2] = True
    apart = Groups(ROWS, (0, *range(2, 9)), tuple(range(1, 9)))
    packed = packed_bits(pack(keep), unit.grid, unit.blocks, apart)
    assert unpack(packed, 5).shape == (4, 5)
    assert unpack(packed, 5).sum() == 20 > keep.sum()
    unit.keep, unit.error = np.repeat(pack(keep)[None], unit.heads, 0), np.zeros(unit.heads)
    unit.menu.error[:] = 1e9
    unit.menu.error[:, 0] = 0
    market = Market(job, unit, 1.0)
    assert market.offer(0, apart, 0.0).gain < 0
    assert market.offer(0, Groups(ROWS, (0,), (5,)), 0.0).gain > 0


def test_what_anchors_save_is_worth_their_error() -> None:
    job, accounts = compiled(PASSES, **CHEAP)
    saved = accounts[1].predicted_ms - accounts[2].predicted_ms
    assert job.multiplier * saved >= accounts[2].error - accounts[1].error


def test_a_second_select_spends_what_anchors_saved() -> None:
    text = "select{target-density=0.7},anchors,select{target-density=0.7},schedule,lower"
    job, accounts = compiled(text, copies=10)
    first, anchors, second, last = (accounts[index] for index in (1, 2, 3, 5))
    taken = job.findings["anchors"]["heads_with_anchors"]
    assert 0 < taken < job.findings["anchors"]["heads"]
    assert anchors.blocks < second.blocks <= first.blocks
    assert second.error < min(first.error, anchors.error)
    assert last.density <= 0.7
    for unit in job.all:
        assert len(unit.anchors) == unit.heads


def test_heads_keep_their_anchors_with_another_mask_or_lose_them() -> None:
    text = "select{target-density=0.7},anchors"
    before, after = (compiled(each, copies=3)[0] for each in (text, f"{text},select{{target-density=0.35}}"))
    kept, changed = [], []
    for old, new in zip(before.all, after.all, strict=True):
        for head, groups in enumerate(new.anchors):
            kept.append(groups is not None)
            if groups is not None:
                assert groups == old.anchors[head]
                assert new.error[head] >= new.copy_error[head] == old.copy_error[head] > 0
                np.testing.assert_array_equal(
                    new.packed[head], packed_bits(new.keep[head], new.grid, new.blocks, groups)
                )
                changed.append(not np.array_equal(new.keep[head], old.keep[head]))
    assert 0 < sum(kept) <= before.findings["anchors"]["heads_with_anchors"]
    assert any(changed)
    free = compiled(f"{text},select{{target-density=1}}", copies=3)[0]
    assert {groups for unit in free.all for groups in unit.anchors} == {None}


def test_no_anchors_where_they_cost_too_much_or_may_not_be() -> None:
    def found(options: str = "", **changes: float) -> dict[str, int]:
        passes = PASSES.replace("anchors", f"anchors{{{options}}}")
        return compiled(passes, **{**CHEAP, **changes})[0].findings["anchors"]

    assert found(copies=1e9)["heads_with_anchors"] == 0
    assert found("max-group-rows=1,max-group-frames=1")["heads_with_anchors"] == 0
    rows, frames = found("max-group-frames=1"), found("max-group-rows=1")
    assert rows["heads_with_anchors"] > rows["of_frames"] == 0
    assert frames["heads_with_anchors"] == frames["of_frames"] > 0
    unmeasured = compiled(PASSES, stats.manifest(row_radius=0, frame_radius=0))[0]
    assert unmeasured.findings["anchors"]["heads_with_anchors"] == 0


@pytest.mark.parametrize(("axis", "groups"), [("row", Groups(ROWS, (0,), (2,))), ("frame", Groups(FRAMES, (0,), (0,)))])
def test_rows_or_frames_that_are_equal_are_all_copied(axis: str, groups: Groups) -> None:
    store = memory_store(of := stats.manifest(), copies=1000)
    name = f"{axis}_effect"
    same = {key: replace(part, **{name: getattr(part, name) * 0}) for key, part in store.parts.items()}
    text = "select{target-density=0.9},anchors{max-group-rows=5},schedule,lower"
    job, _ = compile_store(MemoryStore(of, same, store.tables), text)
    assert {found for unit in job.all for found in unit.anchors} == {groups}


def test_anchors_need_a_price() -> None:
    with pytest.raises(PassError, match="anchors: select must come before, got none"):
        compiled("anchors")
    with pytest.raises(PassError, match="anchors: anchors must come before anchors, got it after"):
        compiled("select{target-density=0.9},anchors,anchors", **CHEAP)
