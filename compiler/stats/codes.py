"""Non-negative numbers as codes on a logarithmic scale: value = peak * 2 ** (-code / steps), the last code = 0."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from calibatt.compiler.stats.errors import UnitError

Float = npt.NDArray[np.float32]
Code = npt.NDArray[np.uint8]
Codes = npt.NDArray[Any]
"""uint8 or uint16."""

STEPS_PER_OCTAVE = 8
"""Steps of an octave in uint8 codes: 31.75 octaves, at most 2 ** (1 / 16) - 1 = 4.4 % from the value."""
FINE_STEPS = 2048
"""Steps of an octave in uint16 codes: 32 octaves, at most 2 ** (1 / 4096) - 1 = 0.017 % from the value."""
ZERO_CODE = 255
MOST = 1e18
"""Largest squared effect, level and difference, and largest 1 / level and square of a signed effect: sums and ratios of
them stay within float32.
"""
_ROUNDING = 1e-3
_TOP_BITS = 15


def quantise(values: npt.ArrayLike, peak: npt.ArrayLike, fine: bool = False) -> Codes:
    """Codes of non-negative values; a value more than half a step below the last code becomes 0.

    Args:
        values: Any shape, finite, 0 <= values <= peak; up to 0.1 % above the peak, by rounding, counts as the peak.
        peak: Broadcasts against `values`; finite, non-negative.
        fine: Whether codes are uint16 instead of uint8.

    Raises:
        UnitError: A value or peak out of range.
    """
    value, top = np.asarray(values, np.float32), np.asarray(peak, np.float32)
    if top.size and not (np.isfinite(top).all() and top.min() >= 0):
        raise UnitError(f"peak must be finite and not negative, got {top.min()} to {top.max()}")
    with np.errstate(divide="ignore", invalid="ignore"):
        code = np.asarray(value / top)
        code[np.broadcast_to(value == 0, code.shape)] = 0.0  # this also handles a peak of 0
        if code.size and not (code.min() >= 0 and code.max() <= 1 + _ROUNDING):
            wrong = ~((code >= 0) & (code <= 1 + _ROUNDING))
            got = (np.broadcast_to(each, code.shape)[wrong][0] for each in (value, top))
            raise UnitError("values must be in [0, peak], got {} under peak {}".format(*got))
        np.log2(code, out=code)
    code *= -(FINE_STEPS if fine else STEPS_PER_OCTAVE)
    kind = np.dtype(np.uint16 if fine else np.uint8)
    codes: Codes = np.clip(np.rint(code, out=code), 0, np.iinfo(kind).max, out=code).astype(kind)
    return codes


def dequantise(codes: Codes, peak: npt.ArrayLike) -> Float:
    """The values of `quantise`'s codes, float32 of the codes' shape; `peak` broadcasts."""
    if codes.dtype not in (np.uint8, np.uint16):
        raise UnitError(f"codes must be uint8 or uint16, got {codes.dtype}")
    values: Float = _fractions(codes.dtype.itemsize == 2).take(codes)
    values *= np.asarray(peak, np.float32)
    return values


def code_values(peak: float) -> Float:
    """The value of every uint8 code under a peak, float32 (256,): a look-up table."""
    values: Float = _fractions(False) * np.float32(peak)
    return values


@lru_cache(maxsize=2)
def _fractions(fine: bool) -> Float:
    last, steps = (65535, FINE_STEPS) if fine else (ZERO_CODE, STEPS_PER_OCTAVE)
    fractions: Float = np.append(np.exp2(-np.arange(last) / steps), 0.0).astype(np.float32)
    fractions.flags.writeable = False
    return fractions


def fast_codes(values: Float, peak: np.float32) -> Code:
    """`quantise` to uint8 by table, of the exponent and 8 bits of the mantissa: at most 0.2 % from exact.

    Args:
        values: float32, any shape, 0 <= values <= peak.
        peak: What code 0 stands for.
    """
    if peak <= 0:
        return np.full(values.shape, ZERO_CODE, np.uint8)
    bits = (values * np.float32(1 / peak)).view(np.uint32)
    bits >>= _TOP_BITS
    codes: Code = _table().take(bits, mode="clip")
    return codes


@lru_cache(maxsize=1)
def _table() -> Code:
    top = int(np.float32(1).view(np.uint32)) >> _TOP_BITS
    middles = ((np.arange(top + 1, dtype=np.uint32) << _TOP_BITS) + (1 << (_TOP_BITS - 1))).view(np.float32)
    codes = quantise(np.minimum(middles, 1), 1.0)
    codes[0] = ZERO_CODE  # an exact zero
    return codes
