"""The report of a compilation: one JSON value for programs, and the same in a terminal or on a page for people."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from calibatt.compiler.emit import predicted_snr
from calibatt.compiler.ir import Job
from calibatt.compiler.pipeline import Run
from calibatt.plans import PlanFile, page, told_precisions
from calibatt.plans.files import write_text
from calibatt.plans.readable import duration, number, size, snr

KINDS = ("dense", "sparse", "anchored")
"""Of heads, in every report."""
ERROR = "what the squared errors of all heads leave of the final latent, as a signal-to-noise"
WEIGHT = "how much errors in all steps of a time count, relative to the time where they count most"
UNKNOWN = (
    "not known, since the store does not say their times (earlier versions did not): each measured time counts as one "
    "step, and a sampling of more steps executes another density"
)


def as_json(job: Job, plan: PlanFile, run: Run, file_bytes: int) -> dict[str, Any]:
    """The report as plain values; the same input gives the same report but for the seconds."""
    times, layers = range(len(plan.segments)), job.manifest.model.layers
    dense = job.manifest.model.heads * job.manifest.q_blocks * job.manifest.k_blocks
    rows = [run.units[index * layers : (index + 1) * layers] for index in times]
    counts = job.steps.counts
    planned_ms, dense_ms = ((counts * np.sum(plan.predicted[key], 1)).tolist() for key in ("planned_ms", "dense_ms"))
    precisions = np.array([[unit.masks.precision for unit in units] for units in rows], np.uint8)
    kinds: Counter[str] = Counter()
    for unit in run.units:
        kinds.update({name: number for name, number in unit.kinds.items() if number})
    return {
        "model": asdict(plan.signature),
        "grid": asdict(plan.grid) | {"tokens": plan.grid.tokens},
        "blocks": asdict(plan.blocks),
        "passes": plan.passes,
        "accounts": [asdict(each) for each in run.accounts],
        "density": plan.predicted["density"],
        "attention_cost": plan.predicted["cost"],
        "precision": told_precisions(precisions),
        "precision_by_layer": [told_precisions(precisions[:, layer]) for layer in range(layers)],
        "density_by_time_and_layer": [[unit.blocks / dense for unit in units] for units in rows],
        "error_by_time_and_layer": [[float(unit.head_error.sum()) for unit in units] for units in rows],
        "heads_by_time_and_layer": [[{k: unit.kinds[k] for k in KINDS} for unit in units] for units in rows],
        "times": list(job.manifest.times),
        "steps": counts.tolist(),
        "steps_known": bool(job.steps.times),
        "levels": job.levels.tolist(),
        "predicted_latent_db": plan.predicted["latent_db"],
        "predicted_snr": str(predicted_snr(job, run)),
        "planned_ms": planned_ms,
        "dense_ms": dense_ms,
        "attention_speedup": sum(dense_ms) / sum(planned_ms),
        "device": {"name": job.device.name, "source": job.device.source},
        "heads_by_kind": dict(sorted(kinds.items())),
        "provenance": dict(plan.provenance),
        "section_bytes": plan.section_bytes(),
        "file_bytes": file_bytes,
        "plain_csr_bytes": run.accounts[-2].plan_bytes,
        "cost": {
            "units": job.units,
            "seconds_a_unit": sum(account.seconds for account in run.accounts) / job.units,
            "file_bytes_a_unit": file_bytes / job.units,
        },
    }


def show(console: Console, value: dict[str, Any]) -> None:
    """Prints the report of `as_json`."""
    for title, names, rows in _tables(value):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for name in names:
            table.add_column(name, justify="right" if table.columns else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table, highlight=False)
    for name, text in _facts(value).items():
        console.print(f"{name}: {text}", markup=False, highlight=False)


def write(path: Path, value: dict[str, Any]) -> None:
    """Writes the report: HTML where the name ends so, else JSON."""
    if path.suffix == ".html":
        write_text(path, _page(value))
    else:
        write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def _page(value: dict[str, Any]) -> str:
    model, grid, blocks, device = (value[name] for name in ("model", "grid", "blocks", "device"))
    latent = value["predicted_latent_db"]
    cards = [
        (f"{value['density']:.1%}", "of the blocks of dense attention"),
        (f"{latent['mean']:.1f} dB" if latent else "unknown", f"predicted latent SNR: {value['predicted_snr']}"),
        (f"{number(value['attention_speedup'])} x", f"as fast as dense attention, predicted for {device['name']}"),
        (size(value["file_bytes"]), "the plan file"),
    ]
    densities = np.array(value["density_by_time_and_layer"]).T.tolist()
    passes, times = (page.table(names, rows) for _, names, rows in _tables(value))
    facts = _facts(value)
    text = facts.pop("passes")
    return page.page(
        "A compiled plan",
        f"{model['architecture']}: {model['layers']} layers of {model['heads']} heads; {grid['frames']} x "
        f"{grid['height']} x {grid['width']} tokens of video in blocks of {blocks['block_q']} queries and "
        f"{blocks['block_k']} keys.",
        page.cards(*cards),
        page.element("h2", "From pass to pass"),
        passes,
        page.element("h2", "From video to noise"),
        times,
        page.element("small", f"Error: {ERROR}. Weight: {WEIGHT}. Then numbers of heads by kind."),
        page.heat(
            ["layer", *(f"{time:.2f}" for time in value["times"])],
            {str(layer): row for layer, row in enumerate(densities)},
            "Density in % of dense attention, by layer and time",
        ),
        page.folded("the pass string", page.element("p", page.element("code", text))),
        page.folded("everything else", page.table(["", ""], list(facts.items()))),
    )


def _tables(value: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Titles, names of columns, and rows."""
    passes, times = [], []
    for account in value["accounts"]:
        cells = f"{account['blocks']:,}", f"{account['density']:.1%}", duration(account["predicted_ms"])
        passes.append([account["name"], *cells, snr(account["error"]), duration(1e3 * account["seconds"])])
    for index, now in enumerate(value["times"]):
        heads, density = value["heads_by_time_and_layer"][index], np.mean(value["density_by_time_and_layer"][index])
        weight = 100 * value["levels"][index] / max(value["levels"])
        cells = f"{number(weight)}%", f"{density:.1%}", snr(sum(value["error_by_time_and_layer"][index]))
        milliseconds = (duration(value[key][index]) for key in ("planned_ms", "dense_ms"))
        times.append([f"{now:.3f}", *cells, *milliseconds, *(str(sum(each[kind] for each in heads)) for kind in KINDS)])
    columns = ["time", "weight", "density", "error", "attention", "all dense", *KINDS]
    return [
        ("passes", ["pass", "blocks", "density", "attention", "error", "took"], passes),
        ("times, from video to noise", columns, times),
    ]


def _facts(value: dict[str, Any]) -> dict[str, str]:
    """What is no table, by name."""
    findings = {each["name"]: _findings(each["findings"]) for each in value["accounts"] if each["findings"]}
    by_layer = {f"precision, layer {layer}": text for layer, text in enumerate(value["precision_by_layer"])}
    cost, device, by_time = value["cost"], value["device"], ", ".join(map(str, value["steps"]))
    return {
        "error": ERROR,
        "weight": WEIGHT,
        **findings,
        "heads": ", ".join(f"{count} {kind}" for kind, count in value["heads_by_kind"].items()),
        "predicted latent SNR": value["predicted_snr"],
        "predicted attention": f"{duration(sum(value['planned_ms']))}, dense {duration(sum(value['dense_ms']))}: "
        f"{value['attention_speedup']:.2f} times as fast, on {device['name']} ({device['source']})",
        "density": f"{value['density']:.4f} of the blocks of dense attention, mean over the steps of the sampling",
        "steps": f"{sum(value['steps'])}; of each time: {by_time}" if value["steps_known"] else UNKNOWN,
        "attention cost": f"{value['attention_cost']:.4f} of dense attention in 16 bit",
        "precision": value["precision"],
        **(by_layer if len(set(by_layer.values())) > 1 else {}),
        "passes": value["passes"],
        "provenance": f"{len(value['provenance']['samples'])} samplings, manifest {value['provenance']['manifest']}",
        "file": f"{size(value['file_bytes'])}; {size(value['plain_csr_bytes'])} as plain CSR",
        "compilation": f"{cost['units']} units (layer, time), {duration(1e3 * cost['seconds_a_unit'])} and "
        f"{cost['file_bytes_a_unit']:.0f} bytes each",
    }


def _findings(findings: dict[str, Any]) -> str:
    plain = ((key.replace("_", " "), value) for key, value in findings.items() if not isinstance(value, dict))
    return ", ".join(f"{key} {number(value, 4) if isinstance(value, float) else value}" for key, value in plain)
