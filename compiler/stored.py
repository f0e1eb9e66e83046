"""Values of the compiler in files of a work folder: JSON and arrays, which can hold nothing that runs."""

from __future__ import annotations

import json
import zipfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibatt.compiler.errors import CompileError
from calibatt.compiler.ir import Groups, UnitIR, UnitMeans
from calibatt.plans import Blocks, PackedLayer, TokenGrid
from calibatt.plans.files import whole_file

KINDS: dict[str, Any] = {kind.__name__: kind for kind in (UnitIR, UnitMeans, Groups, TokenGrid, Blocks, PackedLayer)}
"""What a file may hold besides plain values, lists, tuples, maps and arrays; `storable` adds to it."""


def storable(kind: type[Any]) -> type[Any]:
    """Decorates a dataclass whose values are kept in work folders."""
    KINDS[kind.__name__] = kind
    return kind


def save(path: Path, value: Any) -> None:
    """Writes a value, whole or not at all.

    Raises:
        OSError: It cannot be written.
        TypeError: It holds what no file may.
    """
    arrays: dict[str, Any] = {}
    text = json.dumps(_plain(value, arrays))
    with whole_file(path, sync=False) as file:
        np.savez(file, **arrays, value=np.frombuffer(text.encode(), np.uint8))


def load(path: Path, kind: str) -> Any:
    """The value that `save` was given.

    Args:
        path: The file.
        kind: One of `KINDS`: what the value must be.

    Raises:
        CompileError: The file is damaged, or holds something else.
        OSError: It cannot be read.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = _value(json.loads(arrays["value"].tobytes()), arrays)
            if type(found) is not KINDS[kind]:
                raise TypeError(f"{type(found).__name__} for {kind}")
            return found
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError, zipfile.BadZipFile) as error:
        raise CompileError(f"{path} must be what an interrupted job left, got {error}: leave out --resume") from None


def _plain(value: Any, arrays: dict[str, Any]) -> Any:
    """JSON of a value; arrays are put aside under names."""

    def inner(each: Any) -> Any:
        return _plain(each, arrays)

    if isinstance(value, np.ndarray):
        arrays[name := f"a{len(arrays)}"] = value
        return {"array": name}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [inner(each) for each in value]
    if type(value) is tuple:
        return {"tuple": [inner(each) for each in value]}
    if type(value) is dict:
        return {"map": [[inner(key), inner(each)] for key, each in value.items()]}
    name = type(value).__name__
    if KINDS.get(name) is not type(value):
        raise TypeError(f"a work folder can hold {', '.join(KINDS)}, got {name}")
    names = [each.name for each in fields(value)] if is_dataclass(value) else value._fields
    return {"kind": name, "fields": {each: inner(getattr(value, each)) for each in names}}


def _value(found: Any, arrays: Any) -> Any:
    """The value of what `_plain` made."""

    def inner(each: Any) -> Any:
        return _value(each, arrays)

    if isinstance(found, list):
        return [inner(each) for each in found]
    if not isinstance(found, dict):
        return found
    if "array" in found:
        return arrays[found["array"]]
    if "tuple" in found:
        return tuple(inner(each) for each in found["tuple"])
    if "map" in found:
        return {inner(key): inner(each) for key, each in found["map"]}
    kind: Any
    kind, values = KINDS[found["kind"]], {name: inner(each) for name, each in found["fields"].items()}
    if kind is Groups:
        return Groups(**values)
    made: Any = object.__new__(kind)
    for each in fields(kind):  # as they were, those that are not arguments too
        object.__setattr__(made, each.name, values[each.name])
    return made
