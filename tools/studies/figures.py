"""The pictures of `calibatt-bench kernel` and `calibatt-bench model`, drawn from what they wrote.

    python -m calibatt.tools.studies.figures docs/benchmarks/model_h100.json -o docs/pictures/model_h100.png

Reports of models that say nothing of linear layers are from before there were several kinds: all are the model's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from calibatt.tools.bench.kernel import OURS
from calibatt.tools.bench.options import file_option
from calibatt.tools.bench.peers import DENSE_PEERS
from calibatt.tools.bench.variants import COPY
from calibatt.tools.inspect_plan.drawing import save_figure
from calibatt.tools.studies.options import FILE, study_command

PEAK_TFLOPS = {"NVIDIA H200": 989.4, "NVIDIA H100 80GB HBM3": 989.4}
"""Dense bf16, from the data sheets; the roof of the figure."""
COLOURS = {
    "hopper": "#1b3d78",
    "triton": "#2694a0",
    "torch": "#1b3d78",
    "flash-attention-4 sparse": "#e4572e",
    "flash-attention-4": "#e4a03a",
    "flex-attention": "#7a5ea8",
    "sdpa-cudnn": "#5a606b",
    "sdpa-flash": "#9aa0aa",
}
OTHER_COLOUR, DENSE_COLOUR, PLAN_COLOUR, BOUND_COLOUR = "#b9bdc4", "#e4a03a", "#1b3d78", "#c24f7a"


def draw_kernels(report: dict[str, Any]) -> Figure:
    """Milliseconds and TFLOP/s against density, one row for each size that has several densities."""
    records = report["measurements"]
    names = [size["name"] for size in report["sizes"]]
    shown = [
        name
        for name in names
        if len({row["density"] for row in records if row["size"] == name and row["backend"] in OURS}) > 2
    ]
    if not shown:
        raise ValueError(f"a size must have more than two densities of {', '.join(OURS)} to be drawn, got none")
    figure = Figure(figsize=(11, 3.9 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), 2, squeeze=False)
    for line, name in zip(grid, shown, strict=True):
        for backend, colour in COLOURS.items():
            rows = sorted(
                (row for row in records if (row["size"], row["backend"]) == (name, backend)),
                key=lambda row: row["density"],
            )
            if not rows:
                continue
            for axis, key in zip(line, ("median_ms", "tflops"), strict=True):
                dense = backend in DENSE_PEERS
                x = [0.05, 1.0] if dense else [row["density"] for row in rows]
                middle = float(np.median([row[key] for row in rows]))
                y = [middle, middle] if dense else [row[key] for row in rows]
                axis.plot(
                    x, y, color=colour, linestyle="--" if dense else "-", marker="" if dense else "o", markersize=4,
                    linewidth=2.2 if backend == "hopper" else 1.4, label=backend,
                )  # fmt: skip
        left, right = line
        left.set_xscale("log")
        left.set_yscale("log")
        left.set_xticks([0.05, 0.1, 0.2, 0.3, 0.5, 1.0], ["0.05", "0.1", "0.2", "0.3", "0.5", "1"])
        left.minorticks_off()
        left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        left.set_ylabel("milliseconds a call")
        right.set_ylabel("TFLOP/s of computed blocks")
        roof = PEAK_TFLOPS.get(report["device"])
        right.set_ylim(0, 1.06 * roof if roof else None)
        if roof:
            right.axhline(roof, color="#c24f7a", linewidth=1)
            right.annotate("data sheet peak", (0.5, roof), fontsize=8, va="bottom", color="#c24f7a")
            tokens, heads, dim = (
                next(size for size in report["sizes"] if size["name"] == name)[key]
                for key in ("tokens", "heads", "head_dim")
            )
            x = np.array([0.05, 1.0])
            left.plot(x, 4 * tokens**2 * dim * heads * x / roof / 1e9, color="#c24f7a", linewidth=1, label="peak")
        for axis in line:
            axis.set_title(f"{name}: {report['mask']} masks")
            axis.set_xlabel("density: share of blocks computed (dense kernels: dashed)")
            axis.grid(color="#e4e2dc")
            axis.spines[["top", "right"]].set_visible(False)
        left.legend(fontsize=8, frameon=False)
    told = ", ".join(f"{key} {value}" for key, value in report["versions"].items())
    figure.suptitle(f"{report['device']}, {report['date'][:10]}; {told}", fontsize=9)
    return figure


def draw_models(report: dict[str, Any]) -> Figure:
    """One bar a case, grouped by size, mode and linears: grey is all but attention, a line the bound of a plan."""
    modes = list(dict.fromkeys((row["mode"], row["linears"]) for row in report["forwards"]))
    names = [size["name"] for size in report["sizes"] if any(r["size"] == size["name"] for r in report["forwards"])]
    most = max((len(_rows(report, name, mode)) for name in names for mode in modes), default=1)
    figure = Figure(figsize=(1.5 + 5.2 * max(1, len(modes)), 1.5 + (0.9 + 0.42 * most) * max(1, len(names))))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(max(1, len(names)), max(1, len(modes)), squeeze=False, sharex="row")
    tokens = {size["name"]: size["tokens"] for size in report["sizes"]}
    for line, name in zip(grid, names, strict=False):
        for axis, mode in zip(line, modes, strict=False):
            _bars(axis, report, name, mode)
            axis.set_title(f"{name}, {tokens[name]:,} tokens, {mode[0]}, {mode[1]} linears", fontsize=10)
            axis.set_xlabel("seconds a forward")
    figure.legend(
        handles=[
            Patch(color=OTHER_COLOUR, label="everything but self-attention"),
            Patch(color=DENSE_COLOUR, label="dense self-attention"),
            Patch(color=PLAN_COLOUR, label="planned self-attention"),
            Line2D([], [], color=BOUND_COLOUR, label="bound: everything else + density x fastest dense attention"),
        ],
        loc="outside lower center", ncols=2 * len(modes), fontsize=8, frameon=False,
    )  # fmt: skip
    told = ", ".join(f"{key} {report['versions'][key]}" for key in ("torch", "triton", "diffusers", "cudnn")
                     if key in report["versions"])  # fmt: skip
    layers = f"{report['layers']} of {report['published_layers']} layers"
    what = f"{report['model']}, {layers}, random weights, synthetic masks"
    figure.suptitle(f"{what}\n{report['device']}, {report['date'][:10]}; {told}", fontsize=9)
    return figure


def _rows(report: dict[str, Any], size: str, mode: tuple[str, str]) -> list[dict[str, Any]]:
    """The cases of a panel, dense ones first, then plans by falling density."""
    here = [row for row in report["forwards"] if (row["size"], row["mode"], row["linears"]) == (size, *mode)]
    shown = [row for row in here if row["attention"] != COPY]
    return sorted(shown, key=lambda row: (row["attention"].startswith("plan"), -row["density"]))


def _bars(axis: Any, report: dict[str, Any], size: str, mode: tuple[str, str]) -> None:
    here = [row for row in report["derived"] if (row["size"], row["mode"], row["linears"]) == (size, *mode)]
    compared = sorted((row for row in here if "bound_ms" in row), key=lambda row: -row["speedup"])
    bounds = {row["attention"]: row for row in compared}  # against the fastest dense kernel
    other = here[0]["other_ms"] / 1e3 if here else 0.0
    rows = _rows(report, size, mode)
    for place, row in enumerate(rows):
        seconds, is_plan = row["median_ms"] / 1e3, row["attention"].startswith("plan")
        axis.barh(place, min(other, seconds), color=OTHER_COLOUR, height=0.7)
        axis.barh(
            place, max(0.0, seconds - other), left=other, color=PLAN_COLOUR if is_plan else DENSE_COLOUR, height=0.7,
            xerr=[[(row["median_ms"] - row["p10_ms"]) / 1e3], [(row["p90_ms"] - row["median_ms"]) / 1e3]],
            error_kw={"linewidth": 1, "ecolor": "#333333"},
        )  # fmt: skip
        told, end = _seconds(seconds), row["p90_ms"] / 1e3
        if (bound := bounds.get(row["attention"])) is not None:
            at = bound["bound_ms"] / 1e3
            axis.plot([at, at], [place - 0.42, place + 0.42], color=BOUND_COLOUR, linewidth=1.6)
            told, end = f"{told}  ({bound['speedup']:.2f}x)", max(end, at)
        axis.annotate(told, (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [row["attention"] for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * max((row["p90_ms"] for each in {(row["mode"], row["linears"]) for row in report["forwards"]}
                               for row in _rows(report, size, each)), default=1) / 1e3)  # fmt: skip
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", color="#e4e2dc")
    axis.set_axisbelow(True)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{1e3 * value:.3g} ms"


@study_command("python -m calibatt.tools.studies.figures", __doc__)
@click.argument("report", type=FILE)
@file_option("-o", "--output", text="PNG to draw.", required=True)
def main(report: Path, output: Path) -> None:
    result = json.loads(report.read_text("utf-8"))
    kinds = {"forwards": draw_models, "measurements": draw_kernels}
    draw = next((draw for kind, draw in kinds.items() if isinstance(result, dict) and result.get(kind)), None)
    if draw is None:
        raise click.UsageError(f"{report} must be of calibatt-bench kernel or model, with measurements, got another")
    for row in (*result.get("forwards", ()), *result.get("derived", ())):
        row.setdefault("linears", "bf16")
    save_figure(draw(result), output)


if __name__ == "__main__":
    main()
