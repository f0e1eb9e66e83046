"""Dense against plans on held-out prompts: what is measured, kept prompt by prompt, and what it says in sum."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibatt.plans import PlanFile
from calibatt.plans.schedule import ARRAYS
from calibatt.runtime import Plan
from calibatt.runtime.adapters import adapter_for
from calibatt.tools.calibrate.recorder import sample_name
from calibatt.tools.calibrate.sampler import Sampler
from calibatt.tools.evaluate.harness import (
    HeadErrors,
    attending,
    executed_density,
    head_errors,
    promised,
    written_out,
)
from calibatt.tools.evaluate.metrics import Metric, summarise
from calibatt.tools.evaluate.pictures import side_by_side

Work = Sequence[tuple[str, int]]
"""Prompts and their seeds."""
SUSPECTS = 12
BROKEN_RATIO = 10.0
"""A head whose error is so many times what calibration promised is broken, if that matters:"""
BROKEN_SHARE = 0.02
"""if its error beyond the promise is at least this share of all the plan's error times weight."""


class EvaluationError(ValueError):
    """What was asked cannot be evaluated; says why."""


@dataclass(frozen=True)
class Candidate:
    """A plan under evaluation.

    Args:
        name: How the report calls it.
        plan: The plan.
    """

    name: str
    plan: Plan

    @property
    def key(self) -> str:
        """Of what the plan executes, whatever its header says: a stamp does not make another plan of it."""
        return schedules_digest(self.plan.file)


def schedules_digest(plan: PlanFile) -> str:
    """16 hexadecimal digits of all that a plan executes, and when."""
    state = hashlib.blake2b(digest_size=8)
    state.update(repr((plan.signature, plan.grid, plan.blocks, plan.segments)).encode())
    for layers in plan.schedules:
        for schedule in layers:
            for name in ARRAYS:
                state.update(np.ascontiguousarray(getattr(schedule, name)).tobytes() + b"|")
    return state.hexdigest()


class Cells:
    """What has been measured, one file a prompt and plan, so that an evaluation goes on where it stopped.

    Args:
        folder: Where; made if absent.
        settings: What all of it depends on, plain values.

    Raises:
        EvaluationError: The folder holds measurements under other settings; names what differs.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "settings.json"
        if path.exists():
            found = json.loads(path.read_text("utf-8"))
            wrong = sorted(name for name in {*found, *settings} if found.get(name) != settings.get(name))
            if wrong:
                name = wrong[0]
                raise EvaluationError(
                    f"{folder} must hold an evaluation of {name} {settings.get(name)!r}, got one of "
                    f"{found.get(name)!r}: give another folder"
                )
        else:
            _write(path, json.dumps(settings, indent=1).encode())

    def path(self, key: str, prompt: str, seed: int, ending: str = "json") -> Path:
        return self.folder / key / f"{sample_name(prompt, seed)}.{ending}"

    def get(self, path: Path) -> dict[str, Any] | None:
        """What a cell says, or None where nothing has been measured."""
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    def put(self, path: Path, value: dict[str, Any]) -> None:
        _write(path, json.dumps(value).encode())


def _write(path: Path, data: bytes) -> None:
    """A whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def settings_of(sampler: Sampler, metrics: Sequence[Metric]) -> dict[str, Any]:
    """What a measurement depends on besides plan, prompt and seed."""
    model = sampler.transformer
    weight = next(model.parameters())
    return {
        "model": asdict(adapter_for(model).signature(model)),
        "times": list(sampler.times),
        "versions": {**sampler.versions, "torch": torch.__version__},
        "device": weight.device.type,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "metrics": [metric.name for metric in metrics],
    }


def check_held_out(candidates: Sequence[Candidate], work: Work) -> None:
    """Proves that no prompt was calibrated on, as far as the plans say what was.

    Raises:
        EvaluationError: One was; names plan and prompt.
    """
    for candidate in candidates:
        calibrated = {str(name).split("-")[0] for name in candidate.plan.file.provenance.get("samples", ())}
        for prompt, seed in work:
            if sample_name(prompt, seed).split("-")[0] in calibrated:
                raise EvaluationError(
                    f"prompts must be held out, got one that {candidate.name} was made from: {prompt!r}"
                )


def measure_videos(
    sampler: Sampler,
    candidates: Sequence[Candidate],
    work: Work,
    metrics: Sequence[Metric],
    floor: int,
    cells: Cells,
    done: Callable[[], None],
) -> None:
    """Generates every prompt dense and under every plan from the same noise, and, for the first `floor` prompts, dense
    by a second exact kernel; what is measured already is not done again.

    Args:
        done: Called after each prompt.
    """
    for index, (prompt, seed) in enumerate(work):
        todo = [(c.key, c) for c in candidates if not cells.path(c.key, prompt, seed).exists()]
        if index < floor and not cells.path("floor", prompt, seed).exists():
            todo.insert(0, ("floor", None))
        if todo:
            dense = sampler.decode(sampler.run(prompt, seed))
        for key, candidate in todo:
            attached = candidate.plan.attach(sampler.transformer) if candidate else None
            with attached or attending(sampler.transformer, written_out):
                latent = sampler.run(prompt, seed)
            video = sampler.decode(latent)
            if candidate:
                _write(cells.path(key, prompt, seed, "png"), side_by_side(dense[0], video[0]))
            found = {metric.name: float(metric.measure(video, dense)[0]) for metric in metrics}
            cells.put(cells.path(key, prompt, seed), found)
        done()


def measure_heads(
    sampler: Sampler,
    candidates: Sequence[Candidate],
    work: Work,
    cells: Cells,
    done: Callable[[], None],
    *,
    queries: int,
    heads: int | None = None,
) -> None:
    """Measures what every plan does to every head on dense generations of these prompts; see `head_errors`."""
    for prompt, seed in work:
        for candidate in candidates:
            path = _heads_path(cells, candidate, prompt, seed, queries, heads)
            if not path.exists():
                found = head_errors(sampler, candidate.plan, prompt, seed, queries=queries, heads=heads)
                cells.put(path, {name: values.tolist() for name, values in vars(found).items()})
            done()


def _heads_path(cells: Cells, candidate: Candidate, prompt: str, seed: int, queries: int, heads: int | None) -> Path:
    return cells.path(candidate.key, prompt, seed, f"heads-{queries}-{'all' if heads is None else heads}.json")


def head_findings(
    sampler: Sampler, candidate: Candidate, work: Work, cells: Cells, *, queries: int, heads: int | None = None
) -> dict[str, Any]:
    """What `measure_heads` found, against what calibration promised: plain values.

    A head's *share* is the part of all the plan's error times weight that is this head's error beyond its promise. With
    no promise in the plan, heads are ranked by error alone, and none is called broken.
    """
    paths = [_heads_path(cells, candidate, prompt, seed, queries, heads) for prompt, seed in work]
    found = [HeadErrors(**{name: np.array(v, np.float64) for name, v in (cells.get(p) or {}).items()}) for p in paths]
    measured, recall, relative = (
        np.stack([getattr(each, name) for each in found]) for name in ("residual", "recall", "relative")
    )
    mean, worst = measured.mean(0), measured.max(0)
    file = candidate.plan.file
    promise, weight = (promised(file, sampler.times, key) for key in ("head_error", "error_weight"))
    known = ~np.isnan(mean)
    weighted = mean * (1.0 if weight is None else weight)
    total = float(weighted[known].sum())
    beyond = weighted - (0.0 if promise is None or weight is None else promise * weight)
    share = beyond / max(total, 1e-300)
    order = np.argsort(-np.where(known, share, -np.inf), axis=None)[: min(SUSPECTS, int(known.sum()))]
    rows = []
    for step, layer, head in zip(*np.unravel_index(order, mean.shape), strict=True):
        at = (step, layer, head)
        row = {
            "time": float(sampler.times[step]),
            "layer": int(layer),
            "head": int(head),
            "error": float(mean[at]),
            "error_worst_prompt": float(worst[at]),
            "relative_error": float(relative.mean(0)[at]),
            "recall": float(recall.mean(0)[at]),
            "share": float(share[at]),
        }
        if promise is not None:
            ratio = float(mean[at] / max(promise[at], 1e-12))
            broken = ratio >= BROKEN_RATIO and share[at] >= BROKEN_SHARE
            row |= {"promised": float(promise[at]), "ratio": ratio, "broken": bool(broken)}
        rows.append(row)
    result: dict[str, Any] = {
        "prompts": len(work),
        "queries": queries,
        "heads_measured": int(known.sum()),
        "recall_mean": float(recall[:, known].mean()),
        "recall_least": float(recall[:, known].mean(0).min()),
        "weighted_error": total if weight is not None else None,
        "heads": rows,
        "broken": [row for row in rows if row.get("broken")],
    }
    if promise is not None and weight is not None:
        told = float((promise * weight)[known].sum())
        result |= {"weighted_error_promised": told, "ratio": total / max(told, 1e-300)}
    return result


def plan_findings(
    sampler: Sampler, candidate: Candidate, work: Work, metrics: Sequence[Metric], cells: Cells
) -> dict[str, Any]:
    """What was measured of a plan's videos: plain values."""
    by_prompt = [{"prompt": p, "seed": s, **(cells.get(cells.path(candidate.key, p, s)) or {})} for p, s in work]
    return {
        "plan": candidate.name,
        "digest": candidate.plan.file.digest,
        "executes": candidate.key,
        "passes": candidate.plan.file.passes,
        "density": executed_density(candidate.plan, sampler.times),
        "metrics": {m.name: _summary([row[m.name] for row in by_prompt], m) for m in metrics},
        "by_prompt": by_prompt,
    }


def floor_findings(work: Work, metrics: Sequence[Metric], cells: Cells) -> dict[str, Any]:
    """What was measured between two exact kernels: plain values; empty if nothing was."""
    found = [cell for p, s in work if (cell := cells.get(cells.path("floor", p, s)))]
    return {m.name: _summary([cell[m.name] for cell in found], m) for m in metrics} if found else {}


def _summary(values: list[float], metric: Metric) -> dict[str, Any]:
    return summarise(values, metric.higher_is_better).as_json()


def paired(first: dict[str, Any], other: dict[str, Any], metric: Metric) -> dict[str, Any]:
    """Other - first of one metric, prompt by prompt, of two of `plan_findings`."""
    pairs = zip(first["by_prompt"], other["by_prompt"], strict=True)
    return _summary([theirs[metric.name] - ours[metric.name] for ours, theirs in pairs], metric)
