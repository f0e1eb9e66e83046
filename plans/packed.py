"""A layer's schedule with its block lists as packed bits, and how a plan file stores them.

Bits are what the compiler computes with and what compresses; the lists of a `LayerSchedule` follow in milliseconds.
Neighbouring times differ in few blocks, so a layer is stored as its difference from the same layer of a neighbour, its
*base*; some segments are their own base, so that no more than a few frames make a layer wherever one starts.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import zstandard

from calibatt.plans.errors import LimitError, MaskError, PlanError, ScheduleError
from calibatt.plans.schedule import (
    DENSE,
    SMALL_ARRAYS,
    Int32,
    LayerSchedule,
    UInt8,
    UInt16,
    check_anchors,
    check_heads,
    check_order,
    check_total,
    check_types,
)
from calibatt.plans.schema import Blocks, TokenGrid

MAX_BASES = 4
"""Segments between one and what is stored whole, itself not counted."""
LEVEL, BASE_LEVEL = 6, 12
"""Effort of compression; a base is stored once and read for all of its group."""
CACHE_BYTES = 1 << 27
"""The layers of a plan that were last used are kept, up to so many bytes in each of `StoredLayers`' three forms."""
LAYER_BYTES, FILE_TIMES = 1 << 26, 64
"""A layer of a file may need so many bytes, and so many times the file's, to be used; see `layer_bytes`."""
LAYERS = 128
"""All lists of a file may need as much as so many such layers: what proving it takes."""
PROVE_BYTES = 1 << 30
"""Threads that prove share so many bytes, as long as one has enough."""
LIMIT_VARIABLE = "CALIBATT_PLAN_BYTES"
"""Environment variable: what a layer may need instead."""


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """What a `LayerSchedule` says, lists as bits.

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
        found: npt.NDArray[np.int64] = np.einsum("ij->i", np.bitwise_count(words), dtype=np.uint32).astype(np.int64)
        return found  # three times as fast as a sum of int64

    @property
    def row_ptr(self) -> Int32:
        """int32 ``(lists + 1,)``, as in `LayerSchedule`."""
        found = np.zeros(len(self.list_bits) + 1, np.int32)
        np.cumsum(self.lengths, out=found[1:])
        return found

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
            found = f"{self.list_bits.dtype} of {self.list_bits.shape}"
            raise ScheduleError(f"list_bits must be uint8 of (lists, {width}), got {found}")
        if spare and (self.list_bits[:, -1] >> (8 - spare)).any():
            raise ScheduleError(f"list_bits must have zero bits from key block {self.k_blocks} on, got ones")
        if len(self.lengths) and not self.lengths.all():
            raise ScheduleError(f"list_bits must hold a block in each list, got none in {int(self.lengths.argmin())}")
        check_total(int(self.lengths.sum()))

    def schedule(self) -> LayerSchedule:
        """The lowered form, what kernels use; of a layer that keeps its promises."""
        row_ptr = self.row_ptr
        col_idx = np.empty(int(row_ptr[-1]), np.uint16)
        width = 8 * self.list_bits.shape[1]
        for start in range(0, len(self.list_bits), _ROWS_AT_ONCE):  # a part at a time stays in the cache
            stop = min(start + _ROWS_AT_ONCE, len(self.list_bits))
            bits = np.unpackbits(self.list_bits[start:stop].reshape(-1), bitorder="little")
            place = np.flatnonzero(bits.view(np.bool_)).astype(np.uint16)  # modulo 65536, and so is what follows
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
    """The schedule of a packed layer that unpacks its lists when they are asked for, and keeps them."""

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
    """Tile ids head by head, within a head by falling length, equal ones by their place."""
    order, first = [np.zeros(0, np.int64)], 0
    for each in lengths:
        falling = (each.max(initial=0) - each).astype(np.uint16)  # lengths are 1 to 65536; a radix sort is stable
        order.append(first + np.argsort(falling, kind="stable"))
        first += len(each)
    return np.concatenate(order).astype(np.int32)


@dataclass(frozen=True, eq=False)
class EncodedLayer:
    """A layer as a plan file holds it.

    Args:
        masks: uint8, a zstd frame of the lists' bits, or of their difference from those of the base.
        lists: How many lists there are.
        small: `SMALL_ARRAYS` by name; ``tile_order`` is empty where it is the natural one.
    """

    masks: UInt8
    lists: int
    small: dict[str, npt.NDArray[Any]]


def encode(layer: PackedLayer, base: PackedLayer | None) -> EncodedLayer:
    """The stored form of a layer."""
    bits = np.ascontiguousarray(layer.list_bits)
    if base is not None:
        bits = bits ^ _prediction(layer, base)
    level = BASE_LEVEL if base is None else LEVEL
    frame = zstandard.ZstdCompressor(level=level, write_content_size=True).compress(bits.tobytes())
    small = {name: getattr(layer, name) for name in SMALL_ARRAYS}
    if np.array_equal(layer.tile_order, layer.natural_order):
        small["tile_order"] = np.zeros(0, np.int32)
    return EncodedLayer(np.frombuffer(frame, np.uint8), len(layer.list_bits), small)


def layer_bytes(lists: int, k_blocks: int, tiles: int) -> int:
    """Bytes that a layer needs at least, for so many lists and tiles: bits, and what is counted and ordered."""
    return lists * (-(-k_blocks // 8) + 16) + tiles * 16


def granted_bytes(file_bytes: int) -> int:
    """Bytes that a layer of a file may need.

    Raises:
        LimitError: The environment says otherwise, but no whole number above 0.
    """
    said = os.environ.get(LIMIT_VARIABLE)
    if said is None:
        return LAYER_BYTES + FILE_TIMES * file_bytes
    if not said.isdecimal() or int(said) == 0:
        raise LimitError(f"{LIMIT_VARIABLE} must be a whole number of bytes above 0, got {said!r}")
    return int(said)


def decode(
    stored: EncodedLayer, base: PackedLayer | None, grid: TokenGrid, blocks: Blocks, granted: int | None = None
) -> PackedLayer:
    """The layer that was stored, proved.

    Args:
        stored: What a file holds.
        base: The layer that it is the difference from; None: from nothing.
        grid: The token sequence.
        blocks: Block sizes.
        granted: Most `layer_bytes`; None: any.

    Raises:
        LimitError: It needs more than is granted.
        MaskError: The frame is none, or not of so many lists.
        ScheduleError: A promise of `LayerSchedule` is broken.
    """
    return _finish(_unpack(stored, base, grid, blocks, granted), len(stored.small["tile_order"]) == 0)


def _unpack(
    stored: EncodedLayer, base: PackedLayer | None, grid: TokenGrid, blocks: Blocks, granted: int | None
) -> PackedLayer:
    """The layer, all proved but its bits; without an order of tiles if the file has none. Enough for a base."""
    width = -(-blocks.k_blocks(grid.tokens) // 8)
    size = stored.lists * width
    outline = PackedLayer(grid=grid, blocks=blocks, list_bits=np.zeros((0, width), np.uint8), **stored.small)
    shell = outline._shell
    check_types(shell)
    check_anchors(shell)
    tiles = int(shell.head_tile_ptr[-1])
    if stored.lists > tiles:
        raise MaskError(f"masks must have at most a list for each of {tiles} tiles, got {stored.lists} lists")
    check_heads(shell, stored.lists)
    if len(stored.small["tile_order"]):  # else it is the natural one
        check_order(shell)
    needed = layer_bytes(stored.lists, outline.k_blocks, tiles)
    if granted is not None and needed > granted:
        rule = f"need at most {granted} bytes for its lists and tiles ({LIMIT_VARIABLE} grants more)"
        raise LimitError(f"the layer must {rule}, got {needed}")
    try:
        if zstandard.frame_content_size(stored.masks.data) != size:
            rule = f"hold {size} bytes for {stored.lists} lists"
            raise MaskError(f"masks must {rule}, got {zstandard.frame_content_size(stored.masks.data)}")
        unpacker = zstandard.ZstdDecompressor()
        data = unpacker.decompress(stored.masks.data, max_output_size=size, allow_extra_data=False)
        if size == 0:  # decompress does not look at what follows a frame of nothing
            empty = unpacker.decompressobj()
            empty.decompress(stored.masks.data)
            if not empty.eof or empty.unused_data or not stored.masks.data[:4] == zstandard.FRAME_HEADER:
                raise MaskError("masks must be one zstd frame, got bytes beside one of nothing")
    except zstandard.ZstdError as error:
        raise MaskError(f"masks must be one zstd frame, got {error}") from None
    layer = replace(outline, list_bits=np.frombuffer(data, np.uint8).reshape(stored.lists, width))
    if base is None:
        return layer
    predicted = _prediction(layer, base)
    return replace(layer, list_bits=np.bitwise_xor(predicted, layer.list_bits, out=predicted))


def _finish(layer: PackedLayer, natural: bool) -> PackedLayer:
    """Proves what `_unpack` left, and orders the tiles."""
    layer.check_bits()
    if not natural:
        return layer
    found = replace(layer, tile_order=layer.natural_order)
    found.__dict__["lengths"] = layer.lengths  # counted already, and of the same bits
    return found


def _prediction(layer: PackedLayer, base: PackedLayer) -> UInt8:
    """Bits of the base in the places of the layer's lists; 0 where nothing corresponds.

    The lists of a head correspond if neither is dense and both have as many tiles; of heads that share lists the first
    one counts.
    """
    found = np.zeros_like(layer.list_bits)
    for head in reversed(range(layer.heads)):
        bits = base.head_bits(head)
        first, tiles = int(layer.head_list[head]), layer.tiles(head)
        if first != DENSE and bits is not None and len(bits) == tiles:
            found[first : first + tiles] = bits
    return found


def check_bases(bases: Sequence[int]) -> bool:
    """Whether every segment reaches one that is its own base within `MAX_BASES` steps."""
    place = np.array(bases, np.int64)
    if ((place < 0) | (place >= len(place))).any():
        return False
    at = np.arange(len(place))
    for _ in range(MAX_BASES):
        at = place[at]
    return bool((place[at] == at).all())


def base_segments(segments: int) -> tuple[int, ...]:
    """The base of each segment: its neighbour towards the middle of its group; the middle one is its own."""
    group, bases = 2 * MAX_BASES, []
    for segment in range(segments):
        middle = min(segment - segment % group + MAX_BASES, segments - 1)
        bases.append(segment + (segment < middle) - (segment > middle))
    return tuple(bases)


class StoredLayers(Sequence[Sequence[LayerSchedule]]):
    """The schedules of a plan, decoded and proved when they are asked for; ``[segment][layer]``.

    ``schedule(segment, layer)`` is the lowered form, ``packed(segment, layer)`` the packed one. The layers last used
    are kept in both, and as what others are the difference from. All methods may be called from many threads.

    Args:
        where: What errors name.
        grid: The video tokens.
        blocks: Block sizes.
        heads: Of every layer.
        bases: The base of each segment; `check_bases` holds.
        layers: ``[segment][layer]``.
        granted: Most `layer_bytes` of a layer, and of the lists of all `LAYERS` times as many; None: any.

    Raises:
        LimitError: All lists need more than is granted.
        ScheduleError: A layer has another number of heads.
    """

    def __init__(
        self,
        where: str,
        grid: TokenGrid,
        blocks: Blocks,
        heads: int,
        bases: Sequence[int],
        layers: Sequence[Sequence[EncodedLayer]],
        granted: int | None = None,
    ) -> None:
        self.where, self.grid, self.blocks, self.heads = where, grid, blocks, heads
        self.bases, self.layers, self.granted = tuple(bases), layers, granted
        k_blocks = blocks.k_blocks(grid.tokens)
        needed = [layer_bytes(layer.lists, k_blocks, 0) for each in layers for layer in each]
        if granted is not None and sum(needed) > LAYERS * granted:
            rule = f"need at most {LAYERS * granted} bytes for its lists ({LIMIT_VARIABLE} grants more)"
            raise LimitError(f"{where}the plan must {rule}, got {sum(needed)}")
        self._most_bytes = max(needed, default=0)
        for segment, each in enumerate(layers):
            for at, layer in enumerate(each):
                if (found := len(layer.small["head_list"])) != heads:
                    raise ScheduleError(
                        f"segment {segment}, layer {at}: head_list must have {heads} heads, got {found}"
                    )
        mask_blocks = heads * blocks.q_blocks(grid.tokens) * blocks.k_blocks(grid.tokens)
        packed, lowered = (max(4, int(CACHE_BYTES / (mask_blocks * size))) for size in (1 / 8, 2))
        self._unpacked = lru_cache(maxsize=packed)(self._unpack)
        self.packed = lru_cache(maxsize=packed)(self._packed)
        self.schedule = lru_cache(maxsize=lowered)(self._schedule)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredLayers, (self.where, self.grid, self.blocks, self.heads, self.bases, self.layers)

    def _unpack(self, segment: int, layer: int) -> PackedLayer:
        """A layer that is good enough for a base."""
        base = self.bases[segment]
        return self._unpack_from(None if base == segment else self._unpacked(base, layer), segment, layer)

    def _unpack_from(self, base: PackedLayer | None, segment: int, layer: int) -> PackedLayer:
        with self._named(segment, layer):
            return _unpack(self.layers[segment][layer], base, self.grid, self.blocks, self.granted)

    def _finish(self, unpacked: PackedLayer, segment: int, layer: int) -> PackedLayer:
        with self._named(segment, layer):
            return _finish(unpacked, len(self.layers[segment][layer].small["tile_order"]) == 0)

    @contextmanager
    def _named(self, segment: int, layer: int) -> Iterator[None]:
        """Errors say where they are."""
        try:
            yield
        except PlanError as error:
            raise type(error)(f"{self.where}segment {segment}, layer {layer}: {error}") from None
        except MemoryError:
            raise LimitError(
                f"{self.where}segment {segment}, layer {layer}: must fit in memory, got too little"
            ) from None

    def _packed(self, segment: int, layer: int) -> PackedLayer:
        """A layer's packed form, proved.

        Raises:
            MaskError, ScheduleError: What is stored breaks a promise; names plan, segment and layer.
        """
        return self._finish(self._unpacked(segment, layer), segment, layer)

    def _schedule(self, segment: int, layer: int) -> LayerSchedule:
        return self.packed(segment, layer).schedule()

    def forget(self) -> None:
        """Lets go of the layers that were kept because they were used."""
        for cached in (self._unpacked, self.packed, self.schedule):
            cached.cache_clear()

    def walk(self) -> Iterator[tuple[int, int, PackedLayer]]:
        """Segment, layer and packed form of every layer: each is decoded once, and few are held at a time.

        Raises:
            MaskError, ScheduleError: As `packed`, when the layer's turn comes.
        """
        for layer in self._every_layer():
            for segment, unpacked in self._walk(layer):
                yield segment, layer, self._finish(unpacked, segment, layer)

    def prove(self) -> None:
        """Decodes every layer and keeps none, on all cores; threads hold `MAX_BASES` + 4 layers each, about.

        Raises:
            MaskError, ScheduleError: The first broken promise of the first layer that breaks one.
        """
        at_once = PROVE_BYTES // ((MAX_BASES + 4) * self._most_bytes + 1)
        with ThreadPoolExecutor(max(1, min(os.cpu_count() or 1, at_once))) as pool:
            for _ in pool.map(self._prove, self._every_layer()):
                pass

    def _prove(self, layer: int) -> None:
        for segment, unpacked in self._walk(layer):
            with self._named(segment, layer):
                unpacked.check_bits()

    def _every_layer(self) -> range:
        return range(len(self.layers[0]) if self.layers else 0)

    def _walk(self, layer: int) -> Iterator[tuple[int, PackedLayer]]:
        """Every segment of a layer, not finished: a base before what differs from it, which its own proof precedes."""
        above: dict[int, list[int]] = defaultdict(list)
        for segment, base in enumerate(self.bases):
            above[base].append(segment)

        def visit(segment: int, base: PackedLayer | None) -> Iterator[tuple[int, PackedLayer]]:
            unpacked = self._unpack_from(base, segment, layer)
            yield segment, unpacked
            for each in above[segment]:
                if each != segment:
                    yield from visit(each, unpacked)

        for segment, base in enumerate(self.bases):
            if base == segment:
                yield from visit(segment, None)

    def __len__(self) -> int:
        return len(self.layers)

    @overload
    def __getitem__(self, index: int) -> Sequence[LayerSchedule]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sequence[LayerSchedule]]: ...
    def __getitem__(self, index: int | slice) -> Sequence[LayerSchedule] | Sequence[Sequence[LayerSchedule]]:
        if isinstance(index, slice):
            return [self[at] for at in range(len(self))[index]]
        return _StoredSegment(self, range(len(self))[index])


class _StoredSegment(Sequence[LayerSchedule]):
    def __init__(self, of: StoredLayers, segment: int) -> None:
        self._of, self._segment = of, segment

    def __len__(self) -> int:
        return len(self._of.layers[self._segment])

    @overload
    def __getitem__(self, index: int) -> LayerSchedule: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerSchedule]: ...
    def __getitem__(self, index: int | slice) -> LayerSchedule | Sequence[LayerSchedule]:
        if isinstance(index, slice):
            return [self[at] for at in range(len(self))[index]]
        return self._of.schedule(self._segment, range(len(self))[index])
