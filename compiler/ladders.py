"""Ladders: for every head a few families of masks, each mask of a family within the next one.

A ladder follows from the samples of a store and nothing else, the same wherever it is made: only the errors of its
masks, measured while prompts are sampled once more (`stats.refinement`), are kept. Level l of a ladder keeps at most
`shares[l]` of a head's blocks, more only where more is always kept: text, and one block a row. A uint8 a block, the
first level that keeps it, is all of a ladder; blocks of level ``len(shares)`` only a dense head keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from calibatt.compiler.bits import Bool, Votes, unpack
from calibatt.compiler.ir import Float32, row_required
from calibatt.compiler.passes.protect import protected
from calibatt.compiler.stats import Ladders, Manifest, code_values

Levels = npt.NDArray[np.uint8]
Keys = npt.NDArray[np.int64]

CODES = 256
BITS_OF_A_SIZE = 16
"""Sizes are compared by the upper half of their float32: to within 1 %."""


def levels_of(keys: Keys, shares: Sequence[float], always: Bool) -> Levels:
    """The levels of one head's blocks from the order in which they are kept.

    Args:
        keys: Small non-negative integers ``(Q, K)``; the lowest is kept first, equals together.
        shares: Most blocks of each level, as a share of all; ascending.
        always: bool ``(Q, K)``, blocks of level 0 whatever their key.
    """
    keys = np.where(always, 0, keys + 1)
    kept = np.bincount(keys.reshape(-1)).cumsum()
    room = np.floor(np.array(shares) * keys.size)
    level = np.searchsorted(room, kept).astype(np.uint8)
    level[0] = 0
    found: Levels = level.take(keys)
    return found


def by_size(values: Float32) -> Keys:
    """Keys ``(Q, K)`` of non-negative values: the largest first."""
    top = (1 << BITS_OF_A_SIZE) - 1
    return top - (np.ascontiguousarray(values).view(np.uint32) >> (32 - BITS_OF_A_SIZE)).astype(np.int64)


def by_votes(votes: Votes, k_blocks: int, codes: npt.NDArray[np.uint8] | None) -> Keys:
    """Keys ``(Q, K)``: blocks of the most votes of all samples and planes first; of equals those of most error."""
    number = np.zeros((*votes.digits[0].shape[1:-1], k_blocks), np.int64)
    for digit, bits in enumerate(votes.digits):
        number += unpack(bits, k_blocks).sum(0, dtype=np.int64) << digit
    keys = number.max() - number
    return keys if codes is None else keys * CODES + codes


def by_row(codes: npt.NDArray[np.uint8]) -> Keys:
    """Keys ``(Q, K)``: what it adds to its row's error to drop a block after all smaller ones of the row, largest first.

    Errors of dropped blocks point the same way (`error_model`), so a row's error is the square of the sum of their
    sizes, and a block of size s dropped after a sum S adds ``s * (s + 2 S)``: rows with few large blocks give up more.

    Args:
        codes: uint8 ``(Q, K)`` of the mean block error, of any peak.
    """
    rows = np.arange(len(codes))[:, None] * CODES
    number = np.bincount((rows + codes).reshape(-1), minlength=len(codes) * CODES).reshape(-1, CODES)
    size = np.sqrt(code_values(1.0).astype(np.float64))
    sums = number * size
    larger = np.cumsum(sums, 1)
    smaller = larger[:, -1:] - larger
    added = size * (size + 2 * (smaller + np.maximum(number - 1, 0) * size / 2))
    return by_size(added.astype(np.float32)).reshape(-1).take(rows + codes)



class LadderMaker:
    """Makes the levels of all ladders of one unit, head by head.

    Args:
        ladders: Which.
        manifest: Of the store.
    """

    def __init__(self, ladders: Ladders, manifest: Manifest) -> None:
        self.ladders = ladders
        self.k_blocks = manifest.k_blocks
        self.always = protected(manifest.grid, manifest.blocks, False, False)
        shape = (len(ladders.kinds), manifest.model.heads, manifest.q_blocks, manifest.k_blocks)
        self.levels = np.empty(shape, np.uint8)
        """uint8 ``(S, H, Q, K)``: what was made."""

    def add(
        self, head: int, error: Float32 | None, codes: npt.NDArray[np.uint8] | None, votes: Votes | None, mass: Any
    ) -> None:
        """Makes one head's.

        Args:
            head: Which.
            error: float32 ``(Q, K)``, sums of block errors over the samples.
            codes: uint8 ``(Q, K)`` of them.
            votes: Of the head's planes.
            mass: float32 ``(Q, K)``, sums of block mass.
        """
        whole = None if codes is None else codes[None]
        always = self.always | unpack(row_required(whole, 1, *self.always.shape)[0], self.k_blocks)
        for index, kind in enumerate(self.ladders.kinds):
            if kind == "votes":
                assert votes is not None
                keys = by_votes(votes, self.k_blocks, codes)
            elif kind == "row":
                assert codes is not None
                keys = by_row(codes)
            else:
                values = error if kind == "error" else mass
                assert values is not None
                keys = by_size(values)
            self.levels[index, head] = levels_of(keys, self.ladders.shares, always)



def along_band(values: Float32, manifest: Manifest, apart: Bool) -> Float32:
    """For each block the mean over all blocks whose keys lie as far behind or before their queries.

    Args:
        values: float32 ``(Q, K)``.
        manifest: Of the store.
        apart: bool ``(Q, K)``, blocks that do not count.
    """
    blocks = manifest.blocks
    distance = np.arange(values.shape[1]) - np.arange(values.shape[0])[:, None] * blocks.block_q // blocks.block_k
    distance -= distance.min()
    at = distance.reshape(-1)
    number = np.bincount(at, weights=~apart.reshape(-1))
    total = np.bincount(at, weights=np.where(apart, 0, values).reshape(-1))
    found: Float32 = (total / np.maximum(number, 1)).astype(np.float32)[distance]
    return found
