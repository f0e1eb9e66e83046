"""What the compiler's defaults are worth: one change at a time, at equal executed density, on held-out prompts.

    python -m calibatt.tools.studies.ablations --stats stats/ --stats stats_2/ --stats stats_128/ \\
        -o docs/benchmarks/ablations_h100.json --table docs/ablations.md

The first store is the one that is varied; the others are compiled with the default passes and named by what they differ
in: calibration prompts, random vectors, block size.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from calibatt.compiler.stats import Store
from calibatt.plans.files import write_text
from calibatt.tools.calibrate.effects import ladder
from calibatt.tools.calibrate.models import MODEL_HELP
from calibatt.tools.evaluate.harness import about
from calibatt.tools.studies.bench import Kept, Rule
from calibatt.tools.studies.judgements import mean_and_error
from calibatt.tools.studies.study import DEFAULTS, METHODS, Study, make_study

DENSITIES = (0.2, 0.35, 0.5)
BASE = "defaults"

console = Console(stderr=True)


def one_density(study: Study) -> Callable[[float], Rule]:
    """Blocks of the compiler's order, but the same share of them in every head at every time."""

    def order(time_index: int, layer: int) -> torch.Tensor:
        unit = study.store.unit(time_index, layer)
        return torch.from_numpy(unit.effect_values() * unit.error_values()).sqrt()

    def at(density: float) -> Rule:
        times = study.store.manifest.times
        steps = [min(range(len(times)), key=lambda i: abs(times[i] - now)) for now in study.sampler.times]
        layers = range(study.bench.signature.layers)
        keep = [torch.stack([ladder(order(step, layer), (density,))[0] for layer in layers]) for step in steps]
        return Kept(study.bench, torch.stack(keep).to(study.bench.device))

    return at


def variants(study: Study) -> dict[str, Callable[[float], Rule]]:
    """Every change by name, each a function from the density."""

    def by(passes: str) -> Callable[[float], Rule]:
        return lambda density: study.compiled(density, passes)

    def method(name: str) -> Callable[[float], Rule]:
        return lambda density: METHODS[name](study, density)

    return {
        BASE: by(DEFAULTS),
        "no anchors": method("compiled, no anchors"),
        "anchors, rows alone": method("compiled, anchor rows alone"),
        "anchors, frames alone": method("compiled, anchor frames alone"),
        "no windows": by(DEFAULTS.replace("=D", "=D,menu=cuts")),
        "windows alone": by(DEFAULTS.replace("=D", "=D,menu=windows")),
        "no anchors, one density everywhere": one_density(study),
        "the paper's own method": method("the paper's own method"),
    }


def difference(base: Store, other: Store) -> str:
    """What another store differs in."""

    def told(store: Store) -> list[str]:
        vectors = sorted({str(meta.get("vectors")) for meta in store.meta.values()})
        blocks = store.manifest.blocks
        prompts = f"calibration prompts: {len(store.samplings)}"
        return [prompts, f"random vectors: {', '.join(vectors)}", f"blocks of {blocks.block_q} x {blocks.block_k}"]

    return ", ".join(mine for mine, theirs in zip(told(other), told(base), strict=True) if mine != theirs) or "again"


def table(result: dict[str, Any], title: str = "Ablations") -> str:
    """The result as Markdown: PSNR, and what each change does to it, paired by prompt."""
    rows = {(row["variant"], row["target"]): row for row in result["rows"]}
    targets = sorted({target for _, target in rows})
    names = list(dict.fromkeys(row["variant"] for row in result["rows"]))
    told = result["about"]
    lines = [
        f"# {title}",
        "",
        f"PSNR in dB against the dense video, {result['prompts']} held-out prompts; in brackets the change from the",
        "defaults, paired by prompt, with its standard error. Where a variant misses the density, it is named.",
        "",
        f"`{told['command']}`; {told['device']}, {told['versions']}, {told['date']}.",
        "",
        "| what changes | " + " | ".join(f"density {target:g}" for target in targets) + " |",
        "|---" * (len(targets) + 1) + "|",
    ]
    for name in names:
        cells = [_cell(rows.get((name, target)), rows.get((BASE, target)), target) for target in targets]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None, base: dict[str, Any] | None, target: float) -> str:
    if row is None:
        return "not judged"
    quality = mean_and_error(row["psnr"])
    text = f"{quality['mean']:.1f} ± {quality['standard_error']:.1f}"
    if base is not None and row is not base:
        change = mean_and_error([a - b for a, b in zip(row["psnr"], base["psnr"], strict=True)])
        text += f" ({change['mean']:+.1f} ± {change['standard_error']:.1f})"
    return text if abs(row["density"] - target) < 0.01 else f"{text} at {row['density']:.2f}"


@click.command(help=__doc__)
@click.option("--model", default="demo", show_default=True, help=MODEL_HELP)
@click.option("--stats", "stores", type=click.Path(path_type=Path), multiple=True, required=True)
@click.option("--held-out", type=click.Path(path_type=Path), help="One prompt a line; the demo model has its own.")
@click.option("--prompts", type=click.IntRange(1), default=64, show_default=True)
@click.option("--calibration", type=click.IntRange(1), default=16, show_default=True)
@click.option("--densities", default=",".join(map(str, DENSITIES)), show_default=True)
@click.option("--variants", "only", default="", help="Beginnings of names, separated by semicolons; all if absent.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True)
@click.option("--seconds", type=float, default=math.inf, help="Begin no run after so many seconds.")
@click.option("--device", default="auto", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="JSON to write or to continue.")
@click.option("--table", "markdown", type=click.Path(path_type=Path), help="Markdown to write.")
def main(
    model: str,
    stores: tuple[Path, ...],
    held_out: Path | None,
    prompts: int,
    calibration: int,
    densities: str,
    only: str,
    batch: int,
    seconds: float,
    device: str,
    output: Path,
    markdown: Path | None,
) -> None:
    began = time.perf_counter()
    result = json.loads(output.read_text("utf-8")) if output.exists() else {"rows": []}
    result["prompts"] = prompts
    done = {(row["variant"], row["target"]) for row in result["rows"]}

    def judge(study: Study, name: str, make: Callable[[float], Rule]) -> None:
        for target in map(float, densities.split(",")):
            if (name, target) in done or time.perf_counter() - began > seconds:
                continue
            try:
                rule = make(target)
            except ValueError as error:
                console.print(f"{name} @{target:g}: {error}", markup=False)
                continue
            found = study.bench.judge(rule)
            row = {"variant": name, "target": target, **{key: found[key] for key in ("density", "psnr", "latent")}}
            result["rows"].append(row)
            quality = mean_and_error(row["psnr"])
            seconds_now = time.perf_counter() - began
            console.print(f"{seconds_now:6.1f} s  {name} @{target:g}: {quality['mean']:.2f} dB", markup=False)
            write_text(output, json.dumps(result) + "\n")

    output.parent.mkdir(parents=True, exist_ok=True)
    for index, path in enumerate(stores):
        study = make_study(model, (path,), held_out, prompts, calibration, None, batch, device)
        result["about"] = about("python -m calibatt.tools.studies.ablations", study.sampler)
        if index == 0:
            begins = tuple(part.strip() for part in only.split(";"))
            every = variants(study)
            if unknown := [part for part in begins if not any(name.startswith(part) for name in every)]:
                raise click.UsageError(f"--variants must begin some of {'; '.join(every)}; got {unknown[0]!r}")
            for name, make in every.items():
                if name.startswith(begins):
                    judge(study, name, make)
        else:
            judge(study, difference(Store.open(stores[0]), study.store), study.compiled)
    write_text(output, json.dumps(result) + "\n")
    if markdown is not None:
        write_text(markdown, table(result))


if __name__ == "__main__":
    main()
