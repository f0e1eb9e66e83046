"""The compiler's intermediate representation: a `Job` of `UnitIR`s, one a recorded time and layer; passes change them.

H heads, Q and K query and key blocks, T thresholds, M menu entries (T planes, then the windows), Y rows of a frame,
R the row radius. Packed masks are uint8 ``(..., ceil(K / 8))``, bits little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from calibatt.compiler.bits import Bits, Bool, Votes, count, pack, unpack
from calibatt.compiler.cost import Device
from calibatt.compiler.stats import Manifest
from calibatt.plans import Blocks, LayerSchedule, TokenGrid

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

Groups = tuple[tuple[int, ...], tuple[int, ...]]
"""First rows and anchor rows of the groups of one frame; every frame repeats them."""


@dataclass(frozen=True, eq=False)
class UnitMeans:
    """What the samples say of one (time, layer), averaged over them.

    Args:
        samples: How many.
        votes: Of the keep planes, packed masks ``(T, H, Q, ceil(K / 8))``.
        error_code: uint8 ``(H, Q, K)``, codes of the mean block error (`stats.quantise`), or None.
        error_peak: float32 ``(H,)``, what code 0 stands for: squared output error relative to the residual stream.
        menu_error: float64 ``(M, H)``, measured, relative to the head's output.
        menu_residual_error: float64 ``(M, H)``, measured, relative to the residual stream.
        menu_predicted: float64 ``(M, H)``, the same predicted by summing block errors; None without block error.
        output_size: float64 ``(H,)``, the head's output relative to the residual stream.
        row_residual_error: float64 ``(H, Y, 2 R)``, NaN where the offset leaves the frame.
    """

    samples: int
    votes: Votes
    error_code: npt.NDArray[np.uint8] | None
    error_peak: Float32
    menu_error: Float64
    menu_residual_error: Float64
    menu_predicted: Float64 | None
    output_size: Float64
    row_residual_error: Float64


@dataclass(eq=False)
class UnitIR:
    """One layer at one recorded time, from statistics to schedule.

    Args:
        time_index: Of the manifest's times.
        layer: Of the model.
        grid: The token sequence.
        blocks: Block sizes.
        weight: The time weight w(t), times the layer's factor where layers were probed.
        means: The statistics.
        required: Packed ``(H, Q, ceil(K / 8))``, blocks that every mask of the head keeps; at least one a row.
        force_dense: Every head stays dense.
        voted: Packed ``(T, H, Q, ceil(K / 8))``, the planes that the samples agree on; set by `vote`.
        keep: Packed ``(H, Q, ceil(K / 8))``, the chosen masks; set by `select`.
        choice: What each head's mask is: ``dense``, ``plane 0.95``, ``rows(2)``, ``cut``.
        error: float64 ``(H,)``, predicted squared output error of each head, relative to the residual stream.
        anchors: The anchor groups of each head, or None where every row is computed.
        tile_order: int32, see `LayerSchedule`; set by `schedule`.
        lowered: Set by `lower`.
    """

    time_index: int
    layer: int
    grid: TokenGrid
    blocks: Blocks
    weight: float
    means: UnitMeans
    required: Bits
    force_dense: bool = False
    voted: Bits | None = None
    keep: Bits | None = None
    choice: list[str] = field(default_factory=list)
    error: Float64 = field(default_factory=lambda: np.zeros(0))
    anchors: list[Groups | None] = field(default_factory=list)
    tile_order: npt.NDArray[np.int32] | None = None
    lowered: LayerSchedule | None = None

    @property
    def name(self) -> str:
        return f"time {self.time_index}, layer {self.layer}"

    @property
    def heads(self) -> int:
        return len(self.required)

    @property
    def q_blocks(self) -> int:
        return self.blocks.q_blocks(self.grid.tokens)

    @property
    def k_blocks(self) -> int:
        return self.blocks.k_blocks(self.grid.tokens)

    @property
    def dense_blocks(self) -> int:
        """Blocks of one dense head."""
        return self.q_blocks * self.k_blocks

    def head_keep(self, head: int) -> Bool:
        """bool ``(Q, K)``, the head's mask over the original query blocks; all of them before `select`."""
        if self.keep is None:
            return np.ones((self.q_blocks, self.k_blocks), dtype=np.bool_)
        return unpack(self.keep[head], self.k_blocks)

    def tile_keep(self, head: int) -> Bool:
        """bool ``(tiles, K)``, the head's mask over its packed tiles (those of the anchor rows, where it has any)."""
        groups = self.anchors[head] if self.anchors else None
        keep = self.head_keep(head)
        return keep if groups is None else packed_keep(keep, self.grid, self.blocks, groups[1])

    def computed(self) -> tuple[Int64, Int64]:
        """Tiles and computed blocks of each head, both int64 ``(H,)``."""
        tiles = np.full(self.heads, self.q_blocks, dtype=np.int64)
        blocks = np.full(self.heads, self.dense_blocks, dtype=np.int64)
        if self.keep is not None:
            blocks = count(self.keep, (1, 2))
        for head, groups in enumerate(self.anchors):
            if groups is not None:
                keep = self.tile_keep(head)
                tiles[head], blocks[head] = len(keep), int(keep.sum())
        return tiles, blocks


@dataclass(eq=False)
class Job:
    """Everything known of all units, in order of time and then layer.

    Args:
        manifest: Of the statistics.
        samples: Names of the samples.
        weights: float64 ``(times,)``, the time weight w(t).
        weights_probed: False where the weight is 1 for want of a probe.
        weights_source: Where the weights come from, in words.
        device: What predicts milliseconds.
        units: ``times * layers`` of them.
        error_factor: Of `error_model.coherence`.
        multiplier: The price of a millisecond in weighted error (lambda), once `select` has found it.
        error_budget: Most error times weight over all units, where that was asked for.
        findings: What each pass has to report: plain values.
    """

    manifest: Manifest
    samples: tuple[str, ...]
    weights: Float64
    weights_probed: bool
    weights_source: str
    device: Device
    units: list[UnitIR]
    error_factor: float = 1.0
    multiplier: float | None = None
    error_budget: float | None = None
    findings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def unit(self, time_index: int, layer: int) -> UnitIR:
        return self.units[time_index * self.manifest.model.layers + layer]

    def at_time(self, time_index: int) -> list[UnitIR]:
        """The units of all layers at one time."""
        layers = self.manifest.model.layers
        return self.units[time_index * layers : (time_index + 1) * layers]

    def total_error(self) -> float:
        """Predicted error times weight over all units."""
        return float(sum(unit.error.sum() * unit.weight for unit in self.units))

    def unit_ms(self, unit: UnitIR) -> float:
        """Predicted milliseconds of a unit's attention call."""
        tiles, blocks = unit.computed()
        return self._ms(unit, int(tiles.sum()), int(blocks.sum()))

    def dense_ms(self, unit: UnitIR) -> float:
        """The same, were every head dense."""
        return self._ms(unit, unit.heads * unit.q_blocks, unit.heads * unit.dense_blocks)

    def _ms(self, unit: UnitIR, tiles: int, blocks: int) -> float:
        stored = unit.heads * unit.grid.tokens
        return self.device.predict_ms(tiles, blocks, stored, unit.blocks, self.manifest.model.head_dim)


def packed_keep(keep: Bool, grid: TokenGrid, blocks: Blocks, frame_anchors: tuple[int, ...]) -> Bool:
    """The mask of a head's packed tiles: each tile keeps what any query block of its queries keeps.

    Args:
        keep: bool ``(Q, K)`` over the original query blocks.
        grid: The token sequence.
        blocks: Block sizes.
        frame_anchors: The anchor rows of a frame, ascending; every frame has the same.

    Returns:
        bool ``(tiles, K)``.
    """
    source, starts = tile_sources(grid, blocks, frame_anchors)
    packed: Bool = np.logical_or.reduceat(keep[source], starts, axis=0)
    return packed


@lru_cache(maxsize=64)
def tile_sources(grid: TokenGrid, blocks: Blocks, frame_anchors: tuple[int, ...]) -> tuple[Int64, Int64]:
    """The original query blocks of every packed tile, one tile after the other, and where each tile's start."""
    first_row = np.arange(grid.frames, dtype=np.int64)[:, None] * grid.height
    rows = (first_row + np.array(frame_anchors, dtype=np.int64)).reshape(-1)
    video = (grid.text_before + rows[:, None] * grid.width + np.arange(grid.width)).reshape(-1)
    after = grid.text_before + grid.video_tokens
    queries = np.concatenate([np.arange(grid.text_before), video, np.arange(after, grid.tokens)])
    tile, source = np.arange(len(queries)) // blocks.block_q, queries // blocks.block_q
    new_tile = np.diff(tile, prepend=-1) > 0
    first = np.flatnonzero(new_tile | (np.diff(source, prepend=-1) > 0))
    return source[first], np.flatnonzero(new_tile[first])


def query_weights(grid: TokenGrid, blocks: Blocks) -> Float64:
    """float64 ``(Q,)``: the share of all queries that each query block holds."""
    edges = np.minimum(np.arange(blocks.q_blocks(grid.tokens) + 1) * blocks.block_q, grid.tokens)
    share: Float64 = np.diff(edges) / grid.tokens
    return share


def row_required(error_code: npt.NDArray[np.uint8] | None, heads: int, q_blocks: int, k_blocks: int) -> Bits:
    """Packed ``(H, Q, ceil(K / 8))`` with the one block of each row that no mask may drop.

    It is the block of the largest mean block error, or, where none was measured, that of the row's own keys.
    """
    if error_code is None:
        own = np.arange(q_blocks) * k_blocks // q_blocks
        column = np.broadcast_to(own, (heads, q_blocks))
    else:
        column = error_code.argmin(axis=2)
    keep = np.zeros((heads, q_blocks, k_blocks), dtype=np.bool_)
    np.put_along_axis(keep, column[..., None], True, axis=2)
    return pack(keep)
