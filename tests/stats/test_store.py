"""Stores: round trip, interruption at every step, merging, every error."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.stats import manifest, unit

from calibatt.compiler.stats import (
    DuplicateSample,
    ManifestError,
    ManifestMismatch,
    MissingUnits,
    NoSamples,
    Probe,
    ProbeError,
    SampleError,
    SampleExists,
    Store,
    StoreBusy,
    StoreError,
    StoreWriter,
    UnitError,
)
from calibatt.compiler.stats.probes import error_weights, time_weight

M = manifest()
UNITS = [(time, layer) for time in range(2) for layer in range(2)]


def seed_of(name: str, time: int, layer: int) -> int:
    return sum(name.encode()) * 100 + time * 10 + layer


def fill(writer: StoreWriter, name: str) -> None:
    sample = writer.begin(name)
    for time, layer in UNITS:
        sample.write(time, layer, unit(M, seed_of(name, time, layer)))
    sample.finish({"prompt": name})


def make(path: Path, *names: str) -> Path:
    with StoreWriter.open(path, M) as writer:
        for name in names:
            fill(writer, name)
    return path


def assert_whole(store: Store, *names: str) -> None:
    assert store.samples == names
    for name in names:
        for time, layer in UNITS:
            found, wanted = store.unit(name, time, layer), unit(M, seed_of(name, time, layer))
            for field in dataclasses.fields(wanted):
                np.testing.assert_array_equal(getattr(found, field.name), getattr(wanted, field.name))


def probe(name: str = "a", time_index: int = 0, weight: float = 2.0) -> Probe:
    return Probe(name, time_index, weight, 0.5, weight * 0.5, 1.0)


def test_round_trip_and_continuation(tmp_path):
    make(tmp_path / "s", "b")
    with StoreWriter.open(tmp_path / "s", M) as writer:
        assert writer.done() == ("b",)
        with pytest.raises(SampleExists, match="samples/b must be recorded once"):
            writer.begin("b")
        fill(writer, "a")
    store = Store.open(tmp_path / "s")
    assert_whole(store, "a", "b")
    assert store.meta["a"] == {"prompt": "a"}
    assert store.interrupted == ()
    assert store.size_bytes == sum(path.stat().st_size for path in (tmp_path / "s/samples").rglob("*.*"))


def test_merge_by_copying_and_by_several_paths(tmp_path):
    one, two = make(tmp_path / "one", "a"), make(tmp_path / "two", "b", "c")
    assert_whole(Store.open([one, two]), "a", "b", "c")
    shutil.copytree(two / "samples", one / "samples", dirs_exist_ok=True)
    assert_whole(Store.open(one), "a", "b", "c")
    with pytest.raises(
        DuplicateSample, match=r"sample 'b' must be in one store, got .*one/samples/b and .*two/samples/b"
    ):
        Store.open([one, two])


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


def test_killed_at_every_step(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        calls = system_calls(patch, -1)
        with StoreWriter.open(make(tmp_path / "all", "a"), M) as writer:
            fill(writer, "b")
    total = len(calls)
    assert total > 20
    for at in range(total):
        path = tmp_path / str(at)
        with monkeypatch.context() as patch:
            calls = system_calls(patch, at)
            with pytest.raises(Killed):
                with StoreWriter.open(make(path, "a"), M) as writer:
                    fill(writer, "b")
        with StoreWriter.open(path, M) as writer:
            left = [name for name in ("a", "b") if name not in writer.done()]
            if writer.done():
                assert_whole(Store.open(path), *writer.done())
            for name in left:
                fill(writer, name)
        store = Store.open(path)
        assert_whole(store, "a", "b")
        assert store.interrupted == ()


CHILD = """
import sys
sys.path.insert(0, {tests!r})
from support.stats import manifest, unit
from calibatt.compiler.stats import StoreWriter
M = manifest()
writer = StoreWriter.open({path!r}, M)
sample = writer.begin("b")
sample.write(0, 0, unit(M))
print("ready", flush=True)
sys.stdin.read()
"""


def test_sigkill_loses_the_sample_in_progress_and_no_other(tmp_path):
    path = make(tmp_path / "s", "a")
    code = CHILD.format(tests=str(Path(__file__).parents[1]), path=str(path))
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"ready\n"
        with pytest.raises(StoreBusy, match="must have one writer"):
            StoreWriter.open(path, M)
        child.send_signal(signal.SIGKILL)
    store = Store.open(path)
    assert_whole(store, "a")
    assert store.interrupted == (path / "samples/b.partial",)
    with StoreWriter.open(path, M) as writer:
        assert writer.interrupted() == ("b",)
        fill(writer, "b")
    assert_whole(Store.open(path), "a", "b")


def test_helpers_write_while_another_has_it_open(tmp_path):
    path = tmp_path / "s"
    with StoreWriter.open(path, M) as writer:
        with StoreWriter.join(path, M) as helper, StoreWriter.join(path, M) as another:
            fill(helper, "a")
            fill(writer, "b")
            fill(another, "c")
        assert writer.done() == ("a", "b", "c")
        with pytest.raises(StoreBusy, match="must be open for writing"):
            helper.begin("d")
        with pytest.raises(ManifestMismatch, match=r"joined with its own .* got \(its, new\): has_mass: True, False"):
            StoreWriter.join(path, manifest(has_mass=False))
        with pytest.raises(StoreBusy, match="must have one writer"):
            StoreWriter.open(path, M)
    assert_whole(Store.open(path), "a", "b", "c")
    with pytest.raises(StoreBusy, match="must be open in another process of this job, got nobody"):
        StoreWriter.join(path, M)
    with pytest.raises(ManifestError, match="must be a store of statistics"):
        StoreWriter.join(tmp_path / "none", M)
    StoreWriter.open(path, M).close()


def test_writer_refuses(tmp_path):
    path = make(tmp_path / "s", "a")
    with pytest.raises(ManifestMismatch, match=r"got \(its, new\): has_mass: True, False; row_radius: 2, 1"):
        StoreWriter.open(path, manifest(row_radius=1, has_mass=False))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file.txt").write_text("mine")
    with pytest.raises(ManifestError, match="must be a store of statistics"):
        StoreWriter.open(tmp_path / "other", M)
    with StoreWriter.open(path, M) as writer:
        for name in ("", "../x", "a b", "x.partial", ".x", "x" * 101):
            with pytest.raises(SampleError, match="a sample's name must"):
                writer.begin(name)
        sample = writer.begin("b")
        sample.write(0, 0, unit(M))
        with pytest.raises(UnitError, match="must be written once"):
            sample.write(0, 0, unit(M))
        with pytest.raises(UnitError, match="layer of a unit of 'b' must be an integer from 0 to 1, got 2"):
            sample.write(0, 2, unit(M))
        with pytest.raises(UnitError, match=r"t001_l000.unit: block_mass must be there"):
            sample.write(1, 0, dataclasses.replace(unit(M), block_mass=None))
        with pytest.raises(MissingUnits, match=r"got none for t000_l001.unit, t001_l000.unit, t001_l001.unit"):
            sample.finish({})
        for time, layer in UNITS[1:]:
            sample.write(time, layer, unit(M))
        with pytest.raises(SampleError, match="meta must be JSON"):
            sample.finish({"x": object()})
    for act in (lambda: writer.begin("c"), lambda: sample.finish({}), lambda: writer.write_probe(probe())):
        with pytest.raises(StoreBusy, match="must be open"):
            act()


def test_reader_refuses(tmp_path):
    empty = make(tmp_path / "empty")
    with pytest.raises(NoSamples, match="must have a complete sample, got none"):
        Store.open(empty)
    with pytest.raises(NoSamples, match="at least one folder"):
        Store.open([])
    with pytest.raises(ManifestError, match=r"must be a store of statistics, got no manifest.json"):
        Store.open(tmp_path / "nothing")
    path = make(tmp_path / "s", "a", "b")
    with StoreWriter.open(tmp_path / "differs", manifest(times=(0.1, 0.2))):
        pass
    with pytest.raises(ManifestMismatch, match=r"times: \(0.25, 0.75\), \(0.1, 0.2\)"):
        Store.open([path, tmp_path / "differs"])
    store = Store.open(path)
    for place in (("c", 0, 0), ("a", 2, 0), ("a", 0, -1)):
        with pytest.raises(UnitError, match="must be"):
            store.unit(*place)
    shutil.copy(path / "samples/b/t000_l000.unit", path / "samples/a/t000_l000.unit")
    with pytest.raises(UnitError, match=r"a/t000_l000.unit: the header must be .*'sample': 'a'.*got .*'sample': 'b'"):
        store.unit("a", 0, 0)
    data = bytearray((path / "samples/a/t001_l001.unit").read_bytes())
    data[-70] ^= 1
    (path / "samples/a/t001_l001.unit").write_bytes(data)
    with pytest.raises(UnitError, match=r"have CRC-32|be zero"):
        store.unit("a", 1, 1)


def grow(path):
    """A damaged manifest that asks for more unit files than memory holds the names of."""
    value = json.loads(path.read_text())
    value["model"]["layers"] = 2**62
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (lambda s: (s / "samples/a/t000_l001.unit").unlink(), MissingUnits, "got none named t000_l001.unit"),
        (lambda s: (s / "samples/a/sample.json").unlink(), MissingUnits, "got none named sample.json"),
        (
            lambda s: (s / "samples/a/more").write_text(""),
            SampleError,
            "must hold only its units and sample.json, got more",
        ),
        (lambda s: (s / "samples/a/sample.json").write_text("{"), SampleError, "must be JSON"),
        (lambda s: (s / "samples/a/sample.json").write_text("{}"), SampleError, "must have the fields name, manifest"),
        (lambda s: (s / "samples/a").rename(s / "samples/z"), SampleError, "name must be 'z', got 'a'"),
        (lambda s: (s / "samples/z").write_text(""), SampleError, "must be a folder"),
        (
            lambda s: (s / "notes.txt").write_text(""),
            StoreError,
            "must hold only manifest.json, samples, probes and refinement",
        ),
        (lambda s: (s / "manifest.json").write_text("{"), ManifestError, "manifest.json: the manifest must be JSON"),
        (lambda s: (s / "probes/a_t0.json").write_text("["), ProbeError, "a probe must be JSON"),
        (lambda s: (s / "probes/a_t0.json").write_text("{}"), ProbeError, "a probe must have the fields"),
        (lambda s: (s / "probes/a_t1.json").write_text(probe().to_json()), ProbeError, "must be named 'a_t0.json'"),
        (
            lambda s: (s / "probes/c_t0.json").write_text(probe("c").to_json()),
            ProbeError,
            "of a complete sample, got 'c'",
        ),
        (lambda s: (s / "probes/a_t7.json").write_text(probe("a", 7).to_json()), ProbeError, "must be below 2, got 7"),
        (lambda s: grow(s / "manifest.json"), SampleError, "manifest must be '.*', got '"),
        (lambda s: (s / "manifest.json").write_text("[" * 100_000), ManifestError, "must be JSON"),
    ],
)
def test_damaged_stores(tmp_path, act, kind, message):
    path = make(tmp_path / "s", "a")
    act(path)
    with pytest.raises(kind, match=message):
        Store.open(path)


def test_time_weight(tmp_path):
    five = manifest(times=(0.0, 0.25, 0.5, 0.75, 1.0))
    with StoreWriter.open(tmp_path / "s", five) as writer:
        for name in ("a", "b"):
            sample = writer.begin(name)
            for time in range(5):
                for layer in range(2):
                    sample.write(time, layer, unit(five))
            sample.finish({})
        weight, info = Store.open(tmp_path / "s").time_weight()
        assert weight.tolist() == [1.0] * 5
        assert info.probes == 0
        assert "never probed" in str(info)
        for each in (probe("a", 1, 1.0), probe("b", 1, 3.0), probe("a", 3, 32.0)):
            writer.write_probe(each)
        assert writer.probed() == {("a", 1), ("b", 1), ("a", 3)}
        with pytest.raises(DuplicateSample, match=r"a_t1.json must be written once"):
            writer.write_probe(probe("a", 1))
        with pytest.raises(ProbeError, match="complete sample, got 'c'"):
            writer.write_probe(probe("c"))
        with pytest.raises(ProbeError, match="must be below 5"):
            writer.write_probe(probe("a", 5))
    weight, info = Store.open(tmp_path / "s").time_weight()
    # b costs 3 times what a does at the one time that both were probed: so it would have at the other, 96 for 32
    np.testing.assert_allclose(weight, [2, 2, 128**0.5, 64, 64], rtol=1e-6)
    assert (info.probes, info.samples, info.time_indices, info.seconds) == (3, ("a", "b"), (1, 3), 3.0)
    assert "rough" in str(info)


def test_no_sample_decides_the_time_weight_alone():
    wanted = np.array([4.0, 1.0, 16.0])
    suffers = {"a": 1.0, "b": 1e4, "c": 1e-2}
    probes = [probe(name, at, float(wanted[at] * by)) for name, by in suffers.items() for at in range(3)]
    weight, _ = time_weight((0.0, 0.5, 1.0), probes)
    np.testing.assert_allclose(weight / weight[0], wanted / wanted[0])
    np.testing.assert_allclose(weight.mean(), np.mean([each.weight for each in probes]))
    # one probe gone astray 1000-fold, of the sample that suffers most, would move the mean of its time as much
    astray = [probe("b", 1, 1e7) if (each.sample, each.time_index) == ("b", 1) else each for each in probes]
    moved, _ = time_weight((0.0, 0.5, 1.0), astray)
    assert 1 < moved[1] / moved[0] / (wanted[1] / wanted[0]) < 30


def test_a_sample_begun_again_leaves_its_first_writer_behind(tmp_path):
    with StoreWriter.open(tmp_path / "s", M) as writer:
        first, second = writer.begin("a"), writer.begin("a")
        with pytest.raises(SampleError, match="by who began it last, got an earlier writer"):
            first.write(0, 0, unit(M))
        for time in range(len(M.times)):
            for layer in range(M.model.layers):
                second.write(time, layer, unit(M))
        with pytest.raises(SampleError, match="by who began it last"):
            first.finish({})
        second.finish({})
    assert Store.open(tmp_path / "s").samples == ("a",)


def test_layer_factor(tmp_path):
    three = manifest(times=(0.0, 0.5, 1.0))
    with StoreWriter.open(tmp_path / "s", three) as writer:
        for name in ("a", "b"):
            sample = writer.begin(name)
            for time in range(3):
                for layer in range(2):
                    sample.write(time, layer, unit(three))
            sample.finish({})
        writer.write_probe(probe("a", 1))
        np.testing.assert_array_equal(Store.open(tmp_path / "s").layer_factor(), np.ones((3, 2)))
        writer.write_probe(dataclasses.replace(probe("a", 0), layer_factors=(0.5, 8.0)))
        writer.write_probe(dataclasses.replace(probe("b", 0), layer_factors=(2.0, 2.0)))
        writer.write_probe(dataclasses.replace(probe("a", 2), layer_factors=(4.0, 1.0)))
        with pytest.raises(ProbeError, match="must be none or 2, one a layer, got 3"):
            writer.write_probe(dataclasses.replace(probe("b", 2), layer_factors=(1.0, 1.0, 1.0)))
    factor = Store.open(tmp_path / "s").layer_factor()
    np.testing.assert_allclose(factor, [[1, 4], [2, 2], [4, 1]])


def test_probes_of_before_are_still_read():
    early = probe("a", 1, 2.0)
    assert not {"head_factors", "layer_weights", "head_weights"} & set(json.loads(early.to_json()))
    full = dataclasses.replace(early, layer_weights=(1.0, 0.0), head_weights=((1.0, 2.0), (0.0, 4.0)))
    for each in (early, full):
        assert Probe.from_json(each.to_json(), "x") == each
    with pytest.raises(ProbeError, match="must have the fields"):
        Probe.from_json(json.dumps({**json.loads(early.to_json()), "other": 1}), "x")
    for changes, message in (
        ({"layer_weights": (1.0,)}, "layer_weights must be none or 2, one a layer, got 1"),
        ({"head_factors": ((1.0,), (1.0,))}, "head_factors must have 3 heads for each layer, got 1"),
    ):
        with pytest.raises(ProbeError, match=message):
            dataclasses.replace(early, **changes).check_shape(2, 3)


def test_weights_are_of_the_finest_that_was_probed():
    times, rng = (0.0, 0.5, 1.0), np.random.default_rng(0)
    head = rng.uniform(0.5, 5, (3, 2, 4)) * np.array([1.0, 10.0, 100.0])[:, None, None]
    suffers = {"a": 1.0, "b": 30.0}

    def tuples(values):
        return tuple(map(tuples, values)) if values.ndim else float(values)

    plain = [probe(name, at, float(head[at].mean() * by)) for name, by in suffers.items() for at in range(3)]
    # nothing by part: the time weight alone
    found = error_weights(times, 2, 4, plain)
    np.testing.assert_allclose(found.unit, np.repeat(time_weight(times, plain)[0][:, None], 2, 1))
    assert found.head is None
    assert found.told == str(time_weight(times, plain)[1])
    # by head to the end: their means, each sample relative to its own level
    by_head = [dataclasses.replace(p, head_weights=tuples(head[p.time_index] * suffers[p.sample])) for p in plain]
    found = error_weights(times, 2, 4, by_head)
    np.testing.assert_allclose(found.head / found.head.mean(), head / head.mean())
    np.testing.assert_allclose(found.unit, found.head.mean(2))
    # a head that said nothing is like the rest of its layer; one that was not probed at a time lies between the others
    some = [p for p in by_head if p.time_index != 1]
    some = [dataclasses.replace(p, head_weights=(p.head_weights[0], (0.0, *p.head_weights[1][1:]))) for p in some]
    found = error_weights(times, 2, 4, some).head
    np.testing.assert_allclose(found[:, 1, 0], np.exp(np.interp(times, [0, 1], np.log(found[[0, 2], 1, 1:].mean(1)))))
    np.testing.assert_allclose(found[1], np.sqrt(found[0] * found[2]))
    # by layer to the end, and heads by the next latent within them
    layers = head.mean(2)
    both = [
        dataclasses.replace(
            p,
            layer_weights=tuples(layers[p.time_index] * suffers[p.sample]),
            head_factors=tuples(head[p.time_index] / head[p.time_index].mean()),
        )
        for p in plain
    ]
    found = error_weights(times, 2, 4, both)
    np.testing.assert_allclose(found.unit / found.unit.mean(), layers / layers.mean())
    np.testing.assert_allclose(found.head / found.head.mean(), head / head.mean())
    # heads by the next latent alone spread the time weight
    step = [dataclasses.replace(p, layer_weights=()) for p in both]
    found = error_weights(times, 2, 4, step)
    time = time_weight(times, plain)[0][:, None, None]
    np.testing.assert_allclose(found.head, time * head / head.mean((1, 2), keepdims=True))


@pytest.mark.parametrize(
    "change",
    [
        {"layer_factors": [1.0]},
        {"layer_factors": (0.0, 1.0)},
        {"layer_weights": (-1.0, 1.0)},
        {"layer_weights": [1.0]},
        {"head_factors": ((1.0, 2.0), (1.0,))},
        {"head_weights": (1.0, 2.0)},
        {"head_weights": ((1.0, float("inf")),)},
        {"weight": 0.0},
        {"weight": 9.0},
        {"final_error": float("nan")},
        {"seconds": -1.0},
        {"time_index": True},
    ],
)
def test_wrong_probes(change):
    with pytest.raises(ProbeError, match=f"probe.{next(iter(change))}"):
        dataclasses.replace(probe(), **change)
