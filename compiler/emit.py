"""From a compiled job to a plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from importlib.metadata import version
from itertools import pairwise
from typing import Any

from calibatt.compiler.errors import PassError
from calibatt.compiler.ir import Job
from calibatt.compiler.language import print_passes
from calibatt.compiler.passes import Pass
from calibatt.compiler.stats import Store
from calibatt.plans import PlanFile, Segment


def segments(times: Sequence[float]) -> tuple[Segment, ...]:
    """Segments that stand for recorded times, ascending; borders lie midway, and all cover [0, 1]."""
    borders = [0.0, *((a + b) / 2 for a, b in pairwise(times)), 1.0]
    return tuple(Segment(*part) for part in zip(borders, borders[1:], times, strict=False))


def make_plan(job: Job, store: Store, passes: Sequence[Pass], notes: str = "") -> PlanFile:
    """The plan of a job whose units are all lowered.

    Raises:
        PassError: A unit has no schedule.
        PlanError: A promise of the plan is broken; a bug.
    """
    lowered = [unit.lowered for unit in job.units]
    layers = job.manifest.model.layers
    schedules = [schedule for schedule in lowered if schedule is not None]
    if len(schedules) != len(lowered):
        raise PassError(f"passes must end with lower, got {print_passes(passes)}")
    times = range(len(job.manifest.times))
    computed = sum(schedule.computed_blocks(head) for schedule in schedules for head in range(schedule.heads))
    dense = sum(unit.heads * unit.dense_blocks for unit in job.units)
    predicted: dict[str, Any] = {
        "device": job.device.name,
        "device_source": job.device.source,
        "planned_ms": [[job.unit_ms(unit) for unit in job.at_time(index)] for index in times],
        "dense_ms": [[job.dense_ms(unit) for unit in job.at_time(index)] for index in times],
        "density": computed / dense,
        "weighted_error": [float(sum(u.error.sum() * u.weight for u in job.at_time(index))) for index in times],
        "head_error": [[unit.error.tolist() for unit in job.at_time(index)] for index in times],
        "error_weight": [[unit.weight for unit in job.at_time(index)] for index in times],
    }
    return PlanFile(
        signature=job.manifest.model,
        grid=job.manifest.grid,
        blocks=job.manifest.blocks,
        segments=segments(job.manifest.times),
        schedules=tuple(tuple(schedules[index * layers : (index + 1) * layers]) for index in times),
        passes=print_passes(passes),
        provenance=provenance(job, store),
        predicted=predicted,
        notes=notes,
    )


def provenance(job: Job, store: Store) -> dict[str, Any]:
    """Where the plan comes from: plain values, nothing of the machine or the day."""
    found: dict[str, Any] = {
        "samples": list(job.samples),
        "manifest": job.manifest.digest,
        "versions": {**job.manifest.versions, "calibatt-compile": version("calibatt")},
        "time_weight": job.weights_source,
    }
    prompts = [store.meta[sample].get("prompt") for sample in job.samples]
    if all(isinstance(prompt, str) for prompt in prompts):
        text = json.dumps(prompts, ensure_ascii=True).encode()
        found["prompts_digest"] = blake2b(text, digest_size=16).hexdigest()
    return found
