"""What one layer executes during one segment, as the runtime sees it: as torch tensors, and as arrays on a device."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from calibatt.plans.schedule import FRAMES, Int32, LayerSchedule
from calibatt.plans.schema import Blocks, TokenGrid
from calibatt.plans.stored import StoredLayers
from calibatt.runtime.device_schedule import DeviceSchedule, bound_to
from calibatt.runtime.workspace import Workspace


class Outline:
    """The part of a schedule that is known without its lists, and decides which backends can execute it.

    Args:
        grid: The video tokens.
        blocks: Block sizes.
        heads: How many heads.
        precisions: Precisions of the heads; of a share those of all ranks, so that all choose the same backend.
    """

    def __init__(self, grid: TokenGrid, blocks: Blocks, heads: int, precisions: Iterable[int]) -> None:
        self.grid, self.blocks, self.heads, self.precisions = grid, blocks, heads, frozenset(precisions)
        self.q_blocks, self.k_blocks = blocks.q_blocks(grid.tokens), blocks.k_blocks(grid.tokens)


class AttentionSchedule(Outline):
    """What all heads of one layer compute in one segment; immutable.

    Args:
        grid: The video tokens.
        blocks: Block sizes.
        heads: How many heads.
        precisions: Precisions of the heads.
        most_lists: Most lists that there can be, known without decoding any.
        most_queries: Most entries that the arrays of queries can have; see `most_queries`.
    """

    workspace: Workspace | None = None
    """The buffer where lists are unpacked, if they are on devices as bits; None: they are there as lists."""

    def __init__(
        self,
        grid: TokenGrid,
        blocks: Blocks,
        heads: int,
        precisions: Iterable[int],
        most_lists: int,
        most_queries: int,
    ) -> None:
        super().__init__(grid, blocks, heads, precisions)
        self.most_lists, self.most_queries = most_lists, most_queries
        self._bound: dict[torch.device, DeviceSchedule] = {}

    @property
    def core(self) -> LayerSchedule:
        """The schedule of the plan file, which is trusted: `core.check()` has passed."""
        raise NotImplementedError

    @property
    def density(self) -> float:
        """Blocks computed / blocks of dense attention, mean over the heads."""
        return self.core.density

    def __repr__(self) -> str:
        of = f"{self.heads} heads, {self.grid.tokens} video tokens, blocks {self.blocks.block_q}x{self.blocks.block_k}"
        return f"AttentionSchedule({of}, density {self.density:.3f})"

    def dense(self, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The oracle's view of a head.

        Returns:
            source: int64 ``(V,)``; the token whose query is computed in place of token i.
            keep: bool ``(V, k_blocks)``; the key blocks that query attends to.
        """
        source, keep = self.core.dense(head)
        return torch.from_numpy(source), torch.from_numpy(keep)

    @property
    def work(self) -> list[int]:
        """Blocks that each head computes."""
        core = self.core
        return [core.computed_blocks(head) for head in range(core.heads)]

    def bind(self, device: torch.device | str) -> DeviceSchedule:
        """Index arrays of this schedule on `device`, made at the first call for that device and stored until `unbind`.

        The first call copies on the current stream, without waiting for it; a later one does nothing. Any stream may
        use them.

        Raises:
            RuntimeError: A CUDA graph is being captured, which cannot make them.
        """
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        bound = self._bound.get(device)
        if bound is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"{self!r} must be on {device} before a CUDA graph is captured: run it once before")
            bound = self._bound[device] = bound_to(self.core, device, self.workspace)
        if device.type == "cuda":
            bound.use()
        return bound

    def prefetch(self, device: torch.device, lock: AbstractContextManager[Any]) -> None:
        """`bind`, ahead of use and under a lock, if need be; does nothing while a CUDA graph is captured."""
        if device in self._bound or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return
        with lock:
            self.bind(device)

    def unbind(self) -> None:
        """Frees the arrays on every device, except those that a CUDA graph uses; `bind` makes them again."""
        for device, bound in tuple(self._bound.items()):
            if not bound.captured:
                bound.let_go()
                del self._bound[device]

    @property
    def bound_bytes(self) -> int:
        """Bytes of the arrays on all devices, and of what backends derived from them."""
        return sum(bound.nbytes for bound in tuple(self._bound.values()))


class ListedSchedule(AttentionSchedule):
    """A schedule that is in memory.

    Args:
        core: The schedule.
    """

    def __init__(self, core: LayerSchedule) -> None:
        queries = most_queries(core.grid, core.anchor_ptr, core.anchor_axis)
        super().__init__(core.grid, core.blocks, core.heads, core.head_precision.tolist(), len(core.list_bits), queries)
        self._core = core

    @property
    def core(self) -> LayerSchedule:
        return self._core


class StoredSchedule(AttentionSchedule):
    """A schedule that is decoded when it is used.

    Args:
        stored: The schedules of a plan.
        segment: Number of the segment, from 0.
        layer: Number of the layer, from 0.
    """

    def __init__(self, stored: StoredLayers, segment: int, layer: int) -> None:
        self._stored, self._segment, self._layer = stored, segment, layer
        encoded = stored.layers[segment][layer]
        small, lists = encoded.small, encoded.lists
        queries = most_queries(stored.grid, small["anchor_ptr"], small["anchor_axis"])
        super().__init__(stored.grid, stored.blocks, stored.heads, small["head_precision"].tolist(), lists, queries)

    @property
    def core(self) -> LayerSchedule:
        """The schedule, decoded anew unless it was among the last ones used.

        Raises:
            PlanError: What is stored breaks a promise of FORMAT.md.
        """
        return self._stored.schedule(self._segment, self._layer)


def most_queries(grid: TokenGrid, anchor_ptr: Int32, anchor_axis: Int32) -> int:
    """Entries of the arrays of queries: those of all anchor patterns, then all tokens; none without patterns."""
    if len(anchor_axis) == 0:
        return 0
    rows = int(np.diff(anchor_ptr) @ np.where(anchor_axis == FRAMES, grid.height, 1))
    return rows * grid.width + grid.tokens
