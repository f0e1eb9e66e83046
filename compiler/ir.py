"""The compiler's intermediate representation: a `Job`, and a `UnitIR` for each recorded time and layer.

A `Job` is small and describes all units; a `UnitIR` is large, and only a few are in memory at once.

H heads, Q and K query and key blocks, T thresholds, W windows, C shares of the ladder, Y rows of a frame, F frames, R
and S the radii of rows and frames. Packed masks are uint8 ``(..., ceil(K / 8))``, bits little-endian. Errors are
squared changes of the final latent, relative to its size, to first order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from calibatt.compiler.bits import Bits, count, pack
from calibatt.compiler.cost import Device
from calibatt.compiler.stats import Manifest, Table
from calibatt.compiler.steps import Steps
from calibatt.plans import BF16, ROWS, Blocks, LayerSchedule, TokenGrid

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


class Groups(NamedTuple):
    """The anchors of a head: groups of members, of which one is computed and copied to the others.

    Args:
        axis: `plans.ROWS` or `plans.FRAMES`: what the members of the groups are.
        starts: The first member of each group, ascending from 0: a row of the frame, or a frame of the video.
        anchors: The member that is computed for each group.
    """

    axis: int
    starts: tuple[int, ...]
    anchors: tuple[int, ...]

    def members(self, grid: TokenGrid) -> int:
        """How many members there are: rows of a frame, or frames."""
        return grid.height if self.axis == ROWS else grid.frames

    def in_video(self, grid: TokenGrid) -> tuple[Int64, Int64]:
        """Starts and anchors over the whole video: groups of rows are the same in every frame."""
        first = np.arange(grid.frames if self.axis == ROWS else 1)[:, None] * grid.height
        starts, anchors = (np.array(each, np.int64) for each in (self.starts, self.anchors))
        return (first + starts).reshape(-1), (first + anchors).reshape(-1)


@dataclass(frozen=True, eq=False)
class UnitMeans:
    """The statistics of one (time, layer), means over the samplings.

    Args:
        error_code: uint8 ``(H, Q, K)``, codes of each block's error as masks are priced by it; see `error_model`.
        error_peak: float32 ``(H,)``, the value of code 0.
        window_error: float64 ``(W, H)``, measured.
        row_error: float64 ``(H, Y, 2 R)``, error of a row that is a copy, NaN where the offset leaves the frame.
        precision_error: float64 ``(3, H)``, error that each of `plans.PRECISIONS` adds; 0 for 16 bit.
        frame_error: float64 ``(H, F, 2 S)``, of frames; None where S is 0.
        votes: uint16 ``(T, H, Q, K)``, in how many samples a block is in a threshold's set; None in a store without
            thresholds, and once a pass has decided over all units.
        vote_samples: How many samples voted.
        row_difference: float32 ``(H, Y, 2 R)``, relative to the row; None in a store without thresholds.
    """

    error_code: npt.NDArray[np.uint8]
    error_peak: Float32
    window_error: Float64
    row_error: Float64
    precision_error: Float64
    frame_error: Float64 | None = None
    votes: npt.NDArray[np.uint16] | None = None
    vote_samples: int = 0
    row_difference: Float32 | None = None


class MenuTable(NamedTuple):
    """What the masks of a `menu.Menu` compute and lose in each head of a unit; M masks.

    Args:
        parts: The parts of the menu.
        blocks: int64 ``(H, M)``: blocks that each mask computes.
        error: float64 ``(H, M)``: its error.
        packed: By head, where it has anchors: the blocks of each mask with them, int64 ``(M,)``.
    """

    parts: str
    blocks: Int64
    error: Float64
    packed: dict[int, Int64]


@dataclass(eq=False)
class UnitIR:
    """One layer at one recorded time, from statistics to schedule. Every head is dense until a pass decides otherwise.

    Args:
        time_index: Index in the manifest's times.
        layer: Number of the layer, from 0.
        grid: The video tokens.
        blocks: Block sizes.
        means: The statistics.
        required: Packed ``(H, Q, ceil(K / 8))``, blocks that every mask of the head keeps: one a row.
        share_error: float64 ``(C, H)``, error of the head's cut at each share of the ladder; see `prediction`.
        keep: Packed ``(H, Q, ceil(K / 8))``, the masks.
        choice: Name of each head's mask: ``dense``, ``rows(2)``, ``cut``, ``voted``.
        error: float64 ``(H,)``, predicted error of each head.
        anchors: The anchor groups of each head, or None if it computes every row.
        packed: By head, where it has anchors: the packed mask ``(tiles, ceil(K / 8))`` of its tiles.
        copy_error: float64 ``(H,)``, the part of `error` that is due to copies, as of the last `anchors`.
        precision: uint8 ``(H,)``, one of `plans.PRECISIONS` for each head.
        menu: The masks that the last `select` offered; None before the first.
        tile_order: int32, see `LayerSchedule`; set by `schedule`.
        lowered: Set by `lower`.
    """

    time_index: int
    layer: int
    grid: TokenGrid
    blocks: Blocks
    means: UnitMeans
    required: Bits
    share_error: Float64
    keep: Bits = field(init=False)
    choice: list[str] = field(init=False)
    error: Float64 = field(init=False)
    anchors: list[Groups | None] = field(init=False)
    packed: dict[int, Bits] = field(default_factory=dict)
    copy_error: Float64 = field(init=False)
    precision: npt.NDArray[np.uint8] = field(init=False)
    menu: MenuTable | None = None
    tile_order: npt.NDArray[np.int32] | None = None
    lowered: LayerSchedule | None = None

    def __post_init__(self) -> None:
        self.keep = np.repeat(full_bits(self.q_blocks, self.k_blocks)[None], self.heads, 0)
        self.choice, self.anchors = ["dense"] * self.heads, [None] * self.heads
        self.error, self.copy_error = np.zeros(self.heads), np.zeros(self.heads)
        self.precision = np.full(self.heads, BF16, np.uint8)

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

    @property
    def precision_error(self) -> Float64:
        """float64 ``(H,)``, the part of `error` that is due to 8 bits."""
        errors: Float64 = self.means.precision_error[self.precision, np.arange(self.heads)]
        return errors

    def tile_bits(self, head: int) -> Bits:
        """Packed ``(tiles, ceil(K / 8))``: the head's mask over its tiles (of its anchors, if it has some)."""
        mask: Bits = self.packed.get(head, self.keep[head])
        return mask

    def computed(self) -> tuple[Int64, Int64]:
        """Tiles and computed blocks of each head, both int64 ``(H,)``."""
        tiles = np.full(self.heads, self.q_blocks, dtype=np.int64)
        blocks = count(self.keep, (1, 2))
        for head, bits in self.packed.items():
            tiles[head], blocks[head] = len(bits), count(bits, (0, 1))
        return tiles, blocks


@dataclass(eq=False)
class Job:
    """What is known of all units together; small, and given to every process.

    Args:
        manifest: The manifest of the statistics.
        device: The device for which milliseconds are predicted.
        steps: How many steps of the sampling each recorded time stands for.
        levels: float64 ``(times,)``: the sum of squared effects of single blocks, over all steps of a segment, a
            geometric mean over the samplings. So errors of units are of all these steps; blocks and milliseconds are of
            one.
        table: The tables of all samplings, of whole segments too; only in the process that decides.
        multiplier: The price of a millisecond in error (lambda), set by `select`.
        findings: Findings of each pass for the report: plain values.
    """

    manifest: Manifest
    device: Device
    steps: Steps
    levels: Float64
    table: Table
    multiplier: float | None = None
    findings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the table, which is large: other processes do not decide."""
        return {**self.__dict__, "table": None}

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

    @property
    def unit_steps(self) -> Int64:
        """int64 ``(units,)``: how many steps of the sampling execute each unit."""
        return np.repeat(self.steps.counts, self.manifest.model.layers)

    @property
    def dense_blocks(self) -> int:
        """Blocks of dense attention of a sampling, over all steps, layers and heads."""
        return int(self.unit_steps.sum()) * self.unit_dense_blocks

    @property
    def block_ms(self) -> float:
        """Predicted milliseconds of a computed block."""
        return self.device.block_ms(self.manifest.blocks, self.manifest.model.head_dim)

    def block_costs(self, precision: npt.NDArray[np.uint8]) -> Float64:
        """Cost of a computed block of each head, in blocks of 16 bit."""
        tokens, speeds = self.manifest.grid.tokens, self.device.speeds
        costs: Float64 = np.array([speeds[each].block(tokens) for each in precision.tolist()])
        return costs

    def cost(self, blocks: Any, precision: int) -> Any:
        """Cost of heads of a precision that compute so many blocks each, in blocks of 16 bit, pre-pass included."""
        speed, tokens = self.device.speeds[precision], self.manifest.grid.tokens
        prepass_ms = speed.prepass_ns * 1e-6 * tokens * self.manifest.model.head_dim
        return blocks * speed.block(tokens) + prepass_ms / self.block_ms


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
        grid: The video tokens.
        blocks: Block sizes.
        groups: The head's anchors.

    Returns:
        Packed ``(tiles, ceil(K / 8))``.
    """
    return over_sources(np.bitwise_or, bits, tile_sources(grid, blocks, groups))


@lru_cache(maxsize=64)
def tile_sources(grid: TokenGrid, blocks: Blocks, groups: Groups) -> Int64:
    """int64 ``(most, tiles)``: the original query blocks of every packed tile, padded by repeating the last one."""
    size = grid.width if groups.axis == ROWS else grid.height * grid.width
    queries = (groups.in_video(grid)[1][:, None] * size + np.arange(size)).reshape(-1)
    tile, source = np.arange(len(queries)) // blocks.block_q, queries // blocks.block_q
    first = np.flatnonzero((np.diff(tile, prepend=-1) > 0) | (np.diff(source, prepend=-1) > 0))
    starts = np.searchsorted(tile[first], np.arange(tile[-1] + 1))
    stops = np.append(starts[1:], len(first))
    at = np.minimum(starts + np.arange((stops - starts).max())[:, None], stops - 1)
    chosen: Int64 = source[first][at]
    return chosen


def over_sources(combine: np.ufunc, values: npt.NDArray[np.uint8], sources: Int64) -> npt.NDArray[np.uint8]:
    """Rows ``(..., Q, n)`` of query blocks combined for each packed tile, ``(..., tiles, n)``."""
    combined: npt.NDArray[np.uint8] = values[..., sources[0], :]
    for others in sources[1:]:
        combine(combined, values[..., others, :], out=combined)
    return combined


def column_bits(column: Int64, k_blocks: int) -> Bits:
    """Packed ``(..., ceil(K / 8))`` with one block of each row, given as int64 ``(...)``."""
    keep = np.zeros((*column.shape, -(-k_blocks // 8)), dtype=np.uint8)
    bit = (1 << (column % 8)).astype(np.uint8)
    np.put_along_axis(keep, column[..., None] // 8, bit[..., None], axis=-1)
    return keep
