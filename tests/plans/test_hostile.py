"""Plans with right digests that would have cost a reader its memory, its time, or a kernel its bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from support import hostile, mutations
from support.plans import frames_plan

from calibatt.plans import Container, LayerSchedule, PlanFile, errors, write_plan
from calibatt.plans import schedule as schedules
from calibatt.plans.encoding import FILE_TIMES, LAYER_BYTES, LIMIT_VARIABLE, MAX_BASES, layer_bytes
from calibatt.plans.header import MAX_VALUES, pack_header, unpack_header
from calibatt.plans.plan import MAGIC, VERSION

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the limit counts as Linux does")


def read_within(megabytes: int, paths: list[Path], **environment: str) -> list[str]:
    command = [sys.executable, hostile.__file__, str(megabytes), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@linux_only
def test_hostile_plans_end_in_their_error_within_200_mb(tmp_path: Path) -> None:
    cases = hostile.plans()
    paths = [tmp_path / f"{number}.plan" for number in range(len(cases))]
    for path, (write, _, _) in zip(paths, cases.values(), strict=True):
        write(path)
    for line, name, path in zip(read_within(200, paths), cases, paths, strict=True):
        _, kind, words = cases[name]
        assert line.startswith(f"{kind}: {path}: "), (name, line[:200])
        assert words in line, name


@linux_only
def test_what_is_accepted_takes_what_is_stated(tmp_path: Path) -> None:
    """A small file that needs nearly all that it may, lists of ones alone."""
    lists, width = 15000, 4096
    need = layer_bytes(lists, 8 * width, 1 << 14)
    assert 0.9 * LAYER_BYTES < need < LAYER_BYTES
    bits = hostile.frame(b"\xff", lists * width)
    hostile.written(hostile.changed(1 << 22, 1, 1, (256, 128), lists, bits))(path := tmp_path / "a.plan")
    assert path.stat().st_size * FILE_TIMES < LAYER_BYTES
    assert read_within((MAX_BASES + 4) * need // 1_000_000, [path]) == ["accepted"]
    (refused,) = read_within(200, [path], **{LIMIT_VARIABLE: str(need - 300_000)})
    assert refused.startswith(f"LimitError: {path}: segment 0, layer 0: the layer must need at most {need - 300_000}")
    (short,) = read_within(20, [path])
    assert short == f"LimitError: {path}: segment 0, layer 0: must fit in memory, got too little"


@pytest.mark.parametrize("said", ["", "0", "-1", "1e9", "many"])
def test_the_limit_is_a_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str) -> None:
    hostile.written(hostile.dense_parts())(tmp_path / "a.plan")
    monkeypatch.setenv(LIMIT_VARIABLE, said)
    with pytest.raises(
        errors.LimitError, match=f"{LIMIT_VARIABLE} must be a whole number of bytes above 0, got '{said}'"
    ):
        PlanFile.read(tmp_path / "a.plan")


@pytest.mark.parametrize("tail", [b"\0", hostile.frame(b"", 0), b"\x50\x2a\x4d\x18\0\0\0\0"])
def test_nothing_follows_a_frame(tmp_path: Path, tail: bytes) -> None:
    """Not after one of nothing either, which the library decodes without looking at it."""
    for lists, bits in ((0, hostile.frame(b"", 0)), (1, hostile.frame(b"\1", 1))):
        hostile.written(hostile.changed(lists=lists, bits=bits))(path := tmp_path / "a.plan")
        PlanFile.read(path).prove()
        hostile.written(hostile.changed(lists=lists, bits=bits + tail))(path)
        with pytest.raises(errors.MaskError, match="masks must be one zstd frame, got"):
            PlanFile.read(path).prove()


def test_a_skipped_frame_is_no_frame(tmp_path: Path) -> None:
    hostile.written(hostile.changed(bits=b"\x50\x2a\x4d\x18\0\0\0\0"))(path := tmp_path / "a.plan")
    with pytest.raises(errors.MaskError):
        PlanFile.read(path).prove()


def test_lists_end_before_int32_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "MAX_KEPT", 7)
    hostile.written(hostile.changed(128, lists=8, bits=hostile.frame(b"\1", 8)))(path := tmp_path / "a.plan")
    with pytest.raises(errors.ScheduleError, match="lists must hold at most 7 key blocks, got 8"):
        PlanFile.read(path).prove()
    monkeypatch.setattr(schedules, "MAX_KEPT", 8)
    plan = PlanFile.read(path)
    plan.prove()
    monkeypatch.setattr(schedules, "MAX_KEPT", 7)
    with pytest.raises(errors.ScheduleError, match="lists must hold at most 7 key blocks, got 8"):
        plan.schedules[0][0].check()


def test_a_header_holds_so_many_values_and_no_more() -> None:
    """As many as allowed are read; one more is refused by who writes, and by who reads before it is made."""
    rows = [[0.5] * 1023] * (MAX_VALUES // 1024 - 1)
    spare = MAX_VALUES - 1024 * len(rows) - 2  # the map and its list count too
    right = {"a": [*rows, *[None] * spare]}
    assert unpack_header(pack_header(right)) == right
    right["a"].append(None)
    for refuse in (lambda: pack_header(right), lambda: unpack_header(msgpack.packb(right))):
        with pytest.raises(errors.HeaderError, match=f"must have at most {MAX_VALUES} values"):
            refuse()


@pytest.mark.parametrize("text", ["\x1b[2J\x1b]0;owned\x07", "a\rb", "\u202eevil", "\x9b2J"])
def test_messages_do_nothing_to_a_terminal(tmp_path: Path, text: str) -> None:
    header, sections = hostile.dense_parts()
    header[text + "k" * 200] = 1
    hostile.written((header, sections))(path := tmp_path / "a.plan")
    with pytest.raises(errors.SchemaError) as caught:
        PlanFile.read(path)
    assert str(caught.value).isprintable()


def test_messages_are_short() -> None:
    message = str(errors.PlanError("begin" + "x" * 7_400_000 + "end"))
    assert len(message) < 1100
    assert message.startswith("begin")
    assert message.endswith("end")


def require_safe(schedule: LayerSchedule) -> None:
    """What a kernel takes for granted, said anew: every index inside, every query computed once and copied once."""
    tokens, blocks = schedule.grid.tokens, schedule.k_blocks
    tiles = [schedule.tiles(head) for head in range(schedule.heads)]
    assert sorted(schedule.tile_order.tolist()) == list(range(sum(tiles)))
    assert len(schedule.anchor_ptr) - 1 <= schedule.heads
    for head in range(schedule.heads):
        source, keep = schedule.dense(head)
        assert source.shape == (tokens,)
        assert ((source >= 0) & (source < tokens)).all()
        assert (source[source] == source).all()
        assert keep.shape == (tokens, blocks)
        assert keep.any(1).all()
        for tile in range(tiles[head]):
            columns = schedule.columns(head, tile).tolist()
            assert columns == sorted(set(columns))
            assert 0 <= columns[0] <= columns[-1] < blocks


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[hostile.Header, hostile.Sections]:
    write_plan(path := tmp_path_factory.mktemp("plan") / "a.plan", frames_plan())
    container = Container.open(path, magic=MAGIC, version=VERSION)
    return container.header, {name: container.section(name).copy() for name in container.names}


@given(st.data())
def test_any_plan_ends_in_its_error_or_is_safe(
    tmp_path_factory: pytest.TempPathFactory, parts: tuple[hostile.Header, hostile.Sections], data: st.DataObject
) -> None:
    """Headers, arrays, tables and lists changed, with digests made right again."""
    header, sections = parts[0], dict(parts[1])
    if data.draw(st.booleans()):
        header = data.draw(mutations.documents(header))
    for _ in range(data.draw(st.integers(0, 2))):
        name = data.draw(st.sampled_from(sorted(sections)))
        sections[name] = data.draw(mutations.arrays(sections[name]))
    if data.draw(st.booleans()):  # the lists of the first layer, its frame as long as before
        table = sections["0/layers"]
        frame = parts[1]["0/masks"][: parts[1]["0/layers"][1, 0]]
        bits = np.frombuffer(zstandard.decompress(frame.tobytes()), np.uint8)
        changed = zstandard.compress(data.draw(mutations.arrays(bits)).tobytes(), 6)
        sections["0/masks"] = np.append(np.frombuffer(changed, np.uint8), parts[1]["0/masks"][len(frame) :])
        if table.shape == parts[1]["0/layers"].shape and table.dtype == np.int64:
            sections["0/layers"] = table = table.copy()
            table[1:, 0] += len(changed) - len(frame)
    path = tmp_path_factory.getbasetemp() / "any.plan"
    try:
        path.write_bytes(hostile.rebuilt(header, sections))
    except OverflowError:  # no file can say so
        return
    try:
        plan = PlanFile.read(path)
        plan.prove()
        schedules, told = [schedule for layers in plan.schedules for schedule in layers], f"{path}: "
    except errors.PlanError as error:
        schedules, told = [], str(error)
    assert told.startswith(f"{path}: ")
    for schedule in schedules:
        require_safe(schedule)
