"""What a compilation tells: one JSON value for programs, and that value as tables, in a terminal or as a page."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from calibatt.compiler.emit import predicted_snr
from calibatt.compiler.ir import Job
from calibatt.compiler.pipeline import Run
from calibatt.plans import PlanFile, told_precisions
from calibatt.plans.files import write_text

KINDS = ("dense", "sparse", "anchored")
"""Of heads, in every report."""
PAPER, INK = (238, 243, 250), (20, 60, 130)
"""Colours of densities 0 and 1."""
PAGE_WIDTH, LAYER_WIDTH, CELL_WIDTH = 200, 4, 5


def as_json(job: Job, plan: PlanFile, run: Run, file_bytes: int) -> dict[str, Any]:
    """The report as plain values; the same input gives the same report but for the seconds."""
    times, layers = range(len(plan.segments)), job.manifest.model.layers
    dense = job.manifest.model.heads * job.manifest.q_blocks * job.manifest.k_blocks
    rows = [run.units[index * layers : (index + 1) * layers] for index in times]
    planned_ms, dense_ms = (sum(map(sum, plan.predicted[key])) for key in ("planned_ms", "dense_ms"))
    precisions = np.array([[unit.precision for unit in units] for units in rows], np.uint8)
    kinds: Counter[str] = Counter()
    for unit in run.units:
        kinds.update({name: number for name, number in unit.kinds.items() if number})
    return {
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
        "levels": job.levels.tolist(),
        "predicted_latent_db": plan.predicted["latent_db"],
        "predicted_snr": str(predicted_snr(job, run)),
        "planned_ms": [sum(plan.predicted["planned_ms"][index]) for index in times],
        "dense_ms": [sum(plan.predicted["dense_ms"][index]) for index in times],
        "attention_speedup": dense_ms / planned_ms,
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
    passes = _table("passes", "pass", "blocks", "density", "predicted ms", "error", "seconds")
    for each in value["accounts"]:
        cells = [f"{each['blocks']:,}", f"{each['density']:.3f}", f"{each['predicted_ms']:,.4g}"]
        passes.add_row(each["name"], *cells, f"{each['error']:.1e}", f"{each['seconds']:.2f}")
    times = _table("times, from clean to noise", "time", "level", "density", "error", "ms", "of dense", *KINDS)
    for index, now in enumerate(value["times"]):
        density, error = (float(np.mean(value[f"{key}_by_time_and_layer"][index])) for key in ("density", "error"))
        heads = value["heads_by_time_and_layer"][index]
        cells = [f"{value['levels'][index]:.1e}", f"{density:.3f}", f"{error * len(heads):.1e}"]
        cells += [f"{value[key][index]:.3g}" for key in ("planned_ms", "dense_ms")]
        times.add_row(f"{now:.3f}", *cells, *(str(sum(layer[kind] for layer in heads)) for kind in KINDS))
    densities = np.array(value["density_by_time_and_layer"])
    for each in (passes, times, "density in % by layer and time"):
        console.print(each, highlight=False)
    width = (console.width - LAYER_WIDTH) // CELL_WIDTH
    for first in range(0, len(densities), width):
        layers = Table(box=None, padding=0, show_header=False)
        for layer, row in enumerate(densities[first : first + width].T):
            layers.add_row(f"{layer:<{LAYER_WIDTH}}", *(_shaded(each) for each in row))
        console.print(layers)
    findings = {each["name"]: _findings(each["findings"]) for each in value["accounts"] if each["findings"]}
    sizes = value["file_bytes"] / 1e6, value["plain_csr_bytes"] / 1e6
    console.print()
    by_layer = {f"precision, layer {layer}": text for layer, text in enumerate(value["precision_by_layer"])}
    facts = {
        **findings,
        "heads": ", ".join(f"{number} {kind}" for kind, number in value["heads_by_kind"].items()),
        "predicted latent SNR": value["predicted_snr"],
        "predicted attention": f"{sum(value['planned_ms']):.4g} ms planned, {sum(value['dense_ms']):.4g} ms dense, "
        f"{value['attention_speedup']:.2f} times, on {value['device']['name']} ({value['device']['source']})",
        "density": f"{value['density']:.4f} of the blocks of dense attention",
        "attention cost": f"{value['attention_cost']:.4f} of dense attention in 16 bit",
        "precision": value["precision"],
        **(by_layer if len(set(by_layer.values())) > 1 else {}),
        "passes": value["passes"],
        "provenance": f"{len(value['provenance']['samples'])} samplings, manifest {value['provenance']['manifest']}",
        "file": f"{sizes[0]:.3g} MB; {sizes[1]:.3g} MB as plain CSR",
        "cost": "{units} units (layer, time), {seconds_a_unit:.2g} s and {file_bytes_a_unit:.0f} bytes each".format(
            **value["cost"]
        ),
    }
    for name, text in facts.items():
        console.print(f"{name}: {text}", markup=False, highlight=False)


def write(path: Path, value: dict[str, Any]) -> None:
    """Writes the report: HTML where the name ends so, else JSON."""
    if path.suffix == ".html":
        page = Console(record=True, file=io.StringIO(), width=PAGE_WIDTH, force_terminal=True, color_system="truecolor")
        show(page, value)
        write_text(path, page.export_html())
    else:
        write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def _table(title: str, first: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _shaded(density: float) -> Text:
    """Percent, on a ground that is the darker the denser."""
    red, green, blue = (round(a + (b - a) * density) for a, b in zip(PAPER, INK, strict=True))
    ink = "rgb(255,255,255)" if density > 0.5 else "rgb(0,0,0)"
    return Text(f"{100 * density:{CELL_WIDTH - 1}.0f} ", f"{ink} on rgb({red},{green},{blue})")


def _findings(findings: dict[str, Any]) -> str:
    plain = ((key.replace("_", " "), value) for key, value in findings.items() if not isinstance(value, dict))
    return ", ".join(f"{key} {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in plain)
