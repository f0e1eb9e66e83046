"""What heads may choose from: the masks of a menu, how many blocks each computes, what each is expected to lose."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from calibatt.compiler.bits import Bits, count, pack, unpack
from calibatt.compiler.error_model import CODES, code_counts, row_weights
from calibatt.compiler.ir import Float64, Groups, Int64, Job, UnitIR, full_bits, over_sources, packed_bits, tile_sources
from calibatt.compiler.stats import Window, window_keep
from calibatt.compiler.stats.unit import STEPS_PER_OCTAVE
from calibatt.plans import Blocks, TokenGrid

Key = tuple[str, int, tuple[str, ...]]


class Menu:
    """The candidates of every head, in the order of a table's columns: dense, planes, windows, cuts, ladders.

    Args:
        job: Of the units.
        parts: Which of ``planes``, ``windows``, ``cuts`` and ``ladders``, joined by ``+``.
        levels_per_octave: Steps of the cuts' levels in a factor of 2.
        kinds: Which of the refinement's ladders.
    """

    def __init__(self, job: Job, parts: str, levels_per_octave: int, kinds: tuple[str, ...]) -> None:
        manifest = job.manifest
        self.key: Key = (parts, levels_per_octave, kinds)
        self.planes = manifest.thresholds if "planes" in parts else ()
        self.windows = manifest.windows if "windows" in parts else ()
        step = STEPS_PER_OCTAVE // levels_per_octave
        self.cuts = np.arange(0, CODES, step) if "cuts" in parts else np.zeros(0, np.int64)
        """A cut keeps the blocks whose code is below this."""
        self.ladders = job.ladders if kinds else None
        self.kinds = [] if self.ladders is None else [self.ladders.kinds.index(kind) for kind in kinds]
        """Which of the unit's ladders are in the menu."""
        self.shares = 0 if self.ladders is None else len(self.ladders.shares)
        first = 1 + len(self.planes) + len(self.windows)
        self.first_rung = first + len(self.cuts)
        estimated = np.zeros(self.first_rung + len(self.kinds) * self.shares, np.bool_)
        estimated[first : self.first_rung] = True
        estimated[1 : 1 + len(self.planes)] = manifest.has_block_error
        self.estimated = estimated
        """bool ``(columns,)``: errors that are sums of block errors, still without the job's factor."""

    def table(self, job: Job, unit: UnitIR) -> tuple[Int64, Float64]:
        """Blocks int64 and errors float64, both ``(H, columns)``, estimated ones still without the job's factor."""
        blocks = np.full((unit.heads, len(self.estimated)), unit.dense_blocks, np.int64)
        error = np.zeros(blocks.shape)
        planes, at = len(self.planes), 1 + len(self.planes)
        if unit.means.error_code is not None and (planes or len(self.cuts)):
            for head in range(unit.heads):
                self._from_codes(unit, head, blocks[head], error[head])
        elif planes:
            assert unit.voted is not None
            blocks[:, 1:at] = count(unit.voted | unit.required, (2, 3)).T
            error[:, 1:at] = unit.means.menu_residual_error[:planes].T
        required = [np.flatnonzero(unpack(bits, unit.k_blocks)) for bits in unit.required]
        places, starts = np.concatenate(required), np.cumsum([0, *map(len, required[:-1])])
        for index, window in enumerate(self.windows):
            keep = window_keep(window, unit.grid, unit.blocks)
            outside = np.add.reduceat(~keep.reshape(-1).take(places), starts, dtype=np.int64)
            blocks[:, at + index] = np.count_nonzero(keep) + outside
            error[:, at + index] = unit.means.menu_residual_error[len(job.manifest.thresholds) + index]
        if self.ladders is not None:
            assert unit.means.refined_error is not None
            windows = len(unit.means.refined_error) - len(job.manifest.windows)
            rungs = unit.means.refined_error[:windows].reshape(-1, self.shares, unit.heads)[self.kinds]
            error[:, self.first_rung :] = rungs.reshape(-1, unit.heads).T
            if self.windows:
                error[:, at : at + len(self.windows)] = unit.means.refined_error[windows:].T
            for head in range(unit.heads):
                blocks[head, self.first_rung :] = self._rung_blocks(unit, head, required[head]).reshape(-1)
        return blocks, error

    def _rung_blocks(self, unit: UnitIR, head: int, required: Int64) -> Int64:
        """Blocks of every level of every ladder of a head, int64 ``(kinds, shares)``, with those at `required`."""
        assert unit.means.levels is not None
        assert unit.means.level_blocks is not None
        found = []
        for kind in self.kinds:
            levels = unit.means.levels[kind, head].reshape(-1).take(required)
            kept = np.bincount(levels, minlength=self.shares + 1)[: self.shares].cumsum()
            found.append(unit.means.level_blocks[kind, head] + len(required) - kept)
        return np.stack(found)

    def _from_codes(self, unit: UnitIR, head: int, blocks: Int64, error: Float64) -> None:
        """Planes and cuts of one head from counts of its codes: no mask is made.

        The class of a block is the number of planes that keep it, or, for a required block, one more than there are.
        """
        planes = len(self.planes)
        required = unpack(unit.required[head], unit.k_blocks).view(np.uint8)
        classes = required * np.uint8(planes + 1)
        if planes:
            assert unit.voted is not None
            for plane in unpack(unit.voted[:, head], unit.k_blocks).view(np.uint8):
                classes += plane * (1 - required)
        number, sums = code_counts(unit, head, classes, planes + 2)
        weights = row_weights(unit)
        blocks[1 : 1 + planes] = unit.dense_blocks - np.cumsum(number[:planes].sum(1))[::-1]
        error[1 : 1 + planes] = (weights @ np.cumsum(sums[:, :planes].sum(2), 1) ** 2)[::-1]
        if len(self.cuts):
            dropped = np.cumsum(number[:-1].sum(0)[::-1])[::-1]
            cuts = slice(self.first_rung - len(self.cuts), self.first_rung)
            blocks[cuts] = unit.dense_blocks - dropped[self.cuts]
            by_code = np.cumsum(sums[:, :-1].sum(1)[:, ::-1], 1)[:, ::-1]
            error[cuts] = (weights @ by_code**2)[self.cuts]

    def packed_blocks(self, unit: UnitIR, head: int, groups: Groups) -> Int64:
        """int64 ``(columns,)``: what each mask of a head computes where only its anchors are, packed into tiles."""
        sources = tile_sources(unit.grid, unit.blocks, groups)
        required = packed_bits(unit.required[head], unit.grid, unit.blocks, groups)
        always = np.flatnonzero(unpack(required, unit.k_blocks))
        found = np.full(len(self.estimated), sources.shape[1] * unit.k_blocks, np.int64)
        at = 1 + len(self.planes)
        if self.planes:
            assert unit.voted is not None
            voted = over_sources(np.bitwise_or, unit.voted[: len(self.planes), head], sources)
            found[1:at] = count(voted | required, (1, 2))
        if self.windows:
            windows = packed_windows(self.windows, unit.grid, unit.blocks, groups)
            found[at : at + len(self.windows)] = count(windows | required, (1, 2))

        def up_to(values: npt.NDArray[np.uint8], most: int) -> Int64:
            """How many blocks of the tiles are required, or have a value below 0, 1, ... `most`."""
            least = over_sources(np.minimum, values, sources).reshape(-1)
            others = np.bincount(least, minlength=most) - np.bincount(least[always], minlength=most)
            return np.append(0, others[:most].cumsum()) + len(always)

        if len(self.cuts):
            assert unit.means.error_code is not None
            below = up_to(unit.means.error_code[head], CODES)
            found[self.first_rung - len(self.cuts) : self.first_rung] = below[self.cuts]
        for index, kind in enumerate(self.kinds):
            assert unit.means.levels is not None
            rungs = slice(self.first_rung + index * self.shares, self.first_rung + (index + 1) * self.shares)
            found[rungs] = up_to(unit.means.levels[kind, head], self.shares + 1)[1:-1]
        return found

    def mask(self, unit: UnitIR, head: int, column: int) -> tuple[str, Bits]:
        """Name and packed mask ``(Q, ceil(K / 8))`` of a candidate."""
        at = column - 1
        if column == 0:
            return "dense", full_bits(unit.q_blocks, unit.k_blocks)
        if at < len(self.planes):
            assert unit.voted is not None
            return f"plane {self.planes[at]:g}", unit.voted[at, head] | unit.required[head]
        if (at := at - len(self.planes)) < len(self.windows):
            bits = window_bits(self.windows, unit.grid, unit.blocks)[at]
            return str(self.windows[at]), bits | unit.required[head]
        if column < self.first_rung:
            assert unit.means.error_code is not None
            below = self.cuts[at - len(self.windows)]
            return "cut", pack(unit.means.error_code[head] < below) | unit.required[head]
        assert self.ladders is not None
        assert unit.means.levels is not None
        index, level = divmod(column - self.first_rung, self.shares)
        kind = self.kinds[index]
        return f"ladder {self.ladders.kinds[kind]}", pack(unit.means.levels[kind, head] <= level) | unit.required[head]


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
