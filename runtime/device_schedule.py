"""A schedule's index arrays on a device, as kernels read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from calibatt.plans.schedule import DENSE, NO_ANCHORS, Int32, LayerSchedule
from calibatt.runtime.workspace import PackedLists, Workspace, expanded

T = TypeVar("T")
EVERY_AT_ONCE = 1024
"""Queries of a run, for heads without anchors."""


@dataclass(frozen=True, eq=False)
class DeviceSchedule:
    """Index arrays of one schedule on one device: all that a kernel needs besides q, k and v.

    Args:
        core: The schedule, on the host.
        device: Where the arrays are.
        tiles: int32 ``(tiles, 4)``, in execution order: head, tile within the head's packed queries, start and stop of
            its key blocks in `columns`. `stop` exceeds `start`.
        columns: uint16: 0, 1, ... ``k_blocks - 1``, the list of dense heads; then `col_idx`; then a 0, so that a kernel
            may read one column ahead; more may follow. With `lists` this is a buffer that all layers share: call
            `lowered()` before use. Its address never changes.
        heads: int32 ``(heads, 3)``: packed queries of the head, where they start in the three arrays below, and the
            tokens from one that receives an output to the next.
        query_token: int32 ``(packed,)``; the token of each packed query, counted from the first one of the video: the
            queries of the anchor patterns one after the other, then all V. Empty, like the two below, if every head
            computes every query: packed query p is then token p, written once.
        query_first: int32 ``(packed,)``; the first token that receives the query's output.
        query_copies: int32 ``(packed,)``; how many receive it: tokens of the same place in rows, or frames, that follow
            each other.
        lists: The packed lists that `lowered` unpacks to `columns` and the three arrays above; None: they are there.
    """

    core: LayerSchedule
    device: torch.device
    tiles: torch.Tensor
    columns: torch.Tensor
    heads: torch.Tensor
    query_token: torch.Tensor
    query_first: torch.Tensor
    query_copies: torch.Tensor
    lists: PackedLists | None = None
    _derived: dict[Any, Any] = field(default_factory=dict, repr=False)
    _streams: list[torch.cuda.Stream] = field(default_factory=list, repr=False)
    _graphs: list[torch.cuda.Stream] = field(default_factory=list, repr=False)
    _makers: list[torch.cuda.Stream] = field(default_factory=list, repr=False)
    """Where the arrays were made, then each derived value."""
    _waited: dict[int, int] = field(default_factory=dict, repr=False)
    """How many of `_makers` each of `_streams` waited for, by their handles, which are quick to look up: torch makes a
    new stream object at every request."""

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph uses the arrays: they must then stay where they are."""
        return len(self._graphs) > 0

    def use(self) -> None:
        """Makes the current CUDA stream wait for the copies, and for what was derived, before it uses the arrays."""
        capturing = torch.cuda.is_current_stream_capturing()
        handle, makers = torch._C._cuda_getCurrentRawStream(self.device.index), len(self._makers)
        if not capturing and makers and self._waited.get(handle) == makers:
            return
        stream = torch.cuda.current_stream(self.device)
        if capturing:  # a capture begins by waiting for all streams
            if stream not in self._graphs:
                self._graphs.append(stream)
            return
        if not makers:
            self._makers.append(stream)
        for maker in self._makers[self._waited.get(handle, 0) :]:
            if maker != stream:
                stream.wait_stream(maker)
        if stream not in self._streams:
            self._streams.append(stream)
        self._waited[handle] = max(makers, 1)

    def let_go(self) -> None:
        """Makes the stream that owns the memory wait for all others that used it, before the arrays are freed."""
        for stream in self._streams:
            for other in self._streams:
                if other != stream:
                    stream.wait_stream(other)

    @property
    def anchored(self) -> bool:
        """Whether some head computes its anchors only."""
        return len(self.query_token) > 0

    def lowered(self) -> AbstractContextManager[DeviceSchedule]:
        """Unpacks the lists to `columns`, for all work that the current stream is given before the context ends."""
        return nullcontext(self) if self.lists is None else self._unpacked(self.lists)

    @contextmanager
    def _unpacked(self, lists: PackedLists) -> Iterator[DeviceSchedule]:
        with lists.room.entered():
            lists.unpack()
            yield self

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays and of tensors that backends derived, without buffers that layers share."""
        arrays = [self.tiles, self.heads]
        if self.lists is None:
            arrays += [self.columns, self.query_token, self.query_first, self.query_copies]
        for derived in tuple(self._derived.values()):
            arrays += [each for each in getattr(derived, "__dict__", {}).values() if isinstance(each, torch.Tensor)]
        packed = 0 if self.lists is None else self.lists.nbytes
        return packed + sum({array.data_ptr(): array.nbytes for array in arrays}.values())

    def derived(self, make: Callable[[DeviceSchedule], T]) -> T:
        """A value that a backend derives from the schedule: ``make(self)``, called once and stored. The current CUDA
        stream waits for it.

        Raises:
            RuntimeError: A CUDA graph is being captured, which cannot make it.
        """
        if make not in self._derived:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"a schedule must be run once on {self.device} before a CUDA graph is captured")
            value = make(self)
            if self.device.type == "cuda":
                self._makers.append(torch.cuda.current_stream(self.device))
            self._derived[make] = value
        if self.device.type == "cuda":
            self.use()
        return self._derived[make]


def bound_to(core: LayerSchedule, device: torch.device, workspace: Workspace | None = None) -> DeviceSchedule:
    """Puts a schedule on a device; with a workspace as bits."""

    def there(array: np.ndarray) -> torch.Tensor:
        return move(torch.from_numpy(array), device)

    runs, pattern_start = _query_runs(core)
    facts = (np.append(core.pattern_tokens, core.grid.tokens), pattern_start, np.append(core.member_tokens, 0))
    heads = np.stack(facts, axis=1)[core.head_anchor].astype(
        np.int32
    )  # -1, where every query is computed, takes the last
    tiles = there(_tiles(core))
    if workspace is None:
        every = np.arange(core.k_blocks, dtype=np.uint16)
        columns = there(np.concatenate([every, core.col_idx, np.zeros(1, dtype=np.uint16)]))
        return DeviceSchedule(core, device, tiles, columns, there(heads), *map(there, expanded(runs)))
    starts, queries = core.row_ptr + np.int32(core.k_blocks), int(runs[:, 1].sum())
    room, bits = workspace.on(device), core.list_bits.copy()
    lists = PackedLists(there(bits), there(starts), core.k_blocks, there(runs), queries, room)
    return DeviceSchedule(core, device, tiles, room.columns, there(heads), *room.queries(queries), lists=lists)


def other_tiles(bound: DeviceSchedule, all_tokens: int, video_start: int) -> int:
    """Number of tiles for the queries of the prefix and of the suffix; each of both begins a new tile."""
    blocks, grid = bound.core.blocks, bound.core.grid
    return blocks.q_blocks(video_start) + blocks.q_blocks(all_tokens - video_start - grid.tokens)


def move(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device, made on the current stream without waiting for it."""
    if device.type == "cuda":
        host = host.pin_memory()  # a copy from pageable memory would wait for the stream
    return host.to(device, non_blocking=True)


def _tiles(core: LayerSchedule) -> Int32:
    """`DeviceSchedule.tiles`, on the host."""
    counts = np.diff(core.head_tile_ptr)
    head = np.repeat(np.arange(core.heads), counts)
    tile = np.arange(len(head)) - np.repeat(core.head_tile_ptr[:-1], counts)
    listed = core.head_list[head] != DENSE
    start = np.zeros(len(head), dtype=np.int64)
    stop = np.full(len(head), core.k_blocks)
    lists, row_ptr = (core.head_list[head] + tile)[listed], core.row_ptr
    start[listed] = core.k_blocks + row_ptr[lists]
    stop[listed] = core.k_blocks + row_ptr[lists + 1]
    return np.stack([head, tile, start, stop], axis=1).astype(np.int32)[core.tile_order]


def _query_runs(core: LayerSchedule) -> tuple[Int32, list[int]]:
    """`query_token`, `query_first` and `query_copies` as runs (see `workspace.expanded`); where each pattern, then all
    V start. No runs where every head computes every query.
    """
    if (core.head_anchor == NO_ANCHORS).all():
        return np.zeros((0, 5), dtype=np.int32), [0] * len(core.anchor_ptr)
    grid = core.grid
    parts, starts = [], [0]
    for pattern in range(len(core.anchor_ptr) - 1):
        group_start, anchor = core.groups(pattern)
        size = int(core.member_tokens[pattern])
        row = np.arange(0, size, grid.width)  # of a member: where its rows begin, each a run
        tokens = ((at.astype(np.int64) * size)[:, None] + row for at in (anchor, group_start))
        each = np.broadcast_arrays(grid.width, *tokens, core.group_sizes(pattern)[:, None])
        parts.append(np.stack(each, axis=-1).reshape(-1, 4))
        starts.append(starts[-1] + int(core.pattern_tokens[pattern]))
    first = np.arange(0, grid.tokens, EVERY_AT_ONCE)
    every = np.stack([np.minimum(EVERY_AT_ONCE, grid.tokens - first), first, first, np.ones_like(first)], axis=1)
    runs = np.concatenate([*parts, every])
    start = np.cumsum(runs[:, 0]) - runs[:, 0]
    return np.concatenate([start[:, None], runs], axis=1).astype(np.int32), starts
