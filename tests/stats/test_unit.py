"""Quantisation, manifests and the rules of a unit's arrays."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stats import manifest, unit

from calibatt.compiler.stats import Manifest, ManifestError, UnitError, dequantise, quantise
from calibatt.compiler.stats.unit import MAGIC, read_unit, unit_shapes, write_unit
from calibatt.plans import write_container

M = manifest()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(1e-30, 1e30), st.floats(0, 1))
def test_quantisation_is_bounded(peak, share):
    value = peak * share
    found = float(dequantise(quantise(value, peak), peak))
    if value >= peak * 2 ** (-254 / 8):
        assert abs(found / value - 1) <= 2 ** (1 / 16) - 1 + 1e-5
    else:
        assert found <= value * 2 ** (1 / 16) + 1e-37


def test_quantisation_of_the_ends():
    codes = quantise([0.0, 1.0, 0.5, 2.0**-31.75, 2.0**-33, 1.0005], 1.0)
    assert codes.tolist() == [255, 0, 8, 254, 255, 0]
    np.testing.assert_array_equal(dequantise(codes[:3], 1.0), np.array([0, 1, 0.5], np.float32))
    assert quantise(np.zeros((2, 2)), 0.0).tolist() == [[255, 255], [255, 255]]
    per_head = quantise(np.array([[1.0, 2.0], [4.0, 8.0]]), np.array([[2.0], [8.0]]))
    assert per_head.tolist() == [[8, 0], [8, 0]]


@pytest.mark.parametrize(("value", "peak"), [(2.0, 1.0), (-1.0, 1.0), (np.nan, 1.0), (1.0, np.inf), (0.0, -1.0)])
def test_quantisation_refuses(value, peak):
    with pytest.raises(UnitError, match=r"must be (in \[0, peak\]|finite)"):
        quantise(value, peak)


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
        ("windows", ("frames",)),
        ("row_radius", 5),
        ("frame_radius", 2),
        ("query_stride", 17),
        ("has_mass", 1),
        ("versions", {"torch": 2}),
        ("schema_version", 2),
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
        (lambda value: value.update(schema_version=2), "schema_version must be 1, got 2"),
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


def test_a_store_of_before_frames_were_measured_is_read_as_it_was():
    """Its manifest, whose digest every unit carries, has no word of frames, and its units have no errors of them."""
    old = manifest(frame_radius=0)
    assert "frame_radius" not in old.to_json()
    assert "frame_radius" in M.to_json()
    assert Manifest.from_json(old.to_json()) == old
    assert unit(old).frame_residual_error is None
    unit(old).check(old)
    with pytest.raises(UnitError, match="frame_error must be absent as the manifest says"):
        unit(M).check(old)


def test_a_unit_keeps_its_rules():
    one = unit(M)
    one.check(M)
    assert one.keep(0, M).shape == (3, M.q_blocks, M.k_blocks)
    np.testing.assert_allclose(one.mass().sum(-1), 1, rtol=0.05)
    assert one.error().shape == (3, M.q_blocks, M.k_blocks)
    bare = manifest(has_mass=False, has_block_error=False, row_radius=0)
    unit(bare).check(bare)
    for name in ("mass", "error"):
        with pytest.raises(UnitError, match="must have been recorded"):
            getattr(unit(bare), name)()


def changed(name, at, value):
    array = getattr(unit(M), name).copy()
    array[at] = value
    return {name: array}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_mass": None}, "block_mass must be there"),
        ({"output_size": np.ones(3)}, r"output_size must be float32 \(3,\), got float64 \(3,\)"),
        ({"planes": np.zeros((1, 1), np.uint8)}, "planes must be uint8"),
        (changed("planes", ..., 255), "planes must have zero bits from key block 5 on"),
        (changed("planes", ..., 0), "planes must keep a block for every query block, got none for head 0, block 0"),
        (changed("planes", 3, 0), "planes must be nested"),
        (changed("menu_error", (0, 0), -1), "menu_error must be finite and not negative, got -1"),
        (changed("block_error_peak", 0, np.inf), "block_error_peak must be finite"),
        (changed("row_error", (0, 0, 0), 1), "row_error must be NaN where there is no such row, got 1"),
        (changed("row_residual_error", (0, 0, 3), np.nan), "row_residual_error must be finite"),
        (changed("frame_error", (0, 1, 1), 1), "frame_error must be NaN where there is no such frame, got 1"),
        (changed("frame_residual_error", (0, 0, 1), -1), "frame_residual_error must be finite and not negative"),
        ({"frame_error": None}, "frame_error must be there"),
    ],
)
def test_a_unit_refused(change, message):
    with pytest.raises(UnitError, match=message):
        dataclasses.replace(unit(M), **change).check(M)


def test_units_without_crc_are_still_read(tmp_path):
    place = {"sample": "a", "time_index": 0, "layer": 1}
    sections = {name: getattr(unit(M), name) for name in unit_shapes(M)}
    header = {**place, "manifest": M.digest}
    write_container(tmp_path / "old.unit", magic=MAGIC, version=(1, 0), header=header, sections=sections)
    write_unit(tmp_path / "new.unit", unit(M), M, place)
    for path in (tmp_path / "old.unit", tmp_path / "new.unit"):
        found = read_unit(path, M, place)
        for name, array in sections.items():
            np.testing.assert_array_equal(getattr(found, name), array)
        data = bytearray(path.read_bytes())
        data[-1] ^= 16
        path.write_bytes(data)
        with pytest.raises(UnitError, match="section 'row_residual_error' must have"):
            read_unit(path, M, place)


def test_a_unit_that_was_not_announced():
    with pytest.raises(UnitError, match="block_mass must be absent"):
        unit(M).check(manifest(has_mass=False))
