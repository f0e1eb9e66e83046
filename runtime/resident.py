"""A plan and its schedules; those used last stay on devices."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from calibatt.plans import PlanFile, told_precisions
from calibatt.runtime.schedule import AttentionSchedule, StoredSchedule
from calibatt.runtime.workspace import Workspace

RESIDENT_BYTES = 1 << 28
"""Most bytes of a plan's index arrays that stay on devices, beside those of the current and the next segment. A plan
whose lists could not exceed this is put there once, as lists. A larger one is put there as bits, segment by segment,
and a layer's lists are unpacked when it runs."""
COLUMN_BYTES = 2


class ResidentSchedules:
    """The schedules of all layers in all segments.

    Args:
        schedules: By segment, then by layer.
    """

    def __init__(self, schedules: Sequence[Sequence[AttentionSchedule]]) -> None:
        self.lock = threading.RLock()
        """A lock for threads that put arrays on devices, use them or free them."""
        self._schedules = tuple(map(tuple, schedules))
        self._last_used: list[int] = []
        self._workspace: Workspace | None = None
        every = [schedule for layers in self._schedules for schedule in layers]
        most = [(schedule.most_lists + 1) * schedule.k_blocks + 1 for schedule in every]
        if COLUMN_BYTES * sum(most) > RESIDENT_BYTES:
            self._workspace = Workspace(max(most), max(schedule.most_queries for schedule in every))
            for schedule in every:
                schedule.workspace = self._workspace

    @property
    def bound_bytes(self) -> int:
        """Bytes of all arrays that are on devices now."""
        return self._shared_bytes + sum(self._bound_bytes(segment) for segment in range(len(self._schedules)))

    def layers(self, segment: int) -> Sequence[AttentionSchedule]:
        """The schedules of all layers in one segment."""
        return self._schedules[segment]

    def make_room(self, *segments: int) -> None:
        """Frees arrays of segments used longest ago until `RESIDENT_BYTES` remain; never those of named segments."""
        others = [each for each in self._last_used if each not in segments]
        self._last_used = [*segments, *others]
        total = self._shared_bytes + sum(self._bound_bytes(each) for each in segments)
        for each in others:
            total += self._bound_bytes(each)
            if total > RESIDENT_BYTES:
                for schedule in self._schedules[each]:
                    schedule.unbind()

    @property
    def _shared_bytes(self) -> int:
        return 0 if self._workspace is None else self._workspace.nbytes

    def _bound_bytes(self, segment: int) -> int:
        return sum(schedule.bound_bytes for schedule in self._schedules[segment])


class LoadedPlan(ResidentSchedules):
    """A plan's contents, and its schedules, which are decoded when they are put on a device, as lists or as bits.

    Args:
        file: The contents.
    """

    def __init__(self, file: PlanFile) -> None:
        self.file, self.signature, self.grid = file, file.signature, file.grid
        self.blocks, self.segments = file.blocks, file.segments
        layers, segments = range(file.signature.layers), range(len(file.segments))
        super().__init__([[StoredSchedule(file.schedules, at, layer) for layer in layers] for at in segments])

    def schedule(self, time: float, layer: int) -> AttentionSchedule:
        """What a layer executes at a denoising time; the same object for all times of a segment.

        Raises:
            ValueError: `time` is not in [0, 1], or the model has no such layer.
        """
        if not 0 <= layer < self.signature.layers:
            raise ValueError(f"layer must be 0 to {self.signature.layers - 1}, got {layer}")
        return self._schedules[self.file.segment_index(time)][layer]

    def explain(self) -> list[str]:
        """Lines of text: what the plan is for, the density of every layer in every segment, and precisions of heads."""
        lines = [f"{self.signature.architecture}, {self.grid}, blocks {self.blocks.block_q}x{self.blocks.block_k}"]
        lines.append("density (share of the blocks of dense attention) by segment, layers 0 to last:")
        every, layers = {}, range(self.signature.layers)
        precisions = np.zeros((len(self.segments), len(layers), self.signature.heads), np.uint8)
        for segment, layer, packed in self.file.walk():
            every[segment, layer], precisions[segment, layer] = packed.density, packed.head_precision
        for index in reversed(range(len(self.segments))):
            times = f"time {self.segments[index].start:.4f} to {self.segments[index].stop:.4f}"
            densities = [every[index, layer] for layer in layers]
            row = " ".join(f"{density:.3f}" for density in densities)
            lines.append(f"  {times}: mean {sum(densities) / len(densities):.3f}; {row}")
        lines.append(f"precision, over all segments: {told_precisions(precisions)}")
        if precisions.any():
            lines += [f"  layer {layer}: {told_precisions(precisions[:, layer])}" for layer in layers]
        return lines
