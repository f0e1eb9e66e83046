"""What one layer executes during one segment: block lists, anchor rows or frames, and the order of the work.

This is the seam of the project: the compiler lowers into it, the file stores it, the runtime executes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from calibatt.plans.errors import ScheduleError
from calibatt.plans.precision import PRECISIONS
from calibatt.plans.schema import BLOCK_SIZES, INT32_END, MAX_BLOCKS, Blocks, TokenGrid

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt16 = npt.NDArray[np.uint16]
UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]

DENSE = -1
"""In `head_list`: the head keeps every key block, nothing is listed."""
NO_ANCHORS = -1
"""In `head_anchor`: every query of the head is computed."""
ROWS, FRAMES = 0, 1
"""In `anchor_axis`: what the groups of a pattern are of, rows of a frame or whole frames."""

SMALL_ARRAYS = (
    *("head_list", "head_anchor", "anchor_ptr", "anchor_axis", "group_start", "group_anchor", "tile_order"),
    "head_precision",
)
"""The arrays of a `LayerSchedule` other than its block lists."""

MAX_QUERIES = 1 << 28
"""Most queries of all heads of a layer and of one head more: kernels index up to eight int32 values for each."""
MAX_KEPT = INT32_END - 2 * MAX_BLOCKS
"""Most key blocks in the lists of a layer: kernels put all key blocks before them, and read a little past the end."""


@dataclass(frozen=True, eq=False)
class LayerSchedule:
    """What all heads of one layer execute in one segment. Its block lists are bits, as the compiler makes and a file
    stores them; `row_ptr` and `col_idx` are the same lists as kernels read them.

    It is of the video tokens alone, which are numbered from 0 here and cut into blocks from the first one on. A head
    computes its *packed queries*: all V tokens, or, with an anchor pattern, the tokens of the anchor rows, or frames,
    in raster order. Packed queries are cut into *tiles* of ``block_q`` (the last may be partial). Tile t of head h
    attends to the key blocks of block list ``head_list[h] + t``, or to all key blocks where ``head_list[h]`` is
    `DENSE`; and to every key of the prefix and the suffix. Heads may share lists. Rows, or frames, that are no anchors
    receive a copy of the output of their group's anchor. Queries of the prefix and the suffix attend to everything.

    Args:
        grid: The video tokens.
        blocks: Block sizes.
        list_bits: uint8 ``(lists, ceil(K / 8))``; bit j, little-endian, is set if list i holds key block j. No list is
            empty, and bits beyond the last key block are 0.
        head_list: int32 ``(heads,)``; first list of each head, or `DENSE`.
        head_anchor: int32 ``(heads,)``; anchor pattern of each head, or `NO_ANCHORS`.
        anchor_ptr: int32 ``(patterns + 1,)``; pattern p owns groups ``anchor_ptr[p]:anchor_ptr[p + 1]``.
        anchor_axis: int32 ``(patterns,)``; `ROWS` or `FRAMES`: what a pattern's groups are of, its *members*.
        group_start: int32 ``(groups,)``; first member of each group, a row being one of frames * height. The groups of
            a pattern tile all rows, or frames; a group of rows never leaves its frame.
        group_anchor: int32 ``(groups,)``; the anchor, a member of its group.
        tile_order: int32 ``(tiles,)``; a permutation of tile ids, in execution order; tile t of head h has id
            ``head_tile_ptr[h] + t``.
        head_precision: uint8 ``(heads,)``; one of `PRECISIONS` for each head.

    Making a schedule checks nothing: `check` proves these promises once, at load, so that kernels need not.
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

    @property
    def heads(self) -> int:
        return len(self.head_list)

    @property
    def k_blocks(self) -> int:
        return self.blocks.k_blocks(self.grid.tokens)

    @property
    def q_blocks(self) -> int:
        """Query blocks of a head that computes every query."""
        return self.blocks.q_blocks(self.grid.tokens)

    def groups(self, pattern: int) -> tuple[Int32, Int32]:
        """First members and anchors of an anchor pattern's groups, both int32 ``(groups,)``."""
        part = slice(int(self.anchor_ptr[pattern]), int(self.anchor_ptr[pattern + 1]))
        return self.group_start[part], self.group_anchor[part]

    @cached_property
    def member_tokens(self) -> Int64:
        """int64 ``(patterns,)``: tokens of a member of each pattern's groups, a row or a frame."""
        return np.where(self.anchor_axis == FRAMES, self.grid.height, 1).astype(np.int64) * self.grid.width

    @cached_property
    def pattern_tokens(self) -> Int64:
        """int64 ``(patterns,)``: packed queries of the heads of each pattern."""
        tokens: Int64 = np.diff(self.anchor_ptr) * self.member_tokens
        return tokens

    def group_sizes(self, pattern: int) -> Int64:
        """int64 ``(groups,)``: members of each of a pattern's groups."""
        members = self.grid.tokens // int(self.member_tokens[pattern])
        sizes: Int64 = np.diff(np.append(self.groups(pattern)[0].astype(np.int64), members))
        return sizes

    def packed_queries(self, head: int) -> Int64:
        """Token index of each query that the head computes, int64 ``(packed queries,)``, ascending."""
        source = self.token_source(head)
        return np.flatnonzero(source == np.arange(len(source)))

    def token_source(self, head: int) -> Int64:
        """For each token, the token whose query is computed in its place, int64 ``(V,)``."""
        source = np.arange(self.grid.tokens, dtype=np.int64)
        pattern = int(self.head_anchor[head])
        if pattern == NO_ANCHORS:
            return source
        size = int(self.member_tokens[pattern])
        computed = np.repeat(self.groups(pattern)[1].astype(np.int64), self.group_sizes(pattern))
        video = source.reshape(-1, size)
        video += (computed - np.arange(len(video)))[:, None] * size
        return source

    @cached_property
    def head_tile_ptr(self) -> Int64:
        """int64 ``(heads + 1,)``; tiles of head h have ids ``head_tile_ptr[h]:head_tile_ptr[h + 1]``."""
        packed_tokens = np.append(self.pattern_tokens, self.grid.tokens)[self.head_anchor]  # NO_ANCHORS: the last
        return np.concatenate([[0], np.cumsum(-(-packed_tokens // self.blocks.block_q))]).astype(np.int64)

    def tiles(self, head: int) -> int:
        return int(self.head_tile_ptr[head + 1] - self.head_tile_ptr[head])

    @cached_property
    def lengths(self) -> Int64:
        """int64 ``(lists,)``: key blocks of each list."""
        bits = np.ascontiguousarray(self.list_bits)
        words = bits.view(np.uint16) if bits.shape[1] % 2 == 0 else bits
        counts: Int64 = np.einsum("ij->i", np.bitwise_count(words), dtype=np.uint32).astype(np.int64)
        return counts  # three times as fast as a sum of int64

    @property
    def row_ptr(self) -> Int32:
        """int32 ``(lists + 1,)``; list i is ``col_idx[row_ptr[i]:row_ptr[i + 1]]``."""
        return _starts(self.lengths)

    @property
    def col_idx(self) -> UInt16:
        """uint16 ``(kept,)``: the key blocks of all lists, ascending in each; unpacked anew, in milliseconds."""
        row_ptr = self.row_ptr
        columns = np.empty(int(row_ptr[-1]), np.uint16)
        width, at_once = 8 * self.list_bits.shape[1], 512  # so many lists stay in the cache
        for start in range(0, len(self.list_bits), at_once):
            stop = min(start + at_once, len(self.list_bits))
            bits = np.unpackbits(self.list_bits[start:stop].reshape(-1), bitorder="little")
            place = np.flatnonzero(bits.view(np.bool_)).astype(np.uint16)  # modulo 65536, as are the differences below
            first = (np.arange(stop - start) * width).astype(np.uint16)
            part = slice(int(row_ptr[start]), int(row_ptr[stop]))
            np.subtract(place, np.repeat(first, self.lengths[start:stop]), out=columns[part])
        return columns

    def head_bits(self, head: int) -> UInt8 | None:
        """uint8 ``(tiles, ceil(K / 8))``: the head's mask over its tiles; None if it is dense."""
        first = int(self.head_list[head])
        return None if first == DENSE else self.list_bits[first : first + self.tiles(head)]

    def tile_keep(self, head: int) -> Bool:
        """bool ``(tiles, k_blocks)``: the head's block mask over its packed tiles."""
        bits = self.head_bits(head)
        if bits is None:
            return np.ones((self.tiles(head), self.k_blocks), np.bool_)
        return np.unpackbits(bits, axis=1, count=self.k_blocks, bitorder="little").view(np.bool_)

    def columns(self, head: int, tile: int) -> Int64:
        """Key blocks of one tile, ascending."""
        bits = self.head_bits(head)
        if bits is None:
            return np.arange(self.k_blocks)
        return np.flatnonzero(np.unpackbits(bits[tile], count=self.k_blocks, bitorder="little"))

    def tile_lengths(self, head: int) -> Int64:
        """int64 ``(tiles,)``: key blocks of each of the head's tiles."""
        first, tiles = int(self.head_list[head]), self.tiles(head)
        return np.full(tiles, self.k_blocks) if first == DENSE else self.lengths[first : first + tiles]

    def computed_blocks(self, head: int) -> int:
        """Key blocks that the head computes over all its tiles."""
        return int(self.tile_lengths(head).sum())

    def head_density(self, head: int) -> float:
        """Blocks computed / blocks of dense attention; copied rows count as not computed."""
        return self.computed_blocks(head) / (self.q_blocks * self.k_blocks)

    @property
    def density(self) -> float:
        """Mean of `head_density` over the heads."""
        return sum(map(self.computed_blocks, range(self.heads))) / (self.heads * self.q_blocks * self.k_blocks)

    def dense(self, head: int) -> tuple[Int64, Bool]:
        """The oracle's view of a head.

        Returns:
            source: int64 ``(V,)``; the token whose query is computed in place of token i.
            keep: bool ``(V, k_blocks)``; the key blocks that query attends to.
        """
        packed = self.packed_queries(head)
        position = np.full(self.grid.tokens, -1, dtype=np.int64)
        position[packed] = np.arange(len(packed))
        source = self.token_source(head)
        keep = self.tile_keep(head)[position[source] // self.blocks.block_q]
        return source, keep

    def select(self, heads: Sequence[int]) -> LayerSchedule:
        """The schedule of some heads, numbered anew in the order given; their tiles keep their order.

        Args:
            heads: Distinct heads, at least one.

        Raises:
            ValueError: A head is not of this schedule, is given twice, or none is given.
        """
        chosen = np.array(heads, dtype=np.int64)
        inside = ((chosen >= 0) & (chosen < self.heads)).all()
        if len(chosen) == 0 or not inside or len(np.unique(chosen)) < len(chosen):
            raise ValueError(f"heads must be distinct, 0 to {self.heads - 1} and at least one, got {list(heads)}")
        used = np.zeros(len(self.list_bits), dtype=np.bool_)
        for head in chosen:
            if (first := self.head_list[head]) != DENSE:
                used[first : first + self.tiles(head)] = True
        shown = np.zeros(len(self.anchor_ptr) - 1, dtype=np.bool_)
        shown[self.head_anchor[chosen][self.head_anchor[chosen] != NO_ANCHORS]] = True
        groups = np.diff(self.anchor_ptr)
        in_shown = np.repeat(shown, groups)
        number = np.full(int(self.head_tile_ptr[-1]), -1)
        tiles = np.concatenate([np.arange(*self.head_tile_ptr[head : head + 2]) for head in chosen])
        number[tiles] = np.arange(len(tiles))
        order = number[self.tile_order]
        return replace(
            self,
            list_bits=self.list_bits[used],
            head_list=_renumber(self.head_list[chosen], used),
            head_anchor=_renumber(self.head_anchor[chosen], shown),
            anchor_ptr=_starts(groups[shown]),
            anchor_axis=self.anchor_axis[shown],
            group_start=self.group_start[in_shown],
            group_anchor=self.group_anchor[in_shown],
            tile_order=order[order >= 0].astype(np.int32),
            head_precision=self.head_precision[chosen],
        )

    def check(self) -> None:
        """Proves every promise of the class docstring.

        Raises:
            ScheduleError: The first broken promise: which array, the rule, the offending value.
        """
        check_types(self)
        check_bits(self)
        check_anchors(self)
        check_heads(self, len(self.list_bits))
        check_order(self)


def _starts(counts: npt.NDArray[np.integer]) -> Int32:
    """Running sum from 0: where each part begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _renumber(indices: Int32, stay: Bool) -> Int32:
    """Indices after the entries that do not stay were removed; -1 stays -1."""
    return np.append(np.cumsum(stay) - 1, -1)[indices].astype(np.int32)


def _first(wrong: Bool) -> int | None:
    """The first place where something is wrong; None if nothing is."""
    places = np.flatnonzero(wrong)
    return int(places[0]) if len(places) else None


def _fail(array: str, rule: str, value: object) -> None:
    raise ScheduleError(f"{array} must {rule}, got {value}")


def check_size(grid: TokenGrid, blocks: Blocks, heads: int) -> None:
    """The part of `LayerSchedule.check` that is known before there is a schedule: how far kernels can count.

    Raises:
        ScheduleError: There are too many key blocks, or queries over all heads.
    """
    k_blocks, most = blocks.k_blocks(grid.tokens), max(BLOCK_SIZES)
    if k_blocks > MAX_BLOCKS:
        _fail("grid", f"have at most {MAX_BLOCKS} key blocks", k_blocks)
    if (queries := (heads + 1) * most * -(-grid.tokens // most)) > MAX_QUERIES:
        rule = f"have at most {MAX_QUERIES} tokens, padded to whole blocks, over {heads} heads and one more"
        _fail("grid", rule, queries)


def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype of one of `SMALL_ARRAYS`."""
    return np.dtype(np.uint8 if name == "head_precision" else np.int32)


def check_types(s: LayerSchedule) -> None:
    """The part of `LayerSchedule.check` on which all others rely: types and sizes."""
    check_size(s.grid, s.blocks, s.heads)
    for name in SMALL_ARRAYS:
        array = getattr(s, name)
        if array.dtype != (dtype := dtype_of(name)) or array.ndim != 1:
            _fail(name, f"be a one-dimensional {dtype} array", f"{array.dtype} of shape {array.shape}")
    for name in ("head_anchor", "head_precision"):
        if s.heads == 0 or len(getattr(s, name)) != s.heads:
            _fail(name, f"have one entry for each of {s.heads} heads (at least 1)", len(getattr(s, name)))
    if (head := _first(s.head_precision > max(PRECISIONS))) is not None:
        known = ", ".join(f"{value} ({name})" for value, name in PRECISIONS.items())
        _fail("head_precision", f"be one of {known}", f"{s.head_precision[head]} for head {head}")


def check_bits(s: LayerSchedule) -> None:
    """The part of `LayerSchedule.check` that reads every bit."""
    width, spare = -(-s.k_blocks // 8), -s.k_blocks % 8
    if s.list_bits.dtype != np.uint8 or s.list_bits.ndim != 2 or s.list_bits.shape[1] != width:
        _fail("list_bits", f"be uint8 of (lists, {width})", f"{s.list_bits.dtype} of {s.list_bits.shape}")
    if spare and (s.list_bits[:, -1] >> (8 - spare)).any():
        _fail("list_bits", f"have zero bits from key block {s.k_blocks} on", "ones")
    if (empty := _first(s.lengths == 0)) is not None:
        _fail("list_bits", "hold a block in each list", f"none in {empty}")
    if (kept := int(s.lengths.sum())) > MAX_KEPT:
        _fail("lists", f"hold at most {MAX_KEPT} key blocks", kept)


def check_anchors(s: LayerSchedule) -> None:
    """The part of `LayerSchedule.check` that is about anchor patterns, and which head has which."""
    ptr, start, anchor = s.anchor_ptr, s.group_start, s.group_anchor
    if len(ptr) == 0 or ptr[0] != 0 or ptr[-1] != len(start) or (ptr[1:] <= ptr[:-1]).any():
        _fail("anchor_ptr", f"rise from 0 to {len(start)} groups", ptr[:8].tolist())
    if len(s.anchor_axis) != len(ptr) - 1:
        _fail("anchor_axis", f"have one entry for each of {len(ptr) - 1} patterns", len(s.anchor_axis))
    if (pattern := _first((s.anchor_axis != ROWS) & (s.anchor_axis != FRAMES))) is not None:
        rule = f"be {ROWS} (rows) or {FRAMES} (frames)"
        _fail("anchor_axis", rule, f"{s.anchor_axis[pattern]} for pattern {pattern}")
    if len(anchor) != len(start):
        _fail("group_anchor", f"have one entry for each of {len(start)} groups", len(anchor))
    of_frames = np.repeat(s.anchor_axis == FRAMES, np.diff(ptr))
    members = np.where(of_frames, s.grid.frames, s.grid.rows)
    stop = np.append(start[1:], 0)[: len(start)]
    stop[ptr[1:] - 1] = members[ptr[1:] - 1]
    if (pattern := _first(start[ptr[:-1]] != 0)) is not None:
        _fail("group_start", "start at 0 in each pattern", f"{start[ptr[pattern]]} in pattern {pattern}")
    if (group := _first((stop <= start) | (stop > members))) is not None:
        what = f"{members[group]} {'frames' if of_frames[group] else 'rows'}"
        _fail("group_start", f"rise and stay below {what}", f"{start[group]}..{stop[group] - 1} for group {group}")
    if (group := _first(~of_frames & (start // s.grid.height != (stop - 1) // s.grid.height))) is not None:
        rule = f"keep a group in its frame of {s.grid.height} rows"
        _fail("group_start", rule, f"rows {start[group]}..{stop[group] - 1}")
    if (group := _first((anchor < start) | (anchor >= stop))) is not None:
        _fail("group_anchor", f"lie in its group {start[group]}..{stop[group] - 1}", int(anchor[group]))

    patterns = len(s.anchor_axis)
    if (head := _first((s.head_anchor < NO_ANCHORS) | (s.head_anchor >= patterns))) is not None:
        _fail("head_anchor", f"be -1 or below {patterns} patterns", f"{s.head_anchor[head]} for head {head}")
    if len(unused := np.setdiff1d(np.arange(patterns), s.head_anchor)):  # so there are never more patterns than heads
        _fail("head_anchor", f"name each of {patterns} patterns", f"none of pattern {unused[0]}")


def check_heads(s: LayerSchedule, lists: int) -> None:
    """The part of `LayerSchedule.check` that is about which of the lists a head has."""
    tiles = np.diff(s.head_tile_ptr)
    beyond = s.head_list.astype(np.int64) + tiles > lists
    if (head := _first((s.head_list != DENSE) & ((s.head_list < 0) | beyond))) is not None:
        rule = f"leave {tiles[head]} lists of {lists} for the head's tiles"
        _fail("head_list", rule, f"{s.head_list[head]} for head {head}")


def check_order(s: LayerSchedule) -> None:
    """The part of `LayerSchedule.check` that is about the tile order."""
    total, order = int(s.head_tile_ptr[-1]), s.tile_order
    if len(order) != total:
        _fail("tile_order", f"have one entry for each of {total} tiles", len(order))
    if (place := _first((order < 0) | (order >= total))) is not None:
        _fail("tile_order", f"hold tile ids below {total}", int(order[place]))
    seen = np.zeros(total, dtype=np.bool_)
    seen[order] = True
    if (tile := _first(~seen)) is not None:
        _fail("tile_order", "hold every tile once", f"none of tile {tile}")
