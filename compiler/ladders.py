"""Ladders: for every head a few families of masks, each mask of a family within the next one.

A ladder follows from the samples of a store and nothing else, the same wherever it is made: only the errors of its
masks, measured while prompts are sampled once more (`stats.refinement`), are kept. Level l of a ladder keeps at most
`shares[l]` of a head's blocks, more only where more is always kept: text, and one block a row. The first level that
keeps a block is all of a ladder; blocks of level ``len(shares)`` only a dense head keeps. The levels of a block in all
ladders are kept together in one *word*, a few bits each.

Blocks of equal *rank* in equal *regions* share their levels: all that is done for every block is to find its place
among those, to count the blocks of each place, and to look up its word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from calibatt.compiler.bits import Bool, Votes, unpack
from calibatt.compiler.ir import Float32, Int64
from calibatt.compiler.passes.protect import protected
from calibatt.compiler.stats import Ladders, Manifest, Window, code_values, fast_codes, window_keep

Levels = npt.NDArray[np.uint8]
Words = npt.NDArray[Any]
Codes = npt.NDArray[np.uint8]
Regions = npt.NDArray[np.uint8]
Rank = npt.NDArray[Any]

FRAMES = {"frame": 0, "near": 1}
"""Kinds that keep near frames first, and how far; the nearest come first."""
CODES = 256
SIZE_BITS = 13
"""Sizes are compared by so many upper bits of their float32: to within 6 %."""
SIZES = 1 << SIZE_BITS
CACHED_BLOCKS = 1 << 16
"""About so many blocks of a head are worked on at once."""
REGIONS = len(FRAMES) + 2
"""Blocks that are always kept, those that kinds of `FRAMES` keep first, and all others."""


def some_rows(q_blocks: int, k_blocks: int) -> Iterator[slice]:
    """All rows of a head, as many at a time as stay in cache."""
    step = max(1, CACHED_BLOCKS // k_blocks)
    for start in range(0, q_blocks, step):
        yield slice(start, start + step)


def level_bits(shares: int) -> int:
    """Bits of a level in a word, of ladders of so many shares."""
    return shares.bit_length()


def level_in(words: Words, ladder: int, shares: int) -> Levels:
    """The levels of one ladder, uint8, from words of any shape."""
    bits = level_bits(shares)
    found: Levels = ((words >> (bits * ladder)) & ((1 << bits) - 1)).astype(np.uint8)
    return found


def no_words(shape: tuple[int, ...], ladders: int, shares: int) -> Words:
    """Words of level 0 in all ladders, of the fewest bytes that hold them."""
    return np.zeros(shape, np.min_scalar_type((1 << (level_bits(shares) * ladders)) - 1))


def levels_of(number: Int64, shares: Sequence[float], firsts: Sequence[int]) -> tuple[Levels, Int64]:
    """The levels of one head's blocks in some ladders of one order, by what decides them.

    Args:
        number: int64 ``(R, ranks)``, how many blocks there are of each region and rank. Those of the lowest rank are
            kept first, equals together; those of region 0 are of level 0 whatever their rank.
        shares: Most blocks of each level, as a share of all; ascending.
        firsts: One a ladder: blocks of regions 1 to that come before all others, in the same order.

    Returns:
        The levels, uint8 ``(len(firsts), R, ranks)``; blocks up to each level, int64 ``(len(firsts), len(shares))``.
    """
    ranks = number.shape[1]
    room = np.floor(np.array(shares) * number.sum())

    def level(number: Int64, before: int) -> tuple[Int64, Int64]:
        """Of each rank, of whose blocks some come after others; and blocks up to each level."""
        kept = np.append(0, number.cumsum())
        ends = np.searchsorted(kept[1:] + before, room, side="right")
        return np.bincount(ends, minlength=ranks + 1)[:-1].cumsum(), kept[ends]

    tables = np.zeros((len(firsts), *number.shape), np.uint8)
    blocks = np.full((len(firsts), len(shares)), number[0].sum())
    for table, first, kept in zip(tables, firsts, blocks, strict=True):
        before = int(kept[0])
        for some in (slice(1, first + 1), slice(first + 1, None)):
            here = number[some].sum(0)
            table[some], added = level(here, before)
            kept += added
            before += int(here.sum())
    return tables, blocks


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


def by_row(codes: npt.NDArray[Any]) -> Rank:
    """By what it adds to its row's error to drop a block after all smaller ones of the row, largest first.

    Errors of dropped blocks point the same way (`error_model`), so a row's error is the square of the sum of their
    sizes, and a block of size s dropped after a sum S adds ``s * (s + 2 S)``: rows with few large blocks give up more.

    Args:
        codes: Integers ``(Q, K)`` below 256, codes of the mean block error, of any peak.

    Returns:
        Below `SIZES`, int64 ``(Q, K)``.
    """
    rank = np.empty(codes.shape, np.int64)
    for rows in some_rows(*codes.shape):
        _by_row(codes[rows], rank[rows])
    return rank


def _by_row(codes: npt.NDArray[Any], out: Int64) -> None:
    width = int(codes.max()) + 1
    classes = np.add(codes, (np.arange(len(codes)) * width)[:, None], dtype=np.intp)
    number = np.bincount(classes.reshape(-1), minlength=len(codes) * width).reshape(-1, width).astype(np.float64)
    size = np.sqrt(code_values(1.0)[:width].astype(np.float64))
    number *= size  # of all blocks of a code at once
    larger = np.cumsum(number, 1)
    added = larger[:, -1:] - larger
    added *= 2
    added += number
    added *= size
    by_size(added.astype(np.float32)).astype(np.int64).take(classes, out=out, mode="clip")


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
def _of_all_heads(manifest: Manifest) -> tuple[Bands, Regions]:
    """Bands, and region of each block but for those that a head requires; read only."""
    text = protected(manifest.grid, manifest.blocks, False, False)
    found = np.full(text.shape, REGIONS - 1, np.uint8)
    for region, radius in sorted(enumerate(FRAMES.values(), 1), reverse=True):
        found[window_keep(Window("frames", (radius,)), manifest.grid, manifest.blocks)] = region
    found[text] = 0
    return Bands(manifest, text), found


class LadderMaker:
    """Makes the levels of all ladders of one unit, head by head.

    Args:
        ladders: Which.
        manifest: Of the store.
    """

    def __init__(self, ladders: Ladders, manifest: Manifest) -> None:
        self.ladders = ladders
        self._bands, self._region = _of_all_heads(manifest)
        heads, shares = manifest.model.heads, len(ladders.shares)
        self.words = no_words((heads, *self._region.shape), len(ladders.kinds), shares)
        """``(H, Q, K)``: what was made."""
        self.blocks = np.empty((len(ladders.kinds), heads, shares), np.int64)
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
        kinds = self.ladders.kinds
        if together := [kind for kind in kinds if kind in ("row", *FRAMES)]:
            assert error is not None
            assert codes is not None
            self._make(head, together, by_row(self._bands.steady(error, codes, len(self.ladders.samples))), required)
        if "own" in kinds:
            assert codes is not None
            self._make(head, ["own"], by_row(codes), required)
        if "votes" in kinds:
            assert votes is not None
            self._make(head, ["votes"], by_votes(votes, self._region.shape[1], codes), required)
        if "mass" in kinds:
            assert mass is not None
            self._make(head, ["mass"], by_size(mass), required)

    def _make(self, head: int, kinds: Sequence[str], rank: Rank, required: Int64) -> None:
        """Ladders of one order.

        Args:
            head: Which.
            kinds: Of the ladders.
            rank: Unsigned or int64 ``(Q, K)``, written to where it is int64: the blocks of the lowest come first.
            required: Of `add`.
        """
        rows, ranks = np.arange(len(rank)), int(rank.max()) + 1
        place = rank.astype(np.int64, copy=False)
        for some in some_rows(*place.shape):
            place[some] += self._region[some] * np.int64(ranks)
        place[rows, required] -= self._region[rows, required] * np.int64(ranks)  # to region 0
        number = np.bincount(place.reshape(-1), minlength=REGIONS * ranks)
        firsts = [list(FRAMES).index(kind) + 1 if kind in FRAMES else 0 for kind in kinds]
        here = [self.ladders.kinds.index(kind) for kind in kinds]
        shares = self.ladders.shares
        tables, self.blocks[here, head] = levels_of(number.reshape(REGIONS, ranks), shares, firsts)
        words = np.zeros(number.size, self.words.dtype)
        for index, levels in zip(here, tables, strict=True):
            words |= levels.reshape(-1).astype(words.dtype) << (level_bits(len(shares)) * index)
        self.words[head] |= words.take(place)
