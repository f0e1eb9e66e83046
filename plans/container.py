"""The container of plans and of statistics units: a small header and aligned arrays, every byte accounted for.

A file is a 32-byte prefix, a msgpack header, and sections that each begin at the next multiple of 64 bytes. The
digest in the prefix covers prefix and header, the header holds a digest of every section, and everything else must
be zero: hence no byte can change unnoticed, and the digest stands for the whole file. FORMAT.md has every field.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from calibatt.plans.errors import (
    BadMagic,
    ChecksumError,
    HeaderError,
    HeaderTooLarge,
    LayoutError,
    MissingSection,
    PaddingError,
    PlanError,
    SectionError,
    TrailingBytes,
    Truncated,
    UnknownCodec,
    UnsupportedVersion,
)
from calibatt.plans.files import FilePath, whole_file
from calibatt.plans.header import pack_header, unpack_header

Array = npt.NDArray[Any]

ALIGNMENT_BYTES = 64
MAX_HEADER_BYTES = 4 << 20
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 59
"""Product of a shape in which 0 counts as 1: no array library overflows on it."""
MAX_NAME_BYTES = 255
DIGEST_BYTES = 16
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    )
}
"""What a section may hold; always little-endian in the file."""

_PREFIX = struct.Struct("<8sHHI16s")
_ENTRY_KEYS = ("checksum", "codec", "dtype", "length", "name", "offset", "shape")
_CRC_KEY = "crc32"


@dataclass(frozen=True)
class _Entry:
    """One section as the header describes it; `offset` in bytes from the start of the data."""

    name: str
    dtype: str
    shape: list[int]
    offset: int
    length: int
    codec: str
    checksum: bytes
    crc32: int | None = None

    @property
    def stop(self) -> int:
        return self.offset + self.length


def write_container(
    path: FilePath,
    *,
    magic: bytes,
    version: tuple[int, int],
    header: Mapping[str, Any],
    sections: Mapping[str, Array],
    crc: bool = False,
) -> int:
    """Writes one file; the same values always give the same bytes.

    The file appears under its name whole or not at all: it is written beside `path`, flushed to disk and renamed.

    Args:
        path: Where to; an existing file is replaced.
        magic: The 8 bytes that say what kind of file it is.
        version: Major and minor version of what `header` and `sections` mean.
        header: Plain values (None, bool, int, float, str, bytes, lists and maps with string keys); tuples become lists.
        sections: Arrays by name; any shape of up to 8 dimensions, the dtypes of `DTYPES`, any byte order or strides.
        crc: Also write a CRC-32 of each section, for files that are read often; `version` must allow it.

    Returns:
        Bytes written.

    Raises:
        HeaderError: `header` holds something else, is nested too deeply or has too many entries.
        HeaderTooLarge: The header needs more than 4 MiB.
        SectionError: A name or an array that a section cannot hold.
        OSError: The file cannot be written; no temporary file is left behind.
    """
    target = Path(path)
    arrays = {name: _stored(target, name, sections[name]) for name in sorted(sections, key=str)}
    entries, end = [], 0
    for name, array in arrays.items():
        offset = _align(end)
        end = offset + array.nbytes
        entries.append(
            {
                "name": name,
                "dtype": array.dtype.name,
                "shape": list(array.shape),
                "offset": offset,
                "length": array.nbytes,
                "codec": "raw",
                "checksum": _digest(_bytes_of(array)),
                **({_CRC_KEY: zlib.crc32(_bytes_of(array))} if crc else {}),
            }
        )
    try:
        packed = pack_header({"header": header, "sections": entries})
    except HeaderError as error:
        raise HeaderError(f"{target}: {error}") from None
    if len(packed) > MAX_HEADER_BYTES:
        raise HeaderTooLarge(f"{target}: the header must be at most {MAX_HEADER_BYTES} bytes, got {len(packed)}")
    start = struct.pack("<8sHHI", _checked_magic(magic), *version, len(packed))
    head = start + _digest(start, packed) + packed
    with whole_file(target) as file:
        file.write(head)
        position = len(head)
        for entry, array in zip(entries, arrays.values(), strict=True):
            at = _align(len(head)) + entry["offset"]
            file.write(bytes(at - position))
            file.write(_bytes_of(array))
            position = at + array.nbytes
        if not entries:
            file.write(bytes(_align(position) - position))
            position = _align(position)
    return position


class Container:
    """A file of the container, memory mapped and read only.

    `open` proves the structure: prefix, header, bounds, layout and padding. A section's bytes are proved the first
    time it is asked for, so that one array of a large file can be read without the others; `verify` proves all of them.
    The mapping lives as long as the container or any array taken from it.
    """

    def __init__(self, path: FilePath, data: mmap.mmap, magic: bytes, version: tuple[int, int], crc: bool) -> None:
        """Use `Container.open`."""
        self.path = Path(path)
        self._crc = crc
        self._data = data
        self._proved: set[str] = set()
        header_bytes = self._read_prefix(magic, version)
        document = self._read_header(header_bytes)
        self.header: dict[str, Any] = document["header"]
        """The values given to `write_container`."""
        self._data_start = _align(_PREFIX.size + header_bytes)
        self._entries = self._read_entries(document["sections"])
        self._check_layout(_PREFIX.size + header_bytes)

    @classmethod
    def open(cls, path: FilePath, *, magic: bytes, version: tuple[int, int], crc: bool = False) -> Container:
        """Maps a file and proves its structure.

        Args:
            path: The file.
            magic: The 8 bytes it must begin with.
            version: The version this caller understands. Another major version is an error. From a newer minor
                version the container skips what it does not know, and so should the caller (see `newer`).
            crc: Whether this kind of file may have a CRC-32 of each section. Where there is one it proves the section,
                which is four times as fast as by the digest, and enough against accidents.

        Raises:
            PlanError: One subclass for each broken promise; the message names file, rule and value.
            OSError: The file cannot be read.
        """
        _checked_magic(magic)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _PREFIX.size:
                kind = BadMagic if not magic.startswith(file.read(len(magic))) else Truncated
                raise kind(f"{path}: must have at least {_PREFIX.size} bytes, got {size}")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls(path, data, magic, version, crc)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all sections, ascending."""
        return tuple(self._entries)

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return len(self._data)

    def section(self, name: str) -> Array:
        """One section as a read-only array over the mapped file; its bytes are proved at the first call.

        Raises:
            MissingSection: The file has no section of this name.
            UnknownCodec: A newer version wrote it in a way that this code cannot decode.
            SectionError: A newer version gave it a dtype that this code does not know.
            ChecksumError: Its bytes are not those that were written.
        """
        if name not in self._entries:
            raise MissingSection(f"{self.path}: must have a section {name!r}, got {len(self._entries)} others")
        entry = self._entries[name]
        dtype = self._check_decodable(entry)
        self._prove(entry)
        count = math.prod(entry.shape)
        flat = np.frombuffer(self._data, dtype=dtype, count=count, offset=self._data_start + entry.offset)
        return flat.reshape(entry.shape)

    def section_bytes(self) -> dict[str, int]:
        """Stored bytes of every section, without padding."""
        return {name: entry.length for name, entry in self._entries.items()}

    def verify(self, quick: bool = False) -> None:
        """Proves the bytes of every section, known or not, by their digests; `quick`: by a CRC-32 where there is one.

        Raises:
            ChecksumError: A section's bytes are not those that were written.
        """
        for entry in self._entries.values():
            self._prove(entry, quick)

    def _fail(self, kind: type[PlanError], what: str, rule: str, value: object) -> NoReturn:
        raise kind(f"{self.path}: {what} must {rule}, got {value}")

    def _read_prefix(self, magic: bytes, version: tuple[int, int]) -> int:
        begins, major, minor, header_bytes, digest = _PREFIX.unpack_from(self._data)
        if begins != magic:
            self._fail(BadMagic, "the file", f"begin with {magic!r}", repr(begins))
        if major != version[0]:
            self._fail(UnsupportedVersion, "the major version", f"be {version[0]}", f"{major}.{minor}")
        if header_bytes > MAX_HEADER_BYTES:
            self._fail(HeaderTooLarge, "the header", f"be at most {MAX_HEADER_BYTES} bytes", header_bytes)
        if _align(_PREFIX.size + header_bytes) > len(self._data):
            self._fail(Truncated, "the file", f"hold a header of {header_bytes} bytes", f"{len(self._data)} bytes")
        self.version = (major, minor)
        """Major and minor version of the file."""
        self.newer = minor > version[1]
        """True where the file may hold more than this caller knows: skip it. Else the unknown is an error."""
        self.digest = digest.hex()
        """Stands for every byte of the file, 32 hexadecimal digits."""
        start = _PREFIX.size - DIGEST_BYTES
        computed = _digest(self._data[:start], self._data[_PREFIX.size : _PREFIX.size + header_bytes])
        if computed != digest:
            self._fail(ChecksumError, "the header", f"have digest {self.digest}", computed.hex())
        return int(header_bytes)

    def _read_header(self, header_bytes: int) -> dict[str, Any]:
        packed = self._data[_PREFIX.size : _PREFIX.size + header_bytes]
        try:
            document = unpack_header(packed)
        except HeaderError as error:
            raise HeaderError(f"{self.path}: {error}") from None
        return self._known(HeaderError, "the header", document, ("header", "sections"), (dict, list))

    def _read_entries(self, entries: list[Any]) -> dict[str, _Entry]:
        read: dict[str, _Entry] = {}
        last = ""
        kinds = (bytes, str, str, int, str, int, list)
        for index, fields in enumerate(entries):
            what = f"section {index}"
            crc32 = fields.pop(_CRC_KEY, None) if self._crc and isinstance(fields, dict) else None
            if crc32 is not None and (type(crc32) is not int or not 0 <= crc32 < 1 << 32):
                self._fail(SectionError, f"'{_CRC_KEY}' of {what}", "be an integer below 2^32", crc32)
            entry = _Entry(**self._known(SectionError, what, fields, _ENTRY_KEYS, kinds), crc32=crc32)
            self._check_entry(entry, last)
            if not self.newer or (entry.codec == "raw" and entry.dtype in DTYPES):
                self._check_decodable(entry)
            last = entry.name
            read[last] = entry
        return read

    def _known(
        self, kind: type[PlanError], what: str, value: object, keys: tuple[str, ...], kinds: tuple[type, ...]
    ) -> dict[str, Any]:
        """The known keys of a map, each of its kind; an unknown key is an error unless the file is newer."""
        if not isinstance(value, dict):
            self._fail(kind, what, "be a map", type(value).__name__)
        unknown = sorted(set(value) - set(keys))
        if unknown and not self.newer:
            self._fail(kind, what, f"have only the keys {', '.join(keys)}", repr(unknown[0]))
        for key, of in zip(keys, kinds, strict=True):
            if key not in value:
                self._fail(kind, what, f"have the key {key!r}", "none")
            if type(value[key]) is not of:
                self._fail(kind, f"{key!r} of {what}", f"be of type {of.__name__}", type(value[key]).__name__)
        return {key: value[key] for key in keys}

    def _check_entry(self, entry: _Entry, last: str) -> None:
        what = f"section {entry.name!r}"
        if not 0 < len(entry.name.encode()) <= MAX_NAME_BYTES:
            self._fail(SectionError, what, f"have a name of 1 to {MAX_NAME_BYTES} bytes", len(entry.name.encode()))
        if entry.name <= last:
            self._fail(SectionError, what, "be named once, in ascending order", f"it after {last!r}")
        if len(entry.checksum) != DIGEST_BYTES:
            self._fail(SectionError, f"the checksum of {what}", f"have {DIGEST_BYTES} bytes", len(entry.checksum))
        sizes_ok = len(entry.shape) <= MAX_DIMENSIONS and all(type(size) is int and size >= 0 for size in entry.shape)
        if not sizes_ok or math.prod(max(size, 1) for size in entry.shape) > MAX_ELEMENTS:
            rule = f"be up to {MAX_DIMENSIONS} sizes of at most {MAX_ELEMENTS} elements"
            self._fail(SectionError, f"the shape of {what}", rule, str(entry.shape)[:80])
        if min(entry.offset, entry.length) < 0:
            rule = "not be negative"
            self._fail(LayoutError, f"offset and length of {what}", rule, f"{entry.offset} and {entry.length}")

    def _check_decodable(self, entry: _Entry) -> np.dtype[Any]:
        what = f"section {entry.name!r}"
        if entry.codec != "raw":
            self._fail(UnknownCodec, f"the codec of {what}", "be 'raw'", repr(entry.codec))
        if entry.dtype not in DTYPES:
            self._fail(SectionError, f"the dtype of {what}", f"be one of {', '.join(DTYPES)}", repr(entry.dtype))
        dtype: np.dtype[Any] = DTYPES[entry.dtype]
        needed = math.prod(entry.shape) * dtype.itemsize
        if entry.length != needed:
            shape = f"{entry.dtype} of shape {entry.shape}"
            self._fail(SectionError, f"the length of {what}", f"be that of {shape}", entry.length)
        return dtype

    def _check_layout(self, header_end: int) -> None:
        """Sections lie one after the other from the data start to the file's end, padded with zeros."""
        end = 0
        self._check_zero(header_end, self._data_start)
        for entry in self._entries.values():
            if entry.offset != _align(end):
                self._fail(LayoutError, f"the offset of section {entry.name!r}", f"be {_align(end)}", entry.offset)
            if self._data_start + entry.stop > len(self._data):
                needed = f"reach byte {self._data_start + entry.stop} for section {entry.name!r}"
                self._fail(Truncated, "the file", needed, f"{len(self._data)} bytes")
            self._check_zero(self._data_start + end, self._data_start + entry.offset)
            end = entry.stop
        if self._data_start + end != len(self._data):
            self._fail(TrailingBytes, "the file", f"end at byte {self._data_start + end}", f"{len(self._data)} bytes")

    def _check_zero(self, start: int, stop: int) -> None:
        if any(self._data[start:stop]):
            self._fail(PaddingError, f"bytes {start} to {stop - 1}", "be zero", self._data[start:stop].hex())

    def _prove(self, entry: _Entry, quick: bool = True) -> None:
        if entry.name in self._proved:
            return
        start = self._data_start + entry.offset
        with memoryview(self._data) as view, view[start : start + entry.length] as part:
            if quick and entry.crc32 is not None:
                what, expected, computed = "CRC-32", f"{entry.crc32:08x}", f"{zlib.crc32(part):08x}"
            else:
                what, expected, computed = "digest", entry.checksum.hex(), _digest(part).hex()
        if computed != expected:
            self._fail(ChecksumError, f"section {entry.name!r}", f"have {what} {expected}", computed)
        self._proved.add(entry.name)


def _align(position: int) -> int:
    return -(-position // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _checked_magic(magic: bytes) -> bytes:
    if len(magic) != 8:
        raise ValueError(f"magic must be 8 bytes, got {magic!r}")
    return magic


def _digest(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _bytes_of(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _stored(path: Path, name: str, array: Array) -> Array:
    """The array as the file holds it: contiguous, little-endian."""
    if not isinstance(name, str) or not 0 < len(name.encode(errors="surrogatepass")) <= MAX_NAME_BYTES:
        raise SectionError(f"{path}: a section must have a name of 1 to {MAX_NAME_BYTES} bytes, got {name!r}")
    if not isinstance(array, np.ndarray) or array.dtype.name not in DTYPES or array.ndim > MAX_DIMENSIONS:
        got = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        rule = f"be an array of up to {MAX_DIMENSIONS} dimensions and dtype {', '.join(DTYPES)}"
        raise SectionError(f"{path}: section {name!r} must {rule}, got {got}")
    return np.ascontiguousarray(array, dtype=DTYPES[array.dtype.name]).reshape(array.shape)
