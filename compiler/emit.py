"""From a compiled job to a plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from hashlib import blake2b
from importlib.metadata import version
from itertools import pairwise
from typing import Any

from calibatt.compiler.cost import Device
from calibatt.compiler.errors import PassError
from calibatt.compiler.gather import StatisticsSource
from calibatt.compiler.ir import Job
from calibatt.compiler.language import print_passes
from calibatt.compiler.passes import Pass
from calibatt.compiler.pipeline import Map, Run, Source, in_turn, run, stages
from calibatt.compiler.shelf import MemoryShelf, Shelf
from calibatt.compiler.stats import Store
from calibatt.plans import EncodedLayer, PlanFile, Segment, StoredLayers, base_segments, encode


def segments(times: Sequence[float]) -> tuple[Segment, ...]:
    """Segments that stand for recorded times, ascending; borders lie midway, and all cover [0, 1]."""
    borders = [0.0, *((a + b) / 2 for a, b in pairwise(times)), 1.0]
    return tuple(Segment(*part) for part in zip(borders, borders[1:], times, strict=False))


def require_lowered(passes: Sequence[Pass]) -> None:
    """Refuses passes that make no plan, before they are run.

    Raises:
        PassError: The last one is not `lower`.
    """
    if passes[-1].name != "lower":
        raise PassError(f"passes must end with lower, got {print_passes(passes)}")


def make_plan(
    job: Job,
    provenance: dict[str, Any],
    parts: tuple[Segment, ...],
    passes: Sequence[Pass],
    done: Run,
    shelf: Shelf,
    over: Map,
    notes: str = "",
) -> PlanFile:
    """The plan of a job whose passes have been run and end with `lower`.

    Args:
        job: The job.
        provenance: Where it comes from.
        parts: The segments, one a recorded time.
        passes: What was run.
        done: What came of it.
        shelf: Where the units are.
        over: How units are spread over processes.
        notes: Stored in the plan.
    """
    layers, times = job.manifest.model.layers, range(len(job.manifest.times))
    bases = base_segments(len(times))
    last = len(stages(passes)) - 1
    base_of = [bases[job.place(index)[0]] * layers + job.place(index)[1] for index in range(job.units)]
    encoded = dict(over(partial(_encode, shelf, last), base_of))
    by_time = [done.units[index * layers : (index + 1) * layers] for index in times]
    predicted: dict[str, Any] = {
        "device": job.device.name,
        "device_source": job.device.source,
        "planned_ms": [[unit.predicted_ms for unit in units] for units in by_time],
        "dense_ms": [[job.dense_unit_ms] * layers for _ in times],
        "density": done.accounts[-1].density,
        "weighted_error": [float(sum(unit.error for unit in units)) for units in by_time],
        "head_error": [[list(unit.head_error) for unit in units] for units in by_time],
        "error_weight": [[unit.weight for unit in units] for units in by_time],
    }
    stored = [[encoded[index * layers + layer] for layer in range(layers)] for index in times]
    manifest = job.manifest
    return PlanFile(
        signature=manifest.model,
        grid=manifest.grid,
        blocks=manifest.blocks,
        segments=parts,
        schedules=StoredLayers("", manifest.grid, manifest.blocks, manifest.model.heads, bases, stored),
        passes=print_passes(passes),
        provenance=provenance,
        predicted=predicted,
        notes=notes,
    )


def compile_in_memory(store: Store, source: Source, passes: Sequence[Pass], device: Device) -> PlanFile:
    """What `calibatt-compile` makes of a store, in this process and without a folder: for small jobs.

    Args:
        store: The statistics.
        source: `StatisticsSource` of them.
        passes: What to run; the last one is `lower`.
        device: What predicts milliseconds.

    Raises:
        CompileError: A pass lacks what it requires.
        StoreError: The statistics are damaged.
    """
    require_lowered(passes)
    job, shelf = StatisticsSource(store).make_job(device), MemoryShelf()
    passes = StatisticsSource(store).settle(job, passes)
    found = run(source, job, passes, shelf, in_turn)
    return make_plan(job, provenance(job, store), segments(job.manifest.times), passes, found, shelf, in_turn)


def _encode(shelf: Shelf, last: int, index: int, base: int) -> EncodedLayer:
    above = None if base == index else shelf.unit(last, base).lowered
    layer = shelf.unit(last, index).lowered
    assert layer is not None
    return encode(layer, above)


def provenance(job: Job, store: Store) -> dict[str, Any]:
    """Where the plan comes from: plain values, nothing of the machine or the day."""
    found: dict[str, Any] = {
        "samples": list(job.samples),
        "manifest": job.manifest.digest,
        "versions": {**job.manifest.versions, "calibatt-compile": version("calibatt")},
        "time_weight": job.weights_source,
    }
    if job.use_ladders and job.ladders is not None:
        found["refinement"] = job.ladders.told(job.manifest)
    prompts = [store.meta[sample].get("prompt") for sample in job.samples]
    if all(isinstance(prompt, str) for prompt in prompts):
        text = json.dumps(prompts, ensure_ascii=True).encode()
        found["prompts_digest"] = blake2b(text, digest_size=16).hexdigest()
    return found
