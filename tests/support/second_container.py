"""The container of plans and statistics, read as part 1 of plans/FORMAT.md says: nothing here is calibatt's."""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from typing import Any

import numpy as np

PREFIX = struct.Struct("<8sHHI16s")
DTYPES = "int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split()


class Refused(Exception):
    """A rule of the page is broken."""


def require(rule: bool, what: str) -> None:
    if not rule:
        raise Refused(what)


def whole(value: object, least: int = 0) -> bool:
    """Whether a value is an integer (a boolean is none) of at least `least`."""
    return type(value) is int and value >= least


def up(value: int, step: int) -> int:
    return -(-value // step) * step


class Packed:
    """The one canonical msgpack value that a header is."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.values = data, 0, 0

    def take(self, count: int) -> bytes:
        require(self.at + count <= len(self.data), "header: ends early")
        self.at += count
        return self.data[self.at - count : self.at]

    def longer(self, which: int, forms: str, bounds: list[int]) -> int:
        """An integer of one of several forms, which no shorter form can hold: at least its bound, or below it."""
        form, bound = forms[which], bounds[which]
        value: int = struct.unpack(">" + form, self.take(struct.calcsize(form)))[0]
        require(value >= bound if bound >= 0 else value < bound, "header: a number is not in its shortest form")
        return value

    def value(self, level: int) -> Any:
        self.values += 1
        require(level <= 32, "header: more than 32 levels")
        require(self.values <= 524288, "header: more than 524288 values")
        tag = self.take(1)[0]
        if tag <= 0x7F:
            return tag
        if tag >= 0xE0:
            return tag - 256
        if tag in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[tag]
        if tag == 0xCB:
            return struct.unpack(">d", self.take(8))[0]
        if 0xCC <= tag <= 0xCF:
            return self.longer(tag - 0xCC, "BHIQ", [128, 2**8, 2**16, 2**32])
        if 0xD0 <= tag <= 0xD3:
            return self.longer(tag - 0xD0, "bhiq", [-32, -(2**7), -(2**15), -(2**31)])
        if 0xC4 <= tag <= 0xC6:
            return self.take(self.longer(tag - 0xC4, "BHI", [0, 2**8, 2**16]))
        if tag & 0xE0 == 0xA0 or 0xD9 <= tag <= 0xDB:
            return self.text(tag)
        if tag & 0xF0 == 0x90 or tag in (0xDC, 0xDD):
            count = tag & 15 if tag < 0xA0 else self.longer(tag - 0xDC, "HI", [16, 2**16])
            require(count <= 65536, "header: more than 65536 entries")
            return [self.value(level + 1) for _ in range(count)]
        if tag & 0xF0 == 0x80 or tag in (0xDE, 0xDF):
            count = tag & 15 if tag < 0x90 else self.longer(tag - 0xDE, "HI", [16, 2**16])
            require(count <= 65536, "header: more than 65536 entries")
            result: dict[str, Any] = {}
            last = None
            for _ in range(count):
                key = self.text(self.take(1)[0], 255)
                require(last is None or last < key, "header: keys do not ascend")
                last = key
                result[key] = self.value(level + 1)
            return result
        raise Refused(f"header: {tag:#x} is no plain value")

    def text(self, tag: int, most: int = 2**32) -> str:
        if tag & 0xE0 == 0xA0:
            count = tag & 31
        else:
            require(0xD9 <= tag <= 0xDB, "header: a key is no string")
            count = self.longer(tag - 0xD9, "BHI", [32, 2**8, 2**16])
        require(count <= most, "header: a key has more than 255 bytes")
        try:
            return self.take(count).decode()
        except UnicodeDecodeError:
            raise Refused("header: text is not UTF-8") from None


def container(
    data: bytes, magic: bytes = b"CALIBPLN", major: int = 5, crc: bool = False
) -> tuple[bool, Any, dict[str, np.ndarray]]:
    """Whether the file is of a later minor version, its `header`, and its sections that can be read.

    Args:
        data: The whole file.
        magic: Of its kind, as is `major`.
        major: Version.
        crc: Sections may have a CRC-32, as those of statistics.
    """
    require(len(data) >= 32, "truncated prefix")
    kind, version, minor, length, digest = PREFIX.unpack(data[:32])
    require(kind == magic, "magic")
    require(version == major, "major version")
    require(length <= 4194304, "header too large")
    require(len(data) >= 32 + length, "truncated header")
    require(hashlib.blake2b(data[:16] + data[32 : 32 + length], digest_size=16).digest() == digest, "digest")
    packed = Packed(data[32 : 32 + length])
    header = packed.value(0)
    require(packed.at == length, "header: bytes after it")
    later = minor > 0
    keys(header, "header sections", later, "header")
    require(isinstance(header["header"], dict), "header: no map")
    require(isinstance(header["sections"], list), "sections: no list")
    start = up(32 + length, 64)
    end, last, sections = 0, "", {}
    gaps = [(32 + length, start)]
    for entry in header["sections"]:
        quick = entry.pop("crc32", None) if crc and isinstance(entry, dict) else None
        require(quick is None or (whole(quick) and quick < 2**32), "section: crc32")
        keys(entry, "name dtype shape offset length codec checksum", later, "section")
        name, dtype, shape = entry["name"], entry["dtype"], entry["shape"]
        require(type(name) is str and 1 <= len(name.encode()) <= 255 and last < name, "section: name")
        last = name
        require(type(dtype) is str and type(entry["codec"]) is str, "section: dtype or codec is no string")
        known = dtype in DTYPES and entry["codec"] == "raw"
        require(known or later, "section: dtype or codec")
        require(type(shape) is list and len(shape) <= 8 and all(map(whole, shape)), "section: shape")
        require(math.prod(max(1, n) for n in shape) <= 2**59, "section: shape is too large")
        require(whole(entry["offset"]) and entry["offset"] == up(end, 64), "section: offset")
        require(whole(entry["length"]), "section: length")
        if known:
            require(entry["length"] == math.prod(shape) * np.dtype(dtype).itemsize, "section: length")
        require(type(entry["checksum"]) is bytes and len(entry["checksum"]) == 16, "section: checksum")
        gaps.append((start + end, start + entry["offset"]))
        end = entry["offset"] + entry["length"]
        require(start + end <= len(data), "truncated section")
        content = data[start + entry["offset"] : start + end]
        if quick is None:
            require(hashlib.blake2b(content, digest_size=16).digest() == entry["checksum"], "checksum")
        else:
            require(zlib.crc32(content) == quick, "crc32")
        if known:
            sections[name] = np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).reshape(shape)
    require(all(not any(data[a:b]) for a, b in gaps), "padding")
    require(len(data) == start + end, "trailing bytes")
    return later, header["header"], sections


def keys(value: object, names: str, later: bool, what: str) -> None:
    """Refuses what is no map of these keys, others only in a later minor version."""
    require(isinstance(value, dict), f"{what}: no map")
    assert isinstance(value, dict)
    wanted = set(names.split())
    require(wanted <= set(value) and (later or wanted == set(value)), f"{what}: keys")
