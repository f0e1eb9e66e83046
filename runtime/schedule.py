"""What one layer executes during one segment, as the runtime sees it: torch views, and index arrays on a device."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch

from calibatt.plans.packed import PackedLayer
from calibatt.plans.schedule import FRAMES, Int32
from calibatt.plans.schedule import LayerSchedule as CoreSchedule
from calibatt.plans.schema import Blocks, TokenGrid
from calibatt.plans.stored import StoredLayers
from calibatt.runtime.device_schedule import DeviceSchedule, bound_to
from calibatt.runtime.workspace import Workspace


class Outline(Protocol):
    """What is known of a schedule before its lists: enough to say who can execute it."""

    @property
    def grid(self) -> TokenGrid: ...
    @property
    def blocks(self) -> Blocks: ...
    @property
    def heads(self) -> int: ...
    @property
    def q_blocks(self) -> int: ...
    @property
    def k_blocks(self) -> int: ...
    @property
    def precisions(self) -> frozenset[int]: ...


class LayerSchedule:
    """The schedule of all heads of one layer in one segment; immutable.

    Args:
        core: The schedule as the plan file means it. It is trusted: `core.check()` has passed.
    """

    workspace: Workspace | None = None
    """Where lists are unpacked on devices, as bits of which they wait there; None: lists wait themselves."""

    def __init__(self, core: CoreSchedule) -> None:
        self._core = core
        self._bound: dict[torch.device, DeviceSchedule] = {}

    @property
    def core(self) -> CoreSchedule:
        """The schedule as the plan file means it."""
        return self._core

    @property
    def packed(self) -> PackedLayer:
        """The schedule with its lists as bits."""
        return PackedLayer.of(self.core)

    @property
    def most_lists(self) -> int:
        """How many lists there are, at most: known without unpacking any."""
        return len(self.core.row_ptr) - 1

    @property
    def most_queries(self) -> int:
        """Length of the arrays of queries, at most."""
        return _most_queries(self.grid, self.core.anchor_ptr, self.core.anchor_axis)

    @property
    def grid(self) -> TokenGrid:
        return self.core.grid

    @property
    def blocks(self) -> Blocks:
        return self.core.blocks

    @property
    def heads(self) -> int:
        return self.core.heads

    @property
    def q_blocks(self) -> int:
        return self.blocks.q_blocks(self.grid.tokens)

    @property
    def k_blocks(self) -> int:
        return self.blocks.k_blocks(self.grid.tokens)

    @property
    def precisions(self) -> frozenset[int]:
        """What its heads multiply in; of a share, those of all ranks, so that all choose the same backend."""
        return frozenset(self.core.head_precision.tolist())

    @property
    def density(self) -> float:
        """Blocks computed / blocks of dense attention, mean over the heads."""
        return self.core.density

    def __repr__(self) -> str:
        grid, blocks = self.grid, self.blocks
        return (
            f"LayerSchedule({self.heads} heads, {grid.tokens} video tokens, blocks {blocks.block_q}x{blocks.block_k}, "
            f"density {self.density:.3f})"
        )

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
        packed = self.packed
        return [packed.computed_blocks(head) for head in range(packed.heads)]

    def bind(self, device: torch.device | str) -> DeviceSchedule:
        """Index arrays of this schedule on `device`, made at the first call for that device and kept until `unbind`.

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
            core = self.core if self.workspace is None else self.packed.later()
            bound = self._bound[device] = bound_to(core, device, self.workspace)
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
        """Lets go of the arrays on every device, but for those that a CUDA graph uses; `bind` makes them again."""
        for device, bound in tuple(self._bound.items()):
            if not bound.captured:
                bound.let_go()
                del self._bound[device]

    @property
    def bound_bytes(self) -> int:
        """Bytes of the arrays on all devices, and of what backends derived from them."""
        return sum(bound.nbytes for bound in tuple(self._bound.values()))


class StoredSchedule(LayerSchedule):
    """A schedule that stays packed until it is bound or asked for its lists.

    Args:
        stored: The schedules of a plan.
        segment: Which one, from 0.
        layer: Of which layer, from 0.
    """

    def __init__(self, stored: StoredLayers, segment: int, layer: int) -> None:
        self._stored, self._segment, self._layer = stored, segment, layer
        self._bound = {}

    @property
    def core(self) -> CoreSchedule:
        """The schedule, decoded and lowered anew unless it was among the last ones used.

        Raises:
            PlanError: What is stored breaks a promise of FORMAT.md.
        """
        return self._stored.schedule(self._segment, self._layer)

    @property
    def packed(self) -> PackedLayer:
        """As of `LayerSchedule`; decoded anew unless it was among the last ones used."""
        return self._stored.packed(self._segment, self._layer)

    @property
    def most_lists(self) -> int:
        return self._stored.layers[self._segment][self._layer].lists

    @property
    def most_queries(self) -> int:
        small = self._stored.layers[self._segment][self._layer].small
        return _most_queries(self.grid, small["anchor_ptr"], small["anchor_axis"])

    @property
    def grid(self) -> TokenGrid:
        return self._stored.grid

    @property
    def blocks(self) -> Blocks:
        return self._stored.blocks

    @property
    def heads(self) -> int:
        return self._stored.heads

    @property
    def precisions(self) -> frozenset[int]:
        return frozenset(self._stored.layers[self._segment][self._layer].small["head_precision"].tolist())

    @property
    def density(self) -> float:
        return self.packed.density


def _most_queries(grid: TokenGrid, anchor_ptr: Int32, anchor_axis: Int32) -> int:
    if len(anchor_axis) == 0:
        return 0
    rows = int(np.diff(anchor_ptr) @ np.where(anchor_axis == FRAMES, grid.height, 1))
    return rows * grid.width + grid.tokens
