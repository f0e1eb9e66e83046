"""The compiler's intermediate representation: a `Job`, and a `UnitIR` for each recorded time and layer.

A `Job` is small and knows the whole; a `UnitIR` is large, and only a few are in memory at once.

H heads, Q and K query and key blocks, T thresholds, M menu entries (T planes, then the windows), Y rows of a frame,
F frames, R and S the radii of rows and frames. Packed masks are uint8 ``(..., ceil(K / 8))``, bits little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from calibatt.compiler.bits import Bits, Bool, Votes, count, pack, unpack
from calibatt.compiler.cost import Device
from calibatt.compiler.stats import Ladders, Manifest
from calibatt.plans import ROWS, Blocks, PackedLayer, TokenGrid

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


class Groups(NamedTuple):
    """What is computed for what it is copied to.

    Args:
        axis: `plans.ROWS` or `plans.FRAMES`: what the members of the groups are.
        starts: The first member of each group, ascending from 0: a row of the frame, or a frame of the video.
        anchors: The member that is computed for each group.
    """

    axis: int
    starts: tuple[int, ...]
    anchors: tuple[int, ...]

    def members(self, grid: TokenGrid) -> int:
        """Rows of a frame, or frames."""
        return grid.height if self.axis == ROWS else grid.frames

    def in_video(self, grid: TokenGrid) -> tuple[Int64, Int64]:
        """Starts and anchors over the whole video: groups of rows are the same in every frame."""
        first = np.arange(grid.frames if self.axis == ROWS else 1)[:, None] * grid.height
        starts, anchors = (np.array(each, np.int64) for each in (self.starts, self.anchors))
        return (first + starts).reshape(-1), (first + anchors).reshape(-1)


@dataclass(frozen=True, eq=False)
class UnitMeans:
    """What the samples say of one (time, layer), averaged over them.

    Args:
        votes: Of the keep planes of each head, packed masks ``(T, Q, ceil(K / 8))``; gone when the votes are counted.
        error_code: uint8 ``(H, Q, K)``, codes of the mean block error (`stats.quantise`), or None where none was
            measured, or no pass asks for it.
        error_peak: float32 ``(H,)``, what code 0 stands for: squared output error relative to the residual stream.
        menu_error: float64 ``(M, H)``, measured, relative to the head's output.
        menu_residual_error: float64 ``(M, H)``, measured, relative to the residual stream.
        menu_predicted: float64 ``(M, H)``, the same predicted from block errors over some rows; None without.
        output_size: float64 ``(H,)``, the head's output relative to the residual stream.
        row_residual_error: float64 ``(H, Y, 2 R)``, NaN where the offset leaves the frame.
        frame_residual_error: float64 ``(H, F, 2 S)``, of frames; None where it was not measured.
        levels: uint8 ``(S, H, Q, K)``, the ladders (`compiler.ladders`), or None.
        level_blocks: int64 ``(S, H, shares)``, blocks up to each level.
        refined_error: float64 ``(C, H)``, measured errors of every level of every ladder, then of the windows, relative
            to the residual stream; None without a refinement.
    """

    votes: list[Votes]
    error_code: npt.NDArray[np.uint8] | None
    error_peak: Float32
    menu_error: Float64
    menu_residual_error: Float64
    menu_predicted: Float64 | None
    output_size: Float64
    row_residual_error: Float64
    levels: npt.NDArray[np.uint8] | None = None
    level_blocks: Int64 | None = None
    refined_error: Float64 | None = None
    frame_residual_error: Float64 | None = None


@dataclass(eq=False)
class UnitIR:
    """One layer at one recorded time, from statistics to schedule.

    Args:
        time_index: Of the manifest's times.
        layer: Of the model.
        grid: The token sequence.
        blocks: Block sizes.
        weight: What an error costs at this time and layer; where heads were probed, the mean over them.
        means: The statistics.
        required: Packed ``(H, Q, ceil(K / 8))``, blocks that every mask of the head keeps; at least one a row.
        head_weight: float64 ``(H,)``, what an error costs in each head; None where heads were not probed.
        force_dense: Every head stays dense.
        voted: Packed ``(T, H, Q, ceil(K / 8))``, the planes that the samples agree on; set by `vote`.
        keep: Packed ``(H, Q, ceil(K / 8))``, the chosen masks; set by `select`.
        choice: What each head's mask is: ``dense``, ``plane 0.95``, ``rows(2)``, ``cut``.
        error: float64 ``(H,)``, predicted squared output error of each head, relative to the residual stream.
        anchors: The anchor groups of each head, or None where every row is computed.
        packed: By head, where it has anchors: the packed mask ``(tiles, ceil(K / 8))`` of its tiles.
        copy_error: float64 ``(H,)``, the part of `error` that copies of the anchors make, as of the last `anchors`.
        menu: What `select` found that heads may choose from: key, blocks and errors; see `menu.Menu`.
        packed_menu: By head, where it has anchors: blocks of each mask of the menu with them.
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
    head_weight: Float64 | None = None
    force_dense: bool = False
    voted: Bits | None = None
    keep: Bits | None = None
    choice: list[str] = field(default_factory=list)
    error: Float64 = field(default_factory=lambda: np.zeros(0))
    anchors: list[Groups | None] = field(default_factory=list)
    packed: dict[int, Bits] = field(default_factory=dict)
    copy_error: Float64 = field(default_factory=lambda: np.zeros(0))
    menu: Any = None
    packed_menu: dict[int, Int64] = field(default_factory=dict)
    tile_order: npt.NDArray[np.int32] | None = None
    lowered: PackedLayer | None = None

    @property
    def name(self) -> str:
        return f"time {self.time_index}, layer {self.layer}"

    @property
    def heads(self) -> int:
        return len(self.required)

    @property
    def weighted_error(self) -> float:
        """Predicted error times weight, summed over the heads."""
        return float(self.error.sum() * self.weight if self.head_weight is None else self.error @ self.head_weight)

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

    def tile_bits(self, head: int) -> Bits:
        """Packed ``(tiles, ceil(K / 8))``: the head's mask over its tiles; all blocks before `select`."""
        if head in self.packed:
            return self.packed[head]
        if self.keep is None:
            return full_bits(self.q_blocks, self.k_blocks)
        found: Bits = self.keep[head]
        return found

    def head_keep(self, head: int) -> Bool:
        """bool ``(Q, K)``, the head's mask over the original query blocks; all of them before `select`."""
        bits = full_bits(self.q_blocks, self.k_blocks) if self.keep is None else self.keep[head]
        return unpack(bits, self.k_blocks)

    def tile_keep(self, head: int) -> Bool:
        """bool ``(tiles, K)``, the head's mask over its packed tiles (those of its anchors, where it has any)."""
        return unpack(self.tile_bits(head), self.k_blocks)

    def computed(self) -> tuple[Int64, Int64]:
        """Tiles and computed blocks of each head, both int64 ``(H,)``."""
        tiles = np.full(self.heads, self.q_blocks, dtype=np.int64)
        blocks = np.full(self.heads, self.dense_blocks, dtype=np.int64)
        if self.keep is not None:
            blocks = count(self.keep, (1, 2))
        for head, bits in self.packed.items():
            tiles[head], blocks[head] = len(bits), count(bits, (0, 1))
        return tiles, blocks


@dataclass(eq=False)
class Job:
    """What is known of all units together; small, and given to every process.

    Args:
        manifest: Of the statistics.
        samples: Names of the samples.
        weights: float64 ``(times,)``, the time weight w(t).
        unit_weights: float64 ``(times, layers)``: what an error costs in each layer; see `stats.error_weights`.
        weights_probed: False where the weight is 1 for want of a probe.
        weights_source: Where the weights come from, in words.
        device: What predicts milliseconds.
        head_weights: float64 ``(times, layers, heads)``, the same in each head; None where heads were not probed.
        planes: Some pass asks for the keep planes of the samples.
        codes: Some pass asks for the mean block error.
        ladders: What a refinement of the store is of; None without one.
        use_ladders: Some pass asks for ladders.
        refinement: Digests of the files with their errors, where that is so.
        error_factor: Of `error_model.coherence`; known once every unit has been gathered.
        multiplier: The price of a millisecond in weighted error (lambda), once `select` has found it.
        error_budget: Most error times weight over all units, where that was asked for.
        findings: What each pass has to report: plain values.
    """

    manifest: Manifest
    samples: tuple[str, ...]
    weights: Float64
    unit_weights: Float64
    weights_probed: bool
    weights_source: str
    device: Device
    head_weights: Float64 | None = None
    planes: bool = True
    codes: bool = True
    ladders: Ladders | None = None
    use_ladders: bool = False
    refinement: tuple[str, ...] = ()
    error_factor: float = 1.0
    multiplier: float | None = None
    error_budget: float | None = None
    findings: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def units(self) -> int:
        return len(self.manifest.times) * self.manifest.model.layers

    def place(self, index: int) -> tuple[int, int]:
        """Time index and layer of a unit: layers of one time come one after the other."""
        return divmod(index, self.manifest.model.layers)

    @property
    def unit_dense_blocks(self) -> int:
        """Blocks of dense attention of a unit, over all heads."""
        manifest = self.manifest
        return manifest.model.heads * manifest.q_blocks * manifest.k_blocks

    def unit_ms(self, tiles: Int64, blocks: Int64) -> float:
        """Predicted milliseconds of a unit's attention call, from what it has `computed`."""
        return self._ms(int(tiles.sum()), int(blocks.sum()))

    @property
    def dense_unit_ms(self) -> float:
        """The same, were every head dense."""
        manifest = self.manifest
        tiles = manifest.model.heads * manifest.q_blocks
        return self._ms(tiles, tiles * manifest.k_blocks)

    def forward_speedup(self, density: float, attention_share: float) -> float:
        """Predicted speed-up of a forward at a density, given the share of dense attention in a dense forward."""
        manifest = self.manifest
        tiles = manifest.model.heads * manifest.q_blocks
        planned = self._ms(tiles, density * tiles * manifest.k_blocks)
        return 1 / (1 - attention_share * (1 - planned / self.dense_unit_ms))

    def density_for(self, speedup: float, attention_share: float) -> float:
        """The density at which `forward_speedup` is that; may be beyond what is possible."""
        manifest = self.manifest
        tiles = manifest.model.heads * manifest.q_blocks
        planned = (1 - (1 - 1 / speedup) / attention_share) * self.dense_unit_ms
        fixed = self._ms(tiles, 0)
        return (planned - fixed) / (self.dense_unit_ms - fixed)

    def _ms(self, tiles: int, blocks: float) -> float:
        manifest = self.manifest
        stored = manifest.model.heads * manifest.grid.tokens
        return self.device.predict_ms(tiles, blocks, stored, manifest.blocks, manifest.model.head_dim)


@lru_cache(maxsize=8)
def full_bits(q_blocks: int, k_blocks: int) -> Bits:
    """Packed ``(Q, ceil(K / 8))`` of a dense head; read only."""
    bits = pack(np.ones((q_blocks, k_blocks), dtype=np.bool_))
    bits.flags.writeable = False
    return bits


def packed_bits(bits: Bits, grid: TokenGrid, blocks: Blocks, groups: Groups) -> Bits:
    """The mask of a head's packed tiles: each tile keeps what any query block of its queries keeps.

    Args:
        bits: Packed ``(Q, ceil(K / 8))`` over the original query blocks.
        grid: The token sequence.
        blocks: Block sizes.
        groups: The head's anchors.

    Returns:
        Packed ``(tiles, ceil(K / 8))``.
    """
    return over_sources(np.bitwise_or, bits, tile_sources(grid, blocks, groups))


@lru_cache(maxsize=64)
def tile_sources(grid: TokenGrid, blocks: Blocks, groups: Groups) -> Int64:
    """int64 ``(most, tiles)``: the original query blocks of every packed tile; of fewer the last again."""
    size = grid.width if groups.axis == ROWS else grid.height * grid.width
    video = (grid.text_before + groups.in_video(grid)[1][:, None] * size + np.arange(size)).reshape(-1)
    after = grid.text_before + grid.video_tokens
    queries = np.concatenate([np.arange(grid.text_before), video, np.arange(after, grid.tokens)])
    tile, source = np.arange(len(queries)) // blocks.block_q, queries // blocks.block_q
    first = np.flatnonzero((np.diff(tile, prepend=-1) > 0) | (np.diff(source, prepend=-1) > 0))
    starts = np.searchsorted(tile[first], np.arange(tile[-1] + 1))
    stops = np.append(starts[1:], len(first))
    at = np.minimum(starts + np.arange((stops - starts).max())[:, None], stops - 1)
    found: Int64 = source[first][at]
    return found


def over_sources(combine: np.ufunc, values: npt.NDArray[np.uint8], sources: Int64) -> npt.NDArray[np.uint8]:
    """Rows ``(..., Q, n)`` of query blocks combined for each packed tile, ``(..., tiles, n)``."""
    found: npt.NDArray[np.uint8] = values[..., sources[0], :]
    for others in sources[1:]:
        combine(found, values[..., others, :], out=found)
    return found


def query_weights(grid: TokenGrid, blocks: Blocks) -> Float64:
    """float64 ``(Q,)``: the share of all queries that each query block holds."""
    edges = np.minimum(np.arange(blocks.q_blocks(grid.tokens) + 1) * blocks.block_q, grid.tokens)
    share: Float64 = np.diff(edges) / grid.tokens
    return share


def row_required(error_code: npt.NDArray[np.uint8] | None, q_blocks: int, k_blocks: int) -> Int64:
    """int64 ``(Q,)``: the one block of each row of a head that no mask may drop.

    It is the block of the largest mean block error by its codes ``(Q, K)``, or, where none was measured, that of the
    row's own keys.
    """
    found: Int64 = np.arange(q_blocks) * k_blocks // q_blocks if error_code is None else error_code.argmin(axis=1)
    return found


def column_bits(column: Int64, k_blocks: int) -> Bits:
    """Packed ``(..., ceil(K / 8))`` with one block of each row, given as int64 ``(...)``."""
    keep = np.zeros((*column.shape, -(-k_blocks // 8)), dtype=np.uint8)
    bit = (1 << (column % 8)).astype(np.uint8)
    np.put_along_axis(keep, column[..., None] // 8, bit[..., None], axis=-1)
    return keep
