"""The compiler at the size of Wan 14B: seconds, memory, bytes; on synthetic statistics.

    python -m calibatt.tools.bench.compiler -o docs/benchmarks/compiler.json

Writes a store (21 MB for each sample, layer and time), compiles it as a user would, opens the plan and lowers every
layer in the order of a denoising run. What is said of the full model is the measured part times 40 / layers.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
from rich.progress import track

from calibatt.plans import PlanFile, StoredLayers
from calibatt.tools.bench.synthetic import Synthetic, wan14b_manifest

FULL_LAYERS = 40


def compile_once(store: Path, plan: Path, report: Path, arguments: list[str]) -> dict:
    """Seconds and memory of one `calibatt-compile`, processes it starts included."""
    command = [sys.executable, "-m", "calibatt.compiler.cli", str(store), "-o", str(plan), "--report", str(report)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*command, "--force", *arguments], check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall_seconds": round(seconds, 2),
        "processor_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "peak_mb_of_the_largest_process": round(after.ru_maxrss / 1000, 1),
    }


def lower_all(path: Path) -> dict:
    """Milliseconds to open a plan, and to unpack and lower each layer, segments from noise to clean."""
    start = time.perf_counter()
    plan = PlanFile.read(path)
    opened = time.perf_counter() - start
    stored = plan.schedules
    assert isinstance(stored, StoredLayers)
    found = []
    for segment in reversed(range(len(plan.segments))):
        for layer in range(plan.signature.layers):
            start = time.perf_counter()
            stored.packed(segment, layer).schedule()
            found.append(1e3 * (time.perf_counter() - start))
    return {
        "open_ms": round(1e3 * opened, 1),
        "lower_ms_median": round(statistics.median(found), 1),
        "lower_ms_95_percent": round(float(np.quantile(found, 0.95)), 1),
        "lower_ms_most": round(max(found), 1),
    }


@click.command(help=__doc__)
@click.option("--layers", type=click.IntRange(1), default=4, show_default=True)
@click.option("--times", type=click.IntRange(1), default=50, show_default=True)
@click.option("--samples", type=click.IntRange(1), default=8, show_default=True)
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True)
@click.option("--store", type=click.Path(path_type=Path), help="Use this store, or make and keep it; else a temporary.")
@click.option("--arguments", default="--target-density 0.3", show_default=True, help="For calibatt-compile.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
def main(layers: int, times: int, samples: int, jobs: int, store: Path | None, arguments: str, output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stats = store or Path(folder) / "store"
        if not stats.exists():
            steps = iter(track(range(layers * times), "writing statistics"))
            Synthetic(wan14b_manifest(layers, times)).write(stats, samples, lambda: next(steps, None))
        plan, report = Path(folder) / "bench.plan", Path(folder) / "report.json"
        cost = compile_once(stats, plan, report, [*arguments.split(), "--jobs", str(jobs)])
        value, lowering = json.loads(report.read_text()), lower_all(plan)
    if store is None:
        shutil.rmtree(stats, ignore_errors=True)
    units = layers * times
    per_unit = cost["processor_seconds"] / units
    scale = FULL_LAYERS * 50 / units
    result = {
        "command": " ".join(["python -m calibatt.tools.bench.compiler", *sys.argv[1:]]).replace(str(store), "STORE"),
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "zstandard": version("zstandard"),
        "statistics": f"synthetic, {samples} samples x {layers} layers x {times} times x 40 heads, 591 x 591 blocks",
        "compile": {**cost, "jobs": jobs, "processor_seconds_per_unit": round(per_unit, 3)},
        "passes": [
            {key: each[key] for key in ("passes", "seconds", "blocks", "density", "plan_bytes", "predicted_ms")}
            for each in value["accounts"]
        ],
        "plan_bytes": value["file_bytes"],
        "plain_csr_bytes": value["plain_csr_bytes"],
        "times_smaller": round(value["plain_csr_bytes"] / value["file_bytes"], 1),
        "lowering": lowering,
        "full_model": {
            "plan_mb": round(value["file_bytes"] * scale / 1e6, 1),
            "processor_minutes": round(per_unit * FULL_LAYERS * 50 / 60, 1),
        },
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(
        json.dumps({key: result[key] for key in ("compile", "times_smaller", "lowering", "full_model")}, indent=1)
    )


if __name__ == "__main__":
    main()
