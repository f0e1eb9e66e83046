"""The schedules of a plan, of which the last used ones stay on devices."""

from __future__ import annotations

from collections.abc import Sequence

from calibatt.runtime.schedule import LayerSchedule

RESIDENT_BYTES = 1 << 30
"""Index arrays of a plan stay on devices up to so many bytes, and always those of the segment at work and the next one.
A small plan is put there once; a segment of a large one each time that it comes."""


class ResidentSchedules:
    """The schedules of all layers in all segments.

    Args:
        schedules: By segment, then by layer.
    """

    def __init__(self, schedules: Sequence[Sequence[LayerSchedule]]) -> None:
        self._schedules = tuple(map(tuple, schedules))
        self._last_used: list[int] = []

    def layers(self, segment: int) -> Sequence[LayerSchedule]:
        """The schedules of all layers in one segment."""
        return self._schedules[segment]

    def make_room(self, *segments: int) -> None:
        """Lets go of the arrays of the segments used longest ago, beyond `RESIDENT_BYTES`; never of those named."""
        others = [each for each in self._last_used if each not in segments]
        self._last_used = [*segments, *others]
        total = sum(self._bound_bytes(each) for each in segments)
        for each in others:
            total += self._bound_bytes(each)
            if total > RESIDENT_BYTES:
                for schedule in self._schedules[each]:
                    schedule.unbind()

    def let_go(self) -> None:
        """Lets go of the arrays of all segments."""
        for schedules in self._schedules:
            for schedule in schedules:
                schedule.unbind()

    def _bound_bytes(self, segment: int) -> int:
        return sum(schedule.bound_bytes for schedule in self._schedules[segment])
