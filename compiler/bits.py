"""Block masks as packed bits: the last axis holds 8 key blocks a byte, bits little-endian, padding bits 0."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]


def pack(keep: npt.NDArray[Any]) -> Bits:
    """uint8 ``(..., ceil(K / 8))`` of a bool array ``(..., K)``."""
    return np.packbits(keep, axis=-1, bitorder="little")


def unpack(bits: Bits, k_blocks: int) -> Bool:
    """The bool array ``(..., K)`` that `pack` was given."""
    return np.unpackbits(bits, axis=-1, count=k_blocks, bitorder="little").view(np.bool_)


def count(bits: Bits, axes: tuple[int, ...] = (-1,)) -> npt.NDArray[np.int64]:
    """Number of set bits, int64, summed over `axes`; it must be below 2 ** 32, since uint32 adds twice as fast."""
    counts: npt.NDArray[np.int64] = np.bitwise_count(bits).sum(axis=axes, dtype=np.uint32).astype(np.int64)
    return counts
