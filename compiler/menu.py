"""The masks that heads may choose from: how many blocks each computes, and what error it is expected to make."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from calibatt.compiler.bits import Bits, count, pack, unpack
from calibatt.compiler.error_model import CODES, at_shares, cuts
from calibatt.compiler.ir import (
    Groups,
    Int64,
    Job,
    MenuTable,
    UnitIR,
    full_bits,
    over_sources,
    packed_bits,
    tile_sources,
)
from calibatt.compiler.prediction import CUT, DENSE
from calibatt.compiler.stats import Window, window_keep
from calibatt.plans import Blocks, TokenGrid

CUT_STEP = 2
"""Codes from one cut to the next: 4 cuts in a factor of 2."""


class Mask(NamedTuple):
    """A mask of the menu, for any head.

    Args:
        name: ``dense``, that of a window, or ``cut``.
        kind: As in `prediction.Masks`.
        below: A cut keeps the blocks whose code is below this.
    """

    name: str
    kind: int
    below: int = 0


class Candidate(NamedTuple):
    """A candidate for a head: a mask, with its anchors or without, in a precision.

    Args:
        mask: The mask.
        anchored: Whether the head computes its anchors only.
        precision: One of `plans.PRECISIONS`.
        error: Expected error of all three together.
    """

    mask: Mask
    anchored: bool
    precision: int
    error: float


class Menu:
    """The masks that heads may choose from, in the order of all tables: dense, windows, cuts.

    Args:
        job: The job of the units.
        parts: ``windows``, ``cuts``, or both joined by ``+``.
    """

    def __init__(self, job: Job, parts: str) -> None:
        self.parts = parts
        self.shares = job.manifest.shares
        self.windows = job.manifest.windows if "windows" in parts else ()
        self.cuts = np.arange(0, CODES, CUT_STEP) if "cuts" in parts else np.zeros(0, np.int64)
        self.masks = [
            Mask("dense", DENSE),
            *(Mask(str(window), kind) for kind, window in enumerate(self.windows)),
            *(Mask("cut", CUT, below) for below in self.cuts.tolist()),
        ]

    def table(self, unit: UnitIR) -> MenuTable:
        """The table of a unit, as if no head had anchors; also sets the unit's `share_error`."""
        required = [np.flatnonzero(unpack(bits, unit.k_blocks)) for bits in unit.required]
        places, starts = np.concatenate(required), np.cumsum([0, *map(len, required[:-1])])
        blocks, error = [np.full(unit.heads, unit.dense_blocks)], [np.zeros(unit.heads)]
        for window, measured in zip(self.windows, unit.means.window_error, strict=False):
            keep = window_keep(window, unit.grid, unit.blocks)
            outside = np.add.reduceat(~keep.reshape(-1).take(places), starts, dtype=np.int64)
            blocks.append(np.count_nonzero(keep) + outside)
            error.append(measured)
        if len(self.cuts):
            numbers, losses = np.array([cuts(unit, head) for head in range(unit.heads)]).swapaxes(0, 1)
            shares = (self.shares, unit.dense_blocks)
            unit.share_error = np.stack([at_shares(*both, *shares) for both in zip(numbers, losses, strict=True)], 1)
            blocks.extend(numbers.T[self.cuts])
            error.extend(losses.T[self.cuts])
        return MenuTable(self.parts, np.stack(blocks, 1).astype(np.int64), np.stack(error, 1), {})

    def packed_blocks(self, unit: UnitIR, head: int, groups: Groups) -> Int64:
        """int64 ``(masks,)``: blocks that each mask computes if the head computes its anchors only."""
        sources = tile_sources(unit.grid, unit.blocks, groups)
        required = packed_bits(unit.required[head], unit.grid, unit.blocks, groups)
        always = np.flatnonzero(unpack(required, unit.k_blocks))
        parts = [np.array([sources.shape[1] * unit.k_blocks])]
        if self.windows:
            parts.append(count(packed_windows(self.windows, unit.grid, unit.blocks, groups) | required, (1, 2)))
        if len(self.cuts):
            least = over_sources(np.minimum, unit.means.error_code[head], sources).reshape(-1)
            others = np.bincount(least, minlength=CODES) - np.bincount(least[always], minlength=CODES)
            below = np.append(0, others.cumsum()) + len(always)
            parts.append(below[self.cuts])
        blocks: Int64 = np.concatenate(parts, dtype=np.int64)
        return blocks

    def bits(self, mask: Mask, unit: UnitIR, head: int) -> Bits:
        """Packed ``(Q, ceil(K / 8))``: the blocks that a mask keeps of a head."""
        if mask.kind == DENSE:
            return full_bits(unit.q_blocks, unit.k_blocks)
        if mask.kind == CUT:
            bits = pack(unit.means.error_code[head] < mask.below)
        else:
            bits = window_bits(self.windows, unit.grid, unit.blocks)[mask.kind].copy()
        bits |= unit.required[head]
        return bits


@lru_cache(maxsize=8)
def window_bits(windows: tuple[Window, ...], grid: TokenGrid, blocks: Blocks) -> Bits:
    """Packed ``(windows, Q, ceil(K / 8))``; cached and read only."""
    bits = pack(np.stack([window_keep(window, grid, blocks) for window in windows]))
    bits.flags.writeable = False
    return bits


@lru_cache(maxsize=16)
def packed_windows(windows: tuple[Window, ...], grid: TokenGrid, blocks: Blocks, groups: Groups) -> Bits:
    """Packed ``(windows, tiles, ceil(K / 8))``, over the tiles of such anchors; cached and read only."""
    bits = over_sources(np.bitwise_or, window_bits(windows, grid, blocks), tile_sources(grid, blocks, groups))
    bits.flags.writeable = False
    return bits
