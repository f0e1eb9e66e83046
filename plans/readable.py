"""Numbers as people read them, in every report, page and terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping

SHOWN_ITEMS = 3
"""Longer lists are shown as their length."""
SHOWN_CHARACTERS = 160
LEAST_PLAIN = 1e-4
"""Smaller numbers are written with a power of ten."""


def number(value: float, digits: int = 3) -> str:
    """So many significant digits, thousands apart.

    >>> number(75_600), number(5.1534), number(0.00396), number(9.996)
    ('75,600', '5.15', '0.00396', '10.0')
    """
    if not math.isfinite(value):
        return str(value)
    if value == round(value):
        return f"{value:,.0f}"
    power = int(f"{value:.{digits - 1}e}".split("e")[1])  # of the rounded number
    if abs(value) < LEAST_PLAIN:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(digits - 1 - power, 0)}f}"


def with_error(mean: float, error: float) -> str:
    """A mean and its standard error, both to the second digit of the error.

    >>> with_error(0.00396, 0.00221), with_error(33.3412, 0.4237)
    ('0.0040 ± 0.0022', '33.34 ± 0.42')
    """
    if not (math.isfinite(mean) and math.isfinite(error) and error > 0):
        return number(mean)
    decimals = min(max(1 - math.floor(math.log10(error)), 0), 6)
    return f"{mean:,.{decimals}f} ± {error:,.{decimals}f}"


def snr(squared_error: float) -> str:
    """The signal-to-noise, in dB, that a squared error relative to the squared size of the signal leaves.

    >>> snr(1e-4), snr(0)
    ('40.0 dB', 'no error')
    """
    return f"{-10 * math.log10(squared_error):.1f} dB" if squared_error > 0 else "no error"


def size(size_bytes: float) -> str:
    """Bytes.

    >>> size(768), size(83_968), size(999_999)
    ('768 B', '84.0 kB', '1.0 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if round(size_bytes, 1) < 1000 or unit == "GB":
            break
        size_bytes /= 1000
    return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"


def duration(milliseconds: float) -> str:
    """A time in the unit that fits it.

    >>> duration(0.1084), duration(5150), duration(7.8e6)
    ('0.108 ms', '5.15 s', '2.17 h')
    """
    for unit, length in (("h", 3.6e6), ("min", 6e4), ("s", 1e3)):
        if milliseconds >= (2 if unit == "min" else 1) * length:
            return f"{number(milliseconds / length)} {unit}"
    return f"{number(milliseconds)} ms"


def words(value: object) -> str:
    """Any plain value without brackets: mappings as ``name value``, short lists item by item, long ones as a count.

    >>> words({"samples": [1, 2, 3, 4], "weights": "abc", "size": [480, 832]})
    'samples 4 values, size 480 x 832, weights abc'
    """
    if isinstance(value, Mapping):
        text = ", ".join(f"{str(key).replace('_', ' ')} {words(item)}" for key, item in sorted(value.items(), key=str))
    elif isinstance(value, list | tuple):
        if len(value) > SHOWN_ITEMS or any(isinstance(item, list | tuple | Mapping) for item in value):
            text = f"{len(value):,} value{'s' if len(value) != 1 else ''}"
        else:
            text = " x ".join(map(words, value)) or "none"
    elif isinstance(value, bytes):
        text = size(len(value))
    elif isinstance(value, float):
        text = number(value, 4)
    else:
        text = "none" if value is None else str(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
