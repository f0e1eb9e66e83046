"""What a compilation tells: tables for people, one JSON value for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from calibatt.compiler.emit import predicted_snr
from calibatt.compiler.ir import Job
from calibatt.compiler.pipeline import Account, Run
from calibatt.plans import PlanFile
from calibatt.plans.files import write_text

KINDS = ("dense", "sparse", "anchored")
"""Of heads, in every report."""
SHADES, ASCII_SHADES = "·░▒▓█", ".:*%#"


def as_json(job: Job, plan: PlanFile, run: Run, file_bytes: int) -> dict[str, Any]:
    """The report as plain values; the same input gives the same report but for the seconds."""
    times, layers = range(len(plan.segments)), job.manifest.model.layers
    dense = job.manifest.model.heads * job.manifest.q_blocks * job.manifest.k_blocks
    rows = [run.units[index * layers : (index + 1) * layers] for index in times]
    planned_ms, dense_ms = (sum(map(sum, plan.predicted[key])) for key in ("planned_ms", "dense_ms"))
    seconds = sum(account.seconds for account in run.accounts)
    return {
        "passes": plan.passes,
        "accounts": [asdict(each) for each in run.accounts],
        "density": plan.predicted["density"],
        "density_by_time_and_layer": [[unit.blocks / dense for unit in units] for units in rows],
        "error_by_time_and_layer": [[float(unit.head_error.sum()) for unit in units] for units in rows],
        "heads_by_time_and_layer": [[{k: unit.kinds[k] for k in KINDS} for unit in units] for units in rows],
        "times": list(job.manifest.times),
        "levels": job.levels.tolist(),
        "predicted_latent_db": plan.predicted["latent_db"],
        "predicted_snr": str(predicted_snr(job, run)),
        "planned_ms": [sum(plan.predicted["planned_ms"][index]) for index in times],
        "dense_ms": [sum(plan.predicted["dense_ms"][index]) for index in times],
        "attention_speedup": dense_ms / planned_ms,
        "device": {"name": job.device.name, "source": job.device.source},
        "heads_by_kind": dict(sorted(_kinds(run).items())),
        "provenance": dict(plan.provenance),
        "section_bytes": plan.section_bytes(),
        "file_bytes": file_bytes,
        "plain_csr_bytes": run.accounts[-2].plan_bytes,
        "cost": {
            "units": job.units,
            "seconds_a_unit": seconds / job.units,
            "file_bytes_a_unit": file_bytes / job.units,
        },
    }


def _cost_told(cost: dict[str, Any]) -> str:
    """What a unit, one layer at one time, took; a whole job takes as much for each of its units."""
    return "{units} units (layer, time), {seconds_a_unit:.3g} s and {file_bytes_a_unit:.0f} bytes each".format(**cost)


def show(console: Console, job: Job, plan: PlanFile, run: Run, file_bytes: int) -> None:
    """Prints the report."""
    value = as_json(job, plan, run, file_bytes)
    console.print(_accounts(run.accounts))
    console.print(_times(job, plan, value["density_by_time_and_layer"], value["heads_by_time_and_layer"]))
    shades = ASCII_SHADES if console.options.ascii_only else SHADES
    console.print(_densities(job, value["density_by_time_and_layer"], shades))
    for name, findings in job.findings.items():
        console.print(f"{name}: {_findings(findings)}", markup=False, highlight=False)
    planned, dense = sum(value["planned_ms"]), sum(value["dense_ms"])
    lines = [
        f"heads: {', '.join(f'{kind} {number}' for kind, number in sorted(_kinds(run).items()))}",
        f"predicted latent SNR: {value['predicted_snr']}",
        f"provenance: {len(job.table.samplings)} samplings, manifest {job.manifest.digest}",
        f"device: {job.device.name} ({job.device.source})",
        f"predicted attention: {planned:.4g} ms planned, {dense:.4g} ms dense, {value['attention_speedup']:.2f} times",
        f"density {plan.predicted['density']:.4f}, {file_bytes} bytes, plain CSR {value['plain_csr_bytes']}",
        f"cost: {_cost_told(value['cost'])}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False)


def as_html(value: dict[str, Any]) -> str:
    """The report of `as_json` as a page that needs nothing else."""

    def table(title: str, names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
        return f"<h2>{escape(title)}</h2><table><tr>{head}</tr>{body}</table>"

    def cell(text: object) -> str:
        return f"<td>{escape(str(text))}</td>"

    def shade(density: float, told: str) -> str:
        ink = "#fff" if density > 0.5 else "#000"
        style = f"background:hsl(210 60% {95 - 65 * density:.0f}%);color:{ink}"
        return f'<td title="{escape(told)}" style="{style}">{100 * density:.0f}</td>'

    accounts = value["accounts"]
    passes = []
    for each in accounts:
        row = [each["passes"] or "dense", each["blocks"], f"{each['density']:.4f}", each["plan_bytes"]]
        row += [f"{each['predicted_ms']:.4g}", f"{each['error']:.3e}", _findings(each["findings"])]
        passes.append([cell(text) for text in row])
    times = value["times"]
    layers = []
    for layer in range(len(value["density_by_time_and_layer"][0])):
        shades = []
        for index in range(len(times)):
            heads = value["heads_by_time_and_layer"][index][layer]
            error = value["error_by_time_and_layer"][index][layer]
            told = ", ".join(f"{count} {kind}" for kind, count in heads.items()) + f"; error {error:.3e}"
            shades.append(shade(value["density_by_time_and_layer"][index][layer], told))
        layers.append([cell(layer), *shades])
    facts = {
        "passes": value["passes"],
        "device": f"{value['device']['name']}: {value['device']['source']}",
        "predicted latent SNR": value["predicted_snr"],
        "density": f"{value['density']:.4f}",
        "predicted speed-up of attention": f"{value['attention_speedup']:.3f}",
        "bytes of the file": f"{value['file_bytes']} (plain CSR {value['plain_csr_bytes']})",
        "cost": _cost_told(value["cost"]),
        "provenance": value["provenance"],
    }
    return (
        '<!doctype html><meta charset="utf-8"><title>calibatt-compile</title>'
        "<style>body{font:14px sans-serif;margin:2em}"
        "table{border-collapse:collapse}td,th{padding:2px 6px;text-align:right}td:first-child{text-align:left}</style>"
        + table("plan", ("", ""), [[cell(name), cell(text)] for name, text in facts.items()])
        + table("passes", ("pass", "blocks", "density", "bytes", "predicted ms", "error", "found"), passes)
        + table("density in % by layer and time", ("layer", *(f"{time:.2f}" for time in times)), layers)
    )


def write(path: Path, value: dict[str, Any]) -> None:
    """Writes the report: HTML where the name ends so, else JSON."""
    text = as_html(value) if path.suffix == ".html" else json.dumps(value, indent=1, sort_keys=True)
    write_text(path, text + "\n")


def _findings(findings: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {_number(value)}" for key, value in findings.items())


def _accounts(accounts: Sequence[Account]) -> Table:
    table = Table(title="passes", title_justify="left")
    table.add_column("pass")
    for name in ("blocks", "density", "bytes", "predicted ms", "error", "seconds"):
        table.add_column(name, justify="right")
    for each in accounts:
        cells = [f"{each.blocks}", f"{each.density:.4f}", f"{each.plan_bytes}", f"{each.predicted_ms:.4g}"]
        table.add_row(each.name, *cells, f"{each.error:.3e}", f"{each.seconds:.3f}")
    return table


def _times(
    job: Job, plan: PlanFile, densities: Sequence[Sequence[float]], heads: Sequence[Sequence[dict[str, int]]]
) -> Table:
    table = Table(title="times", title_justify="left")
    for name in ("time", "segment", "level", "density", "error", "planned ms", "dense ms", *KINDS):
        table.add_column(name, justify="right")
    for index, segment in enumerate(plan.segments):
        density = sum(densities[index]) / len(densities[index])
        error = float(np.sum(plan.predicted["head_price"][index]))
        planned, dense = (sum(plan.predicted[key][index]) for key in ("planned_ms", "dense_ms"))
        cells = [f"{segment.start:.3f}-{segment.stop:.3f}", f"{job.levels[index]:.3g}", f"{density:.4f}"]
        cells += [f"{error:.3e}", f"{planned:.4g}", f"{dense:.4g}"]
        cells += [str(sum(layer[kind] for layer in heads[index])) for kind in KINDS]
        table.add_row(f"{segment.time:.3f}", *cells)
    return table


def _densities(job: Job, densities: Sequence[Sequence[float]], shades: str) -> Table:
    """A row a layer, a shade a time, from 0 to 1."""
    table = Table(title=f"density by layer and time ({shades[0]} is 0, {shades[-1]} is 1)", title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("mean", justify="right")
    table.add_column("times, ascending", no_wrap=True)
    for layer in range(job.manifest.model.layers):
        found = [layers[layer] for layers in densities]
        shown = "".join(shades[min(int(share * len(shades)), len(shades) - 1)] for share in found)
        table.add_row(str(layer), f"{sum(found) / len(found):.4f}", shown)
    return table


def _kinds(run: Run) -> Counter[str]:
    """Heads over all times and layers: dense, sparse, with anchors, and by mask."""
    kinds: Counter[str] = Counter()
    for unit in run.units:
        kinds.update({name: number for name, number in unit.kinds.items() if number})
    return kinds


def _number(value: object) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_number(part)}" for key, part in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
