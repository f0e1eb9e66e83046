"""How a plan file stores a layer, and what it may need in memory.

Neighbouring times differ in few blocks, so a layer is stored as its difference from the same layer of a neighbour, its
*base*; some segments are their own base, so that no more than a few frames make a layer wherever one starts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from calibatt.plans.errors import LimitError, MaskError
from calibatt.plans.masks import natural_order
from calibatt.plans.schedule import (
    DENSE,
    SMALL_ARRAYS,
    LayerSchedule,
    UInt8,
    check_anchors,
    check_bits,
    check_heads,
    check_order,
    check_types,
)
from calibatt.plans.schema import Blocks, TokenGrid

MAX_BASES = 4
"""Longest chain of differences that leads from a segment to one that is stored in full."""
LEVEL, BASE_LEVEL = 6, 12
"""Levels of zstd. A base gets more effort: it is stored once, and read for all segments of its group."""
LAYER_BYTES, FILE_TIMES = 1 << 26, 64
"""Memory that a layer may need: so many bytes, and so many times the size of the file; see `layer_bytes`."""
LIMIT_VARIABLE = "CALIBATT_PLAN_BYTES"
"""Environment variable that replaces this limit, in bytes."""


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


def encode(layer: LayerSchedule, base: LayerSchedule | None) -> EncodedLayer:
    """The stored form of a layer."""
    bits = np.ascontiguousarray(layer.list_bits)
    if base is not None:
        bits = bits ^ _prediction(layer, base)
    level = BASE_LEVEL if base is None else LEVEL
    frame = zstandard.ZstdCompressor(level=level, write_content_size=True).compress(bits.tobytes())
    small = {name: getattr(layer, name) for name in SMALL_ARRAYS}
    if np.array_equal(layer.tile_order, natural_order(layer)):
        small["tile_order"] = np.zeros(0, np.int32)
    return EncodedLayer(np.frombuffer(frame, np.uint8), len(layer.list_bits), small)


def layer_bytes(lists: int, k_blocks: int, tiles: int) -> int:
    """Least bytes of memory that a layer needs: for the bits of its lists, their counts, and the order of its tiles."""
    return lists * (-(-k_blocks // 8) + 16) + tiles * 16


def granted_bytes(file_bytes: int) -> int:
    """Bytes that a layer of a file may need.

    Raises:
        LimitError: `LIMIT_VARIABLE` is set, but not to a whole number above 0.
    """
    said = os.environ.get(LIMIT_VARIABLE)
    if said is None:
        return LAYER_BYTES + FILE_TIMES * file_bytes
    if not said.isdecimal() or int(said) == 0:
        raise LimitError(f"{LIMIT_VARIABLE} must be a whole number of bytes above 0, got {said!r}")
    return int(said)


def unpack(
    stored: EncodedLayer, base: LayerSchedule | None, grid: TokenGrid, blocks: Blocks, granted: int | None
) -> LayerSchedule:
    """The layer that was stored, proved except for its bits, and without a tile order if the file stores none.

    That is enough for a base; `finish` makes it a whole layer.

    Args:
        stored: What a file holds.
        base: The layer from which the stored bits differ; None if they are stored in full.
        grid: The token sequence.
        blocks: Block sizes.
        granted: Most `layer_bytes` that it may need; None: no limit.

    Raises:
        LimitError: It needs more than is granted.
        MaskError: The masks are no zstd frame, or do not hold as many lists as the file says.
        ScheduleError: A promise of `LayerSchedule` is broken.
    """
    width = -(-blocks.k_blocks(grid.tokens) // 8)
    size = stored.lists * width
    outline = LayerSchedule(grid=grid, blocks=blocks, list_bits=np.zeros((0, width), np.uint8), **stored.small)
    check_types(outline)
    check_anchors(outline)
    tiles = int(outline.head_tile_ptr[-1])
    if stored.lists > tiles:
        raise MaskError(f"masks must have at most a list for each of {tiles} tiles, got {stored.lists} lists")
    check_heads(outline, stored.lists)
    if len(stored.small["tile_order"]):  # else it is the natural one
        check_order(outline)
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
        if size == 0:  # decompress ignores what follows an empty frame
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


def finish(layer: LayerSchedule) -> LayerSchedule:
    """Proves the bits of an unpacked layer, and orders its tiles if the file stores no order: then it is the natural
    one.
    """
    check_bits(layer)
    if len(layer.tile_order):
        return layer
    ordered = replace(layer, tile_order=natural_order(layer))
    ordered.__dict__["lengths"] = layer.lengths  # the bits are the same, and were counted already
    return ordered


def _prediction(layer: LayerSchedule, base: LayerSchedule) -> UInt8:
    """Bits of the base in the places of the layer's lists; 0 where nothing corresponds.

    The lists of a head correspond if neither is dense and both have as many tiles; of heads that share lists the first
    one counts.
    """
    predicted = np.zeros_like(layer.list_bits)
    for head in reversed(range(layer.heads)):
        bits = base.head_bits(head)
        first, tiles = int(layer.head_list[head]), layer.tiles(head)
        if first != DENSE and bits is not None and len(bits) == tiles:
            predicted[first : first + tiles] = bits
    return predicted


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
