"""Codes, manifests, and the rules of a unit's and a sampling's arrays."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stats import manifest, measured, tables, unit

from calibatt.compiler.stats import (
    DuplicateSample,
    Manifest,
    ManifestError,
    SampleError,
    Unit,
    UnitError,
    combined,
    dequantise,
    fast_codes,
    quantise,
)
from calibatt.compiler.stats.unit import read_unit, write_unit

M = manifest()
V = manifest(thresholds=(0.8, 0.9))
FINE, COARSE = 2 ** (1 / 4096) - 1, 2 ** (1 / 16) - 1


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(1e-25, 1e30), st.floats(0, 1), st.booleans())
def test_quantisation_is_bounded(peak, share, fine):
    value = peak * share
    found = float(dequantise(quantise(value, peak, fine), peak))
    last, steps, bound = (65534, 2048, FINE) if fine else (254, 8, COARSE)
    if value >= peak * 2 ** (-last / steps):
        assert abs(found / value - 1) <= bound * 1.02 + 1e-6
    else:
        assert found <= peak * 2 ** (-last / steps) * (1 + bound)


def test_quantisation_of_the_ends():
    codes = quantise([0.0, 1.0, 0.5, 2.0**-31.75, 2.0**-33, 1.0005], 1.0)
    assert codes.tolist() == [255, 0, 8, 254, 255, 0]
    np.testing.assert_array_equal(dequantise(codes[:3], 1.0), np.array([0, 1, 0.5], np.float32))
    assert quantise([0.0, 1.0, 0.5, 2.0**-33], 1.0, fine=True).tolist() == [65535, 0, 2048, 65535]
    assert quantise(np.zeros((2, 2)), 0.0).tolist() == [[255, 255], [255, 255]]
    per_head = quantise(np.array([[1.0, 2.0], [4.0, 8.0]]), np.array([[2.0], [8.0]]))
    assert per_head.tolist() == [[8, 0], [8, 0]]
    with pytest.raises(UnitError, match="codes must be uint8 or uint16, got int64"):
        dequantise(np.zeros(3, np.int64), 1.0)


@pytest.mark.parametrize(("value", "peak"), [(2.0, 1.0), (-1.0, 1.0), (np.nan, 1.0), (1.0, np.inf), (0.0, -1.0)])
def test_quantisation_refuses(value, peak):
    with pytest.raises(UnitError, match=r"must be (in \[0, peak\]|finite)"):
        quantise(value, peak)


@given(st.integers(0, 2**32))
def test_codes_by_table_are_nearly_the_same(seed):
    values = (2.0 ** np.random.default_rng(seed).uniform(-40, 0, 1000)).astype(np.float32)
    values[:10] = 0
    difference = fast_codes(values, values.max()).astype(int) - quantise(values, values.max()).astype(int)
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.1
    assert (fast_codes(values[:10], np.float32(0)) == 255).all()


def test_manifest_round_trip_is_canonical():
    text = M.to_json()
    assert Manifest.from_json(text) == M
    assert Manifest.from_json(json.dumps(json.loads(text))).to_json() == text
    assert M.differences(Manifest.from_json(text)) == []
    other = manifest(row_radius=1, versions={"calibatt": "1", "torch": "2"})
    assert M.differences(other) == ["row_radius: 2, 1", "versions.calibatt: '0', '1'", "versions.torch: 'absent', '2'"]
    assert M.digest != other.digest


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("times", (0.5, 0.25)),
        ("times", ()),
        ("times", (0.5, 1.5)),
        ("times", (0, 1)),
        ("thresholds", (0.0, 0.5)),
        ("thresholds", (0.9, 0.9)),
        ("shares", (0.5, 1.0)),
        ("shares", (0.5, 0.2)),
        ("windows", ("frames",)),
        ("row_radius", 5),
        ("frame_radius", 2),
        ("versions", {"torch": 2}),
        ("schema_version", 5),
        ("grid", None),
    ],
)
def test_manifest_refuses(name, value):
    with pytest.raises(ManifestError, match=f"^{name} must be .*, got "):
        manifest(**{name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.pop("grid"), "must have the field 'grid'"),
        (lambda value: value.update(more=1), "must not have the field 'more'"),
        (lambda value: value.update(schema_version=5), "schema_version must be 4, got 5"),
        (lambda value: value.update(schema_version=3), r"must be 4 \(calibrate again: .*\), got 3"),
        (lambda value: value.update(schema_version=1, query_stride=4), r"must be 4 \(calibrate again: .*\), got 1"),
        (lambda value: value.update(times=3), "times must be a list, got 3"),
        (lambda value: value["grid"].update(width=0), "grid.width must be a positive integer, got 0"),
        (lambda value: value["windows"][0].update(kind="ball"), "window.kind must be"),
        (lambda value: value["windows"][0].update(kind=["box"]), "window.kind must be"),
    ],
)
def test_manifest_text_refused(change, message):
    value = json.loads(M.to_json())
    change(value)
    with pytest.raises(ManifestError, match=message):
        Manifest.from_json(json.dumps(value))


@given(st.lists(st.integers(0, 2**32), min_size=1, max_size=5, unique=True), st.integers(0, 5), st.booleans())
def test_a_mean_is_the_mean_however_it_is_made(seeds, cut, closed):
    """One after the other or in two parts, in any order: within what the codes round; votes are added exactly."""
    parts = [measured(V, seed) for seed in seeds]
    names = [f"s{seed}" for seed in seeds]

    def made(which):
        found = unit(V, names[which[0]], seeds[which[0]])
        for index in which[1:]:
            found = combined([found, unit(V, names[index], seeds[index])])
        return combined([found], closed=True) if closed else found

    every = list(range(len(parts)))
    halves = [half for half in (every[cut:], every[:cut]) if half]
    bound = 0.05 if closed else 0.001
    for found in (made(every), made(every[::-1]), combined([made(half) for half in halves], closed=closed)):
        found.check(V)
        assert sorted(found.samplings) == sorted(names)
        for name in ("effect", "error"):
            wanted = np.mean([part[name] for part in parts], 0)
            large = wanted > wanted.max() * 1e-6
            np.testing.assert_allclose(getattr(found, f"{name}_values")()[large], wanted[large], rtol=2 * bound)
        for name in ("row_effect", "frame_effect", "row_difference"):
            wanted = np.mean([part[name] for part in parts], 0)
            np.testing.assert_allclose(getattr(found, name), wanted, rtol=1e-5)
        np.testing.assert_array_equal(found.votes, np.sum([part["votes"] for part in parts], 0))
        assert found.vote_samples == 2 * len(parts)


def test_one_addition_rounds_by_half_a_step():
    effect, one = measured(M)["effect"], unit(M, "a")
    large = effect > effect.max() * 2.0**-30
    for found, bound in ((one, FINE), (combined([one], closed=True), COARSE + FINE)):
        assert np.abs(found.effect_values()[large] / effect[large] - 1).max() <= bound * 1.02
    with pytest.raises(DuplicateSample, match="got 'a' in several"):
        combined([one, one])


def changed(name, at, value):
    array = measured(V)[name].copy()
    array[at] = value
    return {name: array}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_effect": None}, "row_effect must be there as the manifest says"),
        (
            {"effect": np.ones((3, 5, 4), np.float32)},
            r"effect must be uint8 or uint16 \(3, 5, 5\), got uint16",
        ),
        ({"votes": np.zeros((1, 1), np.uint16)}, r"votes must be uint16 \(2, 3, 5, 5\), got uint16 \(1, 1\)"),
        (changed("effect", (0, 0, 0), -1), r"effect: values must be in \[0, peak\], got -1"),
        (changed("error", (0, 0, 0), np.inf), "error: peak must be finite and not negative, got .* to inf"),
        (changed("error", (0, 0, 0), np.nan), "error: peak must be finite and not negative, got nan"),
        (changed("row_effect", (0, 0, 0), 1), "row_effect must be NaN where there is no such row, got 1"),
        (changed("row_difference", (0, 0, 3), np.nan), "row_difference must be from 0 to 1e\\+18"),
        (changed("frame_effect", (0, 1, 1), 1), "frame_effect must be NaN where there is no such frame, got 1"),
        (changed("votes", (0, 0, 0, 0), 3), "votes must be at most vote_samples 2, got 3"),
        ({"vote_samples": 0}, "vote_samples must be a positive integer, got 0"),
        ({"frame_effect": None}, "frame_effect must be there"),
    ],
)
def test_what_was_measured_refused(change, message):
    unit(V, "a").check(V)
    with pytest.raises(UnitError, match=message):
        Unit.of("a", **{**measured(V), **change}).check(V)


def test_what_was_not_announced():
    with pytest.raises(UnitError, match="votes must be absent as the manifest says"):
        unit(V, "a").check(M)
    with pytest.raises(UnitError, match="frame_effect must be absent"):
        unit(M, "a").check(manifest(frame_radius=0))
    unit(manifest(row_radius=0, frame_radius=0), "a").check(manifest(row_radius=0, frame_radius=0))


def test_a_unit_refused(tmp_path):
    one = unit(V, "a")
    place = (0, 1)
    for changes, message in (
        ({"samplings": ()}, "samplings must be at least one, all different, got"),
        ({"error": one.error.astype(np.uint8)}, "error must be of effect's dtype uint16, got uint8"),
        ({"effect_peak": one.effect_peak * np.nan}, "effect_peak must be from 0 to"),
    ):
        with pytest.raises(UnitError, match=message):
            write_unit(tmp_path / "u", dataclasses.replace(one, **changes), V, place)
    write_unit(tmp_path / "u", one, V, place)
    found = read_unit(tmp_path / "u", V, place)
    for each in dataclasses.fields(Unit):
        np.testing.assert_array_equal(getattr(found, each.name), getattr(one, each.name))
    with pytest.raises(UnitError, match=r"the header must be .*'layer': 0.*, got .*'layer': 1"):
        read_unit(tmp_path / "u", V, (0, 0))
    with pytest.raises(UnitError, match="the header must be"):
        read_unit(tmp_path / "u", M, place)
    data = bytearray((tmp_path / "u").read_bytes())
    data[-1] ^= 16
    (tmp_path / "u").write_bytes(data)
    with pytest.raises(UnitError, match=r"section 'votes' must have CRC-32|be zero"):
        read_unit(tmp_path / "u", V, place)


def edited(name, at, value):
    array = getattr(tables(M), name).copy()
    array[at] = value
    return {name: array}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edited("level", 0, 0), "level must be from 1e-18 to 1e\\+18, got 0"),
        (edited("window_effect", (0, 0, 0, 0, 0), np.nan), "window_effect must be from -1e\\+09 to 1e\\+09"),
        (edited("ladder_effect", (0, 0, 0, 0, 0), np.nan), r"ladder_effect must be numbers, or NaN in all of a"),
        (edited("ladder_effect", (0, 0, 0), np.nan), r"ladder_effect must be numbers, or NaN in all of a"),
        (edited("ladder_effect", (0, 0, 0, 0, 0), np.inf), "ladder_effect must be from -1e\\+09 to 1e\\+09"),
        (edited("precision_effect", (0, 0, 0, 1, 2), np.nan), "precision_effect must be from -1e\\+09 to 1e\\+09"),
        (
            {"precision_effect": np.ones((2, 2, 2, 1, 3), np.float32)},
            r"precision_effect must be float32 \(2, 2, 2, 2",
        ),
        ({"level": np.ones(2, np.float32)}, r"level must be float64 \(2,\), got float32 \(2,\)"),
        ({"window_effect": np.ones((0, 2, 2, 2, 3), np.float32)}, "at least one vector, got none"),
    ],
)
def test_tables_refused(change, message):
    with pytest.raises(SampleError, match=message):
        dataclasses.replace(tables(M), **change).check(M)


def test_tables_know_whether_the_ladder_was_measured():
    assert tables(M).has_ladder
    assert not tables(M, ladder=False).has_ladder
    partly = dataclasses.replace(tables(M), **edited("ladder_effect", np.s_[:, 1, 0], np.nan))
    partly.check(M)
    assert not partly.has_ladder
    assert not tables(manifest(shares=())).has_ladder
