"""The schedules of a plan, of which the last used ones stay on devices."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from calibatt.runtime.schedule import LayerSchedule
from calibatt.runtime.workspace import Workspace

RESIDENT_BYTES = 1 << 28
"""Index arrays of a plan stay on devices up to so many bytes, and always those of the segment at work and the next one.
A plan whose lists would take no more even if they held every block is put there once, as lists. A larger one is there
as bits, a segment each time that it comes, and a layer's lists are unpacked when it runs."""
COLUMN_BYTES = 2


class ResidentSchedules:
    """The schedules of all layers in all segments.

    Args:
        schedules: By segment, then by layer.
    """

    def __init__(self, schedules: Sequence[Sequence[LayerSchedule]]) -> None:
        self.lock = threading.RLock()
        """Held by threads that put arrays on devices, use them, or let them go."""
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
        """Bytes on all devices, of all that is there now."""
        return self._shared_bytes + sum(self._bound_bytes(segment) for segment in range(len(self._schedules)))

    def layers(self, segment: int) -> Sequence[LayerSchedule]:
        """The schedules of all layers in one segment."""
        return self._schedules[segment]

    def make_room(self, *segments: int) -> None:
        """Lets go of the arrays of the segments used longest ago, beyond `RESIDENT_BYTES`; never of those named."""
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
