"""How far the density falls as videos grow: the same methods on the demo model at several token counts.

    calibatt-calibrate --model demo --samples 16 --vectors 1 --thresholds 0.5,0.7,0.8,0.9,0.95 --device cuda -o small/
    calibatt-calibrate --model demo-medium ... -o medium/ ; calibatt-calibrate --model demo-large ... -o large/
    python -m calibatt.tools.studies.sizes --stats small=small/ --stats medium=medium/ --stats large=large/ \\
        --plans kept/ -o docs/benchmarks/sizes.json --figure docs/pictures/sizes.png --table docs/sizes.md
    python -m calibatt.tools.studies.sizes ... --timings

A size may be given several times; of further stores, of other block sizes or calibrations, only the calibrated plan is
judged. Plans run as the runtime runs them, in the model's own 16 bits; all masks that are chosen otherwise run in the
block-sparse kernel of Triton; dense attention is cuDNN's. What matters most is done first, so that a run that --seconds
ends has a whole figure; run again, it does only what is not in the JSON yet. Sizes may be judged by several processes
at the same time (--busy), each into its own JSON, which --join puts together; then --timings, on a GPU with nothing
else to do, measures the milliseconds of attention.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from torch.nn.attention import SDPBackend

from calibatt.compiler.stats import Store
from calibatt.plans.files import whole_file, write_text
from calibatt.tools.evaluate.harness import about
from calibatt.tools.studies.bench import Exact, Rule
from calibatt.tools.studies.judgements import Judgements, console, mean_and_error
from calibatt.tools.studies.study import METHODS, OURS, Study, make_study
from calibatt.tools.studies.tradeoff import density_at

MODELS = {"small": "demo", "medium": "demo-medium", "large": "demo-large"}
DENSITIES = (0.1, 0.15, 0.2, 0.3, 0.35, 0.4)
DENSE = "dense: cuDNN"
RIVAL = "dynamic: Sol-Attn"
CHOSEN = (
    OURS,
    "the paper's own method",
    RIVAL,
    "dynamic: Sol-Attn, first step dense",
    "uniform: box",
    "dynamic: top-p, one p",
    "compiled, no anchors",
    "compiled, anchor rows alone",
    "compiled, anchor frames alone",
)
AT_PSNR_DB = (25.0, 30.0, 35.0)
BATCH_TOKENS, TIMED_TOKENS = 16 * 36864, 4 * 36864
"""Of videos generated at a time."""
FIRST_METHODS, FIRST_DENSITIES = 3, 2
"""So many of the methods and of the densities come first."""
COLOURS = ("#1b3d78", "#2694a0", "#e4572e", "#e4a03a", "#7a5ea8", "#2c8c3c")


Key = tuple[int, int, str]
"""Tokens, block size, and what the plans were calibrated on."""


def key_of(row: dict[str, Any]) -> Key:
    return row["tokens"], row["block"], row["calibrated"]


def told_key(key: Key) -> str:
    return f"{key[0]:,} tokens, blocks of {key[1]}, {key[2]} vector{'' if key[2].endswith(' x 1') else 's'}"


def series(rows: list[dict[str, Any]], method: str) -> dict[Key, list[dict[str, Any]]]:
    """Rows of a method by `Key`, each by density."""
    found: dict[Key, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (*key_of(row), row["density"])):
        if row["method"] == method:
            found.setdefault(key_of(row), []).append(row)
    return found


def in_order(names: Sequence[str], densities: Sequence[float], *, first: bool) -> list[tuple[int, str, float]]:
    """What is judged of a store, each with its turn: the calibrated plan and the first methods at the first densities
    come first; of stores that are not the first of their size only the calibrated plan is judged, after those."""
    found = []
    for name, density in itertools.product(names, densities):
        late = names.index(name) // FIRST_METHODS, densities.index(density) // FIRST_DENSITIES
        if first or name == OURS:
            found.append((min(1, late[1]) + (not first) if name == OURS else sum(late), name, density))
    return found


def points_of(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [{"density": row["density"], "psnr_db": mean_and_error(row["psnr"])["mean"]} for row in rows]


def speed_up_at(rows: list[dict[str, Any]], dense_ms: float, psnr_db: float) -> float | None:
    """How many times as fast as dense attention a curve is where it reaches a PSNR, by the straight line through the
    milliseconds that were timed; None where it does not reach it, or fewer than two were."""
    timed = [(row["density"], row["attention_ms"]) for row in rows if row["attention_ms"]]
    density = density_at(points_of(rows), psnr_db)
    if density is None or len(timed) < 2:
        return None
    return dense_ms / float(np.polyval(np.polyfit(*zip(*timed, strict=True), 1), density))


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: PSNR of every method by size, differences from `OURS`, and density by quality."""
    rows, told = result["rows"], result["about"]
    targets = sorted({row["target"] for row in rows if row["method"] != DENSE})
    lines = ["# The study at several sizes", ""]
    lines += [
        f"PSNR in dB against the dense video (standard error), {result['prompts']} held-out prompts, and attention"
    ]
    lines += [
        "of a video; in brackets the difference from the calibrated plan, paired by prompt. Where a method misses"
    ]
    lines += ["the density, its own is named.", ""]
    lines += [f"`{told['command']}`; {told['device']}, {told['versions']}, {told['date']}.", ""]
    for key in series(rows, OURS):
        here = [row for row in rows if key_of(row) == key]
        ours = {row["target"]: row for row in here if row["method"] == OURS}
        dense = next((row for row in here if row["method"] == DENSE), None)
        lines += [f"## {told_key(key)}", ""]
        if dense and dense["attention_ms"]:
            lines += [f"Dense attention of a video by cuDNN: {dense['attention_ms']:.1f} ms.", ""]
        lines.append("| method | " + " | ".join(f"{target:g}" for target in targets) + " |")
        lines.append("|---" * (len(targets) + 1) + "|")
        for method in dict.fromkeys(row["method"] for row in here if row["method"] != DENSE):
            found = {row["target"]: row for row in here if row["method"] == method}
            lines.append(f"| {method} | " + " | ".join(_cell(found.get(t), ours.get(t), t) for t in targets) + " |")
        lines.append("")
    lines += ["## Density and speed-up of attention at equal quality", "", "| | 25 dB | 30 dB | 35 dB |"]
    lines.append("|---|---|---|---|")
    for key, found in series(rows, OURS).items():
        dense = next((row for row in rows if row["tokens"] == key[0] and row["method"] == DENSE), None)
        dense_ms = dense["attention_ms"] if dense else None
        cells = [_at(found, dense_ms, psnr_db) for psnr_db in AT_PSNR_DB]
        lines.append(f"| {told_key(key)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _at(rows: list[dict[str, Any]], dense_ms: float | None, psnr_db: float) -> str:
    density, speed_up = density_at(points_of(rows), psnr_db), dense_ms and speed_up_at(rows, dense_ms, psnr_db)
    if density is None:
        return "not reached"
    return f"{density:.2f}, {speed_up:.2f}x" if speed_up else f"{density:.2f}"


def _cell(row: dict[str, Any] | None, ours: dict[str, Any] | None, target: float) -> str:
    if row is None:
        return "not judged"
    quality = mean_and_error(row["psnr"])
    text = f"{quality['mean']:.1f} ({quality['standard_error']:.1f})"
    text += f", {row['attention_ms']:.1f} ms" if row["attention_ms"] else ""
    if ours is not None and row is not ours:
        change = mean_and_error([a - b for a, b in zip(row["psnr"], ours["psnr"], strict=True)])
        text += f" [{change['mean']:+.1f} ({change['standard_error']:.1f})]"
    return text if abs(row["density"] - target) < 0.01 else f"{text} at {row['density']:.2f}"


def draw(result: dict[str, Any], path: Path) -> None:
    """PSNR against density, a curve a size: plans, and dashed the strongest online rival."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    colours = dict(zip(series(result["rows"], OURS), COLOURS, strict=False))
    for method, style in ((OURS, "-"), (RIVAL, "--")):
        for key, rows in series(result["rows"], method).items():
            quality = [mean_and_error(row["psnr"]) for row in rows]
            axes.errorbar(
                [row["density"] for row in rows],
                [each["mean"] for each in quality],
                yerr=[each["standard_error"] for each in quality],
                color=colours.get(key, "#9aa0aa"),
                linestyle=style,
                marker="o",
                markersize=3.5,
                label=f"{told_key(key)}: {'plan' if method == OURS else 'Sol-Attn'}",
            )
    axes.set(xlabel="executed density (share of dense attention's blocks)", ylabel="PSNR against the dense video, dB")
    axes.margins(y=0.15)
    axes.grid(color="#e4e2dc")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    told = result["about"]
    axes.set_title(f"{result['prompts']} held-out prompts; {told['device']}, {told['versions']}", fontsize=9)
    FigureCanvasAgg(figure)
    with whole_file(path) as file:
        figure.savefig(file, dpi=150, facecolor="white", format="png")


def _store(text: str) -> tuple[str, Path]:
    size, equals, folder = text.partition("=")
    if size not in MODELS or not equals or not folder:
        raise click.UsageError(f"--stats must be SIZE=FOLDER, SIZE one of {', '.join(MODELS)}; got {text!r}")
    return size, Path(folder)


@click.command(help=__doc__)
@click.option("--stats", "stores", multiple=True, metavar="SIZE=FOLDER", help="May be repeated.")
@click.option("--prompts", type=click.IntRange(1), default=32, show_default=True, help="Held-out prompts.")
@click.option("--calibration", type=click.IntRange(1), default=8, show_default=True, help="Prompts of thresholds.")
@click.option("--densities", default=",".join(map(str, DENSITIES)), show_default=True)
@click.option("--methods", default=";".join(CHOSEN), help="Names, separated by semicolons.", show_default=True)
@click.option("--batch-tokens", type=click.IntRange(1), default=BATCH_TOKENS, show_default=True, help="At a time.")
@click.option("--plans", type=click.Path(path_type=Path), help="Folder in which compiled plans are kept.")
@click.option("--join", type=click.Path(path_type=Path, exists=True), multiple=True, help="JSON of another run.")
@click.option("--timings", is_flag=True, help="Measure attention again, of the rows there are.")
@click.option("--busy", is_flag=True, help="Others use the device: leave the milliseconds out.")
@click.option("--seconds", type=float, default=math.inf, help="Begin no method after so many seconds.")
@click.option("--device", default="auto", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="JSON to write or to continue.")
@click.option("--figure", type=click.Path(path_type=Path), help="PNG to draw.")
@click.option("--table", "markdown", type=click.Path(path_type=Path), help="Markdown to write.")
def main(
    stores: tuple[str, ...],
    prompts: int,
    calibration: int,
    densities: str,
    methods: str,
    batch_tokens: int,
    plans: Path | None,
    join: tuple[Path, ...],
    timings: bool,
    busy: bool,
    seconds: float,
    device: str,
    output: Path,
    figure: Path | None,
    markdown: Path | None,
) -> None:
    names, parsed = [name.strip() for name in methods.split(";")], [_store(text) for text in stores]
    if unknown := [name for name in names if name not in METHODS]:
        raise click.UsageError(f"--methods must be some of {'; '.join(METHODS)}; got {unknown[0]!r}")
    judged, at = Judgements(output, seconds, timed=not busy), [float(density) for density in densities.split(",")]
    for path in join:
        judged.join(path)
    studies: dict[str, Study] = {}
    todo: list[tuple[int, str, float, Study, dict[str, Any]]] = []
    for size, folder in parsed:
        batch = max(1, batch_tokens // Store.open(folder).manifest.grid.tokens)
        known = MODELS[size], (folder,), None, prompts, calibration, None, batch, device, "auto", plans
        study = make_study(*known, like=studies.get(size))
        labels = {"size": size, "tokens": study.sampler.grid.tokens, "block": study.bench.blocks.block_k}
        labels |= {"calibrated": study.calibrated}
        judged.result |= {"about": about("python -m calibatt.tools.studies.sizes", study.sampler), "prompts": prompts}
        first = size not in studies
        studies[size] = studies.get(size, study)
        todo += [(0, DENSE, 1.0, study, labels)] if first else []
        todo += [(*each, study, labels) for each in in_order(names, at, first=first)]
    for _, name, density, study, labels in sorted(todo, key=lambda each: each[0]):

        def make(name: str = name, density: float = density, study: Study = study) -> Rule:
            return Exact(SDPBackend.CUDNN_ATTENTION) if name == DENSE else METHODS[name](study, density)

        if timings:
            judged.time(study.bench, name, density, make, max(1, TIMED_TOKENS // labels["tokens"]), **labels)
        else:
            judged.judge(study.bench, name, density, make, **labels)
    judged.write()
    if figure is not None:
        draw(judged.result, figure)
    if markdown is not None:
        write_text(markdown, table(judged.result))
    console.print(f"{judged.elapsed:.1f} s: {output}")


if __name__ == "__main__":
    main()
