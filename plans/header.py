"""The one encoding of a header: msgpack of plain values, maps sorted by key, every number in its shortest form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack  # type: ignore[import-untyped]

from calibatt.plans.errors import HeaderError

MAX_DEPTH = 32
MAX_ITEMS = 1 << 16
"""Entries of one list or map."""


def pack_header(document: Mapping[str, Any]) -> bytes:
    """Encodes a map of plain values: None, bool, int, float, str, bytes, lists (or tuples) and maps with string keys.

    Raises:
        HeaderError: Another kind of value, an integer beyond 64 bits, or too deep or large; the message says where.
    """
    return bytes(msgpack.packb(_plain(document, "header", 0)))


def unpack_header(packed: bytes) -> dict[str, Any]:
    """Decodes what `pack_header` wrote, and nothing else: a second encoding of the same values is an error.

    Raises:
        HeaderError: The bytes are not msgpack, not a map, not plain values or not canonical.
    """
    try:
        document = msgpack.unpackb(packed, max_array_len=MAX_ITEMS, max_map_len=MAX_ITEMS)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise HeaderError(f"header must be msgpack, got {type(error).__name__}: {error}") from None
    if not isinstance(document, dict):
        raise HeaderError(f"header must be a map, got {type(document).__name__}")
    if pack_header(document) != packed:
        raise HeaderError(
            "header must be canonical msgpack, got keys twice or out of order, or numbers in a longer form"
        )
    return document


def _plain(value: Any, where: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise HeaderError(f"header must be nested at most {MAX_DEPTH} deep, got more at {where[:80]}")
    is_list = type(value) in (list, tuple)
    if (is_list or isinstance(value, Mapping)) and len(value) > MAX_ITEMS:
        raise HeaderError(f"{where} must have at most {MAX_ITEMS} entries, got {len(value)}")
    if isinstance(value, Mapping):
        strange = [key for key in value if not isinstance(key, str)]
        if strange:
            raise HeaderError(f"{where} must have string keys, got {strange[0]!r}")
        for key in value:
            _check_text(key, where)
        return {key: _plain(value[key], f"{where}.{key}", depth + 1) for key in sorted(value)}
    if is_list:
        return [_plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        raise HeaderError(f"{where} must be an integer of 64 bits, got one of {value.bit_length()}")
    if value is not None and type(value) not in (bool, int, float, str, bytes):
        raise HeaderError(f"{where} must be a plain value, got {type(value).__name__}")
    if isinstance(value, str):
        _check_text(value, where)
    return value


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise HeaderError(f"{where} must be text that UTF-8 can hold, got {text!r}") from None
