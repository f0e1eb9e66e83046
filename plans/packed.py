"""A layer's schedule with its block lists as packed bits.

Bits are what the compiler computes with and what compresses; the lists of a `LayerSchedule` follow in milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from calibatt.plans.errors import ScheduleError
from calibatt.plans.precision import BF16
from calibatt.plans.schedule import (
    DENSE,
    NO_ANCHORS,
    SMALL_ARRAYS,
    Int32,
    LayerSchedule,
    UInt8,
    UInt16,
    check_total,
)
from calibatt.plans.schema import Blocks, TokenGrid


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """The same as a `LayerSchedule`, with its block lists as bits.

    Args:
        grid: The video tokens.
        blocks: Block sizes.
        list_bits: uint8 ``(lists, ceil(K / 8))``: bit j, little-endian, is set if list i holds key block j.
        head_list: int32 ``(heads,)``, as in `LayerSchedule`; so are the others.
        head_anchor: int32 ``(heads,)``.
        anchor_ptr: int32 ``(patterns + 1,)``.
        anchor_axis: int32 ``(patterns,)``.
        group_start: int32 ``(groups,)``.
        group_anchor: int32 ``(groups,)``.
        tile_order: int32 ``(tiles,)``.
        head_precision: uint8 ``(heads,)``.
    """

    grid: TokenGrid
    blocks: Blocks
    list_bits: UInt8
    head_list: Int32
    head_anchor: Int32
    anchor_ptr: Int32
    anchor_axis: Int32
    group_start: Int32
    group_anchor: Int32
    tile_order: Int32
    head_precision: UInt8

    @classmethod
    def of(cls, schedule: LayerSchedule) -> PackedLayer:
        """The packed form of a schedule that keeps its promises."""
        k_blocks, lengths = schedule.k_blocks, np.diff(schedule.row_ptr)
        keep = np.zeros((len(lengths), k_blocks), np.bool_)
        keep[np.repeat(np.arange(len(lengths)), lengths), schedule.col_idx] = True
        return cls(
            grid=schedule.grid,
            blocks=schedule.blocks,
            list_bits=np.packbits(keep, axis=1, bitorder="little"),
            **{name: getattr(schedule, name) for name in SMALL_ARRAYS},
        )

    @classmethod
    def of_heads(
        cls,
        grid: TokenGrid,
        blocks: Blocks,
        heads: Sequence[UInt8],
        *,
        precision: UInt8 | None = None,
        patterns: Sequence[tuple[int, npt.ArrayLike, npt.ArrayLike]] = (),
        head_anchor: Sequence[int] | None = None,
        tile_order: Int32 | None = None,
    ) -> PackedLayer:
        """The schedule of these masks: dense heads list nothing, and heads with equal masks share their lists.

        Args:
            grid: The video's tokens.
            blocks: Block sizes.
            heads: The mask of each head, uint8 ``(tiles, ceil(K / 8))``, a bit for each key block; no row is empty.
            precision: uint8 ``(heads,)``; all `BF16` if absent.
            patterns: For each anchor pattern its axis, the first members of its groups, and their anchors.
            head_anchor: The pattern of each head, or `NO_ANCHORS`; all `NO_ANCHORS` if absent.
            tile_order: The order in which tiles are executed; `natural_order` if absent.
        """
        k_blocks = blocks.k_blocks(grid.tokens)
        full = np.packbits(np.ones(k_blocks, np.bool_), bitorder="little")
        firsts: dict[bytes, int] = {}
        head_list, listed = [], [np.zeros((0, len(full)), np.uint8)]
        for bits in heads:
            if (bits == full).all():
                head_list.append(DENSE)
            elif (key := bits.tobytes()) in firsts:
                head_list.append(firsts[key])
            else:
                head_list.append(firsts.setdefault(key, sum(map(len, listed))))
                listed.append(bits)
        starts, anchors = ([np.asarray(each[which]) for each in patterns] for which in (1, 2))
        none = np.zeros(0, np.int64)
        layer = cls(
            grid=grid,
            blocks=blocks,
            list_bits=np.concatenate(listed),
            head_list=np.array(head_list, np.int32),
            head_anchor=np.array([NO_ANCHORS] * len(heads) if head_anchor is None else head_anchor, np.int32),
            anchor_ptr=np.append(0, np.cumsum([len(each) for each in starts])).astype(np.int32),
            anchor_axis=np.array([axis for axis, _, _ in patterns], np.int32),
            group_start=np.concatenate([none, *starts]).astype(np.int32),
            group_anchor=np.concatenate([none, *anchors]).astype(np.int32),
            tile_order=np.zeros(0, np.int32) if tile_order is None else tile_order,
            head_precision=np.full(len(heads), BF16, np.uint8) if precision is None else precision,
        )
        return replace(layer, tile_order=layer.natural_order) if tile_order is None else layer

    @property
    def heads(self) -> int:
        return len(self.head_list)

    @property
    def k_blocks(self) -> int:
        return self.blocks.k_blocks(self.grid.tokens)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 ``(lists,)``: blocks of each list."""
        bits = np.ascontiguousarray(self.list_bits)
        words = bits.view(np.uint16) if bits.shape[1] % 2 == 0 else bits
        counts: npt.NDArray[np.int64] = np.einsum("ij->i", np.bitwise_count(words), dtype=np.uint32).astype(np.int64)
        return counts  # three times as fast as a sum of int64

    @property
    def row_ptr(self) -> Int32:
        """int32 ``(lists + 1,)``, as in `LayerSchedule`."""
        starts = np.zeros(len(self.list_bits) + 1, np.int32)
        np.cumsum(self.lengths, out=starts[1:])
        return starts

    @cached_property
    def _shell(self) -> LayerSchedule:
        """The schedule with one block in each list: all but the lists themselves."""
        lists = len(self.list_bits)
        row_ptr, col_idx = np.arange(lists + 1, dtype=np.int32), np.zeros(lists, np.uint16)
        small = {name: getattr(self, name) for name in SMALL_ARRAYS}
        return LayerSchedule(grid=self.grid, blocks=self.blocks, row_ptr=row_ptr, col_idx=col_idx, **small)

    def tiles(self, head: int) -> int:
        return self._shell.tiles(head)

    def head_bits(self, head: int) -> UInt8 | None:
        """uint8 ``(tiles, ceil(K / 8))``: the head's mask over its tiles; None if it is dense."""
        first = int(self.head_list[head])
        return None if first == DENSE else self.list_bits[first : first + self.tiles(head)]

    def computed_blocks(self, head: int) -> int:
        """Key blocks that the head computes over all its tiles."""
        first, tiles = int(self.head_list[head]), self.tiles(head)
        return tiles * self.k_blocks if first == DENSE else int(self.lengths[first : first + tiles].sum())

    @property
    def density(self) -> float:
        """Blocks computed / blocks of dense attention, mean over the heads."""
        dense = self.heads * self.blocks.q_blocks(self.grid.tokens) * self.k_blocks
        return sum(self.computed_blocks(head) for head in range(self.heads)) / dense

    def check(self) -> None:
        """Proves that the bits are lists and that all else keeps the promises of `LayerSchedule`.

        Raises:
            ScheduleError: The first broken promise.
        """
        self.check_bits()
        self._shell.check()

    def check_bits(self) -> None:
        """The part of `check` that reads every bit."""
        width, spare = -(-self.k_blocks // 8), -self.k_blocks % 8
        if self.list_bits.dtype != np.uint8 or self.list_bits.ndim != 2 or self.list_bits.shape[1] != width:
            given = f"{self.list_bits.dtype} of {self.list_bits.shape}"
            raise ScheduleError(f"list_bits must be uint8 of (lists, {width}), got {given}")
        if spare and (self.list_bits[:, -1] >> (8 - spare)).any():
            raise ScheduleError(f"list_bits must have zero bits from key block {self.k_blocks} on, got ones")
        if len(self.lengths) and not self.lengths.all():
            raise ScheduleError(f"list_bits must hold a block in each list, got none in {int(self.lengths.argmin())}")
        check_total(int(self.lengths.sum()))

    def schedule(self) -> LayerSchedule:
        """The lowered form, which kernels use; the layer must keep its promises."""
        row_ptr = self.row_ptr
        col_idx = np.empty(int(row_ptr[-1]), np.uint16)
        width = 8 * self.list_bits.shape[1]
        for start in range(0, len(self.list_bits), _ROWS_AT_ONCE):  # so many lists at a time stay in the cache
            stop = min(start + _ROWS_AT_ONCE, len(self.list_bits))
            bits = np.unpackbits(self.list_bits[start:stop].reshape(-1), bitorder="little")
            place = np.flatnonzero(bits.view(np.bool_)).astype(np.uint16)  # modulo 65536, as are the differences below
            first = (np.arange(stop - start) * width).astype(np.uint16)
            part = slice(int(row_ptr[start]), int(row_ptr[stop]))
            np.subtract(place, np.repeat(first, self.lengths[start:stop]), out=col_idx[part])
        small = {name: getattr(self, name) for name in SMALL_ARRAYS}
        return LayerSchedule(grid=self.grid, blocks=self.blocks, row_ptr=row_ptr, col_idx=col_idx, **small)

    def later(self) -> LayerSchedule:
        """`schedule`, whose lists are unpacked when something first asks for them."""
        return _UnpackedLater(self)

    def select(self, heads: Sequence[int]) -> PackedLayer:
        """As `LayerSchedule.select`."""
        chosen = self._shell.select(heads)
        used = self._shell.lists_of(np.array(heads, np.int64), np.diff(chosen.head_tile_ptr))
        return self._with(chosen, self.list_bits[used])

    def _with(self, shell: LayerSchedule, list_bits: UInt8) -> PackedLayer:
        small = {name: getattr(shell, name) for name in SMALL_ARRAYS}
        return PackedLayer(grid=shell.grid, blocks=shell.blocks, list_bits=list_bits, **small)

    @cached_property
    def natural_order(self) -> Int32:
        """The tile order that a plan file need not store: `longest_first`."""
        every = [self.head_bits(head) for head in range(self.heads)]
        dense = [np.full(self.tiles(head), self.k_blocks) for head in range(self.heads)]
        firsts = self.head_list.tolist()
        lengths = [
            dense[head] if bits is None else self.lengths[firsts[head] : firsts[head] + len(bits)]
            for head, bits in enumerate(every)
        ]
        return longest_first(lengths)


class _UnpackedLater(LayerSchedule):
    """The schedule of a packed layer; its lists are unpacked when they are first asked for."""

    packed: PackedLayer

    def __init__(self, packed: PackedLayer) -> None:
        small = {name: getattr(packed, name) for name in SMALL_ARRAYS}
        self.__dict__.update(small, grid=packed.grid, blocks=packed.blocks, packed=packed)

    @cached_property
    def row_ptr(self) -> Int32:
        return self.packed.row_ptr

    @cached_property
    def col_idx(self) -> UInt16:
        return self.packed.schedule().col_idx

    def select(self, heads: Sequence[int]) -> LayerSchedule:
        return self.packed.select(heads).later()


_ROWS_AT_ONCE = 512


def longest_first(lengths: Sequence[npt.NDArray[np.int64]]) -> Int32:
    """Tile ids: head after head, in a head the longest list first, lists of one length in their order."""
    order, first = [np.zeros(0, np.int64)], 0
    for each in lengths:
        falling = (each.max(initial=0) - each).astype(np.uint16)  # lengths are 1 to 65536; a radix sort is stable
        order.append(first + np.argsort(falling, kind="stable"))
        first += len(each)
    return np.concatenate(order).astype(np.int32)
