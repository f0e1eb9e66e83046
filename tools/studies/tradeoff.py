"""Quality against work on the demo model: the trivial compiler and ours, on held-out prompts.

    python -m calibatt.tools.studies.tradeoff STATS -o docs/benchmarks/demo_tradeoff.json

The trivial compiler is the paper's own method: it keeps the blocks that half of the samples agree on, and repeats rows
that differ little (``vote{threshold=T},repeat,lower``), for every threshold of the store; record some with
`calibatt-calibrate --thresholds`. Ours is the default pipeline at a list of densities. Every video is compared with the
dense one of the same prompt and noise. Between measured points PSNR is linear in density.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import click
import numpy as np
from rich.progress import track

from calibatt.compiler.stats import Store
from calibatt.plans.files import write_text
from calibatt.runtime import Plan, load_plan
from calibatt.tools.demo import measure
from calibatt.tools.demo_model.model import DemoModel, generate
from calibatt.tools.evaluate.harness import about, executed_density

FIRST_SEED = 5000
DENSITIES = "0.15,0.2,0.25,0.3,0.35,0.4,0.5,0.6"
AT_PSNR_DB = (25.0, 30.0, 35.0)
AT_DENSITY = (0.35, 0.5)
TRIVIAL = "vote{threshold=%g},repeat,lower"


def compiled(stats: Path, target: Path, arguments: Iterable[str]) -> Plan:
    """The plan of `calibatt-compile` with these arguments."""
    command = [sys.executable, "-m", "calibatt.compiler.cli", str(stats), "-o", str(target), "--force", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return load_plan(target)


def density_at(points: list[dict], psnr_db: float) -> float | None:
    """Density at which a curve reaches a PSNR; None outside of what was measured."""
    found = sorted((point["density"], point["psnr_db"]) for point in points)
    density, psnr = (np.array(part) for part in zip(*found, strict=True))
    if not psnr.min() <= psnr_db <= psnr.max():
        return None
    after = int(np.argmax(psnr >= psnr_db))
    span = slice(max(0, after - 1), after + 1)
    return float(np.interp(psnr_db, psnr[span], density[span]))


def psnr_at(points: list[dict], density: float) -> float | None:
    """PSNR of a curve at a density; None outside of what was measured."""
    found = sorted((point["density"], point["psnr_db"]) for point in points)
    densities, psnr = zip(*found, strict=True)
    if not densities[0] <= density <= densities[-1]:
        return None
    return float(np.interp(density, densities, psnr))


def compare(trivial: list[dict], ours: list[dict]) -> dict:
    """Work saved at equal PSNR, and dB gained at equal density."""
    found: dict[str, dict] = {"at_psnr_db": {}, "at_density": {}}
    for psnr in AT_PSNR_DB:
        theirs, mine = density_at(trivial, psnr), density_at(ours, psnr)
        saved = None if theirs is None or mine is None else round(1 - mine / theirs, 4)
        found["at_psnr_db"][psnr] = {"trivial_density": theirs, "density": mine, "less_work": saved}
    for density in AT_DENSITY:
        theirs, mine = psnr_at(trivial, density), psnr_at(ours, density)
        gained = None if theirs is None or mine is None else round(mine - theirs, 2)
        found["at_density"][density] = {"trivial_psnr_db": theirs, "psnr_db": mine, "gained_db": gained}
    return found


@click.command(help=__doc__)
@click.argument("stats", type=click.Path(exists=True, path_type=Path))
@click.option("--densities", default=DENSITIES, show_default=True)
@click.option("--arguments", default="", help="More arguments for calibatt-compile, for ours only.")
@click.option("--trivial/--no-trivial", default=True, help="Measure the trivial compiler as well.")
@click.option("--prompts", type=click.IntRange(1), default=32, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Videos generated at once.")
@click.option("--device", default="cpu", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
def main(
    stats: Path, densities: str, arguments: str, trivial: bool, prompts: int, batch: int, device: str, output: Path
) -> None:
    model, held_out = DemoModel.load(device=device), measure.held_out_prompts(prompts)
    seeds = list(range(FIRST_SEED, FIRST_SEED + prompts))
    groups = [slice(start, start + batch) for start in range(0, prompts, batch)]
    dense = [generate(model, held_out[group], seeds[group]) for group in track(groups, "dense")]

    def point(name: str, plan: Plan) -> dict:
        found: list[float] = []
        with plan.attach(model.transformer):
            for group, reference in zip(groups, dense, strict=True):
                found += measure.psnr_db(generate(model, held_out[group], seeds[group]), reference).tolist()
        error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
        density = executed_density(plan, model.times()[:-1].tolist())
        result = {"density": round(density, 4), "psnr_db": round(statistics.mean(found), 2), "error": round(error, 2)}
        click.echo(f"{name}: {result}")
        return {"name": name, **result, "psnr_db_by_prompt": [round(value, 2) for value in found]}

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "plan.plan"
        baseline = [
            point(f"trivial {level:g}", compiled(stats, target, ["--passes", TRIVIAL % level]))
            for level in (Store.open(stats).manifest.thresholds if trivial else ())
        ]
        ours = [
            point(f"ours {each}", compiled(stats, target, ["--target-density", each, *arguments.split()]))
            for each in densities.split(",")
        ]
    result = {
        **about("python -m calibatt.tools.studies.tradeoff", model),
        "prompts": prompts,
        "compared": compare(baseline, ours) if baseline else None,
        "trivial": baseline,
        "ours": ours,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, json.dumps(result, indent=1) + "\n")
    click.echo(json.dumps(result["compared"], indent=1))


if __name__ == "__main__":
    main()
