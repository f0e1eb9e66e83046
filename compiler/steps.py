"""How many steps of a sampling each recorded time stands for, and how much those steps change together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from calibatt.compiler.errors import CompileError
from calibatt.compiler.stats import SampleError, SamplingTables, Table
from calibatt.compiler.stats.codes import MOST
from calibatt.plans import Segment

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of the sampling that a plan is for.

    Args:
        counts: int64 ``(T,)``: how many steps each recorded time stands for, those in its segment.
        times: Denoising times of all steps, falling; none if they are not known, and each recorded time is one step.
    """

    counts: Int64
    times: tuple[float, ...] = ()


def segments(times: Sequence[float]) -> tuple[Segment, ...]:
    """Segments that stand for recorded times, ascending; borders lie midway, and all cover [0, 1]."""
    borders = [0.0, *((a + b) / 2 for a, b in pairwise(times)), 1.0]
    return tuple(Segment(*part) for part in zip(borders, borders[1:], times, strict=False))


def measured_times(recorded: Sequence[float], meta: Mapping[str, Mapping[str, Any]]) -> tuple[float, ...]:
    """The denoising times of all steps of the samplings that were measured, falling; none if the store does not say.

    Args:
        recorded: The times of the store, ascending.
        meta: Meta data of its samplings. An earlier version stored how many steps they have, not their times.

    Raises:
        SampleError: The recorded times are not among those of a sampling's steps, or two samplings have other steps.
    """
    known: dict[tuple[float, ...], str] = {}
    for name, facts in meta.items():
        times = facts.get("times", list(recorded) if facts.get("steps") == len(recorded) else None)
        if times is None:
            continue
        right = isinstance(times, list) and all(type(now) is float and 0 <= now <= 1 for now in times)
        if not right or not set(recorded) <= set(times):
            rule = f"have times of its steps in [0, 1], the {len(recorded)} recorded ones among them"
            raise SampleError(f"sampling {name!r} must {rule}, got {str(times)[:80]}")
        known.setdefault(tuple(sorted(times, reverse=True)), name)
    if len(known) > 1:
        listed = " and ".join(f"{len(times)} in {name!r}" for times, name in known.items())
        raise SampleError(f"all samplings must have the same steps, got {listed}: compile them apart")
    return next(iter(known), ())


def steps_of(recorded: Sequence[float], measured: Sequence[float], wanted: int | None = None) -> Steps:
    """The steps that a plan is for: those that were measured, or another number along the same schedule.

    Args:
        recorded: The times of the store, ascending.
        measured: `measured_times` of it.
        wanted: How many steps, along the same schedule (`_along`). Those of an expert that hands over to another go on
            below its range there, all into its lowest segment.

    Raises:
        CompileError: The measured times are not known, or so few steps leave a recorded time without one.
    """
    if not measured:
        if wanted is not None:
            rule = "come with a store that says the times of its steps (earlier versions did not: calibrate again)"
            raise CompileError(f"--steps must {rule}, got {wanted}")
        return Steps(np.ones(len(recorded), np.int64))
    times = tuple(measured)
    if wanted is not None and wanted != len(times):
        times = _along(times, wanted)
    counts = np.bincount(_segment_of(recorded, times), minlength=len(recorded))
    if not counts.all():
        rule = "be enough that every recorded time stands for one (calibrate at those steps, or with fewer --times)"
        raise CompileError(f"--steps must {rule}, got {wanted}, none at time {recorded[int(counts.argmin())]:.3f}")
    return Steps(counts, times)


def _along(measured: Sequence[float], wanted: int) -> tuple[float, ...]:
    """Times of another number of steps.

    Where a share l of the steps is left, schedules of flow matching with a shift s have the odds s l / (1 - l) of their
    time: the logarithm of s is interpolated, so that such schedules are met exactly.
    """
    steps, most = len(measured), max(measured[0], np.finfo(np.float64).tiny)
    ends = int(steps > 1 and measured[-1] < (measured[-2] - measured[-1]) / 2)  # 1: the last step is at 0 itself
    left, share = 1 - np.arange(steps) / max(steps - ends, 1), np.array(measured) / most
    inside = (left > 0) & (left < 1) & (share > 0) & (share < 1)
    left, share = (left[inside], share[inside]) if inside.any() else (np.full(1, 0.5), np.full(1, 0.5))  # no shift
    at = 1 - np.arange(wanted) / max(wanted - ends, 1)
    odds = _log_odds(at) + np.interp(at, left[::-1], (_log_odds(share) - _log_odds(left))[::-1])
    return tuple((most / (1 + np.exp(-odds))).tolist())


def _log_odds(share: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of shares from 0 to 1, whose ends are taken just inside."""
    inner = share.clip(1e-12, 1 - 1e-12)
    odds: npt.NDArray[np.float64] = np.log(inner / (1 - inner))
    return odds


def of_segments(table: Table, recorded: Sequence[float], measured: Sequence[float]) -> Table:
    """Tables whose levels and effects are of all measured steps of a segment, not of its recorded time alone.

    Neighbouring steps of one mask change the latent the same way, so that their effects add up. Between recorded times
    the level is interpolated, on a logarithmic scale. No level grows beyond the largest that a store may have.

    Args:
        table: Tables of the recorded times.
        recorded: These times, ascending.
        measured: `measured_times`.
    """
    if len(measured) <= len(recorded):
        return table
    segment, level = _segment_of(recorded, measured), np.log(table.time_level)
    root = np.exp((np.interp(measured, recorded, level) - level[segment]) / 2)
    reach = np.minimum(np.bincount(segment, root, len(recorded)), np.sqrt(MOST / table.time_level))
    factor = reach.astype(np.float32)[:, None, None, None]
    return Table(
        tuple(
            SamplingTables(
                level=each.level * reach**2,
                window_effect=each.window_effect * factor,
                ladder_effect=each.ladder_effect * factor,
                precision_effect=each.precision_effect * factor,
            )
            for each in table.samplings
        )
    )


def _segment_of(recorded: Sequence[float], times: Sequence[float]) -> Int64:
    """The segment of each time."""
    starts = [part.start for part in segments(recorded)]
    return np.searchsorted(starts, times, "right") - 1
