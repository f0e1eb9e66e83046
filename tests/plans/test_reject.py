"""Every promise of the container, broken by literal bytes: one error each, naming file, rule and value."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibatt.plans import errors
from calibatt.plans.container import Container

MAGIC = b"CALIBTST"
VERSION = (1, 0)


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def build(header: bytes, data: bytes = b"", magic: bytes = MAGIC, version: tuple[int, int] = VERSION) -> bytes:
    """A file around any header, well-formed or not, built without the code under test."""
    start = magic + struct.pack("<HHI", *version, len(header))
    head = start + digest(start + header) + header
    return head + bytes(-len(head) % 64) + data


def pack(document: object) -> bytes:
    return msgpack.packb(document)


def entry(name: str = "a", data: bytes = b"\x01\x02\x03\x04", **changes: Any) -> dict[str, Any]:
    """A right entry of a section of four uint8, keys ascending, with changes."""
    right = {
        "checksum": digest(data),
        "codec": "raw",
        "dtype": "uint8",
        "length": len(data),
        "name": name,
        "offset": 0,
        "shape": [len(data)],
    }
    return dict(sorted((right | changes).items()))


def document(*entries: object, header: object = None) -> bytes:
    return pack({"header": {} if header is None else header, "sections": list(entries)})


DATA = b"\x01\x02\x03\x04"
GOOD = build(document(entry()), DATA)
TWO = (entry("a"), entry("b", offset=64))
TWO_DATA = DATA + bytes(60) + DATA
DEEP = b"\x91" * 2000 + b"\xc0"


def nested(depth: int) -> object:
    return [] if depth == 0 else [nested(depth - 1)]


def open_bytes(folder: Path, data: bytes, version: tuple[int, int] = VERSION) -> Container:
    path = folder / "file"
    path.write_bytes(data)
    container = Container.open(path, magic=MAGIC, version=version)
    container.verify()
    return container


def test_accepts_what_the_rejections_vary(tmp_path: Path) -> None:
    assert open_bytes(tmp_path, GOOD).section("a").tolist() == [1, 2, 3, 4]
    assert open_bytes(tmp_path, build(document(*TWO), TWO_DATA)).section("b").tolist() == [1, 2, 3, 4]
    assert open_bytes(tmp_path, build(document())).names == ()


REJECTED = {
    "other magic": (build(document(), magic=b"CALIBXXX"), errors.BadMagic, "begin with b'CALIBTST'"),
    "short, other magic": (b"\x89PNG", errors.BadMagic, "at least 32 bytes"),
    "empty": (b"", errors.Truncated, "at least 32 bytes, got 0"),
    "prefix cut": (GOOD[:20], errors.Truncated, "at least 32 bytes, got 20"),
    "next major": (build(document(), version=(2, 0)), errors.UnsupportedVersion, "must be 1, got 2.0"),
    "major 0": (build(document(), version=(0, 9)), errors.UnsupportedVersion, "must be 1, got 0.9"),
    "header of 4 GiB": (
        MAGIC + struct.pack("<HHI", 1, 0, 2**32 - 1) + bytes(64),
        errors.HeaderTooLarge,
        "at most 4194304 bytes, got 4294967295",
    ),
    "header cut": (GOOD[:64], errors.Truncated, "hold a header of"),
    "header not msgpack": (build(b"\xc1"), errors.HeaderError, "must be msgpack"),
    "header empty": (build(b""), errors.HeaderError, "must be msgpack"),
    "header with a tail": (build(document() + b"\xc0"), errors.HeaderError, "must be msgpack"),
    "header a list": (build(pack([])), errors.HeaderError, "must be a map, got list"),
    "header not UTF-8": (build(b"\x81\xa1\xff\xc0"), errors.HeaderError, "must be msgpack"),
    "header nested 2000 deep": (build(DEEP), errors.HeaderError, "must be msgpack"),
    "header nested 34 deep": (build(document(header={"x": nested(34)})), errors.HeaderError, "at most 32 deep"),
    "header claims 2**32 items": (build(b"\xdd\xff\xff\xff\xff"), errors.HeaderError, "must be msgpack"),
    "header with an extension": (
        build(document(header={"x": msgpack.ExtType(5, b"")})),
        errors.HeaderError,
        "plain value, got ExtType",
    ),
    "header with a date": (build(document(header={"x": msgpack.Timestamp(0)})), errors.HeaderError, "plain value"),
    "header with integer keys": (build(document(header={1: 2})), errors.HeaderError, "must be msgpack"),
    "header with bytes keys": (build(document(header={b"x": 2})), errors.HeaderError, "string keys, got b'x'"),
    "key twice": (build(b"\x82\xa1a\x01\xa1a\x02"), errors.HeaderError, "canonical"),
    "keys out of order": (build(pack({"sections": [], "header": {}})), errors.HeaderError, "canonical"),
    "long form of a number": (build(document().replace(b"\x80", b"\xde\x00\x00")), errors.HeaderError, "canonical"),
    "no header": (build(pack({"sections": []})), errors.HeaderError, "have the key 'header'"),
    "header values not a map": (build(document(header=[1])), errors.HeaderError, "be of type dict, got list"),
    "unknown key": (build(pack({"extra": 1, "header": {}, "sections": []})), errors.HeaderError, "got 'extra'"),
    "sections not a list": (build(pack({"header": {}, "sections": {}})), errors.HeaderError, "be of type list"),
    "entry not a map": (build(document(7)), errors.SectionError, "section 0 must be a map, got int"),
    "entry without checksum": (
        build(document({key: value for key, value in entry().items() if key != "checksum"}), DATA),
        errors.SectionError,
        "have the key 'checksum'",
    ),
    "entry with an unknown key": (build(document(entry(zip=1)), DATA), errors.SectionError, "got 'zip'"),
    "offset not an integer": (build(document(entry(offset=0.0)), DATA), errors.SectionError, "be of type int"),
    "length a bool": (build(document(entry(length=True)), DATA), errors.SectionError, "be of type int, got bool"),
    "name empty": (build(document(entry("")), DATA), errors.SectionError, "name of 1 to 255 bytes, got 0"),
    "name long": (build(document(entry("n" * 256)), DATA), errors.SectionError, "got 256"),
    "name twice": (build(document(entry(), entry()), DATA), errors.SectionError, "ascending order"),
    "names descending": (
        build(document(entry("b"), entry("a", offset=64)), TWO_DATA),
        errors.SectionError,
        "it after 'b'",
    ),
    "object dtype": (build(document(entry(dtype="object")), DATA), errors.SectionError, "got 'object'"),
    "big-endian dtype": (build(document(entry(dtype=">i4")), DATA), errors.SectionError, "got '>i4'"),
    "bool dtype": (build(document(entry(dtype="bool")), DATA), errors.SectionError, "got 'bool'"),
    "shape too small": (build(document(entry(shape=[3])), DATA), errors.SectionError, "uint8 of shape [3], got 4"),
    "shape negative": (
        build(document(entry(shape=[-2, -2])), DATA),
        errors.SectionError,
        "up to 8 sizes",
    ),
    "shape of strings": (build(document(entry(shape=["4"])), DATA), errors.SectionError, "up to 8 sizes"),
    "shape of 9 dimensions": (
        build(document(entry(shape=[1] * 8 + [4])), DATA),
        errors.SectionError,
        "up to 8 sizes",
    ),
    "shape wraps to 4": (build(document(entry(shape=[2**62 + 1, 4])), DATA), errors.SectionError, "up to 8 sizes"),
    "shape product wraps to 4": (
        build(document(entry(shape=[2**32, 2**32, 4])), DATA),
        errors.SectionError,
        "up to 8 sizes",
    ),
    "shape wrong by a factor": (build(document(entry(shape=[2, 4])), DATA), errors.SectionError, "[2, 4], got 4"),
    "empty but huge": (
        build(document(entry(data=b"", shape=[0, 2**62, 2**62]))),
        errors.SectionError,
        "up to 8 sizes",
    ),
    "checksum short": (build(document(entry(checksum=b"1234")), DATA), errors.SectionError, "have 16 bytes, got 4"),
    "checksum wrong": (build(document(entry(checksum=bytes(16))), DATA), errors.ChecksumError, "section 'a'"),
    "header digest wrong": (
        GOOD[:16] + bytes(16) + GOOD[32:],
        errors.ChecksumError,
        "have digest 0000",
    ),
    "unknown codec": (build(document(entry(codec="zstd")), DATA), errors.UnknownCodec, "must be 'raw', got 'zstd'"),
    "negative offset": (build(document(entry(offset=-64)), DATA), errors.LayoutError, "not be negative, got -64"),
    "negative length": (build(document(entry(length=-4)), DATA), errors.LayoutError, "not be negative"),
    "overlap": (build(document(entry("a"), entry("b")), DATA), errors.LayoutError, "'b' must be 64, got 0"),
    "hole": (build(document(entry(offset=64)), bytes(64) + DATA), errors.LayoutError, "'a' must be 0, got 64"),
    "not aligned": (
        build(document(entry("a"), entry("b", offset=4)), DATA + DATA),
        errors.LayoutError,
        "'b' must be 64, got 4",
    ),
    "section cut": (GOOD[:-1], errors.Truncated, "reach byte"),
    "section of 2**62 bytes": (
        build(document(entry(shape=[2**58], length=2**58)), DATA),
        errors.Truncated,
        "reach byte",
    ),
    "trailing byte": (GOOD + b"\x00", errors.TrailingBytes, "must end at byte"),
    "padding after the header": (
        GOOD[:-5] + b"\x01" + DATA,
        errors.PaddingError,
        "must be zero",
    ),
    "padding between sections": (
        build(document(*TWO), DATA + bytes(59) + b"\x07" + DATA),
        errors.PaddingError,
        "must be zero",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejects(tmp_path: Path, case: str) -> None:
    data, kind, words = REJECTED[case]
    with pytest.raises(errors.PlanError) as caught:
        open_bytes(tmp_path, data)
    assert type(caught.value) is kind
    assert words in str(caught.value)
    assert str(tmp_path / "file") in str(caught.value)


def test_a_section_is_proved_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(build(document(entry("a"), entry("b", offset=64, checksum=bytes(16))), TWO_DATA))
    container = Container.open(path, magic=MAGIC, version=VERSION)
    assert container.section("a").tolist() == [1, 2, 3, 4]
    with pytest.raises(errors.ChecksumError, match="section 'b'"):
        container.section("b")
    with pytest.raises(errors.ChecksumError, match="section 'b'"):
        container.verify()


@pytest.mark.parametrize("crc", [-1, 1 << 32, 1.0, "b63cfbcd", True])
def test_rejects_a_crc(tmp_path: Path, crc: object) -> None:
    path = tmp_path / "file"
    path.write_bytes(build(document(entry(crc32=crc)), DATA))
    with pytest.raises(errors.SectionError, match=r"'crc32' of section 0 must be an integer below 2\^32, got"):
        Container.open(path, magic=MAGIC, version=VERSION, crc=True)


def test_a_crc_may_be_absent_and_is_not_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(build(document(entry(crc32=0xB63CFBCD)), DATA))
    assert Container.open(path, magic=MAGIC, version=VERSION, crc=True).section("a").tolist() == [1, 2, 3, 4]
    path.write_bytes(build(document(entry(checksum=bytes(16))), DATA))
    with pytest.raises(errors.ChecksumError, match="digest"):
        Container.open(path, magic=MAGIC, version=VERSION, crc=True).section("a")


def test_a_newer_minor_version_skips_what_it_does_not_know(tmp_path: Path) -> None:
    unknown = entry("b", offset=64, codec="zstd", dtype="bfloat16", shape=[9], extra=[1])
    document = pack({"header": {"new": 1}, "more": 1, "sections": [entry("a"), unknown]})
    container = open_bytes(tmp_path, build(document, TWO_DATA, version=(1, 3)))
    assert container.newer
    assert container.version == (1, 3)
    assert container.section("a").tolist() == [1, 2, 3, 4]
    with pytest.raises(errors.UnknownCodec, match="'zstd'"):
        container.section("b")
    with pytest.raises(errors.HeaderError):
        open_bytes(tmp_path, build(document, TWO_DATA, version=(1, 3)), version=(1, 3))


@given(data=st.binary(max_size=200))
def test_any_header_ends_in_a_plan_error_or_a_container(tmp_path_factory: Any, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any_header"
    path.write_bytes(build(data))
    try:
        Container.open(path, magic=MAGIC, version=VERSION)
    except errors.PlanError:
        pass
