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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn.attention import SDPBackend

from calibatt.compiler.stats import Store
from calibatt.tools.bench.options import choose, count_option, densities_option
from calibatt.tools.evaluate.harness import about
from calibatt.tools.studies.bench import Exact, Rule
from calibatt.tools.studies.judgements import Judgements, by_target, caption, draw_curve, mean_and_error, page, table
from calibatt.tools.studies.options import FIGURE, JOIN, JUDGED, PATH, TABLE, prompts_option, study_command
from calibatt.tools.studies.study import METHODS, OURS, Study, make_study

NAME = "python -m calibatt.tools.studies.sizes"
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


def key_name(key: Key) -> str:
    return f"{key[0]:,} tokens, blocks of {key[1]}, {key[2]} vector{'' if key[2].endswith(' x 1') else 's'}"


def series(rows: list[dict[str, Any]], method: str) -> dict[Key, list[dict[str, Any]]]:
    """Rows of a method by `Key`, each by rising density."""
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


def sizes_page(result: dict[str, Any]) -> str:
    """The result as Markdown: PSNR of every method by size, differences from `OURS`, and density by quality."""
    rows, tables = result["rows"], []
    text = (
        f"PSNR in dB against the dense video (standard error), {result['prompts']} held-out prompts, and attention of "
        "a video; in square brackets the difference from the calibrated plan, paired by prompt. Where a method misses "
        "the density, its own is named."
    )
    sparse = [row for row in rows if row["method"] != DENSE]
    reached = []
    for key, ours in series(rows, OURS).items():
        ms = next((row["attention_ms"] for row in rows if row["tokens"] == key[0] and row["method"] == DENSE), None)
        here = [row for row in sparse if key_of(row) == key]
        tables.append([f"## {key_name(key)}", ""])
        tables.append([f"Dense attention of a video by cuDNN: {ms:.1f} ms.", ""] if ms else [])
        tables.append(by_target(here, "method", OURS, of=sparse))
        reached.append([key_name(key), *(_at(ours, ms, psnr_db) for psnr_db in AT_PSNR_DB)])
    tables.append(["## Density and speed-up of attention at equal quality", ""])
    tables.append(table(["", *(f"{psnr_db:g} dB" for psnr_db in AT_PSNR_DB)], reached))
    return page("The study at several sizes", result, text, *tables)


def _at(rows: list[dict[str, Any]], dense_ms: float | None, psnr_db: float) -> str:
    density, speed_up = density_at(points_of(rows), psnr_db), dense_ms and speed_up_at(rows, dense_ms, psnr_db)
    if density is None:
        return "not reached"
    return f"{density:.2f}, {speed_up:.2f}x" if speed_up else f"{density:.2f}"


def density_at(points: Sequence[dict[str, float]], psnr_db: float) -> float | None:
    """Density at which a curve reaches a PSNR, by straight lines between its points; None outside of them."""
    density, psnr = (np.array([point[key] for point in points]) for key in ("density", "psnr_db"))
    if not psnr.min() <= psnr_db <= psnr.max():
        return None
    after = int(np.argmax(psnr >= psnr_db))
    span = slice(max(0, after - 1), after + 1)
    return float(np.interp(psnr_db, psnr[span], density[span]))


def draw(result: dict[str, Any]) -> Figure:
    """PSNR against density, a curve a size: plans, and dashed Sol-Attn."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    colours = dict(zip(series(result["rows"], OURS), COLOURS, strict=False))
    for method, style in ((OURS, "-"), (RIVAL, "--")):
        for key, rows in series(result["rows"], method).items():
            label = f"{key_name(key)}: {'plan' if method == OURS else 'Sol-Attn'}"
            draw_curve(axes, rows, color=colours.get(key, "#9aa0aa"), linestyle=style, label=label)
    axes.set(xlabel="executed density (share of dense attention's blocks)", ylabel="PSNR against the dense video, dB")
    axes.margins(y=0.15)
    axes.legend(fontsize=8, frameon=False)
    axes.set_title(caption(result), fontsize=9)
    return figure


def _store(text: str) -> tuple[str, Path]:
    size, equals, folder = text.partition("=")
    if size not in MODELS or not equals or not folder:
        raise click.UsageError(f"--stats must be SIZE=FOLDER, SIZE one of {', '.join(MODELS)}; got {text!r}")
    return size, Path(folder)


@study_command(NAME, __doc__)
@click.option("--stats", "stores", multiple=True, metavar="SIZE=FOLDER", help="May be repeated.")
@prompts_option()
@count_option("--calibration", 8, "Prompts of thresholds.")
@densities_option(",".join(map(str, DENSITIES)))
@click.option("--methods", default=";".join(CHOSEN), help="Names, separated by semicolons.", show_default=True)
@count_option("--batch-tokens", BATCH_TOKENS, "Tokens of the videos that are generated at a time.")
@click.option("--plans", type=PATH, help="Folder in which compiled plans are kept.")
@JOIN
@click.option("--timings", is_flag=True, help="Measure attention again, of the rows there are.")
@click.option("--busy", is_flag=True, help="Others use the device: leave the milliseconds out.")
@JUDGED
@FIGURE
@TABLE
def main(
    stores: tuple[str, ...],
    prompts: int,
    calibration: int,
    densities: list[float],
    methods: str,
    batch_tokens: int,
    plans: Path | None,
    join: tuple[Path, ...],
    timings: bool,
    busy: bool,
    seconds: float,
    device: torch.device,
    output: Path,
    figure: Path | None,
    markdown: Path | None,
) -> None:
    names, parsed = choose(methods, list(METHODS), "--methods", ";"), [_store(text) for text in stores]
    judged = Judgements(output, seconds, timed=not busy)
    for path in join:
        judged.join(path)
    studies: dict[str, Study] = {}
    todo: list[tuple[int, str, float, Study, dict[str, Any]]] = []
    for size, folder in parsed:
        batch = max(1, batch_tokens // Store.open(folder).manifest.grid.tokens)
        study = make_study(
            model=MODELS[size], stores=(folder,), prompts=prompts, calibration=calibration, batch=batch, device=device,
            backend="auto", plans=plans, like=studies.get(size),
        )  # fmt: skip
        labels = {"size": size, "tokens": study.sampler.grid.tokens, "block": study.bench.blocks.block_k}
        labels |= {"calibrated": study.calibrated}
        judged.begin(about(NAME, study.sampler), prompts=prompts, calibration=calibration)
        first = size not in studies
        studies[size] = studies.get(size, study)
        todo += [(0, DENSE, 1.0, study, labels)] if first else []
        todo += [(*each, study, labels) for each in in_order(names, densities, first=first)]
    for _, name, density, study, labels in sorted(todo, key=lambda each: each[0]):

        def make(name: str = name, density: float = density, study: Study = study) -> Rule:
            return Exact(SDPBackend.CUDNN_ATTENTION) if name == DENSE else METHODS[name](study, density)

        if timings:
            judged.time(study.bench, name, density, make, max(1, TIMED_TOKENS // labels["tokens"]), **labels)
        else:
            judged.judge(study.bench, name, density, make, lambda study=study: study.store, **labels)
    judged.finish(sizes_page, markdown, draw, figure)


if __name__ == "__main__":
    main()
