"""Text, vote, repeat, schedule and lower; and what the pipeline refuses between passes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from support import stats
from support.jobs import compiled, gathered, memory_store, tiles

from calibatt.compiler.bits import count, pack, unpack
from calibatt.compiler.error_model import copy_prices, mask_errors
from calibatt.compiler.errors import PassError, VerifyError
from calibatt.compiler.ir import UnitIR
from calibatt.compiler.passes.lower import lowered
from calibatt.compiler.pipeline import verify
from calibatt.compiler.stats import Manifest
from calibatt.plans import DENSE


def test_bits_are_counted_and_unpacked() -> None:
    keep = np.random.default_rng(0).random((3, 4, 13)) < 0.5
    np.testing.assert_array_equal(unpack(pack(keep), 13), keep)
    np.testing.assert_array_equal(count(pack(keep)), keep.sum(-1))
    np.testing.assert_array_equal(count(pack(keep), (1, 2)), keep.sum((1, 2)))


COUNTED = stats.manifest(thresholds=(0.8, 0.9))


@pytest.mark.parametrize(("agreement", "needed"), [(1e-9, 1), (0.1, 1), (0.4, 4), (0.5, 5), (0.51, 6), (1.0, 10)])
def test_blocks_are_kept_that_enough_samples_need(agreement: float, needed: int) -> None:
    store = memory_store(COUNTED, samples=5)  # of two branches each
    for index, threshold in enumerate((0.8, 0.9)):
        text = f"vote{{agreement={agreement},threshold={threshold}}},schedule,lower"
        found, _ = compiled(text, COUNTED, samples=5)
        for unit in found.all:
            votes = store.unit(unit.time_index, unit.layer).votes[index]
            np.testing.assert_array_equal(unit.keep, pack(votes >= needed) | unit.required)
            assert unit.choice == ["voted"] * unit.heads
            np.testing.assert_array_equal(unit.error, mask_errors(unit, unit.keep))


@pytest.mark.parametrize("group", [2, 3, 5])
def test_heads_whose_rows_differ_little_repeat(group: int) -> None:
    store = memory_store(COUNTED)
    anchors = {2: (0, 2, 4), 3: (1, 3), 5: (2,)}[group]
    source = np.repeat(anchors, [group] * (5 // group) + [5 % group] * bool(5 % group))
    offset = source - np.arange(5)
    seen = set()
    for most in (0.0, 0.02, 1.0):
        passes = f"vote,repeat{{max-difference={most},group={group}}},schedule,lower"
        found, _ = compiled(passes, COUNTED)
        for unit in found.all:
            raw = store.unit(unit.time_index, unit.layer)
            for head in range(unit.heads):
                copies = [(row, d + 2 - (d > 0)) for row, d in enumerate(offset.tolist()) if d]
                difference = np.mean([raw.row_difference[head][at] for at in copies])
                groups = unit.anchors[head]
                before, after = (int(count(bits, (0, 1))) for bits in (unit.keep[head], unit.tile_bits(head)))
                assert after <= before
                if groups is None:
                    assert difference > most or unit.copy_error[head] == 0
                    seen.add("none")
                    continue
                assert difference <= most
                assert groups.anchors == anchors
                level = found.levels[unit.time_index]
                priced = copy_prices(raw.row_effect * level, len(store.samplings) * stats.VECTORS)
                copied = sum(float(priced[head][at]) for at in copies)
                assert unit.copy_error[head] == pytest.approx(copied, rel=1e-5)
                seen.add("some")
    assert seen == {"none", "some"}


@pytest.mark.parametrize(
    ("passes", "of", "message"),
    [
        ("vote", stats.manifest(), "vote: threshold must be one of the store's none, got 0.9"),
        ("vote{threshold=0.85}", COUNTED, "vote: threshold must be one of the store's 0.8, 0.9, got 0.85"),
        ("select,vote", COUNTED, "vote: vote must come before select, got it after"),
        ("repeat", stats.manifest(), "differences of rows must have been recorded with thresholds, got none"),
        ("vote,repeat{group=6}", COUNTED, "repeat: group must be at most 5, as measured, got 6"),
        ("vote,repeat,repeat", COUNTED, "repeat: repeat must come before repeat, got it after"),
    ],
)
def test_what_the_papers_method_requires(passes: str, of: Manifest, message: str) -> None:
    with pytest.raises(PassError, match=message):
        compiled(passes, of)


def test_every_mask_keeps_a_block_a_row() -> None:
    of = stats.manifest()
    for unit in gathered(of)[1]:
        least = np.zeros_like(unit.means.error_code, bool)
        np.put_along_axis(least, unit.means.error_code.argmin(2)[..., None], True, 2)
        np.testing.assert_array_equal(unit.required, pack(least))
    for text in ("select{target-density=0.8}", "select{target-density=0.8},anchors,select{target-density=0.8}"):
        for unit in compiled(text, of)[0].all:
            assert not (unit.required & ~unit.keep).any()


def test_tiles_are_ordered_head_by_head_longest_first() -> None:
    found, _ = compiled("select{target-density=0.8},anchors,schedule,lower", copies=1e-3)
    for unit in found.all:
        schedule = unit.lowered
        heads = np.searchsorted(schedule.head_tile_ptr, schedule.tile_order, side="right") - 1
        assert (np.diff(heads) >= 0).all()
        for head in range(unit.heads):
            tiles = schedule.tile_order[heads == head] - schedule.head_tile_ptr[head]
            keys = [(-len(schedule.columns(head, tile)), tile) for tile in tiles.tolist()]
            assert keys == sorted(keys)


def test_lowering_keeps_the_masks_and_shares_lists() -> None:
    found, _ = compiled("select{target-density=0.8},lower")
    for unit in found.all:
        for head in range(unit.heads):
            np.testing.assert_array_equal(unit.lowered.tile_keep(head), tiles(unit, head))
            assert (unit.lowered.head_list[head] == DENSE) == bool(tiles(unit, head).all())
    unit = found.all[0]
    unit.keep[:] = pack(np.eye(5, dtype=bool))
    unit.keep[2] = pack(np.tri(5, dtype=bool))
    lists = lowered(unit)
    assert lists.head_list.tolist() == [0, 0, 5]
    assert len(lists.col_idx) == 5 + 15


def test_nothing_decided_lowers_to_dense() -> None:
    found, accounts = compiled("lower")
    assert accounts[-1].density == 1.0
    assert all((unit.lowered.head_list == DENSE).all() for unit in found.all)


def spoil_padding(unit: UnitIR) -> None:
    unit.keep[0, 0, -1] |= 0x80


def spoil_row(unit: UnitIR) -> None:
    unit.keep[0, 0] = 0


def spoil_required(unit: UnitIR) -> None:
    unit.keep[...] = pack(np.eye(unit.q_blocks, unit.k_blocks, dtype=bool))
    unit.required[...] = pack(np.ones((unit.q_blocks, unit.k_blocks), bool))


def spoil_shape(unit: UnitIR) -> None:
    unit.keep = unit.keep[:2]


def spoil_choice(unit: UnitIR) -> None:
    unit.choice.pop()


def spoil_error(unit: UnitIR) -> None:
    unit.error[0] = np.nan


def spoil_anchors(unit: UnitIR) -> None:
    unit.anchors = [None]


def spoil_schedule(unit: UnitIR) -> None:
    unit.lowered.tile_order[0] = 99


def spoil_mask_after_lower(unit: UnitIR) -> None:
    unit.keep[...] = pack(np.ones((unit.q_blocks, unit.k_blocks), bool))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_padding, "keep must have zero padding bits after x, got ones"),
        (spoil_row, "keep must hold a block for every query block after x, got an empty row"),
        (spoil_required, "keep must hold every required block after x, got one dropped"),
        (spoil_shape, "keep must be uint8 (3, 5, 1) after x, got ('uint8', (2, 5, 1))"),
        (spoil_choice, "choice must name 3 heads after x, got 2"),
        (spoil_error, "error must be 3 finite numbers, none negative after x, got"),
        (spoil_anchors, "anchors must be given for 3 heads after x, got 1"),
        (spoil_schedule, "the schedule is broken after x: tile_order must hold tile ids below 15, got 99"),
        (spoil_mask_after_lower, "the schedule must compute the blocks of the masks, [25, 25, 25] after x, got"),
    ],
)
def test_the_pipeline_proves_every_unit(spoil: Callable[[UnitIR], None], message: str) -> None:
    found, _ = compiled("select{target-density=0.6},schedule,lower")
    unit = found.all[0]
    verify(unit, "x")
    spoil(unit)
    with pytest.raises(VerifyError) as raised:
        verify(unit, "x")
    assert f"time 0, layer 0: {message}" in str(raised.value)


def test_accounts_follow_the_masks() -> None:
    found, accounts = compiled("select{target-density=0.6},schedule,lower")
    assert [each.name for each in accounts] == ["dense", "select", "schedule", "lower"]
    kept = sum(int(tiles(unit, head).sum()) for unit in found.all for head in range(unit.heads))
    assert accounts[0].blocks == 2 * 2 * 3 * 25
    assert accounts[-1].blocks == kept
    assert accounts[-1].density == pytest.approx(np.mean([unit.lowered.density for unit in found.all]))
    assert accounts[-1].predicted_ms == pytest.approx(kept * found.device.block_ms(found.manifest.blocks, 8))
    assert accounts[-1].error == pytest.approx(sum(unit.error.sum() for unit in found.all))
    assert accounts[-1].passes == "lower"
