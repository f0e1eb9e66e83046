"""Quality against executed density and attention time: our plans, and what else could choose the blocks.

    calibatt-calibrate --model demo --samples 8 --thresholds 0.8,0.9,0.95 -o stats/
    python -m calibatt.tools.studies.pareto --stats stats/ -o docs/benchmarks/pareto.json \\
        --figure docs/pictures/pareto.png

Every method runs on the same held-out prompts from the same noise, through the same block-sparse kernel: only the masks
differ. *compiled*: by passes of the compiler, from the store. *uniform*: one rule for all heads and times. *budget*:
candidates of many densities for each head, their output errors measured on the calibration prompts, chosen by the
compiler's own budget of error times price; what an error of a head costs is what the store's windows cost per unit of
output error that they make. Run again, it does only what is not in the JSON yet.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from calibatt.plans.files import whole_file
from calibatt.tools.calibrate.models import MODEL_HELP
from calibatt.tools.evaluate.harness import about
from calibatt.tools.studies.bench import Exact
from calibatt.tools.studies.judgements import Judgements, console, mean_and_error
from calibatt.tools.studies.study import DENSITIES, METHODS, OURS, make_study


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each density the paired differences in PSNR from what `OURS` reaches there, in dB."""
    ours = {row["target"]: row for row in rows if row["method"] == OURS}
    found = []
    for row in rows:
        base = ours.get(row["target"])
        if base is not None and row is not base:
            difference = [a - b for a, b in zip(row["psnr"], base["psnr"], strict=True)]
            found.append({"method": row["method"], "target": row["target"], **mean_and_error(difference)})
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """PSNR against density and against attention time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {
        OURS: ("#1b3d78", "-", "calibrated plan (ours)"),
        "compiled, no anchors": ("#2694a0", "-", "the same, no anchors"),
        "the paper's own method": ("#2c8c3c", "-", "the paper's own method"),
        "dynamic: top-p, budget": ("#7a5ea8", "--", "dynamic top-p, our budget"),
        "dynamic: top-p, one p": ("#b79fd6", "--", "dynamic top-p"),
        "dynamic: skip-softmax": ("#c24f7a", "--", "skip-softmax"),
        "dynamic: spatial or temporal (SVG)": ("#d78aa5", "--", "spatial or temporal (SVG)"),
        "compiled, windows alone": ("#e4a03a", "-.", "windows, our budget"),
        "budget: random": ("#9aa0aa", "-.", "random, our budget"),
        "uniform: votes, one threshold": ("#7ac678", ":", "calibrated, one threshold"),
        "uniform: cubes (STA)": ("#e4572e", ":", "3D tiles (STA)"),
        "uniform: radial": ("#a8571e", ":", "radial"),
        "uniform: random": ("#5a606b", ":", "random"),
    }
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for name, (colour, style, label) in shown.items():
        rows = sorted((row for row in result["rows"] if row["method"] == name), key=lambda row: row["density"])
        if not rows:
            continue
        quality = [mean_and_error(row["psnr"]) for row in rows]
        for axis, key in zip(axes, ("density", "attention_ms"), strict=True):
            axis.errorbar(
                [row[key] for row in rows],
                [value["mean"] for value in quality],
                yerr=[value["standard_error"] for value in quality],
                color=colour,
                linestyle=style,
                marker="o",
                markersize=3.5,
                linewidth=2.2 if name == OURS else 1.3,
                label=label,
            )
    axes[0].set_xlabel("executed density (share of dense attention's blocks)")
    axes[1].set_xscale("log")
    axes[1].set_xlabel("attention of one video, ms (masks chosen from the input included)")
    axes[0].set_ylabel("PSNR against the dense video, dB")
    for row in result["rows"]:
        if row["method"] == "dense: PyTorch":
            axes[1].axvline(row["attention_ms"], color="#22262e", linewidth=0.8)
            axes[1].annotate(" dense", (row["attention_ms"], axes[1].get_ylim()[0]), fontsize=8, va="bottom")
    for axis in axes:
        axis.grid(color="#e4e2dc")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=7.5, frameon=False)
    told = result["about"]
    figure.suptitle(
        f"{result['prompts']} held-out prompts; {told['device']}, {told['versions']}, {told['date']}", fontsize=9
    )
    FigureCanvasAgg(figure)
    with whole_file(path) as file:
        figure.savefig(file, dpi=150, facecolor="white", format="png")


@click.command(help=__doc__)
@click.option("--model", default="demo", show_default=True, help=MODEL_HELP)
@click.option("--stats", "stores", type=click.Path(path_type=Path), multiple=True, required=True)
@click.option("--held-out", type=click.Path(path_type=Path), help="One prompt a line; the demo model has its own.")
@click.option("--prompts", type=click.IntRange(1), default=64, show_default=True, help="Held-out prompts.")
@click.option(
    "--calibration", type=click.IntRange(1), default=16, show_default=True, help="Prompts that errors are measured on."
)
@click.option("--densities", default=",".join(map(str, DENSITIES)), show_default=True)
@click.option("--methods", default="", help="Names, separated by semicolons; all if absent.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps [the model's own].")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Videos at a time.")
@click.option("--seconds", type=float, default=math.inf, help="Begin no method after so many seconds.")
@click.option("--device", default="auto", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="JSON to write or to continue.")
@click.option("--figure", type=click.Path(path_type=Path), help="PNG to draw.")
def main(
    model: str,
    stores: tuple[Path, ...],
    held_out: Path | None,
    prompts: int,
    calibration: int,
    densities: str,
    methods: str,
    steps: int | None,
    batch: int,
    seconds: float,
    device: str,
    output: Path,
    figure: Path | None,
) -> None:
    names = [name.strip() for name in methods.split(";")] if methods else list(METHODS)
    if unknown := [name for name in names if name not in METHODS]:
        raise click.UsageError(f"--methods must be some of {'; '.join(METHODS)}; got {unknown[0]!r}")
    judged = Judgements(output, seconds)
    study, result = make_study(model, stores, held_out, prompts, calibration, steps, batch, device), judged.result
    result |= {"about": about("python -m calibatt.tools.studies.pareto", study.sampler)}
    result |= {"prompts": prompts, "calibration": calibration, "steps": len(study.sampler.times)}
    judged.judge(study.bench, "dense: block-sparse kernel", 1.0, lambda: study.uniform("random", 1.0))
    judged.judge(study.bench, "dense: PyTorch", 1.0, Exact)
    for name in names:
        for density in map(float, densities.split(",")):
            judged.judge(study.bench, name, density, lambda name=name, density=density: METHODS[name](study, density))
    result["difference_from_ours_db"] = summary(result["rows"])
    judged.write()
    if figure is not None:
        draw(result, figure)
    console.print(f"{judged.elapsed:.1f} s: {output}")


if __name__ == "__main__":
    main()
