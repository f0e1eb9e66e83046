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
    """Bits set, int64, summed over `axes`: fewer than 2 ** 32, which are added twice as fast as int64."""
    found: npt.NDArray[np.int64] = np.bitwise_count(bits).sum(axis=axes, dtype=np.uint32).astype(np.int64)
    return found


class Votes:
    """How many of the masks seen so far set each bit, counted 8 blocks at a time.

    The counts are kept bit-sliced: `digits[i]` is a packed mask of the blocks whose count has binary digit i set, so
    adding a mask is a ripple of exclusive ors, and S masks take ``log2(S) + 1`` bits a block.
    """

    def __init__(self) -> None:
        self.voters = 0
        self.digits: list[Bits] = []

    def add(self, mask: Bits) -> None:
        """Counts one more packed mask; all of one shape."""
        self.voters += 1
        carry = mask.copy()
        for index, digit in enumerate(self.digits):
            self.digits[index], carry = digit ^ carry, digit & carry
        if self.voters >> len(self.digits):
            self.digits.append(carry)

    def at_least(self, votes: int) -> Bits:
        """Packed mask of the blocks with at least `votes` votes, 1 <= votes <= voters."""
        above = np.zeros_like(self.digits[0])
        equal = np.full_like(self.digits[0], 0xFF)
        for index in reversed(range(len(self.digits))):
            digit = self.digits[index]
            if votes >> index & 1:
                equal &= digit
            else:
                above |= equal & digit
                equal &= ~digit
        if votes >> len(self.digits):
            return above
        return above | equal
