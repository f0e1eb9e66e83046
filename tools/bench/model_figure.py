"""The picture of `calibatt-bench model`: what a forward takes, and how much of it is attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calibatt.plans.files import whole_file

COPY = "copy"
OTHER_COLOUR, DENSE_COLOUR, PLAN_COLOUR, BOUND_COLOUR = "#b9bdc4", "#e4a03a", "#1b3d78", "#c24f7a"


def draw(report: dict[str, Any], path: Path) -> None:
    """One bar a case, grouped by size, mode and linears: grey is everything but attention, a line the bound of a plan.

    Args:
        report: As the command writes it.
        path: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

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
    FigureCanvasAgg(figure)
    with whole_file(path) as file:
        figure.savefig(file, dpi=130, facecolor="white", format="png")


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
