"""Ladders: for every head a few families of masks, each mask of a family within the next one.

A ladder follows from the samples of a store and nothing else, the same wherever it is made: only the errors of its
masks, measured while prompts are sampled once more (`stats.refinement`), are kept. Level l of a ladder keeps at most
`shares[l]` of a head's blocks, more only where more is always kept: text, and one block a row. The first level that
keeps a block is all of a ladder; blocks of level ``len(shares)`` only a dense head keeps.

Many blocks come at the same place in the order for the same reason. They are one *class*: all that is done for every
block is to find its class, to count the blocks of each, and to look up its level.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from calibatt.compiler.bits import Bool, Votes, unpack
from calibatt.compiler.ir import Float32, Int64
from calibatt.compiler.passes.protect import protected
from calibatt.compiler.stats import Ladders, Manifest, code_values, fast_codes

Levels = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.uint8]
Rank = npt.NDArray[Any]

CODES = 256
SIZE_BITS = 13
"""Sizes are compared by so many upper bits of their float32: to within 6 %."""
SIZES = 1 << SIZE_BITS


def levels_of(number: Int64, always: int, shares: Sequence[float]) -> tuple[Levels, Int64]:
    """The levels of one head's blocks by their rank.

    Args:
        number: int64 ``(ranks,)``, how many blocks there are of each rank. Those of the lowest are kept first, equals
            together.
        always: How many more there are, which come before all of them.
        shares: Most blocks of each level, as a share of all; ascending.

    Returns:
        The levels, uint8 ``(ranks,)``; blocks up to each level, int64 ``(len(shares),)``.
    """
    kept = np.append(0, number.cumsum()) + always
    ends = np.searchsorted(kept[1:], np.floor(np.array(shares) * kept[-1]), side="right")
    return np.bincount(ends, minlength=len(kept))[:-1].cumsum().astype(np.uint8), kept[ends]


def by_size(values: Float32) -> Rank:
    """Non-negative values ``(Q, K)``: the largest first."""
    found: Rank = SIZES - 1 - _upper(values)
    return found


def by_votes(votes: Votes, k_blocks: int, codes: Codes | None) -> Rank:
    """Blocks of the most votes of all samples and planes first; of equals those of most error by their codes."""
    number = np.zeros((*votes.digits[0].shape[1:-1], k_blocks), np.uint32)
    for digit, bits in enumerate(votes.digits):
        for plane in bits:
            number += unpack(plane, k_blocks).view(np.uint8).astype(np.uint32) << digit
    found: Rank = number.max() - number
    return found if codes is None else found * CODES + codes


def by_row(codes: npt.NDArray[Any]) -> tuple[Int64, Int64, Rank]:
    """By what it adds to its row's error to drop a block after all smaller ones of the row, largest first.

    Errors of dropped blocks point the same way (`error_model`), so a row's error is the square of the sum of their
    sizes, and a block of size s dropped after a sum S adds ``s * (s + 2 S)``: rows with few large blocks give up more.

    Args:
        codes: Integers ``(Q, K)`` below 256, codes of the mean block error, of any peak.

    Returns:
        The class of every block, one of its row and code, int64 ``(Q, K)``; of each class how many blocks it has,
        int64, and its rank. The rank of a class without blocks is of no meaning.
    """
    rows, width = len(codes), int(codes.max()) + 1
    classes = np.add(codes, np.arange(rows)[:, None] * width, dtype=np.int64)
    number = np.bincount(classes.reshape(-1), minlength=rows * width)
    size = np.sqrt(code_values(1.0)[:width].astype(np.float64))
    sizes = number.reshape(rows, width) * size  # of all blocks of a code at once
    larger = sizes.cumsum(1)
    added = np.subtract(larger[:, -1:], larger, out=larger)
    added *= 2
    added += sizes
    added *= size
    return classes, number, by_size(added.astype(np.float32)).reshape(-1)


def _upper(values: Float32) -> npt.NDArray[np.uint16]:
    """The upper bits of non-negative float32: in the order of the values."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    found: npt.NDArray[np.uint16] = (bits >> (32 - SIZE_BITS)).astype(np.uint16)
    return found


class Bands:
    """All blocks whose keys lie as far from their queries, band by band.

    Args:
        manifest: Of the store.
        apart: bool ``(Q, K)``, blocks that do not count in their bands.
    """

    def __init__(self, manifest: Manifest, apart: Bool) -> None:
        own = np.arange(manifest.q_blocks) * manifest.blocks.block_q // manifest.blocks.block_k
        self._first = own.max() - own
        """Band of each row's first block."""
        self._band = (self._first[:, None] + np.arange(manifest.k_blocks)).reshape(-1)
        self._number = np.bincount(self._band, ~apart.reshape(-1))
        self._counts = ~apart if apart.any() else None

    def steady(self, error: Float32, codes: Codes, samples: int) -> npt.NDArray[Any]:
        """Codes of each block's error, drawn to that of its band.

        What few samples say of a single block is mostly what was in their pictures: the band counts as one sample more,
        in a geometric mean. It is taken of codes, in integers, so that every machine finds the same.

        Args:
            error: float32 ``(Q, K)``.
            codes: uint8 ``(Q, K)`` of it.
            samples: How many it is the sum or mean of.
        """
        counted = error if self._counts is None else error * self._counts
        mean = (np.bincount(self._band, counted.reshape(-1)) / np.maximum(self._number, 1)).astype(np.float32)
        kind = np.uint16 if CODES * (samples + 2) <= 1 << 16 else np.uint32
        typical = fast_codes(mean, error.max()).astype(kind) + kind((samples + 1) // 2)
        both: npt.NDArray[Any] = sliding_window_view(typical, codes.shape[1])[self._first]
        both += codes * kind(samples)
        both //= kind(samples + 1)
        return both


@lru_cache(maxsize=1)
def _of_all_heads(manifest: Manifest) -> tuple[Bands, Int64]:
    """Bands, and the places of blocks that every head keeps, ascending; read only."""
    text = protected(manifest.grid, manifest.blocks, False, False)
    return Bands(manifest, text), np.flatnonzero(text)


class LadderMaker:
    """Makes the levels of all ladders of one unit, head by head.

    Args:
        ladders: Which.
        manifest: Of the store.
    """

    def __init__(self, ladders: Ladders, manifest: Manifest) -> None:
        self.ladders = ladders
        self._bands, self._text = _of_all_heads(manifest)
        shape = (len(ladders.kinds), manifest.model.heads)
        self.levels = np.empty((*shape, manifest.q_blocks, manifest.k_blocks), np.uint8)
        """uint8 ``(S, H, Q, K)``: what was made."""
        self.blocks = np.empty((*shape, len(ladders.shares)), np.int64)
        """int64 ``(S, H, shares)``: blocks up to each level."""

    def add(
        self,
        head: int,
        required: Int64,
        error: Float32 | None,
        codes: Codes | None,
        votes: Votes | None,
        mass: Float32 | None,
    ) -> None:
        """Makes one head's.

        Args:
            head: Which.
            required: int64 ``(Q,)``: the block of each row that is always kept.
            error: float32 ``(Q, K)``, sums of block errors over the samples.
            codes: uint8 ``(Q, K)`` of them.
            votes: Of the head's planes.
            mass: float32 ``(Q, K)``, sums of block mass.
        """
        q_blocks, k_blocks = self.levels.shape[2:]
        always = np.union1d(np.arange(q_blocks) * k_blocks + required, self._text)
        for index, kind in enumerate(self.ladders.kinds):
            if kind == "row":
                assert error is not None
                assert codes is not None
                found = by_row(self._bands.steady(error, codes, len(self.ladders.samples)))
            elif kind == "own":
                assert codes is not None
                found = by_row(codes)
            elif kind == "votes":
                assert votes is not None
                found = _of_ranks(by_votes(votes, k_blocks, codes))
            else:
                assert mass is not None
                found = _of_ranks(by_size(mass))
            self._make(head, index, *found, always)

    def _make(self, head: int, index: int, classes: Int64, number: Int64, rank: Rank, always: Int64) -> None:
        """Writes the levels of one ladder.

        Args:
            head: Which.
            index: Of the ladder.
            classes: Of every block, int64 ``(Q, K)``.
            number: Blocks of each class, int64.
            rank: Of each class.
            always: Places of the blocks that are of level 0, int64.
        """
        others = number - np.bincount(classes.reshape(-1)[always], minlength=len(number))
        ranks = np.bincount(rank, others).astype(np.int64)
        of_rank, self.blocks[index, head] = levels_of(ranks, len(always), self.ladders.shares)
        levels = self.levels[index, head]
        levels[...] = of_rank.take(rank).take(classes)
        levels.reshape(-1)[always] = 0


def _of_ranks(rank: Rank) -> tuple[Int64, Int64, Rank]:
    """As `by_row`, of blocks of equal rank."""
    classes = rank.astype(np.int64)
    number = np.bincount(classes.reshape(-1))
    return classes, number, np.arange(len(number))
