"""Stores: round trip, kills at every step, merging, helpers, every error."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.stats import add_sampling, manifest, measured, seed_of, tables, unit, write_store

from calibatt.compiler.stats import (
    DuplicateSample,
    ManifestError,
    ManifestMismatch,
    MissingUnits,
    NoSamples,
    SampleError,
    SampleExists,
    Store,
    StoreBusy,
    StoreError,
    StoreWriter,
    UnitError,
)
from calibatt.compiler.stats.sampling import MAGIC as SAMPLING_MAGIC
from calibatt.compiler.stats.sampling import VERSION as SAMPLING_VERSION
from calibatt.compiler.stats.sampling import read_sampling
from calibatt.plans.container import Container, write_container

M = manifest()
PLACES = [(time, layer) for time in range(2) for layer in range(2)]
TESTS = Path(__file__).parent.parent


def make(path: Path, *names: str) -> Path:
    return write_store(path, M, names)


def assert_whole(store: Store, *names: str, bound: float = 1e-3) -> None:
    assert store.samplings == names
    for place in PLACES:
        found = store.unit(*place)
        assert sorted(found.samplings) == list(names)
        parts = [measured(M, seed_of(0, name, *place)) for name in names]
        for name in ("effect", "error"):
            wanted = np.mean([part[name] for part in parts], 0)
            large = wanted > wanted.max() * 1e-6
            np.testing.assert_allclose(getattr(found, f"{name}_values")()[large], wanted[large], rtol=bound)
        np.testing.assert_allclose(found.row_effect, np.mean([part["row_effect"] for part in parts], 0), rtol=1e-5)
    table = store.table()
    for name, found in zip(names, table.samplings, strict=True):
        wanted = tables(M, seed_of(0, name))
        np.testing.assert_array_equal(found.window_effect, wanted.window_effect)
        np.testing.assert_array_equal(found.precision_effect, wanted.precision_effect)
        np.testing.assert_array_equal(found.level, wanted.level)


def contents(path: Path) -> dict[str, bytes]:
    """What a store holds, without its hidden files."""
    found = [each for each in path.rglob("*") if each.is_file() and each.name[0] != "."]
    return {str(each.relative_to(path)): each.read_bytes() for each in found}


def test_round_trip_and_continuation(tmp_path):
    make(tmp_path / "s", "b")
    with StoreWriter.open(tmp_path / "s", M) as writer:
        assert writer.done() == ("b",)
        with pytest.raises(SampleExists, match="'b' must be finished once"):
            writer.finish("b", tables(M), {})
        before = contents(tmp_path / "s")
        writer.add(0, 0, unit(M, "b", 99))
        assert contents(tmp_path / "s") == before
        add_sampling(writer, "a", steps=8)
        assert writer.unit_samplings(1, 1) == ("b", "a")
        assert writer.read_unit(1, 1).n == 2
    store = Store.open(tmp_path / "s")
    assert_whole(store, "a", "b")
    assert store.meta["a"]["prompt"] == "prompt of a"
    assert store.meta["a"]["steps"] == 8
    assert store.unfinished == ()
    parts = [tmp_path / "s" / part for part in ("units", "samplings")]
    assert store.size_bytes == sum(path.stat().st_size for part in parts for path in part.glob("[!.]*"))


def test_the_table_divides_by_the_level(tmp_path):
    table = Store.open(make(tmp_path / "s", "a", "b")).table()
    one, other = (each.level for each in table.samplings)
    assert one.shape == (2,)
    np.testing.assert_allclose(table.time_level, np.sqrt(one * other))
    for name, found in (("window_effect", table.window_error), ("precision_effect", table.precision_error)):
        wanted = [(getattr(each, name) ** 2).mean(0) / each.level[:, None, None, None] for each in table.samplings]
        np.testing.assert_allclose(found, np.mean(wanted, 0), rtol=1e-5)
    for each in table.samplings:
        assert each.window_effect.shape == (2, 2, 2, 2, 3)
        assert each.ladder_effect.shape == (2, 2, 2, 3, 3)


def test_the_same_order_gives_the_same_bytes_and_another_nearly_the_same_values(tmp_path):
    one, same, other = (make(tmp_path / name, *order) for name, order in zip("xyz", ("abc", "abc", "cab"), strict=True))
    assert contents(one) == contents(same)
    parts = [make(tmp_path / "p", "c"), make(tmp_path / "q", "a", "b")]
    for paths in (one, other, parts, parts[::-1]):
        assert_whole(Store.open(paths), "a", "b", "c")
    merged = [Store.open(paths).unit(1, 0) for paths in (parts, parts[::-1])]
    np.testing.assert_array_equal(merged[0].effect, merged[1].effect)
    assert merged[0].samplings == merged[1].samplings


def test_closing_halves_the_units_and_adding_opens_them_again(tmp_path):
    path, seen = make(tmp_path / "s", "a", "b"), []
    large = Store.open(path).unit(0, 0)
    with StoreWriter.open(path, M) as writer:
        assert writer.close_units(on_unit=lambda: seen.append(1)) == 4
        assert len(seen) == 4
        assert_whole(Store.open(path), "a", "b", bound=0.045)
        assert Store.open(path).unit(0, 0).effect.nbytes * 2 == large.effect.nbytes
        assert writer.close_units() == 0
        add_sampling(writer, "c")
        assert not writer.read_unit(0, 0).closed
        writer.close_units()
    assert_whole(Store.open(path), "a", "b", "c", bound=0.09)
    halves = [write_store(tmp_path / name, M, [name], closed=True) for name in "de"]
    assert_whole(Store.open(halves), "d", "e", bound=0.045)


class Killed(BaseException):
    """What no code of ours catches."""


def system_calls(monkeypatch, at: int) -> list[str]:
    """Dies at the `at`-th call that changes the disk."""
    calls: list[str] = []

    def wrap(module, name):
        original = getattr(module, name)

        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) - 1 == at:
                raise Killed(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in ("fsync", "replace", "rename", "mkdir"):
        wrap(os, name)
    return calls


def fill(path: Path) -> None:
    with StoreWriter.open(path, M) as writer:
        for name in ("a", "b"):
            if name not in writer.done():
                (writer.progress_folder(name) / "journal").write_text("1")
                add_sampling(writer, name)
            writer.drop_progress(name)
        writer.close_units()


def test_killed_at_every_step(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        calls = system_calls(patch, -1)
        fill(tmp_path / "all")
    total, whole = len(calls), contents(tmp_path / "all")
    assert total > 40
    for at in range(0, total, 3):
        path = tmp_path / str(at)
        with monkeypatch.context() as patch:
            system_calls(patch, at)
            with pytest.raises(Killed):
                fill(path)
        if any((path / "samplings").glob("*.sampling")):
            names = Store.open(path).samplings
            assert names in (("a",), ("a", "b"))
            assert all(set(names) <= set(Store.open(path).unit(*place).samplings) for place in PLACES)
        fill(path)
        assert Store.open(path).unfinished == ()
        assert contents(path).keys() == whole.keys()
        assert_whole(Store.open(path), "a", "b", bound=0.09)


CHILD = """
import sys
from support.stats import add_sampling, manifest
from calibatt.compiler.stats import StoreWriter
with StoreWriter.open(sys.argv[1], manifest()) as writer:
    print("open", flush=True)
    for index in range(10_000):
        writer.progress_folder(f"s{index}")
        if f"s{index}" not in writer.done():
            add_sampling(writer, f"s{index}")
        writer.drop_progress(f"s{index}")
"""


def child(path: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


@pytest.mark.slow
def test_killed_while_it_adds(tmp_path):
    """At fifteen random moments, or ``KILLS``; every time the store opens, and in the end it holds all it should."""
    rng = random.Random(0)
    for _ in range(int(os.environ.get("KILLS", 15))):
        with child(tmp_path / "s") as process:
            time.sleep(rng.uniform(0.001, 0.1))
            process.send_signal(signal.SIGKILL)
        with StoreWriter.open(tmp_path / "s", M) as writer:
            done = writer.done()
            for place in PLACES:
                assert set(done) <= set(writer.unit_samplings(*place))
                writer.read_unit(*place)
        assert not list((tmp_path / "s").glob("*/.*.tmp"))
        if done:
            assert Store.open(tmp_path / "s").samplings == done
    assert done
    with StoreWriter.open(tmp_path / "s", M) as writer:
        for name in {*Store.open(tmp_path / "s").unfinished} - set(done):
            add_sampling(writer, name)
            writer.drop_progress(name)
    found = Store.open(tmp_path / "s")
    order = sorted(found.samplings, key=lambda name: int(name[1:]))
    whole = Store.open(make(tmp_path / "whole", *order))
    np.testing.assert_array_equal(found.unit(1, 1).effect, whole.unit(1, 1).effect)
    assert found.unit(0, 1).samplings == tuple(order)


def test_one_writer_at_a_time(tmp_path):
    with child(tmp_path / "s") as process:
        with pytest.raises(StoreBusy, match="must have one writer"):
            StoreWriter.open(tmp_path / "s", M)
        process.send_signal(signal.SIGKILL)
    StoreWriter.open(tmp_path / "s", M).close()


HELPER = """
import sys
from support.stats import add_sampling, manifest
from calibatt.compiler.stats import StoreWriter
with StoreWriter.join(sys.argv[1], manifest()) as writer:
    for index in range(5):
        add_sampling(writer, f"{sys.argv[2]}{index}")
"""


def test_processes_of_a_job_add_to_the_same_units(tmp_path):
    path, env = tmp_path / "s", {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    with StoreWriter.open(path, M) as writer:
        helpers = [subprocess.Popen([sys.executable, "-c", HELPER, str(path), name], env=env) for name in "xy"]
        add_sampling(writer, "a")
        assert [helper.wait() for helper in helpers] == [0, 0]
        assert len(writer.done()) == 11
    assert_whole(Store.open(path), "a", *(f"{name}{index}" for name in "xy" for index in range(5)))


def test_helpers_write_while_another_has_it_open(tmp_path):
    path, other = tmp_path / "s", manifest(row_radius=1)
    with StoreWriter.open(path, M) as writer:
        with StoreWriter.join(path, M) as helper:
            add_sampling(helper, "a")
        with pytest.raises(StoreBusy, match="must be open for writing"):
            helper.add(0, 0, unit(M, "d"))
        with pytest.raises(ManifestMismatch, match=r"joined with its own .* got \(its, new\): row_radius: 2, 1"):
            StoreWriter.join(path, other)
        add_sampling(writer, "b")
    with pytest.raises(StoreBusy, match="must be open in another process of this job, got nobody"):
        StoreWriter.join(path, M)
    with pytest.raises(ManifestError, match="must be a store of statistics"):
        StoreWriter.join(tmp_path / "none", M)


def test_progress_is_the_callers(tmp_path):
    path = make(tmp_path / "s", "a")
    with StoreWriter.open(path, M) as writer:
        folder = writer.progress_folder("b")
        (folder / "journal").write_text("1")
        assert writer.progress_folder("b") == folder
        writer.progress_folder("a")  # finished, and killed before this was dropped
        writer.add(0, 0, unit(M, "b"))
        assert Store.open(path).unfinished == ("b",)
        assert Store.open(path).unit(0, 0).samplings == ("a", "b")
        writer.drop_progress("b")
        writer.drop_progress("b")
    assert Store.open(path).unfinished == ()


def test_writer_refuses(tmp_path):
    path = make(tmp_path / "s", "a")
    with pytest.raises(ManifestMismatch, match=r"got \(its, new\): row_radius: 2, 1"):
        StoreWriter.open(path, manifest(row_radius=1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file.txt").write_text("mine")
    with pytest.raises(ManifestError, match="must be a store of statistics"):
        StoreWriter.open(tmp_path / "other", M)
    with StoreWriter.open(path, M) as writer:
        for name in ("", "../x", "a b", "x.", ".x", "x" * 101):
            with pytest.raises(SampleError, match="a sampling's name must"):
                writer.add(0, 0, unit(M, name))
        with pytest.raises(UnitError, match="layer of a unit must be an integer from 0 to 1, got 2"):
            writer.add(0, 2, unit(M, "b"))
        with pytest.raises(UnitError, match=r"t001_l000.unit: frame_effect must be there"):
            writer.add(1, 0, dataclasses.replace(unit(M, "b"), frame_effect=None))
        writer.add(0, 0, unit(M, "b"))
        with pytest.raises(MissingUnits, match=r"got 3 without it: t000_l001.unit, t001_l000.unit, t001_l001.unit"):
            writer.finish("b", tables(M), {})
        for place in PLACES:
            writer.add(*place, unit(M, "b"))
        with pytest.raises(SampleError, match=r"b.sampling: .*object"):
            writer.finish("b", tables(M), {"x": object()})
        with pytest.raises(SampleError, match=r"b.sampling: level must be from 1e-18 to"):
            writer.finish("b", dataclasses.replace(tables(M), level=np.zeros(2)), {})
    for act in (lambda: writer.add(0, 0, unit(M, "c")), lambda: writer.finish("b", tables(M), {})):
        with pytest.raises(StoreBusy, match="must be open"):
            act()


def test_reader_refuses(tmp_path):
    empty = make(tmp_path / "empty")
    with pytest.raises(NoSamples, match="must have a finished sampling, got none"):
        Store.open(empty)
    with pytest.raises(NoSamples, match="at least one folder"):
        Store.open([])
    with pytest.raises(ManifestError, match=r"must be a store of statistics, got no manifest.json"):
        Store.open(tmp_path / "nothing")
    path = make(tmp_path / "s", "a", "b")
    make(tmp_path / "twice", "b")
    with pytest.raises(DuplicateSample, match=r"sampling 'b' must be in one store, got .*s and .*twice"):
        Store.open([path, tmp_path / "twice"])
    with StoreWriter.open(tmp_path / "part", M) as writer:
        add_sampling(writer, "c")
        writer.add(0, 0, unit(M, "a"))
    with pytest.raises(DuplicateSample, match=r"t000_l000.unit: a sampling must be in one store, got 'a'"):
        Store.open([path, tmp_path / "part"]).unit(0, 0)
    StoreWriter.open(tmp_path / "differs", manifest(times=(0.1, 0.2))).close()
    with pytest.raises(ManifestMismatch, match=r"times: \(0.25, 0.75\), \(0.1, 0.2\)"):
        Store.open([path, tmp_path / "differs"])
    store = Store.open(path)
    for place in ((2, 0), (0, -1)):
        with pytest.raises(UnitError, match="must be"):
            store.unit(*place)
    shutil.copy(path / "units/t000_l001.unit", path / "units/t000_l000.unit")
    with pytest.raises(UnitError, match=r"t000_l000.unit: the header must be .*'layer': 0.*got .*'layer': 1"):
        store.unit(0, 0)
    shutil.copy(tmp_path / "twice/units/t001_l000.unit", path / "units/t001_l000.unit")
    with pytest.raises(UnitError, match="must hold every finished sampling, got none of a"):
        store.unit(1, 0)
    data = bytearray((path / "units/t001_l001.unit").read_bytes())
    data[-70] ^= 1
    (path / "units/t001_l001.unit").write_bytes(data)
    with pytest.raises(UnitError, match=r"have CRC-32|be zero"):
        store.unit(1, 1)
    with StoreWriter.open(path, M) as writer, pytest.raises(UnitError, match=r"have CRC-32|be zero"):
        writer.add(1, 1, unit(M, "c"))


def grow(path):
    """A damaged manifest that asks for more unit files than memory holds the names of."""
    value = json.loads(path.read_text())
    value["model"]["layers"] = 2**62
    path.write_text(json.dumps(value))


def flip(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (lambda s: (s / "units/t000_l001.unit").unlink(), MissingUnits, "4 units, got none named t000_l001.unit"),
        (lambda s: (s / "units/more").write_text(""), StoreError, "must hold only units, got more"),
        (lambda s: (s / "samplings/a.sampling").write_text("x" * 99), SampleError, "begin with b'CALIBSMP'"),
        (lambda s: (s / "samplings/a.sampling").rename(s / "samplings/z.sampling"), SampleError, "name must be 'z'"),
        (lambda s: (s / "samplings/more").write_text(""), SampleError, r"hold only files \*.sampling, got 'more'"),
        (lambda s: (s / "notes.txt").write_text(""), StoreError, "only manifest.json, units, samplings, progress, got"),
        (lambda s: (s / "manifest.json").write_text("{"), ManifestError, "manifest.json: the manifest must be JSON"),
        (
            lambda s: grow(s / "manifest.json"),
            ManifestError,
            "model.layers must be at most 65536 in all times",
        ),
        (
            lambda s: os.truncate(s / "manifest.json", 1 << 33),
            ManifestError,
            "at most 1048576 bytes, got more",
        ),
        (lambda s: (s / "manifest.json").write_text("[" * 100_000), ManifestError, "must be JSON"),
        (lambda s: (s / "manifest.json").write_text('{"schema_version": 1}'), ManifestError, "calibrate again"),
    ],
)
def test_damaged_stores(tmp_path, act, kind, message):
    path = make(tmp_path / "s", "a")
    act(path)
    with pytest.raises(kind, match=message):
        Store.open(path)


def test_a_damaged_table_is_named(tmp_path):
    path = make(tmp_path / "s", "a")
    flip(path / "samplings/a.sampling")
    with pytest.raises(SampleError, match=r"a.sampling: section 'window_effect' must have CRC-32|be zero"):
        Store.open(path).table()


def test_a_section_that_a_later_version_has_added_is_proved_too(tmp_path):
    """Found by support.fuzz: only sections that are used were."""
    of = manifest()
    path = write_store(tmp_path / "store", of) / "samplings" / "s0.sampling"
    file = Container.open(path, magic=SAMPLING_MAGIC, version=SAMPLING_VERSION, crc=True)
    sections = {name: np.array(file.section(name)) for name in file.names} | {"zz": np.arange(3, dtype=np.int32)}
    major, minor = SAMPLING_VERSION
    more = {"magic": SAMPLING_MAGIC, "version": (major, minor + 1), "header": file.header, "sections": sections}
    write_container(path, **more, crc=True)
    assert Store.open(tmp_path / "store").samplings
    read_sampling(path, "s0", of)
    data = bytearray(path.read_bytes())
    at = data.rindex(np.arange(3, dtype="<i4").tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(SampleError, match="section 'zz' must have CRC-32"):
        read_sampling(path, "s0", of)
