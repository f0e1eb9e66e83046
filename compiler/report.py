"""What a compilation tells: tables for people, one JSON value for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from calibatt.compiler.ir import Job
from calibatt.compiler.pipeline import Account
from calibatt.plans import PlanFile

SHADES = "·░▒▓█"


def as_json(job: Job, plan: PlanFile, accounts: Sequence[Account], file_bytes: int) -> dict[str, Any]:
    """The report as plain values; the same input gives the same report but for the seconds."""
    times = range(len(plan.segments))
    return {
        "passes": plan.passes,
        "accounts": [asdict(each) for each in accounts],
        "density": plan.predicted["density"],
        "density_by_time_and_layer": [[s.density for s in layers] for layers in plan.schedules],
        "times": list(job.manifest.times),
        "time_weights": job.weights.tolist(),
        "weights_probed": job.weights_probed,
        "weights_source": job.weights_source,
        "weighted_error_by_time": plan.predicted["weighted_error"],
        "planned_ms": [sum(plan.predicted["planned_ms"][index]) for index in times],
        "dense_ms": [sum(plan.predicted["dense_ms"][index]) for index in times],
        "device": {"name": job.device.name, "source": job.device.source},
        "heads_by_kind": dict(sorted(_kinds(job).items())),
        "provenance": dict(plan.provenance),
        "section_bytes": plan.section_bytes(),
        "file_bytes": file_bytes,
    }


def show(console: Console, job: Job, plan: PlanFile, accounts: Sequence[Account], file_bytes: int) -> None:
    """Prints the report."""
    console.print(_accounts(accounts))
    console.print(_times(job, plan))
    console.print(_densities(job, plan))
    for name, findings in job.findings.items():
        told = ", ".join(f"{key.replace('_', ' ')} {_number(value)}" for key, value in findings.items())
        console.print(f"{name}: {told}", markup=False, highlight=False)
    planned, dense = (sum(map(sum, plan.predicted[key])) for key in ("planned_ms", "dense_ms"))
    lines = [
        f"heads: {', '.join(f'{kind} {number}' for kind, number in sorted(_kinds(job).items()))}",
        job.weights_source,
        f"provenance: {len(job.samples)} samples, manifest {job.manifest.digest}",
        f"device: {job.device.name} ({job.device.source})",
        f"predicted attention: {planned:.4g} ms planned, {dense:.4g} ms dense, {dense / planned:.2f} times",
        f"density {plan.predicted['density']:.4f}, {file_bytes} bytes",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False)


def unit_lines(job: Job) -> list[str]:
    """One line a unit: what `--print-after-all` prints after each pass."""
    lines = []
    for unit in job.units:
        _, blocks = unit.computed()
        density = " ".join(f"{share:.3f}" for share in blocks / unit.dense_blocks)
        anchors = sum(groups is not None for groups in unit.anchors)
        parts = [f"{unit.name}: density {density}"]
        parts += [f"masks {', '.join(unit.choice)}"] if unit.choice else []
        parts += [f"{anchors} with anchors"] if anchors else []
        parts += ["lowered"] if unit.lowered is not None else []
        lines.append("; ".join(parts))
    return lines


def _accounts(accounts: Sequence[Account]) -> Table:
    table = Table(title="passes", title_justify="left")
    table.add_column("pass")
    for name in ("blocks", "density", "bytes", "predicted ms", "error x weight", "seconds"):
        table.add_column(name, justify="right")
    for each in accounts:
        cells = [f"{each.blocks}", f"{each.density:.4f}", f"{each.plan_bytes}", f"{each.predicted_ms:.4g}"]
        table.add_row(each.name, *cells, f"{each.error:.3e}", f"{each.seconds:.3f}")
    return table


def _times(job: Job, plan: PlanFile) -> Table:
    title = "times" if job.weights_probed else "times (weight never probed: 1 everywhere)"
    table = Table(title=title, title_justify="left")
    for name in ("time", "segment", "weight", "density", "error x weight", "planned ms", "dense ms"):
        table.add_column(name, justify="right")
    for index, segment in enumerate(plan.segments):
        density = sum(schedule.density for schedule in plan.schedules[index]) / len(plan.schedules[index])
        error = plan.predicted["weighted_error"][index]
        planned, dense = (sum(plan.predicted[key][index]) for key in ("planned_ms", "dense_ms"))
        cells = [f"{segment.start:.3f}-{segment.stop:.3f}", f"{job.weights[index]:.3g}", f"{density:.4f}"]
        table.add_row(f"{segment.time:.3f}", *cells, f"{error:.3e}", f"{planned:.4g}", f"{dense:.4g}")
    return table


def _densities(job: Job, plan: PlanFile) -> Table:
    """A row a layer, a shade a time: `SHADES` from 0 to 1."""
    table = Table(title=f"density by layer and time ({SHADES[0]} is 0, {SHADES[-1]} is 1)", title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("mean", justify="right")
    table.add_column("times, ascending", no_wrap=True)
    for layer in range(job.manifest.model.layers):
        found = [layers[layer].density for layers in plan.schedules]
        shades = "".join(SHADES[min(int(share * len(SHADES)), len(SHADES) - 1)] for share in found)
        table.add_row(str(layer), f"{sum(found) / len(found):.4f}", shades)
    return table


def _kinds(job: Job) -> Counter[str]:
    """Heads over all times and layers by kind of mask, and those with anchors."""
    kinds = Counter(choice for unit in job.units for choice in unit.choice)
    anchors = sum(groups is not None for unit in job.units for groups in unit.anchors)
    return kinds + Counter({"with anchors": anchors})


def _number(value: object) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_number(part)}" for key, part in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
