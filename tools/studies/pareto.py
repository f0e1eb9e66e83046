"""Quality against executed density and attention time: our plans, and what else could choose the blocks.

    calibatt-calibrate --model demo --samples 8 --thresholds 0.8,0.9,0.95 -o stats/
    python -m calibatt.tools.studies.pareto --stats stats/ -o docs/benchmarks/pareto.json \\
        --figure docs/pictures/pareto.png

Every method runs on the same held-out prompts from the same noise, through the same block-sparse kernel: only the masks
differ. Milliseconds are those of its attention, choosing the masks included, in batches after the first.

\b
compiled  by passes of the compiler, from the store
uniform   one rule for all heads and times
budget    candidates of many densities for each head, their output errors measured on the calibration prompts, chosen
          by the compiler's own budget of error times price; what an error of a head costs is what the store's windows
          cost per unit of output error that they make
dynamic   masks are chosen from every input

Run again, it does only what is not in the JSON yet.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
from matplotlib.figure import Figure

from calibatt.tools.bench.options import choose, count_option, densities_option
from calibatt.tools.evaluate.harness import about
from calibatt.tools.studies.bench import Exact
from calibatt.tools.studies.judgements import Judgements, caption, difference, draw_curve
from calibatt.tools.studies.options import FIGURE, JUDGED, STORES, study_command
from calibatt.tools.studies.stores import sampling_counts
from calibatt.tools.studies.study import DENSITIES, METHODS, OURS, make_study

NAME = "python -m calibatt.tools.studies.pareto"


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each density the paired differences in PSNR from what `OURS` reaches there, in dB."""
    ours = {row["target"]: row for row in rows if row["method"] == OURS}
    return [
        {"method": row["method"], "target": row["target"], **difference(row, ours[row["target"]])}
        for row in rows
        if row["method"] != OURS and row["target"] in ours
    ]


def draw(result: dict[str, Any]) -> Figure:
    """PSNR against density and against attention time."""
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
        width = 2.2 if name == OURS else 1.3
        for axis, key in zip(axes, ("density", "attention_ms"), strict=True) if rows else ():
            draw_curve(axis, rows, key, color=colour, linestyle=style, linewidth=width, label=label)
    axes[0].set_xlabel("executed density (share of dense attention's blocks)")
    axes[1].set_xscale("log")
    axes[1].set_xlabel("attention of one video, ms (masks chosen from the input included)")
    axes[0].set_ylabel("PSNR against the dense video, dB")
    for row in result["rows"]:
        if row["method"] == "dense: PyTorch":
            axes[1].axvline(row["attention_ms"], color="#22262e", linewidth=0.8)
            axes[1].annotate(" dense", (row["attention_ms"], axes[1].get_ylim()[0]), fontsize=8, va="bottom")
    axes[0].legend(fontsize=7.5, frameon=False)
    figure.suptitle(caption(result), fontsize=9)
    return figure


@study_command(NAME, __doc__)
@STORES
@densities_option(",".join(map(str, DENSITIES)))
@click.option("--methods", default="", help="Names, separated by semicolons; all if absent.")
@count_option("--steps", None, "Denoising steps [the model's own].")
@JUDGED
@FIGURE
def main(
    densities: list[float], methods: str, seconds: float, output: Path, figure: Path | None, **options: Any
) -> None:
    names = choose(methods, list(METHODS), "--methods", ";")
    judged = Judgements(output, seconds)
    made = make_study(**options)
    settings = {"steps": len(made.sampler.times), "store": sampling_counts(made.store)}
    judged.begin(about(NAME, made.sampler), model=options["model"], **made.bench.counts, **settings)
    judged.judge(made.bench, "dense: block-sparse kernel", 1.0, lambda: made.uniform("random", 1.0))
    judged.judge(made.bench, "dense: PyTorch", 1.0, Exact)
    for name in names:
        for density in densities:
            judged.judge(made.bench, name, density, partial(METHODS[name], made, density))
    judged.result["difference_from_ours_db"] = summary(judged.rows)
    judged.finish(draw=draw, figure=figure)


if __name__ == "__main__":
    main()
