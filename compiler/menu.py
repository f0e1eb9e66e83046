"""What heads may choose from: the masks of a menu, how many blocks each computes, what each is expected to lose."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from calibatt.compiler.bits import Bits, count, pack, unpack
from calibatt.compiler.error_model import CODES, at_shares, cuts
from calibatt.compiler.ir import Float64, Groups, Int64, Job, UnitIR, full_bits, over_sources, packed_bits, tile_sources
from calibatt.compiler.stats import Window, window_keep
from calibatt.plans import Blocks, TokenGrid

CUT_STEP = 2
"""Codes from one cut to the next: 4 in a factor of 2."""


class Candidate(NamedTuple):
    """What a head may be.

    Args:
        column: Of the menu: its mask.
        anchored: Whether it computes its anchors alone.
        precision: One of `plans.PRECISIONS`.
    """

    column: int
    anchored: bool
    precision: int


class Menu:
    """The masks of every head, in the order of a table's columns: dense, windows, cuts.

    Args:
        job: Of the units.
        parts: Which of ``windows`` and ``cuts``, joined by ``+``.
    """

    def __init__(self, job: Job, parts: str) -> None:
        self.key = parts
        self.shares = job.manifest.shares
        self.windows = job.manifest.windows if "windows" in parts else ()
        self.cuts = np.arange(0, CODES, CUT_STEP) if "cuts" in parts else np.zeros(0, np.int64)
        """A cut keeps the blocks whose code is below this."""
        self.first_cut = 1 + len(self.windows)
        self.columns = self.first_cut + len(self.cuts)

    def candidates(self, precisions: Sequence[int]) -> list[Candidate]:
        """Precision by precision: all masks, then all of them with anchors."""
        columns = range(self.columns)
        return [Candidate(at, anchored, each) for each in precisions for anchored in (False, True) for at in columns]

    def table(self, unit: UnitIR) -> tuple[Int64, Float64]:
        """Blocks int64 and errors float64, both ``(H, columns)``; leaves the errors of cuts at the ladder's shares."""
        blocks = np.full((unit.heads, self.columns), unit.dense_blocks, np.int64)
        error = np.zeros(blocks.shape)
        required = [np.flatnonzero(unpack(bits, unit.k_blocks)) for bits in unit.required]
        places, starts = np.concatenate(required), np.cumsum([0, *map(len, required[:-1])])
        for column, window in enumerate(self.windows, 1):
            keep = window_keep(window, unit.grid, unit.blocks)
            outside = np.add.reduceat(~keep.reshape(-1).take(places), starts, dtype=np.int64)
            blocks[:, column] = np.count_nonzero(keep) + outside
            error[:, column] = unit.means.window_error[column - 1]
        if len(self.cuts):
            unit.share_error = np.zeros((len(self.shares), unit.heads))
            for head in range(unit.heads):
                number, lost = cuts(unit, head)
                blocks[head, self.first_cut :], error[head, self.first_cut :] = number[self.cuts], lost[self.cuts]
                unit.share_error[:, head] = at_shares(number, lost, self.shares, unit.dense_blocks)
        return blocks, error

    def packed_blocks(self, unit: UnitIR, head: int, groups: Groups) -> Int64:
        """int64 ``(columns,)``: what each mask of a head computes where only its anchors are, packed into tiles."""
        sources = tile_sources(unit.grid, unit.blocks, groups)
        required = packed_bits(unit.required[head], unit.grid, unit.blocks, groups)
        always = np.flatnonzero(unpack(required, unit.k_blocks))
        found = np.full(self.columns, sources.shape[1] * unit.k_blocks, np.int64)
        if self.windows:
            windows = packed_windows(self.windows, unit.grid, unit.blocks, groups)
            found[1 : self.first_cut] = count(windows | required, (1, 2))
        if len(self.cuts):
            least = over_sources(np.minimum, unit.means.error_code[head], sources).reshape(-1)
            others = np.bincount(least, minlength=CODES) - np.bincount(least[always], minlength=CODES)
            below = np.append(0, others.cumsum()) + len(always)
            found[self.first_cut :] = below[self.cuts]
        return found

    def mask(self, unit: UnitIR, head: int, column: int) -> tuple[str, Bits]:
        """Name and packed mask ``(Q, ceil(K / 8))`` of a candidate."""
        if column == 0:
            return "dense", full_bits(unit.q_blocks, unit.k_blocks)
        if column < self.first_cut:
            bits = window_bits(self.windows, unit.grid, unit.blocks)[column - 1]
            return str(self.windows[column - 1]), bits | unit.required[head]
        below = self.cuts[column - self.first_cut]
        return "cut", pack(unit.means.error_code[head] < below) | unit.required[head]


@lru_cache(maxsize=8)
def window_bits(windows: tuple[Window, ...], grid: TokenGrid, blocks: Blocks) -> Bits:
    """Packed ``(windows, Q, ceil(K / 8))``; read only."""
    bits = pack(np.stack([window_keep(window, grid, blocks) for window in windows]))
    bits.flags.writeable = False
    return bits


@lru_cache(maxsize=16)
def packed_windows(windows: tuple[Window, ...], grid: TokenGrid, blocks: Blocks, groups: Groups) -> Bits:
    """Packed ``(windows, tiles, ceil(K / 8))``, over the tiles of anchors that many heads have; read only."""
    bits = over_sources(np.bitwise_or, window_bits(windows, grid, blocks), tile_sources(grid, blocks, groups))
    bits.flags.writeable = False
    return bits
