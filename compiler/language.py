"""Pass strings: ``vote{agreement=0.5},select{target-density=0.3},lower``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from calibatt.compiler.errors import PassSyntaxError
from calibatt.compiler.passes import PASSES, Pass

DEFAULT_PASSES = "select,anchors,select,schedule,lower"
_PASS = re.compile(r"\s*([a-z][a-z0-9-]*)\s*(?:\{([^{}]*)\})?\s*")
_TEXT = re.compile(r"[A-Za-z0-9_.+-]*")


def parse_passes(text: str) -> tuple[Pass, ...]:
    """Reads a pass string.

    Raises:
        PassSyntaxError: It is no pass string, names an unknown pass or option, or has a value of the wrong type.
        PassError: A pass refuses the value of an option.
    """
    passes, at = [], 0
    while True:
        match = _PASS.match(text, at)
        if not match:
            raise PassSyntaxError(f"passes must read name{{option=value,...}},name,..., got {text[at:]!r}")
        passes.append(_pass(match[1], match[2]))
        at = match.end()
        if at == len(text):
            return tuple(passes)
        if text[at] != ",":
            raise PassSyntaxError(f"passes must be separated by commas, got {text[at:]!r} after {match[1]!r}")
        at += 1


def print_passes(passes: Sequence[Pass]) -> str:
    """The canonical pass string: every option that has a value, in the order of the fields, no spaces."""
    return ",".join(_print(each) for each in passes)


def option_name(field_name: str) -> str:
    return field_name.replace("_", "-")


def _pass(name: str, options: str | None) -> Pass:
    if name not in PASSES:
        raise PassSyntaxError(f"a pass must be one of {', '.join(PASSES)}, got {name!r}")
    kind = PASSES[name]()
    hints = get_type_hints(kind)
    names = {option_name(each.name): each.name for each in fields(kind)}
    values: dict[str, Any] = {}
    for part in options.split(",") if options and options.strip() else []:
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise PassSyntaxError(f"{name}: an option must read option=value, got {part.strip()!r}")
        if option not in names:
            known = f"be one of {', '.join(names)}" if names else "not be given (it has none)"
            raise PassSyntaxError(f"{name}: an option must {known}, got {option!r}")
        if names[option] in values:
            raise PassSyntaxError(f"{name}: {option} must be given once, got it again")
        values[names[option]] = _value(f"{name}: {option}", hints[names[option]], value)
    return kind(**values)


def _value(where: str, hint: Any, text: str) -> Any:
    """Text as a value of a field's type: int, float, str, or one of these or None."""
    if get_origin(hint) is UnionType:
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    if hint is str:
        if not _TEXT.fullmatch(text):
            raise PassSyntaxError(f"{where} must be of letters, digits, '_', '.', '+' and '-', got {text!r}")
        return text
    what = "an integer" if hint is int else "a finite number"
    try:
        value = hint(text)
    except ValueError:
        raise PassSyntaxError(f"{where} must be {what}, got {text!r}") from None
    if not math.isfinite(value):
        raise PassSyntaxError(f"{where} must be {what}, got {text!r}")
    return value


def _print(each: Pass) -> str:
    values = {option_name(field.name): getattr(each, field.name) for field in fields(each)}
    shown = ",".join(f"{name}={value}" for name, value in values.items() if value is not None)
    return each.name + (f"{{{shown}}}" if shown else "")
