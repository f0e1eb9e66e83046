"""`calibatt-evaluate`: what plans lose on prompts that were not calibrated on, and where."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from calibatt.compiler.stats.files import require_outside
from calibatt.plans.command import FAILED, one_line
from calibatt.plans.errors import legible
from calibatt.plans.files import write_text
from calibatt.plans.readable import number, snr
from calibatt.runtime import load_plan
from calibatt.tools.calibrate.models import make_sampler
from calibatt.tools.calibrate.pipeline import PipelineError
from calibatt.tools.calibrate.progress import steps as progress_of
from calibatt.tools.calibrate.work import MODEL_ERRORS, check_sampler, device_memory, pick_device, read_prompts
from calibatt.tools.evaluate import evaluation, gate
from calibatt.tools.evaluate.evaluation import Candidate, Cells, EvaluationError, Work
from calibatt.tools.evaluate.harness import about
from calibatt.tools.evaluate.metrics import ALWAYS, LATENT, LPIPS, Metric, lpips_metric
from calibatt.tools.evaluate.report import summary, write_page

NAME = "calibatt-evaluate"
QUICK_PROMPTS = 2

console = Console(stderr=True)


@one_line(NAME, *MODEL_ERRORS)
@device_memory("--head-prompts 0 takes less, so does offloading")
def run(
    model: str,
    paths: tuple[Path, ...],
    prompts: Path,
    seeds: int,
    first_seed: int,
    steps: int | None,
    head_prompts: int,
    floor_prompts: int,
    device: str,
    output: Path | None,
    require: str,
    stamp: bool,
    quick: bool,
) -> None:
    """Does what the options of `calibatt-evaluate` say; one line and an exit code for what goes wrong."""
    if not quick and output is None:
        raise EvaluationError("-o must name the folder of the report (only --quick does without), got none")
    if quick and (require or stamp or output is not None):
        raise EvaluationError("--quick must come without --require, --stamp and -o: it measures too little")
    requirements = gate.parse_requirements(require) if require else ()
    if output is not None:
        require_outside(output / "report.html")
    for path in paths if stamp else ():
        if not os.access(path.parent, os.W_OK):
            raise EvaluationError(f"--stamp must be able to replace {path}, got a folder that cannot be written")
    candidates = [Candidate(legible(str(path)), load_plan(path)) for path in paths]
    lines = read_prompts(prompts)
    work = [(p, first_seed + i) for i, p in enumerate(p for p in lines for _ in range(seeds))]
    evaluation.check_held_out(candidates, work)
    sampler = make_sampler(model, steps, pick_device(device))
    sampler.check(lines)
    evaluation.check_fit(candidates, sampler)
    if quick or head_prompts:
        check_sampler(sampler)
    if quick:
        sys.exit(_quick(sampler, candidates, work[:QUICK_PROMPTS]))
    assert output is not None
    metrics, absent = _metrics(sampler)
    gate.check_names(requirements, metrics, candidates, bool(head_prompts))
    cells = Cells(output / "cells", evaluation.settings_of(sampler, metrics))
    heads_work = work[:head_prompts]
    with progress_of("videos", len(work), console) as shown:
        evaluation.measure_videos(sampler, candidates, work, metrics, floor_prompts, cells, lambda: shown.advance(1))
    with progress_of("heads", len(heads_work), console) as shown:
        done, times = lambda: shown.advance(1), sorted(sampler.times)
        evaluation.measure_heads(sampler, candidates, heads_work, cells, done, vectors=evaluation.VECTORS, times=times)
    result = _result(sampler, candidates, work, heads_work, metrics, absent, cells, requirements, floor_prompts)
    write_text(output / "report.json", json.dumps(result, indent=1) + "\n")
    animations = {(c.key, p, s): cells.path(c.key, p, s, "png") for c in candidates for p, s in work}
    write_page(output / "report.html", result, metrics, animations)
    _show(result, metrics)
    if stamp:
        for candidate, path, findings in zip(candidates, paths, result["plans"], strict=True):
            gate.stamp(path, candidate.plan.file, _stamped(result, findings))
    click.echo(f"{output / 'report.html'}")
    if not all(plan["verdict"]["passed"] for plan in result["plans"]):
        sys.exit(FAILED)


def _metrics(sampler: Any) -> tuple[tuple[Metric, ...], dict[str, str]]:
    """The metrics that can be measured, and why others cannot."""
    try:
        getattr(sampler, "check_decode", lambda: None)()
    except PipelineError as error:
        return (LATENT,), {"videos": f"judged on final latents alone: {error}"}
    perceptual = lpips_metric()
    metrics = (LATENT, *ALWAYS)
    return ((*metrics, perceptual), {}) if isinstance(perceptual, Metric) else (metrics, {LPIPS: perceptual})


def _result(
    sampler: Any,
    candidates: Sequence[Candidate],
    work: Work,
    heads_work: Work,
    metrics: Sequence[Metric],
    absent: dict[str, str],
    cells: Cells,
    requirements: Sequence[gate.Requirement],
    floor_prompts: int,
) -> dict[str, Any]:
    """The content of ``report.json``; the same call gives the same, except for `about`."""
    plans = []
    for candidate in candidates:
        findings = evaluation.plan_findings(sampler, candidate, work, metrics, cells)
        heads = evaluation.head_findings(sampler, candidate, heads_work, cells) if heads_work else {}
        findings["heads"] = heads
        findings["verdict"] = gate.verdict(requirements, findings["metrics"], heads)
        if plans:
            findings["difference_from_first"] = {m.name: evaluation.paired(plans[0], findings, m) for m in metrics}
        plans.append(findings)
    settings = json.loads((cells.folder / "settings.json").read_text("utf-8"))
    return {
        "about": about("calibatt-evaluate", sampler),
        "settings": settings,
        "floor": evaluation.floor_findings(work[:floor_prompts], metrics, cells),
        "not_available": absent,
        "plans": plans,
    }


def _stamped(result: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """The verdict with its provenance, as `gate.stamp` writes it."""
    metrics = {
        name: {key: round(summary[key], 4) for key in ("mean", "standard_error", "worst")}
        for name, summary in plan["metrics"].items()
    }
    checks = [f"{check['requirement']} ({number(check['value'])})" for check in plan["verdict"]["checks"]]
    passed = ("passed" if plan["verdict"]["passed"] else "FAILED") if checks else "nothing was required"
    about = result["about"]
    return {
        "verdict": f"{passed}: {', '.join(checks)}" if checks else passed,
        "metrics": metrics,
        "videos": len(plan["by_prompt"]),
        "executes": plan["executes"],
        "on": f"{about['device']}, {about['versions']}, {about['date']}",
        "weights": result["settings"]["versions"].get("weights", "not digested"),
    }


def _show(result: dict[str, Any], metrics: Sequence[Metric]) -> None:
    names, rows = summary(result, metrics)
    table = Table()
    for name in (*names, f"worst {metrics[0].name}", "effect / promised", "verdict"):
        table.add_column(name, justify="right" if table.columns else "left", overflow="fold")
    for row, plan in zip(rows, [*result["plans"], None], strict=False):
        values = (plan["metrics"] if plan else result["floor"])[metrics[0].name]
        ratio = plan["heads"].get("ratio") if plan else None
        checks = plan["verdict"]["checks"] if plan else ()
        verdict = ("passed" if plan["verdict"]["passed"] else "FAILED") if checks else ""
        table.add_row(*row, number(values["worst"]), number(ratio) if ratio else "", verdict)
    out = Console(width=None if console.is_terminal else 160)
    out.print(table)
    for name, why in result["not_available"].items():
        click.echo(f"{name}: {why}")
    for plan in result["plans"]:
        for row in plan["heads"].get("broken", ()):
            click.echo(f"{plan['plan']}: {_named(row)}")


def _named(row: dict[str, Any]) -> str:
    return (
        f"broken: layer {row['layer']}, head {row['head']} at time {row['time']:.3f}: alone it leaves a latent SNR of "
        f"{snr(row['effect'])}, {snr(row['promised'])} was promised"
    )


def _quick(sampler: Any, candidates: Sequence[Candidate], work: Work) -> int:
    """The drift check; 1 if a plan does not fit."""
    drifted = 0
    with tempfile.TemporaryDirectory() as folder:
        cells = Cells(Path(folder), {})
        for candidate in candidates:
            findings = evaluation.quick_findings(sampler, candidate, work, cells)
            drifted += not findings["fits"]
            promise = candidate.plan.file.predicted.get("latent_db")
            snr_text = ""
            if promise:
                now = promise["mean"] - 10 * math.log10(findings["ratio"])
                snr_text = f"predicted latent SNR {now:.1f} dB on this model, {promise['mean']:.1f} dB promised; "
            click.echo(
                f"{candidate.name}: {'fits' if findings['fits'] else 'HAS DRIFTED'}: {snr_text}squared effect "
                f"{findings['ratio']:.2f} times what was promised (at most {evaluation.DRIFT_RATIO:g}); "
                f"{findings['heads_measured']} heads at {findings['times']} of {len(sampler.times)} times, "
                f"{len(work)} prompts"
            )
    return int(drifted > 0)
