"""Measures plans against dense attention on held-out prompts, stores it prompt by prompt, and summarises it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibatt.plans import PlanError, PlanFile
from calibatt.plans.files import whole_file, write_text
from calibatt.plans.schedule import SMALL_ARRAYS
from calibatt.runtime import Plan
from calibatt.runtime.adapters import adapter_for
from calibatt.tools.calibrate.calibration import sampling_name
from calibatt.tools.calibrate.sampler import Sampler
from calibatt.tools.calibrate.work import spread
from calibatt.tools.evaluate import effects
from calibatt.tools.evaluate.harness import attending, executed_density, written_out
from calibatt.tools.evaluate.metrics import LATENT, Metric, latent_db, summarise
from calibatt.tools.evaluate.pictures import side_by_side

Work = Sequence[tuple[str, int]]
"""Prompts and their seeds."""
SUSPECTS = 12
"""Heads that a report lists: so many, or all whose share is that of a broken one."""
LEAST_EFFECT = 1e-6
"""Least squared effect of a plan (60 dB): a smaller one counts as this, since kernels round more than that."""
BROKEN_RATIO = 10.0
BROKEN_SHARE = 0.02
"""A head is broken if its squared effect is at least `BROKEN_RATIO` times what calibration promised, and what is beyond
the promise at least `BROKEN_SHARE` of the whole plan's squared effect."""
VECTORS = 4
"""Random vectors of the final latent, on which heads are measured."""
QUICK_TIMES = 4
DRIFT_RATIO = 3.0
"""Above so many times the promised squared effect, a plan does not fit its model any more."""


class EvaluationError(ValueError):
    """The evaluation that was asked for is not possible; the message says why."""


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
        """Digest of what the plan executes, whatever its header says: a stamp does not change it."""
        return schedules_digest(self.plan.file)


def schedules_digest(plan: PlanFile) -> str:
    """16 hexadecimal digits of all that a plan executes, and when."""
    state = hashlib.blake2b(digest_size=8)
    state.update(repr((plan.signature, plan.grid, plan.blocks, plan.segments)).encode())
    for layers in plan.schedules:
        for schedule in layers:
            for name in ("list_bits", *SMALL_ARRAYS):
                state.update(np.ascontiguousarray(getattr(schedule, name)).tobytes() + b"|")
    return state.hexdigest()


class Cells:
    """Stores measurements, one file a prompt and plan, so that an evaluation continues where it stopped.

    Args:
        folder: The folder; it is made if absent.
        settings: Everything that all measurements depend on, plain values.

    Raises:
        EvaluationError: The folder holds measurements under other settings; names what differs.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "settings.json"
        if path.exists():
            stored = _read(path)
            wrong = sorted(name for name in {*stored, *settings} if stored.get(name) != settings.get(name))
            if wrong:
                name = wrong[0]
                raise EvaluationError(
                    f"{folder} must hold an evaluation of {name} {settings.get(name)!r}, got one of "
                    f"{stored.get(name)!r}: give another folder"
                )
        else:
            write_text(path, json.dumps(settings, indent=1))

    def path(self, key: str, prompt: str, seed: int, ending: str = "json") -> Path:
        return self.folder / key / f"{sampling_name(prompt, seed)}.{ending}"

    def get(self, path: Path, shapes: Mapping[str, tuple[int | None, ...]]) -> dict[str, Any] | None:
        """The values of a cell, or None if it has not been measured.

        Args:
            path: File of the cell.
            shapes: Shapes of its finite numbers, by name: () for one number, else sizes of nested lists; None: any.

        Raises:
            EvaluationError: It holds something else.
        """
        if not path.exists():
            return None
        stored = _read(path)
        for name, shape in shapes.items():
            try:
                array = np.array(stored[name], np.float64)
            except (KeyError, TypeError, ValueError):
                array = np.array(np.nan)
            right = array.ndim == len(shape) and np.isfinite(array).all()
            if not right or any(want not in (None, size) for want, size in zip(shape, array.shape, strict=True)):
                raise EvaluationError(f"{path} must hold {name} as it was measured, got something else: {REMOVE}")
        return stored

    def put(self, path: Path, value: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(value))


REMOVE = "remove the file, and it is measured again"


def _read(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds a map."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path} must be JSON, got {error}: {REMOVE}") from None
    if not isinstance(value, dict):
        raise EvaluationError(f"{path} must hold a map, got {type(value).__name__}: {REMOVE}")
    return value


def settings_of(sampler: Sampler, metrics: Sequence[Metric]) -> dict[str, Any]:
    """Everything that a measurement depends on besides plan, prompt and seed."""
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
        samples = candidate.plan.file.provenance.get("samples")
        calibrated = {str(name).split("-")[0] for name in samples} if isinstance(samples, list) else set()
        for prompt, seed in work:
            if sampling_name(prompt, seed).split("-")[0] in calibrated:
                raise EvaluationError(
                    f"prompts must be held out, got one that {candidate.name} was made from: {prompt!r}"
                )


def check_fit(candidates: Sequence[Candidate], sampler: Sampler) -> None:
    """Proves that every plan is for the sampler's model and resolution.

    Raises:
        EvaluationError: One is not; names it and says what differs.
    """
    for candidate in candidates:
        try:
            candidate.plan.attach(sampler.transformer).detach()
        except (PlanError, ValueError, RuntimeError) as error:
            raise EvaluationError(f"{candidate.name}: {error}") from None
        plan, own = ((each.frames, each.height, each.width) for each in (candidate.plan.grid, sampler.grid))
        if plan != own:
            rule = f"be of {own} frames, rows and tokens of a row, as the model samples"
            raise EvaluationError(f"{candidate.name} must {rule}, got one of {plan}")


def measure_videos(
    sampler: Sampler,
    candidates: Sequence[Candidate],
    work: Work,
    metrics: Sequence[Metric],
    floor: int,
    cells: Cells,
    done: Callable[[], None],
) -> None:
    """Generates every prompt dense and under every plan from the same noise, and the first `floor` prompts also dense
    by a second exact kernel. Cells that are stored already are skipped.

    Args:
        metrics: `LATENT` and metrics of videos; videos are decoded only if there are metrics of them.
        done: Called after each prompt.
    """
    for index, (prompt, seed) in enumerate(work):
        todo = [(c.key, c) for c in candidates if not cells.path(c.key, prompt, seed).exists()]
        if index < floor and not cells.path("floor", prompt, seed).exists():
            todo.insert(0, ("floor", None))
        if todo:
            dense = sampler.run(prompt, seed)
            videos = [metric for metric in metrics if metric is not LATENT]
            shown = sampler.decode(dense) if videos else dense
        for key, candidate in todo:
            attached = candidate.plan.attach(sampler.transformer) if candidate else None
            with attached or attending(sampler.transformer, written_out):
                latent = sampler.run(prompt, seed)
            measured = {LATENT.name: float(latent_db(latent, dense)[0])}
            if videos:
                video = sampler.decode(latent)
                measured |= {metric.name: float(metric.measure(video, shown)[0]) for metric in videos}
                if candidate:
                    picture = cells.path(key, prompt, seed, "png")
                    picture.parent.mkdir(parents=True, exist_ok=True)
                    with whole_file(picture) as file:
                        file.write(side_by_side(shown[0], video[0]))
            cells.put(cells.path(key, prompt, seed), measured)
        done()


def measure_heads(
    sampler: Sampler,
    candidates: Sequence[Candidate],
    work: Work,
    cells: Cells,
    done: Callable[[], None],
    *,
    vectors: int,
    times: Sequence[float],
) -> None:
    """Measures what every plan does to every head on dense samplings of these prompts; see `effects`.

    Args:
        done: Called after each prompt.
        vectors: Random vectors of the final latent.
        times: Times of the sampler, ascending.
    """
    for prompt, seed in work:
        todo = [each for each in candidates if not _heads_path(cells, each, prompt, seed).exists()]
        if todo:
            measured = effects.measure_plans(sampler, [each.plan for each in todo], prompt, seed, vectors, times)
            for candidate, each in zip(todo, measured, strict=True):
                cells.put(_heads_path(cells, candidate, prompt, seed), {"times": list(times), "effects": each.tolist()})
        done()


def _heads_path(cells: Cells, candidate: Candidate, prompt: str, seed: int) -> Path:
    return cells.path(candidate.key, prompt, seed, "heads.json")


def head_findings(sampler: Sampler, candidate: Candidate, work: Work, cells: Cells) -> dict[str, Any]:
    """What `measure_heads` found, against what calibration promised: plain values.

    A head's *share* is its squared effect beyond its promise, relative to the squared effect of the whole plan. If the
    plan promises nothing, heads are ranked by their effect alone, and none is called broken.
    """
    model = candidate.plan.signature
    shapes = {"times": (None,), "effects": (None, None, model.layers, model.heads)}
    cell = [cells.get(_heads_path(cells, candidate, prompt, seed), shapes) or {} for prompt, seed in work]
    times, signed = cell[0]["times"], np.array([each["effects"] for each in cell])
    file = candidate.plan.file
    known = effects.visited(file, times)
    squared = effects.by_segment(file, signed, times)[:, :, known] ** 2
    each = squared.mean(1)
    totals = np.maximum(each.sum((1, 2, 3)), LEAST_EFFECT**2)
    # Prompts differ up to 100-fold. As in the promise, each is divided by its level; the result has the typical level.
    measured = (each / totals[:, None, None, None]).mean(0) * np.exp(np.log(totals).mean())
    worst = each.max(0)
    promise = effects.promised(file, sampler.times)
    promise = None if promise is None else promise[known]
    total = max(float(measured.sum()), LEAST_EFFECT)
    share = (measured if promise is None else measured - promise) / total
    rows = []
    for place in np.argsort(-share, axis=None)[: max(SUSPECTS, int((share >= BROKEN_SHARE).sum()))]:
        at = np.unravel_index(int(place), share.shape)
        row = {
            "time": file.segments[known[at[0]]].time,
            "layer": int(at[1]),
            "head": int(at[2]),
            "effect": float(measured[at]),
            "effect_worst_prompt": float(worst[at]),
            "share": float(share[at]),
        }
        if promise is not None:
            ratio = float(measured[at] / max(promise[at], 1e-12))
            broken = ratio >= BROKEN_RATIO and share[at] >= BROKEN_SHARE
            row |= {"promised": float(promise[at]), "ratio": ratio, "broken": bool(broken)}
        rows.append(row)
    result: dict[str, Any] = {
        "prompts": len(work),
        "vectors": signed.shape[1],
        "times": len(times),
        "heads_measured": measured.size,
        "effect": total,
        "heads": rows,
        "broken": [row for row in rows if row.get("broken")],
    }
    if len(times) == len(sampler.times):
        result["first_order_latent"] = _summary(effects.first_order_db(signed).tolist(), LATENT)
    if promise is not None:
        promised = max(float(promise.sum()), LEAST_EFFECT)
        result |= {"effect_promised": promised, "ratio": total / promised}
    return result


def quick_findings(sampler: Sampler, candidate: Candidate, work: Work, cells: Cells) -> dict[str, Any]:
    """`head_findings` from a few of the sampler's times, and whether the plan still ``fits`` its model.

    Raises:
        EvaluationError: The plan does not state what calibration promised.
    """
    file = candidate.plan.file
    segments = effects.visited(file, sampler.times)
    some = {segments[index] for index in spread(len(segments), QUICK_TIMES)}
    times = sorted(now for now in sampler.times if file.segment_index(now) in some)
    measure_heads(sampler, [candidate], work, cells, lambda: None, vectors=VECTORS, times=times)
    found = head_findings(sampler, candidate, work, cells)
    if "ratio" not in found:
        raise EvaluationError(
            f"{candidate.name} must state what calibration promised (predicted.head_price), got nothing: compile it "
            "again"
        )
    return found | {"fits": found["ratio"] <= DRIFT_RATIO}


def plan_findings(
    sampler: Sampler, candidate: Candidate, work: Work, metrics: Sequence[Metric], cells: Cells
) -> dict[str, Any]:
    """What was measured of a plan's videos: plain values."""
    of = {metric.name: () for metric in metrics}
    by_prompt = [{"prompt": p, "seed": s, **(cells.get(cells.path(candidate.key, p, s), of) or {})} for p, s in work]
    return {
        "plan": candidate.name,
        "digest": candidate.plan.file.digest,
        "executes": candidate.key,
        "passes": candidate.plan.file.passes,
        "density": executed_density(candidate.plan, sampler.times),
        "predicted_latent_db": candidate.plan.file.predicted.get("latent_db"),
        "metrics": {m.name: _summary([row[m.name] for row in by_prompt], m) for m in metrics},
        "by_prompt": by_prompt,
    }


def floor_findings(work: Work, metrics: Sequence[Metric], cells: Cells) -> dict[str, Any]:
    """What was measured between two exact kernels: plain values; empty if nothing was."""
    of = {metric.name: () for metric in metrics}
    measured = [cell for p, s in work if (cell := cells.get(cells.path("floor", p, s), of))]
    return {m.name: _summary([cell[m.name] for cell in measured], m) for m in metrics} if measured else {}


def _summary(values: list[float], metric: Metric) -> dict[str, Any]:
    return summarise(values, metric.higher_is_better).as_json()


def paired(first: dict[str, Any], other: dict[str, Any], metric: Metric) -> dict[str, Any]:
    """Other - first of one metric, prompt by prompt, of two of `plan_findings`."""
    pairs = zip(first["by_prompt"], other["by_prompt"], strict=True)
    return _summary([theirs[metric.name] - ours[metric.name] for ours, theirs in pairs], metric)
