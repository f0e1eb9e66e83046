"""Unpacks block lists on a device just before their use: as bits they take a fifth of the memory there. The indices
of packed queries are stored run-length encoded, and expanded in the same way.

The lists of one layer at a time are in a buffer, the *room*, which all layers of a plan share. They are unpacked on
the stream that then reads them: nothing waits, and a CUDA graph unpacks them whenever it is replayed. At the size of
Wan 14B in 720p this costs some 0.1 % of the layer's attention.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from calibatt.plans.schedule import Int32

ALIGNED = 64
"""Arrays in a room begin at multiples of so many integers."""
LISTS_AT_ONCE = 4096
"""How many lists torch unpacks at a time, which bounds its memory."""


class Workspace:
    """Room for the lists of one layer at a time, on every device where they are needed.

    Args:
        columns: Most columns of a layer.
        queries: Most queries of a layer's anchor patterns.
    """

    def __init__(self, columns: int, queries: int = 0) -> None:
        self._columns, self._queries = columns, -(-queries // ALIGNED) * ALIGNED
        self._rooms: dict[torch.device, Room] = {}

    def on(self, device: torch.device) -> Room:
        """The room on a device, the same one each time."""
        if device not in self._rooms:
            columns = torch.empty(self._columns, dtype=torch.uint16, device=device)
            self._rooms[device] = Room(columns, torch.empty(3, self._queries, dtype=torch.int32, device=device))
        return self._rooms[device]

    @property
    def nbytes(self) -> int:
        """Bytes on all devices."""
        return sum(room.nbytes for room in tuple(self._rooms.values()))


class Room:
    """The buffer on one device.

    Uses from many threads and streams take turns. Replays of CUDA graphs cannot be seen here: they, and calls beside
    them, must not run on several streams at once if they use the same room, that is, the same plan.

    Args:
        columns: uint16; all layers use it, and its address never changes.
        queries: int32 ``(3, queries)``; as columns.
    """

    def __init__(self, columns: torch.Tensor, queries: torch.Tensor) -> None:
        self.columns, self._queries = columns, queries
        self._lock = threading.Lock()
        self._stream = torch.cuda.current_stream(columns.device) if columns.device.type == "cuda" else None
        """The stream of the last use; at first the one that allocated the memory."""

    @property
    def nbytes(self) -> int:
        return self.columns.nbytes + self._queries.nbytes

    def queries(self, count: int) -> tuple[torch.Tensor, ...]:
        """Token, first receiver and copies of so many packed queries, each int32 ``(count,)``."""
        return self._queries[:, :count].unbind()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A context for queueing work on the current stream that uses the room."""
        with self._lock:
            if self.columns.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
                stream = torch.cuda.current_stream(self.columns.device)
                if stream != self._stream:
                    stream.wait_stream(self._stream)
                    self.columns.record_stream(stream)
                    self._queries.record_stream(stream)
                self._stream = stream
            yield


@dataclass(frozen=True, eq=False)
class PackedLists:
    """Lists of a layer as bits, and queries as runs, and where they are unpacked; arrays on one device.

    Args:
        bits: uint8 ``(lists, ceil(K / 8))``: bit j, little-endian, is set if list i holds key block j.
        starts: int32 ``(lists + 1,)``; list i goes to ``columns[starts[i]:starts[i + 1]]``. The first is K.
        k_blocks: K.
        runs: int32 ``(runs, 5)``; see `expanded`.
        queries: How many queries the runs have.
        room: The buffer to unpack to.
    """

    bits: torch.Tensor
    starts: torch.Tensor
    k_blocks: int
    runs: torch.Tensor
    queries: int
    room: Room

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, the room not counted."""
        return self.bits.nbytes + self.starts.nbytes + self.runs.nbytes

    def unpack(self) -> None:
        """Writes 0, 1, ... K - 1, then the lists, then a 0, and the queries; on CUDA without waiting."""
        if self.bits.device.type == "cuda":
            unpack_by_kernel(self)
        else:
            unpack_by_torch(self)


def expanded(runs: Int32) -> tuple[Int32, Int32, Int32]:
    """Token, first receiver and copies of every query, from runs of queries: on the host.

    Args:
        runs: int32 ``(runs, 5)``: where each run begins, its length, token and first receiver of its first query, both
            1 more for each query that follows, and the copies of all.
    """
    run = np.repeat(np.arange(len(runs)), runs[:, 1])
    start, _, token, first, copies = runs[run].T
    place = np.arange(len(run), dtype=np.int32) - start
    return token + place, first + place, np.ascontiguousarray(copies)


def unpack_by_kernel(lists: PackedLists) -> None:
    """`PackedLists.unpack` by Triton."""
    from calibatt.runtime.kernels.unpack import (  # triton may be missing elsewhere
        COLUMNS_AT_ONCE,
        QUERIES_AT_ONCE,
        expand_runs,
        unpack_lists,
    )

    columns = lists.room.columns

    count, width = lists.bits.shape
    with torch.cuda.device_of(columns):
        unpack_lists[count + 1,](
            lists.bits, lists.starts, columns, count, lists.k_blocks,
            WIDTH=width, COLUMNS=COLUMNS_AT_ONCE, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
        if lists.queries:
            expand_runs[len(lists.runs),](
                lists.runs, *lists.room.queries(lists.queries), QUERIES=QUERIES_AT_ONCE, num_warps=1,
                enable_fp_fusion=True,
            )  # fmt: skip


def unpack_by_torch(lists: PackedLists) -> None:
    """`PackedLists.unpack` by torch alone; waits for devices other than the CPU."""
    columns, starts = lists.room.columns.view(torch.int16), lists.starts.tolist()
    every = torch.arange(lists.k_blocks, dtype=torch.int32, device=columns.device)
    columns[: lists.k_blocks] = every.to(torch.int16)
    places = torch.arange(8, dtype=torch.uint8, device=columns.device)
    for first in range(0, len(lists.bits), LISTS_AT_ONCE):
        bits = lists.bits[first : first + LISTS_AT_ONCE]
        blocks = (bits[:, :, None] >> places & 1).flatten(1).nonzero()[:, 1]
        columns[starts[first] : starts[first + len(bits)]] = blocks.to(torch.int16)
    columns[starts[-1]] = 0
    for array, values in zip(lists.room.queries(lists.queries), expanded(lists.runs.cpu().numpy()), strict=True):
        array.copy_(torch.from_numpy(values))
