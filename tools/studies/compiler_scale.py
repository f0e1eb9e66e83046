"""The compiler at the size of Wan 14B: seconds, memory, bytes; on synthetic statistics.

    python -m calibatt.tools.studies.compiler_scale -o docs/benchmarks/compiler_scale.json

Writes a store (28 MB for each layer and time, whatever the number of samplings), compiles it as a user would, with
anchors and without, opens and proves the plans, and lowers every layer. What is said of the full model is the measured
part times 40 / layers.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
from rich.progress import track

from calibatt.compiler.language import DEFAULT_PASSES
from calibatt.compiler.stats import Store
from calibatt.plans import PlanFile
from calibatt.plans.files import write_text
from calibatt.tools.bench.options import count_option, output_option
from calibatt.tools.bench.record import typed
from calibatt.tools.studies.options import PATH, study_command
from calibatt.tools.studies.stores import sampling_counts
from calibatt.tools.studies.synthetic import SYNTHETIC, Synthetic, wan14b_manifest

NAME = "python -m calibatt.tools.studies.compiler_scale"
FULL_LAYERS, FULL_TIMES = 40, 50
PASSES = {"defaults": DEFAULT_PASSES, "no anchors": "select,schedule,lower"}
REPEATS = 3
"""On a machine that others use as well, the least of a few times says what the work takes."""


MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
found = {"wall_seconds": seconds, "processor_seconds": used.ru_utime + used.ru_stime}
print(json.dumps(found | {"peak_mb_of_the_largest_process": used.ru_maxrss * 1024 / 1e6}))
sys.exit(code)
"""
"""Runs one command from a small process of its own: the peak that Linux tells of children is the largest of all that a
process ever had, and at least the parent's memory."""


def run_measured(command: list[str]) -> dict[str, float]:
    """Seconds and memory of a command, processes it starts included.

    Raises:
        ValueError: It failed; what it says is on stderr.
    """
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{command[2]} ended with exit code {done.returncode}")
    return {name: round(value, 2) for name, value in json.loads(done.stdout).items()}


def lower_all(path: Path) -> dict:
    """Milliseconds to unpack and lower each layer, the least of `REPEATS` times.

    ``run``: in the order of a denoising run, from noise to clean, what was used last being kept. ``alone``: each layer
    with nothing kept, so that all that it is stored as a difference from is unpacked first.
    """
    plan = PlanFile.read(path)
    stored = plan.schedules
    units = [(segment, layer) for segment in reversed(range(len(plan.segments))) for layer in range(len(stored[0]))]
    found = {}
    for name, kept in (("run", True), ("alone", False)):
        least = np.full(len(units), np.inf)
        for _ in range(REPEATS):
            stored.forget()
            for index, unit in enumerate(units):
                if not kept:
                    stored.forget()
                start = time.perf_counter()
                stored.schedule(*unit).col_idx  # noqa: B018  # unpacks the lists
                least[index] = min(least[index], 1e3 * (time.perf_counter() - start))
        found |= {
            f"{name}_ms_median": round(float(np.median(least)), 1),
            f"{name}_ms_95_percent": round(float(np.quantile(least, 0.95)), 1),
            f"{name}_ms_most": round(float(least.max()), 1),
        }
    return found


OPEN = """
import json, sys, time
from calibatt.plans import PlanFile
memory = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
before, start = memory(), time.perf_counter()
plan = PlanFile.read(sys.argv[1])
opened = time.perf_counter()
plan.prove()
proved = time.perf_counter()
found = {"open_ms": 1e3 * (opened - start), "prove_ms": 1e3 * (proved - opened), "added_mb": memory() - before}
print(json.dumps({name: round(value, 1) for name, value in found.items()}))
"""


def open_plan(path: Path) -> dict:
    """What `runtime.load_plan` and calibatt-inspect take, in a process of their own."""
    opening = subprocess.run([sys.executable, "-c", OPEN, str(path)], check=True, capture_output=True, text=True)
    start = time.perf_counter()
    inspect = [sys.executable, "-m", "calibatt.tools.inspect_plan", str(path), "--json"]
    subprocess.run(inspect, check=True, stdout=subprocess.DEVNULL)
    return {**json.loads(opening.stdout), "inspect_seconds": round(time.perf_counter() - start, 2)}


@study_command(NAME, __doc__)
@SYNTHETIC
@count_option("--jobs", 1, "Processes of calibatt-compile.")
@click.option("--store", type=PATH, help="Use this store, or make and keep it; else a temporary.")
@click.option("--arguments", default="--target-density 0.3", show_default=True, help="For calibatt-compile.")
@output_option("JSON to write.", required=True)
def main(
    layers: int,
    times: int,
    samples: int,
    jobs: int,
    store: Path | None,
    arguments: str,
    output: Path,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stats = store or Path(folder) / "store"
        if not stats.exists():
            steps = iter(track(range(layers * times), "writing statistics"))
            Synthetic(wan14b_manifest(layers, times)).write(stats, samples, lambda: next(steps, None))
        opened = Store.open(stats)
        shape = opened.manifest
        units = len(shape.times) * shape.model.layers
        size = f"{len(opened.samplings)} samplings x {shape.model.layers} layers x {len(shape.times)} times x "
        size += f"{shape.model.heads} heads, {shape.q_blocks} x {shape.k_blocks} blocks"
        result = {
            "command": typed(NAME),
            "date": datetime.date.today().isoformat(),
            "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "numpy": np.__version__,
            "zstandard": version("zstandard"),
            "statistics": f"synthetic, {size}",
            "store": sampling_counts(opened),
        }
        for name, passes in PASSES.items():
            result[name] = measure(stats, Path(folder), units, ["--passes", passes, *arguments.split()], jobs)
    write_text(output, json.dumps(result, indent=1) + "\n")
    parts = ("compile", "times_smaller", "open", "lowering", "full_model")
    click.echo(json.dumps({name: {key: result[name][key] for key in parts} for name in PASSES}, indent=1))


def measure(store: Path, folder: Path, units: int, arguments: list[str], jobs: int) -> dict:
    """Compiles a few times, of which the least counts, and opens, proves and lowers the plan."""
    plan, report = folder / "bench.plan", folder / "report.json"
    command = [sys.executable, "-m", "calibatt.compiler.cli", str(store), "-o", str(plan), "--report", str(report)]
    costs = [run_measured([*command, "--force", *arguments, "--jobs", str(jobs)]) for _ in range(REPEATS)]
    cost = min(costs, key=lambda each: each["processor_seconds"])
    value, lowering, opening = json.loads(report.read_text()), lower_all(plan), open_plan(plan)
    per_unit = cost["processor_seconds"] / units
    whole = FULL_LAYERS * FULL_TIMES
    return {
        "compile": {
            **cost,
            "jobs": jobs,
            "processor_seconds_per_unit": round(per_unit, 3),
            "processor_seconds_of_each_run": [each["processor_seconds"] for each in costs],
        },
        "passes": [
            {key: each[key] for key in ("passes", "seconds", "blocks", "density", "plan_bytes", "predicted_ms")}
            for each in value["accounts"]
        ],
        "plan_bytes": value["file_bytes"],
        "plain_csr_bytes": value["plain_csr_bytes"],
        "times_smaller": round(value["plain_csr_bytes"] / value["file_bytes"], 1),
        "open": opening,
        "lowering": lowering,
        "full_model": {
            "plan_mb": round(whole * value["cost"]["file_bytes_a_unit"] / 1e6, 1),
            "processor_minutes": round(per_unit * whole / 60, 1),
            "open_and_prove_seconds": round((opening["open_ms"] + opening["prove_ms"]) * whole / units / 1e3, 1),
        },
    }


if __name__ == "__main__":
    main()
