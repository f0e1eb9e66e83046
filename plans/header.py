"""The one encoding of a header: msgpack of plain values, maps sorted by key, every number in its shortest form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import msgpack  # type: ignore[import-untyped]

from calibatt.plans.errors import HeaderError

MAX_DEPTH = 32
MAX_ITEMS = 1 << 16
"""Entries of one list or map."""
MAX_VALUES = 1 << 19
"""Most values of a header, lists and maps included: a reader makes an object of each and visits it."""
MAX_KEY_BYTES = 255


def pack_header(document: Mapping[str, Any]) -> bytes:
    """Encodes a map of plain values: None, bool, int, float, str, bytes, lists (or tuples) and maps with string keys.

    Raises:
        HeaderError: Another kind of value, an integer beyond 64 bits, or too deep or large; the message says where.
    """
    try:
        return bytes(msgpack.packb(_plain(document, 0, count(1))))
    except _Broken as broken:
        raise HeaderError(f"header{broken.where} must {broken.rule}") from None


def unpack_header(packed: bytes) -> dict[str, Any]:
    """Decodes what `pack_header` wrote, and nothing else: a second encoding of the same values is an error.

    Raises:
        HeaderError: The bytes are not msgpack, not a map, not plain values or not canonical.
    """
    inside, around = 1, 0

    def counted(entries: list[Any]) -> list[Any]:
        """Called when a list or map is complete, so that no header can make a reader build too many."""
        nonlocal inside, around
        inside, around = inside + len(entries), around + 1
        if max(inside, around) > MAX_VALUES:
            raise HeaderError(f"header must have at most {MAX_VALUES} values, got more")
        return entries

    limits = {"max_array_len": MAX_ITEMS, "max_map_len": MAX_ITEMS}
    try:
        document = msgpack.unpackb(
            packed, **limits, list_hook=counted, object_pairs_hook=lambda pairs: dict(counted(pairs))
        )
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise HeaderError(f"header must be msgpack, got {type(error).__name__}: {error}") from None
    if not isinstance(document, dict):
        raise HeaderError(f"header must be a map, got {type(document).__name__}")
    if pack_header(document) != packed:
        raise HeaderError(
            "header must be canonical msgpack, got keys twice or out of order, or numbers in a longer form"
        )
    return document


class _Broken(Exception):
    """A value breaks a rule. `where` is put together while the exception travels up: valid headers need it not."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule, self.where = rule, ""


def _plain(value: Any, depth: int, seen: Iterator[int]) -> Any:
    """The value with maps in the order of their keys, proved.

    Args:
        value: What the header holds at some place.
        depth: Lists and maps around it.
        seen: Counts the values.
    """
    if next(seen) > MAX_VALUES:
        raise _Broken(f"have at most {MAX_VALUES} values, got more")
    if depth > MAX_DEPTH:
        raise _Broken(f"be nested at most {MAX_DEPTH} deep, got more")
    if isinstance(value, Mapping):
        _check_size(value)
        for key in value:
            if not isinstance(key, str):
                raise _Broken(f"have string keys, got {key!r}")
            if _utf8_bytes(key) > MAX_KEY_BYTES:
                raise _Broken(f"have keys of at most {MAX_KEY_BYTES} bytes, got one of {_utf8_bytes(key)}")
        return {key: _below(key, value[key], depth, seen) for key in sorted(value)}
    if type(value) in (list, tuple):
        _check_size(value)
        return [_below(index, item, depth, seen) for index, item in enumerate(value)]
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        raise _Broken(f"be an integer of 64 bits, got one of {value.bit_length()}")
    if value is not None and type(value) not in (bool, int, float, str, bytes):
        raise _Broken(f"be a plain value, got {type(value).__name__}")
    if isinstance(value, str):
        _utf8_bytes(value)
    return value


def _below(key: str | int, value: Any, depth: int, seen: Iterator[int]) -> Any:
    """`_plain` of what is under a key or an index."""
    try:
        return _plain(value, depth + 1, seen)
    except _Broken as broken:
        broken.where = (f".{key}" if isinstance(key, str) else f"[{key}]") + broken.where
        raise


def _check_size(value: Any) -> None:
    if len(value) > MAX_ITEMS:
        raise _Broken(f"have at most {MAX_ITEMS} entries, got {len(value)}")


def _utf8_bytes(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise _Broken(f"be text that UTF-8 can hold, got {text!r}") from None
