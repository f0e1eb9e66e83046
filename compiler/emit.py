"""Makes a plan of a compiled job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from hashlib import blake2b
from importlib.metadata import version
from typing import Any

import numpy as np

from calibatt.compiler.errors import PassError
from calibatt.compiler.gather import Samplings
from calibatt.compiler.ir import Job
from calibatt.compiler.language import print_passes
from calibatt.compiler.passes import Pass
from calibatt.compiler.pipeline import Map, Run
from calibatt.compiler.prediction import Masks, Prediction, predict
from calibatt.compiler.shelf import Shelf
from calibatt.compiler.steps import segments
from calibatt.plans import EncodedLayer, PlanFile, StoredLayers, base_segments, encode


def require_lowered(passes: Sequence[Pass]) -> None:
    """Refuses passes that do not make a plan, before they are run.

    Raises:
        PassError: `lower` is not the last one, or comes twice.
    """
    if [each.name == "lower" for each in passes] != [*[False] * (len(passes) - 1), True]:
        raise PassError(f"passes must end with lower, got {print_passes(passes)}")


def make_plan(
    job: Job,
    store: Samplings,
    passes: Sequence[Pass],
    done: Run,
    shelf: Shelf,
    over: Map,
    notes: str = "",
) -> PlanFile:
    """The plan of a job whose passes have been run and end with `lower`.

    Args:
        job: The job.
        store: The samplings that it was made from.
        passes: The passes that were run.
        done: Their result.
        shelf: Where the units are stored.
        over: How units are spread over processes.
        notes: Stored in the plan.
    """
    layers, times = job.manifest.model.layers, range(len(job.manifest.times))
    bases = base_segments(len(times))
    base_of = [bases[job.place(index)[0]] * layers + job.place(index)[1] for index in range(job.units)]
    encoded = dict(over(partial(_encode, shelf), base_of))
    by_time = [done.units[index * layers : (index + 1) * layers] for index in times]
    prediction = predicted_snr(job, done)
    latent = prediction if isinstance(prediction, Prediction) and np.isfinite(prediction.mean) else None
    predicted: dict[str, Any] = {
        "device": job.device.name,
        "device_source": job.device.source,
        "planned_ms": [[unit.predicted_ms for unit in units] for units in by_time],
        "dense_ms": [[job.unit_dense_blocks * job.block_ms] * layers for _ in times],
        "density": done.accounts[-1].density,
        "cost": done.accounts[-1].cost,
        "latent_db": None if latent is None else asdict(latent),
        "head_price": [[unit.head_error.tolist() for unit in units] for units in by_time],
    }
    stored = [[encoded[index * layers + layer] for layer in range(layers)] for index in times]
    manifest = job.manifest
    return PlanFile(
        signature=manifest.model,
        grid=manifest.grid,
        blocks=manifest.blocks,
        segments=segments(manifest.times),
        schedules=StoredLayers("", manifest.grid, manifest.blocks, manifest.model.heads, bases, stored),
        passes=print_passes(passes),
        scheduler_hint={"times": list(job.steps.times)} if job.steps.times else None,
        provenance=provenance(job, store),
        predicted=predicted,
        notes=notes,
    )


def _encode(shelf: Shelf, index: int, base: int) -> EncodedLayer:
    above = None if base == index else shelf.unit(base).lowered
    layer = shelf.unit(index).lowered
    assert layer is not None
    return encode(layer, above)


def predicted_snr(job: Job, done: Run) -> Prediction | str:
    """The predicted signal-to-noise of the final latent, or, as text, why it cannot be predicted."""
    masks = Masks(*map(np.stack, zip(*(unit.masks for unit in done.units), strict=True)))
    return predict(job.table, job.levels, job.manifest.shares, masks)


def provenance(job: Job, store: Samplings) -> dict[str, Any]:
    """Where the plan comes from: plain values, none of which depends on the machine or the day."""
    facts: dict[str, Any] = {
        "samples": list(store.samplings),
        "manifest": job.manifest.digest,
        "versions": {**job.manifest.versions, "calibatt-compile": version("calibatt")},
    }
    prompts = [store.meta[name].get("prompt") for name in store.samplings]
    if all(isinstance(prompt, str) for prompt in prompts):
        text = json.dumps(prompts, ensure_ascii=True).encode()
        facts["prompts_digest"] = blake2b(text, digest_size=16).hexdigest()
    return facts
