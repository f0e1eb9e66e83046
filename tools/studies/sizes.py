"""How far the density falls as videos grow: the same methods on the demo model at several token counts.

    calibatt-calibrate --model demo --samples 16 --thresholds 0.5,0.7,0.8,0.9,0.95 --device cuda -o small/
    calibatt-calibrate --model demo-medium ... -o medium/ ; calibatt-calibrate --model demo-large ... -o large/
    python -m calibatt.tools.studies.sizes --stats small=small/ --stats medium=medium/ --stats large=large/ \\
        -o docs/benchmarks/sizes.json --figure docs/pictures/sizes.png --table docs/sizes.md

A size may be given several times, with stores of other block sizes. Plans run as the runtime runs them, in the model's
own 16 bits; all masks that are chosen otherwise run in the block-sparse kernel of Triton; dense attention is cuDNN's.
Run again, it does only what is not in the JSON yet.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click
from torch.nn.attention import SDPBackend

from calibatt.plans.files import whole_file, write_text
from calibatt.tools.evaluate.harness import about
from calibatt.tools.studies.bench import Exact
from calibatt.tools.studies.study import METHODS, OURS, Judgements, Study, console, make_study, mean_and_error
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
BATCH_TOKENS = 16 * 16384
COLOURS = ("#1b3d78", "#2694a0", "#e4572e", "#e4a03a", "#7a5ea8")


def series(rows: list[dict[str, Any]], method: str) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Rows of a method by tokens and block size, each by density."""
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["tokens"], row["block"], row["density"])):
        if row["method"] == method:
            found.setdefault((row["tokens"], row["block"]), []).append(row)
    return found


def speed_up_at(rows: list[dict[str, Any]], dense_ms: float, psnr_db: float) -> tuple[float, float] | None:
    """Density at which a curve reaches a PSNR, and how many times as fast as dense attention it is there.

    Both are linear between measured points; None outside of what was measured.
    """
    points = [{"density": row["density"], "psnr_db": mean_and_error(row["psnr"])["mean"]} for row in rows]
    density = density_at(points, psnr_db)
    spent_at = [point | {"density": row["attention_ms"]} for row, point in zip(rows, points, strict=True)]
    spent = density_at(spent_at, psnr_db)
    return None if density is None or spent is None else (density, dense_ms / spent)


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
    for tokens, block in series(rows, OURS):
        here = [row for row in rows if (row["tokens"], row["block"]) == (tokens, block)]
        ours = {row["target"]: row for row in here if row["method"] == OURS}
        dense = next((row for row in here if row["method"] == DENSE), None)
        lines += [f"## {tokens:,} tokens, blocks of {block}", ""]
        if dense:
            lines += [f"Dense attention of a video by cuDNN: {dense['attention_ms']:.1f} ms.", ""]
        lines.append("| method | " + " | ".join(f"{target:g}" for target in targets) + " |")
        lines.append("|---" * (len(targets) + 1) + "|")
        for method in dict.fromkeys(row["method"] for row in here if row["method"] != DENSE):
            found = {row["target"]: row for row in here if row["method"] == method}
            lines.append(f"| {method} | " + " | ".join(_cell(found.get(t), ours.get(t), t) for t in targets) + " |")
        lines.append("")
    lines += ["## Density and speed-up of attention at equal quality", "", "| tokens, blocks | 25 dB | 30 dB | 35 dB |"]
    lines.append("|---|---|---|---|")
    for (tokens, block), found in series(rows, OURS).items():
        dense = next((r for r in rows if (r["tokens"], r["block"], r["method"]) == (tokens, block, DENSE)), None)
        at = [speed_up_at(found, dense["attention_ms"], psnr) if dense else None for psnr in AT_PSNR_DB]
        cells = [f"{each[0]:.2f}, {each[1]:.2f}x" if each else "not measured" for each in at]
        lines.append(f"| {tokens:,}, {block} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None, ours: dict[str, Any] | None, target: float) -> str:
    if row is None:
        return "not possible"
    quality = mean_and_error(row["psnr"])
    text = f"{quality['mean']:.1f} ({quality['standard_error']:.1f}), {row['attention_ms']:.1f} ms"
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
                label=f"{key[0]:,} tokens, blocks of {key[1]}: {'plan' if method == OURS else 'Sol-Attn'}",
            )
    axes.set(xlabel="executed density (share of dense attention's blocks)", ylabel="PSNR against the dense video, dB")
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
@click.option("--stats", "stores", multiple=True, required=True, metavar="SIZE=FOLDER", help="May be repeated.")
@click.option("--prompts", type=click.IntRange(1), default=32, show_default=True, help="Held-out prompts.")
@click.option("--calibration", type=click.IntRange(1), default=8, show_default=True, help="Prompts of thresholds.")
@click.option("--densities", default=",".join(map(str, DENSITIES)), show_default=True)
@click.option("--methods", default=";".join(CHOSEN), help="Names, separated by semicolons.", show_default=True)
@click.option("--batch-tokens", type=click.IntRange(1), default=BATCH_TOKENS, show_default=True, help="At a time.")
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
    seconds: float,
    device: str,
    output: Path,
    figure: Path | None,
    markdown: Path | None,
) -> None:
    names, parsed = [name.strip() for name in methods.split(";")], [_store(text) for text in stores]
    if unknown := [name for name in names if name not in METHODS]:
        raise click.UsageError(f"--methods must be some of {'; '.join(METHODS)}; got {unknown[0]!r}")
    judged = Judgements(output, seconds)
    for size, folder in parsed:
        study = sized(size, folder, prompts, calibration, batch_tokens, device)
        labels = {"size": size, "tokens": study.sampler.grid.tokens, "block": study.bench.blocks.block_k}
        judged.result |= {"about": about("python -m calibatt.tools.studies.sizes", study.sampler), "prompts": prompts}
        judged.judge(study, DENSE, 1.0, lambda: Exact(SDPBackend.CUDNN_ATTENTION), **labels)
        for density in map(float, densities.split(",")):
            for name in names:
                make = METHODS[name]
                judged.judge(study, name, density, lambda make=make, at=density, of=study: make(of, at), **labels)
    judged.write()
    if figure is not None:
        draw(judged.result, figure)
    if markdown is not None:
        write_text(markdown, table(judged.result))
    console.print(f"{judged.elapsed:.1f} s: {output}")


def sized(size: str, folder: Path, prompts: int, calibration: int, batch_tokens: int, device: str) -> Study:
    """The study of one size; videos are generated as many at a time as their tokens allow."""
    from calibatt.compiler.stats import Store

    batch = max(1, batch_tokens // Store.open(folder).manifest.grid.tokens)
    return make_study(MODELS[size], (folder,), None, prompts, calibration, None, batch, device, "auto")


if __name__ == "__main__":
    main()
