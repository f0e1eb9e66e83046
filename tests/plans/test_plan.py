"""A whole plan: what is written is read, and a file that contradicts itself is refused by name."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.plans import BLOCKS, GRID, frames_plan, tiny_plan, tiny_schedule
from support.schedules import all_blocks, grids, layer_schedules, random_schedule

from calibatt.plans import (
    PRECISIONS,
    Blocks,
    Container,
    LayerSchedule,
    ModelSignature,
    PlanFile,
    Segment,
    StoredLayers,
    TokenGrid,
    errors,
    write_container,
    write_plan,
)
from calibatt.plans.encoding import base_segments, check_bases, encode, finish, unpack
from calibatt.plans.plan import MAGIC, VERSION
from calibatt.plans.schedule import SMALL_ARRAYS

ARRAYS = ("list_bits", *SMALL_ARRAYS)
GOLDEN = Path(__file__).parent / "golden" / "tiny.plan"
HEADER = (
    *("signature", "grid", "blocks", "segments", "passes", "scheduler_hint", "provenance", "predicted", "license"),
    "notes",
)


def assert_same(found: PlanFile, expected: PlanFile) -> None:
    for name in HEADER:
        assert getattr(found, name) == getattr(expected, name)
    assert [len(layers) for layers in found.schedules] == [len(layers) for layers in expected.schedules]
    for found_layers, expected_layers in zip(found.schedules, expected.schedules, strict=True):
        for one, other in zip(found_layers, expected_layers, strict=True):
            assert (one.grid, one.blocks) == (other.grid, other.blocks)
            for name in ARRAYS:
                assert getattr(one, name).dtype == getattr(other, name).dtype
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_writing_gives_the_golden_file(tmp_path: Path) -> None:
    """To renew on purpose: write_plan("tests/plans/golden/tiny.plan", frames_plan()), and a new format version.

    Frames are compared unpacked: another version of the zstd library may compress otherwise.
    """
    write_plan(tmp_path / "tiny.plan", frames_plan())
    found, expected = parts(tmp_path / "tiny.plan"), parts(GOLDEN)
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, array in expected[1].items():
        if name.endswith("/layers"):
            np.testing.assert_array_equal(found[1][name][:, 1:], array[:, 1:])
        elif not name.endswith("/masks"):
            np.testing.assert_array_equal(found[1][name], array)


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_plan(tmp_path / name, frames_plan())
    write_plan(tmp_path / "c", PlanFile.read(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_the_golden_bytes_give_the_values() -> None:
    plan = PlanFile.read(GOLDEN)
    assert_same(plan, frames_plan())
    assert plan.signature == ModelSignature("TinyTransformer", 2, 4, 8, "00ff")
    assert plan.grid == TokenGrid(2, 3, 13)
    assert plan.digest == GOLDEN.read_bytes()[16:32].hex()
    first = plan.schedules[0][0]
    assert first.head_list.tolist() == [0, -1, 0, 5]
    assert first.head_anchor.tolist() == [-1, -1, -1, 0]
    assert first.row_ptr.tolist() == [0, 2, 4, 6, 7, 9, 11, 13, 14, 16]
    assert first.col_idx.tolist() == [0, 2, 1, 4, 1, 2, 3, 0, 4, 1, 4, 1, 2, 3, 0, 4]
    assert first.group_start.tolist() == [0, 2, 3, 4]
    assert first.group_anchor.tolist() == [1, 2, 3, 4]
    assert first.tile_order.tolist() == [17, 18, *range(17)]
    assert [layers[0].head_precision.tolist() for layers in plan.schedules] == [[0, 0, 0, 0], [1, 0, 2, 0]]


def test_finds_the_schedule_of_a_time() -> None:
    plan = tiny_plan()
    assert [plan.segment_index(at) for at in (0, 0.2, 0.37499, 0.375, 0.9, 1)] == [0, 0, 0, 1, 1, 1]
    assert plan.schedule(0.375, 1) is plan.schedules[1][1]
    for outside in (-1e-9, 1.0001, float("nan")):
        with pytest.raises(ValueError, match="time must be"):
            plan.segment_index(outside)
    for outside in (-1, 2):
        with pytest.raises(ValueError, match="layer must be 0 to 1"):
            plan.schedule(0.5, outside)


def test_accounts_for_its_bytes(tmp_path: Path) -> None:
    plan = tiny_plan()
    write_plan(tmp_path / "tiny.plan", plan)
    stored = Container.open(tmp_path / "tiny.plan", magic=MAGIC, version=VERSION).section_bytes()
    for kind, size in plan.section_bytes().items():
        assert size == sum(size for name, size in stored.items() if name.endswith(f"/{kind}"))


@st.composite
def plans(draw: st.DrawFn) -> PlanFile:
    grid, blocks = draw(grids(max_width=12)), draw(all_blocks())
    layers, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    edges = [0.0, *sorted(draw(st.sets(st.floats(0.01, 0.99), max_size=2))), 1.0]
    segments = tuple(Segment(start, stop, stop) for start, stop in pairwise(edges))
    schedule = layer_schedules(st.just(grid), st.just(blocks), st.just(heads), tuple(PRECISIONS))
    return PlanFile(
        signature=ModelSignature("Any", layers, heads, 64),
        grid=grid,
        blocks=blocks,
        segments=segments,
        schedules=StoredLayers.of([[draw(schedule) for _ in range(layers)] for _ in segments]),
    )


@given(plans())
def test_round_trip(tmp_path_factory: Any, plan: PlanFile) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.plan"
    write_plan(path, plan)
    assert_same(PlanFile.read(path), plan)


SEGMENTS: dict[str, tuple[tuple[Segment, ...], str]] = {
    "none": ((), r"must cover \[0, 1\], got 0"),
    "late": ((Segment(0.1, 1.0, 0.5),), r"segments\[0\] must start at 0.0, where .*, got 0.1"),
    "early": ((Segment(0.0, 0.9, 0.5),), r"must cover \[0, 1\], got 1 that stop at 0.9"),
    "gap": ((Segment(0.0, 0.4, 0.2), Segment(0.5, 1.0, 0.7)), r"segments\[1\] must start"),
    "overlap": ((Segment(0.0, 0.5, 0.2), Segment(0.4, 1.0, 0.7)), r"segments\[1\] must start"),
    "descending": ((Segment(0.5, 1.0, 0.7), Segment(0.0, 0.5, 0.2)), r"segments\[0\] must start"),
}


@pytest.mark.parametrize("case", SEGMENTS)
def test_segments_cover_time(case: str) -> None:
    segments, words = SEGMENTS[case]
    schedules = [[tiny_schedule(1), tiny_schedule(2)] for _ in segments] or StoredLayers("", GRID, BLOCKS, 4, (), ())
    with pytest.raises(errors.SchemaError, match=words):
        tiny_plan(segments=segments, schedules=schedules)


def test_schedules_are_those_of_the_plan() -> None:
    good = [*tiny_plan().schedules]
    with pytest.raises(errors.SchemaError, match="schedules must be 2, one a segment, got 1"):
        tiny_plan(schedules=good[:1])
    with pytest.raises(errors.SchemaError, match="segment 1 must have 2 schedules, one a layer, got 1"):
        tiny_plan(schedules=(good[0], good[1][:1]))
    with pytest.raises(errors.ScheduleError, match="schedules must have the plan's grid and blocks"):
        tiny_plan(blocks=Blocks(16, 32))
    with pytest.raises(errors.ScheduleError, match="schedules must have 3 heads, got 4"):
        tiny_plan(signature=ModelSignature("T", 2, 3, 8))
    broken = replace(good[1][0], head_list=good[1][0].head_list - 2)
    with pytest.raises(errors.ScheduleError, match="segment 1, layer 0: head_list must leave"):
        tiny_plan(schedules=(good[0], (broken, good[1][1])))
    other = random_schedule(np.random.default_rng(0), TokenGrid(1, 3, 13), BLOCKS, 4)
    with pytest.raises(errors.ScheduleError, match="segment 0, layer 1: grid and blocks must be the first schedule's"):
        StoredLayers.of([[good[0][0], other]])
    with pytest.raises(errors.SchemaError, match="provenance must be of type mapping, got list"):
        tiny_plan(provenance=[])
    with pytest.raises(errors.SchemaError, match="notes must be of type str, got int"):
        tiny_plan(notes=1)


def parts(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    container = Container.open(path, magic=MAGIC, version=VERSION)
    return container.header, {name: container.section(name) for name in container.names}


def set_header(key: str, value: object) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    *outer, last = key.split("/")

    def change(header: dict[str, Any], _: dict[str, np.ndarray]) -> None:
        for name in outer:
            header = header[name]
        header[last] = value

    return change


def set_section(name: str, value: np.ndarray) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    return lambda _, sections: sections.update({name: value})


def set_table(row: int, column: int, value: int) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    def change(_: dict[str, Any], sections: dict[str, np.ndarray]) -> None:
        table = sections["1/layers"].copy()
        table[row, column] = value
        sections["1/layers"] = table

    return change


INT32 = np.zeros(4, np.int32)
LESS = np.array([2**40] * 9 + [6])
BAD_FILES: dict[str, tuple[Callable[[dict[str, Any], dict[str, np.ndarray]], object], type[Exception], str]] = {
    "no model": (lambda header, _: header.pop("model"), errors.SchemaError, "header must have the key 'model'"),
    "unknown key": (set_header("extra", 1), errors.SchemaError, "header must have only the keys"),
    "grid a list": (set_header("grid", [1]), errors.SchemaError, "grid must be of type dict, got list"),
    "frames 0": (set_header("grid/frames", 0), errors.SchemaError, "grid.frames must be a positive integer, got 0"),
    "frames text": (set_header("grid/frames", "2"), errors.SchemaError, "grid.frames must be"),
    "block 24": (set_header("blocks/block_q", 24), errors.SchemaError, "blocks.block_q must be one of"),
    "block 16.0": (set_header("blocks/block_q", 16.0), errors.SchemaError, "blocks.block_q must be one of"),
    "heads true": (set_header("model/heads", True), errors.SchemaError, "model.heads must be"),
    "unknown model key": (set_header("model/x", 1), errors.SchemaError, "model must have only the keys"),
    "segments a map": (set_header("segments", {}), errors.SchemaError, "segments must be of type list"),
    "no segments": (set_header("segments", []), errors.SchemaError, "segments must cover"),
    "segment a number": (set_header("segments", [1]), errors.SchemaError, "segments[0] must be of type dict"),
    "segment of text": (
        set_header("segments", [{"start": "0", "stop": 1.0, "time": 0.5}]),
        errors.SchemaError,
        "segments[0].start must be of type float, got str",
    ),
    "segment not a number": (
        set_header("segments", [{"start": float("nan"), "stop": 1.0, "time": 0.5}]),
        errors.SchemaError,
        "segment must be 0 <= start < stop <= 1",
    ),
    "passes a list": (set_header("passes", []), errors.SchemaError, "passes must be of type str"),
    "hint a number": (set_header("scheduler_hint", 3), errors.SchemaError, "scheduler_hint must be of type mapping"),
    **{
        f"times {times}": (
            set_header("scheduler_hint", {"times": times}),
            errors.SchemaError,
            f"scheduler_hint.times must be a list of numbers in [0, 1], one at least, got '{times}'",
        )
        for times in (None, [], [0.5, 1.5], [float("nan")], [True], {})
    },
    "2**60 layers": (set_header("model/layers", 2**60), errors.SectionError, "must be int64 of shape"),
    "2**60 heads": (set_header("model/heads", 2**60), errors.ScheduleError, "must have 1152921504606846976 heads"),
    "2**60 frames": (set_header("grid/frames", 2**60), errors.SchemaError, "grid must be of fewer than 2147483648"),
    "missing section": (lambda _, sections: sections.pop("1/head_list"), errors.MissingSection, "'1/head_list'"),
    "missing table": (lambda _, sections: sections.pop("0/layers"), errors.MissingSection, "'0/layers'"),
    "unknown section": (set_section("2/row_ptr", INT32), errors.SectionError, "got '2/row_ptr'"),
    "table of int32": (set_section("0/layers", np.zeros((3, 10), np.int32)), errors.SectionError, "must be int64"),
    "table without precisions": (
        set_section("0/layers", np.zeros((3, 9), np.int64)),
        errors.SectionError,
        "must be int64 of shape (3, 10), got int64 of (3, 9)",
    ),
    "table flat": (
        set_section("0/layers", np.zeros(30, np.int64)),
        errors.SectionError,
        "must be int64 of shape (3, 10)",
    ),
    "table from 1": (set_table(0, 2, 1), errors.SectionError, "column 2 of section '1/layers' must rise from 0"),
    "table falls": (set_table(1, 1, 2**62), errors.SectionError, "column 1 of section '1/layers' must rise from 0"),
    "table negative": (set_table(1, 7, -1), errors.SectionError, "column 7 of section '1/layers' must rise from 0"),
    "table short": (set_table(2, 8, 3), errors.SectionError, "section '1/tile_order'"),
    "array of two dimensions": (
        lambda _, sections: sections.update({"0/head_list": sections["0/head_list"][:, None]}),
        errors.SectionError,
        "column 2 of section '0/layers'",
    ),
    "array of int64": (
        lambda _, sections: sections.update({"0/head_list": sections["0/head_list"].astype(np.int64)}),
        errors.ScheduleError,
        "segment 0, layer 0: head_list must be a one-dimensional int32 array",
    ),
    "layers cut elsewhere": (set_table(1, 0, 3), errors.MaskError, "segment 1, layer 0: masks must be one zstd frame"),
}


def junk(header: dict[str, Any], sections: dict[str, np.ndarray]) -> None:
    sections["0/masks"] = sections["0/masks"] ^ np.uint8(255)


def set_lists(count: int) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    def change(header: dict[str, Any], sections: dict[str, np.ndarray]) -> None:
        sections["0/layers"] = sections["0/layers"].copy()
        sections["0/layers"][-1, 1] = count

    return change


def more_lists(header: dict[str, Any], sections: dict[str, np.ndarray]) -> None:
    table = sections["0/layers"].copy()
    table[1:, 1] += 1
    sections["0/layers"] = table


BAD_FILES |= {
    "no bases": (lambda header, _: header.pop("bases"), errors.SchemaError, "header must have the key 'bases'"),
    "bases a map": (set_header("bases", {}), errors.SchemaError, "bases must be of type list, got dict"),
    "one base": (set_header("bases", [0]), errors.SchemaError, "bases must lead from each of 2 segments"),
    "base beyond": (set_header("bases", [0, 2]), errors.SchemaError, "bases must lead from each of 2 segments"),
    "a base with a base": (
        set_header("bases", [1, 0]),
        errors.SchemaError,
        "its own base in at most 4 steps, got [1, 0]",
    ),
    "2**31 groups": (
        set_section("0/anchor_ptr", np.array([0, 2**31 - 1, 0, 1], np.int32)),
        errors.ScheduleError,
        "segment 0, layer 0: anchor_ptr must rise from 0 to",
    ),
    "2**40 lists": (
        set_lists(2**40),
        errors.LimitError,
        "the plan must need at most",
    ),
    "2**20 lists": (
        set_lists(2**20),
        errors.MaskError,
        "segment 0, layer 1: masks must have at most a list for each of 19 tiles, got",
    ),
    "junk": (junk, errors.MaskError, "segment 0, layer 0: masks must be one zstd frame, got"),
    "more lists": (more_lists, errors.MaskError, "segment 0, layer 0: masks must hold 10 bytes for 10 lists, got 9"),
    "missing masks": (lambda _, sections: sections.pop("1/masks"), errors.MissingSection, "'1/masks'"),
    "masks of int32": (set_section("0/masks", INT32), errors.SectionError, "column 0 of section '0/layers' must rise"),
    "old section": (set_section("0/row_ptr", INT32), errors.SectionError, "got '0/row_ptr'"),
    "anchor pattern beyond": (
        lambda _, sections: sections.update({"0/head_anchor": sections["0/head_anchor"] + np.int32(7)}),
        errors.ScheduleError,
        "segment 0, layer 0: head_anchor must be -1 or below 1 patterns",
    ),
    "group anchors elsewhere": (
        lambda _, sections: sections.update({"0/group_anchor": sections["0/group_anchor"] + np.int32(1)}),
        errors.ScheduleError,
        "segment 0, layer 0: group_anchor must lie in its group",
    ),
    "no axis": (lambda _, sections: sections.pop("1/anchor_axis"), errors.MissingSection, "'1/anchor_axis'"),
    "an axis of no kind": (
        set_section("0/anchor_axis", np.array([2, 0], np.int32)),
        errors.ScheduleError,
        "segment 0, layer 0: anchor_axis must be 0 (rows) or 1 (frames), got 2 for pattern 0",
    ),
    "no precisions": (lambda _, sections: sections.pop("1/head_precision"), errors.MissingSection, "head_precision"),
    "a precision of no kind": (
        set_section("1/head_precision", np.array([0, 0, 0, 0, 1, 2, 3, 0], np.uint8)),
        errors.ScheduleError,
        "segment 1, layer 1: head_precision must be one of 0 (16 bit), 1 (int8 QK), 2 (int8 QK with fp8 PV), got 3",
    ),
    "precisions of int32": (
        set_section("0/head_precision", np.zeros(8, np.int32)),
        errors.ScheduleError,
        "segment 0, layer 0: head_precision must be a one-dimensional uint8 array, got int32",
    ),
    "too few precisions": (
        lambda _, sections: sections.update(
            {"0/head_precision": sections["0/head_precision"][:6], "0/layers": np.minimum(sections["0/layers"], LESS)}
        ),
        errors.ScheduleError,
        "segment 0, layer 1: head_precision must have one entry for each of 4 heads",
    ),
    "rows for frames": (
        set_section("0/anchor_axis", np.array([0, 1], np.int32)),
        errors.ScheduleError,
        "segment 0, layer 1: group_start must rise and stay below 2 frames, got 2..2 for group 1",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses_a_file_that_contradicts_itself(tmp_path: Path, case: str) -> None:
    """A plan's bytes and header are proved when it is opened, a schedule when it is first asked for, all by `prove`."""
    change, kind, words = BAD_FILES[case]
    header, sections = parts(GOLDEN)
    change(header, sections)
    path = tmp_path / "bad.plan"
    write_container(path, magic=MAGIC, version=VERSION, header=header, sections=sections)
    for see_all in (
        lambda plan: [list(layers) for layers in plan.schedules],
        PlanFile.prove,
        lambda plan: [*plan.walk()],
    ):
        with pytest.raises(errors.PlanError) as caught:
            see_all(PlanFile.read(path))
        assert type(caught.value) is kind
        assert words in str(caught.value)
        assert str(caught.value).count(str(path)) == 1


def test_a_newer_minor_version_may_say_more(tmp_path: Path) -> None:
    header, sections = parts(GOLDEN)
    for place in (header, header["model"], header["segments"][0]):
        place["new"] = 1
    sections["0/more"] = INT32
    path = tmp_path / "newer.plan"
    write_container(path, magic=MAGIC, version=(VERSION[0], 1), header=header, sections=sections)
    assert_same(PlanFile.read(path), frames_plan())


def test_another_major_version_is_refused(tmp_path: Path) -> None:
    header, sections = parts(GOLDEN)
    for version in ((4, 0), (6, 0)):
        write_container(tmp_path / "p", magic=MAGIC, version=version, header=header, sections=sections)
        with pytest.raises(errors.UnsupportedVersion, match=f"the major version must be 5, got {version[0]}.0"):
            PlanFile.read(tmp_path / "p")


def test_bases_are_in_the_middle_of_their_groups() -> None:
    assert base_segments(3) == (1, 2, 2)
    assert base_segments(10) == (1, 2, 3, 4, 4, 4, 5, 6, 9, 9)
    for count in range(1, 40):
        assert check_bases(base_segments(count))
    assert not check_bases([1, 2, 3, 4, 5, 5])
    assert not check_bases([1, 0])


@given(st.data())
def test_a_layer_is_what_was_stored(data: st.DataObject) -> None:
    grid, blocks, heads = data.draw(grids(max_width=12)), data.draw(all_blocks()), data.draw(st.integers(1, 3))
    kind = layer_schedules(st.just(grid), st.just(blocks), st.just(heads), tuple(PRECISIONS))
    schedule, other = data.draw(kind), data.draw(kind)
    for above in (None, other):
        found = finish(unpack(encode(schedule, above), above, grid, blocks, None))
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(found, name), getattr(schedule, name))


@given(st.integers(1, 21), st.integers(1, 3), st.integers(0, 2**32))
def test_a_walk_sees_every_layer_once_whatever_the_bases(segments: int, layers: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid, blocks = TokenGrid(2, 3, 13), Blocks(16, 16)
    edges = np.linspace(0, 1, segments + 1).tolist()
    parts = tuple(Segment(start, stop, stop) for start, stop in pairwise(edges))
    schedules = [
        [random_schedule(rng, grid, blocks, 2, 0.5, anchored_heads=(0,)) for _ in range(layers)] for _ in parts
    ]
    plan = PlanFile(ModelSignature("Tiny", layers, 2, 8), grid, blocks, parts, StoredLayers.of(schedules))
    plan.prove()
    found = {(segment, layer): schedule for segment, layer, schedule in plan.walk()}
    assert len(found) == segments * layers
    for (segment, layer), schedule in found.items():
        assert_same_schedule(schedule, schedules[segment][layer])
        assert_same_schedule(plan.schedules.schedule(segment, layer), schedules[segment][layer])


def assert_same_schedule(found: LayerSchedule, expected: LayerSchedule) -> None:
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_a_copy_of_a_plan_grants_no_more_memory() -> None:
    stored = PlanFile.read(GOLDEN).schedules
    assert pickle.loads(pickle.dumps(stored)).granted == stored.granted is not None


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    good = GOLDEN.read_bytes()
    path = tmp_path / "bad.plan"
    for position in range(0, len(good), 3):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        path.write_bytes(bad)
        with pytest.raises(errors.PlanError):
            PlanFile.read(path)


def test_a_layer_of_full_size(tmp_path: Path) -> None:
    """Every block place of Wan 14B at 720p, with lists of any length."""
    grid, blocks, heads = TokenGrid(21, 45, 80), Blocks(), 2
    rng = np.random.default_rng(0)
    keep = rng.random((heads * 591, 591)) < rng.random((heads * 591, 1))
    keep[:, 0] = True
    none = np.zeros(0, np.int32)
    schedule = LayerSchedule(
        grid=grid,
        blocks=blocks,
        list_bits=np.packbits(keep, axis=1, bitorder="little"),
        head_list=np.array([591, 0], np.int32),
        head_anchor=np.full(heads, -1, dtype=np.int32),
        anchor_ptr=np.zeros(1, np.int32),
        anchor_axis=none,
        group_start=none,
        group_anchor=none,
        tile_order=np.arange(heads * 591, dtype=np.int32),
        head_precision=np.zeros(heads, np.uint8),
    )
    schedule.check()
    rows, columns = np.nonzero(keep)
    np.testing.assert_array_equal(schedule.col_idx, columns)
    np.testing.assert_array_equal(np.diff(schedule.row_ptr), np.bincount(rows))
    plan = PlanFile(
        ModelSignature("Wan", 1, heads, 128), grid, blocks, (Segment(0.0, 1.0, 0.5),), StoredLayers.of([[schedule]])
    )
    write_plan(tmp_path / "large.plan", plan)
    assert_same(PlanFile.read(tmp_path / "large.plan"), plan)
