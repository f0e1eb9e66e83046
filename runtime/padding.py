"""Text that is shorter than planned: prompts are padded to one length, and a model attends to no padding.

Each sample is computed without its padding, by the same schedule without the tokens that are not there: exactly what
the model's own mask means, at the kernels' full speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from calibatt.plans.packed import PackedLayer
from calibatt.plans.schedule import LayerSchedule as CoreSchedule
from calibatt.plans.schema import Blocks, TokenGrid
from calibatt.runtime.resident import ResidentSchedules
from calibatt.runtime.schedule import LayerSchedule

MOST_LENGTHS = 4
"""Lengths of text whose index arrays stay on devices, the last used ones: a prompt or two and their negatives."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def each_sample(
    attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """Attention of every sample without the padding at its end.

    Args:
        attend: ``attend(q, k, v) -> out``, all ``(B, n, H, D)``.
        q: ``(B, N, H, D)``.
        k: As q.
        v: As q.
        lengths: Tokens of each sample; what follows them is padding.

    Returns:
        ``(B, N, H, D)``; padding is zeros.
    """
    if all(length == q.shape[1] for length in lengths):
        return attend(q, k, v)
    out = v.new_zeros(v.shape)
    for sample, length in enumerate(lengths):
        part = slice(sample, sample + 1), slice(length)
        out[part] = attend(q[part], k[part], v[part])
    return out


class ShorterSchedule(LayerSchedule):
    """A schedule with fewer text tokens at its end; what it keeps is found when it is bound.

    Args:
        whole: The schedule as planned.
        text_after: Text tokens that remain.
    """

    def __init__(self, whole: LayerSchedule, text_after: int) -> None:
        self._whole, self._text_after = whole, text_after
        self._bound = {}

    @property
    def core(self) -> CoreSchedule:
        """Cut out anew.

        Raises:
            ScheduleError: A tile of the plan keeps key blocks of text only, which may be padding.
        """
        return self._whole.core.shorten(self._text_after)

    @property
    def packed(self) -> PackedLayer:
        """Cut out anew, as `core`."""
        return self._whole.packed.shorten(self._text_after)

    @property
    def most_lists(self) -> int:
        return self._whole.most_lists

    @property
    def most_queries(self) -> int:
        return self._whole.most_queries

    @property
    def grid(self) -> TokenGrid:
        grid = self._whole.grid
        return TokenGrid(grid.frames, grid.height, grid.width, grid.text_before, self._text_after)

    @property
    def blocks(self) -> Blocks:
        return self._whole.blocks

    @property
    def heads(self) -> int:
        return self._whole.heads


class ShorterPlans:
    """The schedules of one plan for the lengths of text that were used last.

    Args:
        plan: The plan's schedules.
        segments: How many it has.
        text_after: Text tokens at the end of the plan's sequence.
    """

    def __init__(self, plan: ResidentSchedules, segments: int, text_after: int) -> None:
        self._plan, self._segments, self._text_after = plan, segments, text_after
        self._made: dict[int, ResidentSchedules] = {}

    @property
    def bound_bytes(self) -> int:
        """Bytes on all devices, the plan's own not counted."""
        return sum(made.bound_bytes for made in tuple(self._made.values()))

    def __getitem__(self, text_after: int) -> ResidentSchedules:
        """The schedules for so many text tokens."""
        if text_after == self._text_after:
            return self._plan
        found = self._made.pop(text_after, None)
        if found is None:
            found = ResidentSchedules(
                [
                    [ShorterSchedule(schedule, text_after) for schedule in self._plan.layers(segment)]
                    for segment in range(self._segments)
                ]
            )
            if len(self._made) == MOST_LENGTHS:
                self._made.pop(next(iter(self._made))).let_go()
        self._made[text_after] = found
        return found
