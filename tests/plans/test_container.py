"""The container keeps what it is given, byte for byte."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibatt.plans import errors
from calibatt.plans.container import DTYPES, Container, write_container

MAGIC = b"CALIBTST"
VERSION = (1, 0)


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


SAMPLE: dict[str, np.ndarray] = {
    "b/ids": np.arange(5, dtype=np.uint16),
    "a": np.array([[1.5, -2.0]], dtype=np.float32),
    "empty": np.zeros((0, 3), np.int64),
}


def write(path: Path, sections: dict[str, Any], header: dict[str, Any] | None = None) -> bytes:
    size = write_container(path, magic=MAGIC, version=VERSION, header=header or {}, sections=sections)
    data = path.read_bytes()
    assert size == len(data)
    return data


def read(folder: Path, data: bytes) -> None:
    path = folder / "read"
    path.write_bytes(data)
    Container.open(path, magic=MAGIC, version=VERSION).verify()


def test_bytes_are_fixed(tmp_path: Path) -> None:
    data = write(tmp_path / "file", {"a": np.array([258], dtype=np.uint16)}, {"z": 1, "k": [None, "é"]})
    header = (
        b"\x82\xa6header\x82\xa1k\x92\xc0\xa2\xc3\xa9\xa1z\x01\xa8sections\x91\x87\xa8checksum\xc4\x10"
        + digest(b"\x02\x01")
        + b"\xa5codec\xa3raw\xa5dtype\xa6uint16\xa6length\x02\xa4name\xa1a\xa6offset\x00\xa5shape\x91\x01"
    )
    start = b"CALIBTST\x01\x00\x00\x00" + bytes([len(header), 0, 0, 0])
    expected = start + digest(start + header) + header
    assert data == expected + bytes(-len(expected) % 64) + b"\x02\x01"


def test_order_strides_and_byte_order_do_not_change_the_bytes(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    plain = write(tmp_path / "1", {"a": array, "b": array}, {"x": [1], "y": 2})
    strange = write(tmp_path / "2", {"b": array.astype(">i4"), "a": np.asfortranarray(array)}, {"y": 2, "x": (1,)})
    assert plain == strange


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    good = write(tmp_path / "file", SAMPLE, {"k": 1})
    for position in range(len(good)):
        for bit in (0, 7):
            bad = bytearray(good)
            bad[position] ^= 1 << bit
            with pytest.raises(errors.PlanError):
                read(tmp_path, bytes(bad))


def test_a_crc_proves_what_has_one(tmp_path: Path) -> None:
    """Every byte still counts, and so does every bit of the padding; without the flag the key is unknown."""
    path = tmp_path / "file"
    write_container(path, magic=MAGIC, version=VERSION, header={}, sections=SAMPLE, crc=True)
    good = path.read_bytes()
    Container.open(path, magic=MAGIC, version=VERSION, crc=True).verify()
    with pytest.raises(errors.SectionError, match=r"must have only the keys .*, got 'crc32'"):
        Container.open(path, magic=MAGIC, version=VERSION)
    seen = set()

    def sections(path: Path) -> list[np.ndarray]:
        container = Container.open(path, magic=MAGIC, version=VERSION, crc=True)
        return [container.section(name) for name in container.names]

    assert len(sections(path)) == 3
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1
        path.write_bytes(bad)
        with pytest.raises(errors.PlanError) as caught:
            sections(path)
        seen.add("CRC-32" in str(caught.value))
    assert seen == {False, True}


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    good = write(tmp_path / "file", SAMPLE, {"k": 1})
    for length in range(len(good)):
        with pytest.raises(errors.Truncated):
            read(tmp_path, good[:length])


def test_arrays_are_read_only_and_outlive_the_container(tmp_path: Path) -> None:
    write(tmp_path / "file", SAMPLE)
    container = Container.open(tmp_path / "file", magic=MAGIC, version=VERSION)
    array = container.section("b/ids")
    del container
    assert array.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_reports_what_is_in_it(tmp_path: Path) -> None:
    data = write(tmp_path / "file", SAMPLE, {"k": 1})
    container = Container.open(tmp_path / "file", magic=MAGIC, version=VERSION)
    assert container.names == ("a", "b/ids", "empty")
    assert container.section_bytes() == {"a": 8, "b/ids": 10, "empty": 0}
    assert container.size_bytes == len(data)
    assert bytes.fromhex(container.digest) == data[16:32]
    assert container.version == VERSION
    assert not container.newer
    with pytest.raises(errors.MissingSection, match="'c'"):
        container.section("c")


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Container.open(tmp_path / "none", magic=MAGIC, version=VERSION)


def too_deep() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"x": np.float32(1)}, r"header\.header\.x must be a plain value, got float32"),
        ({"x": {1: 2}}, "string keys, got 1"),
        ({"x": [0, 1 << 64]}, r"header\.header\.x\[1\] must be an integer of 64 bits"),
        ({"x": too_deep()}, "nested at most 32 deep"),
        ({"x": [0] * 65537}, "at most 65536 entries, got 65537"),
        ({"x": msgpack.ExtType(5, b"")}, "must be a plain value, got ExtType"),
        ({"x": "\ud800"}, "must be text that UTF-8 can hold"),
        ({"\ud800": 1}, "must be text that UTF-8 can hold"),
    ],
)
def test_writer_rejects_a_header(tmp_path: Path, header: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.HeaderError, match=words):
        write(tmp_path / "file", {}, header)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("", np.zeros(1, np.int8)),
        ("n" * 256, np.zeros(1, np.int8)),
        (1, np.zeros(1, np.int8)),
        ("a", np.zeros(1, np.bool_)),
        ("a", np.array([object()])),
        ("a", np.zeros(1, "M8[s]")),
        ("a", np.zeros(1, np.complex64)),
        ("a", np.zeros((1,) * 9, np.int8)),
        ("a", [1, 2]),
    ],
)
def test_writer_rejects_a_section(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(errors.SectionError, match="must"):
        write(tmp_path / "file", {name: value})
    assert not list(tmp_path.iterdir())


def test_writer_rejects_a_large_header(tmp_path: Path) -> None:
    with pytest.raises(errors.HeaderTooLarge, match="at most 4194304"):
        write(tmp_path / "file", {}, {"x": b"0" * (16 << 20)})


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    before = write(tmp_path / "file", SAMPLE)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "file", {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == before


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
ARRAYS = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda name: hnp.arrays(
        np.dtype(name).newbyteorder(">") if name != "float16" else name,
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
    )
)
NAMES = st.text(min_size=1, max_size=12).filter(lambda name: len(name.encode()) <= 255)


@given(
    header=st.dictionaries(st.text(max_size=6), PLAIN, max_size=4), sections=st.dictionaries(NAMES, ARRAYS, max_size=4)
)
def test_round_trip(tmp_path_factory: Any, header: dict[str, Any], sections: dict[str, np.ndarray]) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip"
    write(path, sections, header)
    container = Container.open(path, magic=MAGIC, version=VERSION)
    assert container.header == header
    assert container.names == tuple(sorted(sections))
    for name, array in sections.items():
        found = container.section(name)
        assert found.dtype == array.dtype.newbyteorder("<")
        np.testing.assert_array_equal(found, array)
        assert found.shape == array.shape
