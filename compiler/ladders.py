"""Ladders: for every head a few families of masks, each mask of a family within the next one.

A ladder follows from the samples of a store and nothing else, the same wherever it is made: only the errors of its
masks, measured while prompts are sampled once more (`stats.refinement`), are kept. Level l of a ladder keeps at most
`shares[l]` of a head's blocks, more only where more is always kept: text, and one block a row. A uint8 a block, the
first level that keeps it, is all of a ladder; blocks of level ``len(shares)`` only a dense head keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from calibatt.compiler.bits import Bool, Votes, unpack
from calibatt.compiler.ir import Float32, Int64, row_required
from calibatt.compiler.passes.protect import protected
from calibatt.compiler.stats import Ladders, Manifest, Window, code_values, fast_codes, window_keep
from calibatt.plans import Blocks

Levels = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.uint8]

FRAMES = {"frame": 0, "near": 1}
"""Kinds that keep near frames first, and how far."""
CODES = 256
SIZE_BITS = 13
"""Sizes are compared by so many upper bits of their float32: to within 6 %."""
SIZES = 1 << SIZE_BITS


@dataclass(frozen=True, eq=False)
class Order:
    """In which order a head's blocks are kept.

    Args:
        classes: Non-negative integers ``(Q, K)``: blocks of one class are kept together.
        rank: int64 ``(classes,)``: the class of the lowest is kept first, equals together.
    """

    classes: npt.NDArray[Any]
    rank: Int64

    @cached_property
    def number(self) -> Int64:
        """int64 ``(classes,)``: blocks of each."""
        return np.bincount(self.classes.reshape(-1), minlength=len(self.rank))


def levels_of(order: Order, shares: Sequence[float], always: Bool, first: Bool | None = None) -> Levels:
    """The levels of one head's blocks.

    Args:
        order: Of the blocks.
        shares: Most blocks of each level, as a share of all; ascending.
        always: bool ``(Q, K)``, blocks of level 0 wherever they come.
        first: bool ``(Q, K)``, blocks that come before all others, in the same order.
    """
    classes, rank = order.classes, order.rank
    room = np.floor(np.array(shares) * classes.size)

    def some(mask: Bool) -> Int64:
        return np.bincount(classes[mask], minlength=len(rank))

    def level(number: Int64, before: int) -> Levels:
        """Of each class, of whose blocks some come after others."""
        kept = np.bincount(rank, weights=number).cumsum() + before
        ends = np.searchsorted(kept, room, side="right")
        found: Levels = np.bincount(ends, minlength=len(kept) + 1)[:-1].cumsum().astype(np.uint8)[rank]
        return found

    before = int(np.count_nonzero(always))
    others = order.number - some(always)
    if first is None:
        levels = level(others, before).take(classes)
    else:
        inside = some(first & ~always)
        levels = level(others - inside, before + int(inside.sum())).take(classes)
        levels[first] = level(inside, before).take(classes[first])
    levels[always] = 0
    return levels


def by_size(values: Float32) -> Order:
    """Non-negative values ``(Q, K)``: the largest first."""
    return Order(_upper(values), np.arange(SIZES)[::-1])


def by_votes(votes: Votes, k_blocks: int, codes: Codes | None) -> Order:
    """Blocks of the most votes of all samples and planes first; of equals those of most error by their codes."""
    number = np.zeros((*votes.digits[0].shape[1:-1], k_blocks), np.uint16)
    for digit, bits in enumerate(votes.digits):
        for plane in bits:
            number += unpack(plane, k_blocks).view(np.uint8).astype(np.uint16) << digit
    most = int(number.max())
    if codes is None:
        return Order(number, most - np.arange(most + 1))
    worth = number.astype(np.int64) * CODES + (CODES - 1 - codes)
    return Order(worth, (most + 1) * CODES - 1 - np.arange((most + 1) * CODES))


def by_row(codes: Codes) -> Order:
    """By what it adds to its row's error to drop a block after all smaller ones of the row, largest first.

    Errors of dropped blocks point the same way (`error_model`), so a row's error is the square of the sum of their
    sizes, and a block of size s dropped after a sum S adds ``s * (s + 2 S)``: rows with few large blocks give up more.

    Args:
        codes: uint8 ``(Q, K)`` of the mean block error, of any peak.
    """
    classes = (np.arange(len(codes)) * CODES)[:, None] + codes
    number = np.bincount(classes.reshape(-1), minlength=len(codes) * CODES).reshape(-1, CODES)
    size = np.sqrt(code_values(1.0).astype(np.float64))
    larger = np.cumsum(number * size, 1)
    smaller = larger[:, -1:] - larger
    added = size * (size + 2 * (smaller + np.maximum(number - 1, 0) * size / 2))
    return Order(classes, SIZES - 1 - _upper(added.astype(np.float32)).astype(np.int64).reshape(-1))


def _upper(values: Float32) -> npt.NDArray[np.uint16]:
    """The upper bits of non-negative float32: in the order of the values."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    found: npt.NDArray[np.uint16] = (bits >> (32 - SIZE_BITS)).astype(np.uint16)
    return found


def steady(error: Float32, codes: Codes, samples: int, manifest: Manifest, apart: Bool) -> Codes:
    """Codes of each block's error, drawn to that of its band: of all blocks whose keys lie as far from their queries.

    What few samples say of a single block is mostly what was in their pictures: the band counts as one sample more, in
    a geometric mean. It is taken of codes, in integers, so that every machine finds the same.

    Args:
        error: float32 ``(Q, K)``.
        codes: uint8 ``(Q, K)`` of it.
        samples: How many it is the sum or mean of.
        manifest: Of the store.
        apart: bool ``(Q, K)``, blocks that do not count in their bands.
    """
    band = _bands(manifest.blocks, *error.shape)
    number = np.bincount(band[~apart], minlength=int(band.max()) + 1)
    total = np.bincount(band.reshape(-1), weights=np.where(apart, 0, error).reshape(-1))
    mean = (total / np.maximum(number, 1)).astype(np.float32)
    typical = fast_codes(mean, error.max()).astype(np.uint32)
    both = codes * np.uint32(samples) + typical.take(band) + np.uint32((samples + 1) // 2)
    found: Codes = (both // np.uint32(samples + 1)).astype(np.uint8)
    return found


@lru_cache(maxsize=2)
def _bands(blocks: Blocks, q_blocks: int, k_blocks: int) -> Int64:
    own = np.arange(q_blocks)[:, None] * blocks.block_q // blocks.block_k
    distance: Int64 = np.arange(k_blocks) - own + own.max()
    return distance


class LadderMaker:
    """Makes the levels of all ladders of one unit, head by head.

    Args:
        ladders: Which.
        manifest: Of the store.
    """

    def __init__(self, ladders: Ladders, manifest: Manifest) -> None:
        self.ladders = ladders
        self.manifest = manifest
        self.text = protected(manifest.grid, manifest.blocks, False, False)
        self.windows = {
            kind: window_keep(Window("frames", (radius,)), manifest.grid, manifest.blocks)
            for kind, radius in FRAMES.items()
        }
        shape = (len(ladders.kinds), manifest.model.heads, manifest.q_blocks, manifest.k_blocks)
        self.levels = np.empty(shape, np.uint8)
        """uint8 ``(S, H, Q, K)``: what was made."""

    def add(
        self, head: int, error: Float32 | None, codes: Codes | None, votes: Votes | None, mass: Float32 | None
    ) -> None:
        """Makes one head's.

        Args:
            head: Which.
            error: float32 ``(Q, K)``, sums of block errors over the samples.
            codes: uint8 ``(Q, K)`` of them.
            votes: Of the head's planes.
            mass: float32 ``(Q, K)``, sums of block mass.
        """
        q_blocks, k_blocks = self.text.shape
        whole = None if codes is None else codes[None]
        always = self.text | unpack(row_required(whole, 1, q_blocks, k_blocks)[0], k_blocks)
        by_error = None
        if {"row", *FRAMES} & set(self.ladders.kinds):
            assert error is not None
            assert codes is not None
            by_error = by_row(steady(error, codes, len(self.ladders.samples), self.manifest, self.text))
        for index, kind in enumerate(self.ladders.kinds):
            order = by_error
            if kind == "own":
                assert codes is not None
                order = by_row(codes)
            elif kind == "votes":
                assert votes is not None
                order = by_votes(votes, k_blocks, codes)
            elif kind == "mass":
                assert mass is not None
                order = by_size(mass)
            assert order is not None
            first = self.windows.get(kind)
            self.levels[index, head] = levels_of(order, self.ladders.shares, always, first)
