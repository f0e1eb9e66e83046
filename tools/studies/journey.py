"""From a model to a judged plan, by the commands that a user types.

    calibatt-bench journey -o FILE.json

\b
Stages, on a model of `calibatt.tools.studies.structured`, whose attention has structure and whose weights are random:
  calibrate  calibatt-calibrate
  compile    calibatt-compile
  inspect    calibatt-inspect
  generate   held-out prompts, dense and with the plan attached, from the same noise: the error of the final latents
  evaluate   calibatt-evaluate on the same prompts
Each reports seconds, disk and device memory, and is written to the file as it ends. A latent's dB are
-10 log10(||planned - dense||^2 / ||dense||^2); the plan's header predicts them.

With --measure calibrate nothing but one sampling of --steps steps is calibrated, in this process: seconds of a forward,
of its differentiation and of the statistics, device memory, and what --to-samples of --to-steps will take.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from calibatt.compiler.stats import Store, StoreError, StoreWriter, Unit, neighbours, unit_shapes
from calibatt.plans import PlanFile
from calibatt.plans.command import one_line
from calibatt.plans.files import write_text
from calibatt.runtime import load_plan
from calibatt.tools.bench.forwards import Clock, allocated_bytes, peak_bytes, reset_peak
from calibatt.tools.bench.model import model_header, pick_layers
from calibatt.tools.bench.options import choose, count_option, device_option, output_option
from calibatt.tools.bench.record import OUT_OF_TIME, write_report
from calibatt.tools.calibrate.calibration import Calibrator
from calibatt.tools.calibrate.pipeline import PipelineSampler
from calibatt.tools.calibrate.work import MODEL_ERRORS, make_manifest
from calibatt.tools.inspect_plan.summary import heads_of
from calibatt.tools.studies.stores import sampling_counts
from calibatt.tools.studies.structured import SETTINGS, Setting

STAGES = ("calibrate", "compile", "inspect", "generate", "evaluate")
INPUTS = ("device", "cpu")
"""Where calibration may keep what enters the blocks of a forward."""
FIRST_SEED = 5000
"""Of the held-out prompts, as calibatt-evaluate has it."""
GB = 1e9
STORE, PLAN, HELD_OUT = "store", "journey.plan", "held_out.txt"
PEAK = re.compile(r"peak device memory ([0-9.]+) GB")
"""How a command tells its device memory."""


def folder_bytes(folder: Path) -> int:
    """Of all files below a folder, which others may be writing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


@contextmanager
def watched(folder: Path, every_s: float = 0.5) -> Iterator[dict[str, float]]:
    """What happens inside: ``seconds``, and the ``disk_gb`` of a folder at the end and at most (``disk_peak_gb``)."""
    found: dict[str, float] = {}
    peak, over, begun = folder_bytes(folder), threading.Event(), time.perf_counter()

    def watch() -> None:
        nonlocal peak
        while not over.wait(every_s):
            peak = max(peak, folder_bytes(folder))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        seconds = time.perf_counter() - begun
        over.set()
        thread.join()
        end = folder_bytes(folder)
        found |= {"seconds": seconds, "disk_gb": end / GB, "disk_peak_gb": max(peak, end) / GB}


def run_command(command: Sequence[str], clock: Clock, layers: int) -> dict[str, Any]:
    """Runs one of our commands as the user would, shows what it says, and ends it when time is over.

    Returns:
        ``exit_code``, and ``device_peak_gb`` where the command says it.
    """
    click.echo(f"$ python -m {shlex.join(command)}")
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "LAYERS": str(layers)},
    )  # fmt: skip
    timer = threading.Timer(min(max(clock.seconds - clock.spent, 0.0), threading.TIMEOUT_MAX), process.terminate)
    timer.start()
    found: dict[str, Any] = {}
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            click.echo(line, nl=False)
            if told := PEAK.search(line):
                found["device_peak_gb"] = float(told[1])
    timer.cancel()
    found["exit_code"] = process.returncode
    if process.returncode and not clock.allows():
        found["stopped"] = OUT_OF_TIME
    return found


def latent_db(squares: Sequence[float]) -> float | None:
    """Mean of the decibels of relative squared errors; None for no error at all, which JSON has no number for."""
    return float(np.mean([-10 * math.log10(each) for each in squares])) if all(squares) else None


def generate(
    sampler: PipelineSampler, plan: Path, prompts: Sequence[str], device: torch.device, clock: Clock
) -> dict[str, Any]:
    """Samples prompts dense and with the plan attached, from the same noise; one, and more while there is time."""
    loaded, rows, squares, spent = load_plan(plan), [], [], 0.0
    reset_peak(device)
    for index, prompt in enumerate(prompts):
        if rows and not clock.allows(1e3 * spent):
            click.echo(f"{OUT_OF_TIME} after {index} of {len(prompts)} prompts")
            break
        begun = time.perf_counter()
        dense = sampler.run(prompt, FIRST_SEED + index).double().cpu()
        middle = time.perf_counter()
        with loaded.attach(sampler.transformer):
            planned = sampler.run(prompt, FIRST_SEED + index).double().cpu()
        seconds = {"dense_s": middle - begun, "planned_s": time.perf_counter() - middle}
        spent = sum(seconds.values())
        squares.append(float((planned - dense).square().sum() / dense.square().sum()))
        rows.append({"prompt": prompt, "latent_db": latent_db(squares[-1:]), **seconds})
        click.echo(f"{prompt}: {rows[-1]}")
    peak = peak_bytes(device)
    memory = {} if peak is None else {"device_peak_gb": peak / GB}
    return {"exit_code": 0, "prompts": rows, "measured_latent_db": latent_db(squares), **memory}


def add_earlier_sampling(writer: StoreWriter) -> None:
    """Puts random numbers into the store, so that the masks of their order are measured, as in all but a first one."""
    manifest, drawn = writer.manifest, np.random.default_rng(0)
    shapes = unit_shapes(manifest).items()
    arrays = {key: drawn.exponential(size=shape).astype(np.float32) for key, shape in shapes if "peak" not in key}
    for key, count, radius in (
        ("row_effect", manifest.grid.height, manifest.row_radius),
        ("frame_effect", manifest.grid.frames, manifest.frame_radius),
    ):
        if key in arrays:
            arrays[key][:, ~neighbours(count, radius)] = np.nan
    for time_index in range(len(manifest.times)):
        for layer in range(manifest.model.layers):
            writer.add(time_index, layer, Unit.of("earlier", **arrays))


def measure_sampling(
    sampler: PipelineSampler, *, vectors: int, block_size: int | None, inputs: str, device: torch.device
) -> dict[str, Any]:
    """Calibrates one sampling of which only the first step is measured, and times its parts.

    Args:
        sampler: Of two steps at least.
        vectors: Random vectors.
        block_size: Tokens of a block; calibatt-calibrate's own if absent.
        inputs: Of `INPUTS`.
        device: Where the model is.

    Returns:
        Seconds of a forward and of its differentiation, the least of what ``all_seconds`` lists; what statistics add to
        them, a mean over the forwards of the step; of adding a time to the store. Device memory, bytes of a time.
    """
    steps, count = len(sampler.times), len(sampler.forwards)
    manifest = make_manifest(sampler, block_size=block_size, every=steps)
    stamps: list[float] = []

    def stamp(work: float = 0.0) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        stamps.append(time.perf_counter())
        if work:
            click.echo(f"{'forward' if work == 1 else 'differentiated'}: {stamps[-1] - stamps[-2]:.2f} s")

    with tempfile.TemporaryDirectory() as folder, StoreWriter.open(Path(folder), manifest) as writer:
        add_earlier_sampling(writer)
        calibrator = Calibrator(sampler, writer, vectors=vectors, inputs_on_cpu=inputs == "cpu", on_progress=stamp)
        weights = allocated_bytes(device)
        reset_peak(device)
        stamp()
        calibrator.calibrate("a prompt", 0)
        stamp()
        peak, disk = peak_bytes(device), folder_bytes(Path(folder, "units"))
        begun = time.perf_counter()
        writer.close_units()
        close_s, closed = time.perf_counter() - begun, folder_bytes(Path(folder, "units"))
    each = np.diff(stamps).tolist()
    first = 2 * count - count // steps  # the first step is differentiated last
    found = {"forward": each[:count], "backward": each[count:first], "measured": each[first:-1], "store": each[-1:]}
    forward, backward = min(found["forward"]), min(found["backward"])
    return {
        "inputs": inputs, "steps": steps, "forwards_a_step": count // steps, "vectors": vectors,
        "block": manifest.blocks.block_q, "grid": str(sampler.grid), "tokens": sampler.grid.tokens,
        "forward_s": forward,
        "backward_s": backward,
        "statistics_s": max(float(np.mean(found["measured"])) - backward, 0.0),
        "store_s": each[-1],
        "close_s": close_s, "all_seconds": found, "disk_open_bytes": disk, "disk_closed_bytes": closed,
        **({} if peak is None else {"device_peak_gb": peak / GB, "device_weights_gb": weights / GB}),
    }  # fmt: skip


def extrapolated(measured: dict[str, Any], samples: int, steps: int) -> dict[str, Any]:
    """What so many samplings take, all of their steps measured."""
    forwards = samples * steps * measured["forwards_a_step"]
    seconds = {f"{part}_s": forwards * measured[f"{part}_s"] for part in ("forward", "backward", "statistics")}
    seconds |= {"store_s": samples * steps * measured["store_s"], "close_s": steps * measured["close_s"]}
    disk = {f"disk_{kind}_gb": steps * measured[f"disk_{kind}_bytes"] / GB for kind in ("open", "closed")}
    return {"samples": samples, "steps": steps, "hours": sum(seconds.values()) / 3600, **seconds, **disk}


def commands(name: str, device: torch.device, folder: Path, options: dict[str, Any]) -> dict[str, list[str]]:
    """Of each stage that is a command: its module and what a user types; their files are in a folder."""
    store, plan, held_out = (str(folder / file) for file in (STORE, PLAN, HELD_OUT))
    common = ["--model", f"calibatt.tools.studies.structured:{name}", "--device", str(device)]
    given = [(key, options[key]) for key in ("steps", "samples", "times", "vectors", "block_size") if options[key]]
    calibrate = [text for key, value in given for text in (f"--{key.replace('_', '-')}", str(value))]
    if options["inputs"]:
        calibrate.append(f"--inputs-on-{options['inputs'].split(',')[0]}")
    steps = ["--steps", str(options["generate_steps"])] if options["generate_steps"] else []
    return {
        "calibrate": ["calibatt.tools.calibrate", *common, "-o", store, *calibrate],
        "compile": ["calibatt.compiler.cli", store, "-o", plan, "--force", *shlex.split(options["compile_options"])],
        "inspect": ["calibatt.tools.inspect_plan", plan],
        "evaluate": [
            "calibatt.tools.evaluate", *common, "--plan", plan, "--prompts", held_out, *steps,
            "-o", str(folder / "evaluation"),
        ],
    }  # fmt: skip


def store_facts(path: Path) -> dict[str, Any]:
    """What the statistics were made of, so far; empty where no sampling is finished."""
    try:
        return {"store": sampling_counts(Store.open(path))}
    except StoreError:
        return {}


def plan_facts(path: Path) -> dict[str, Any]:
    """What a plan is, and what it promises."""
    plan = PlanFile.read(path)
    return {
        "plan_gb": path.stat().st_size / GB,
        "segments": len(plan.segments),
        "density": float(np.average(heads_of(plan).densities.mean((1, 2)), weights=plan.steps)),
        "predicted_latent_db": plan.predicted.get("latent_db"),
    }


@click.command(help=__doc__)
@click.option("--model", "name", type=click.Choice(list(SETTINGS)), default="wan_14b_480p", show_default=True)
@click.option("--layers", type=click.IntRange(1), envvar="LAYERS", help="Fewer layers than the model has [all].")
@click.option("--stages", help=f"Of {','.join(STAGES)} [all]; earlier ones may be in --work.")
@click.option("--measure", type=click.Choice(["calibrate"]), help="Only this, in this process, from a few steps.")
@count_option("--steps", None, "Of calibration [the model's own; 2 with --measure].")
@count_option("--samples", 8, "Prompts to calibrate on.")
@count_option("--times", None, "Steps to measure [calibatt-calibrate's own].")
@count_option("--vectors", None, "Random vectors [calibatt-calibrate's own; 1 with --measure].")
@click.option("--block-size", type=int, help="Tokens of a block [calibatt-calibrate's own].")
@click.option("--inputs", help="Of device,cpu: where calibration keeps inputs of blocks; --measure takes both in turn.")
@click.option("--compile-options", default="", help="More for calibatt-compile, as one text.")
@count_option("--held-out", 2, "Prompts to judge the plan on.")
@count_option("--generate-steps", None, "Of generating and evaluating [the model's own].")
@count_option("--to-samples", 8, "Of --measure.")
@count_option("--to-steps", 15, "Of --measure.")
@click.option("--seconds", type=float, default=float("inf"), help="Stop then; --work can be gone on with.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder of store and plan [a temporary one].")
@device_option()
@output_option("JSON to write after every stage.")
@one_line("calibatt-bench journey", *MODEL_ERRORS)
def main(
    name: str,
    layers: int | None,
    stages: str | None,
    measure: str | None,
    seconds: float,
    work: Path | None,
    device: torch.device,
    output: Path | None,
    **options: Any,
) -> None:
    clock, setting = Clock(seconds), SETTINGS[name]
    chosen = choose(stages, STAGES, "--stages")
    count = pick_layers(layers, setting.row)
    places = choose(options["inputs"] or "device", INPUTS, "--inputs")
    report = model_header("calibatt-bench journey", setting.row, name, count, device)
    report |= {"height": setting.height, "width": setting.width, "frames": setting.frames, "guidance": setting.guidance}
    report["weights"] = "random, seed 0; attention has structure"
    if measure:
        for record in _measured(setting, count, places, options, device, clock):
            report.setdefault(measure, []).append(record)
            click.echo(json.dumps(record, indent=1))
            write_report(output, report)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        prompts = [f"held-out prompt {index}" for index in range(options["held_out"])]
        write_text(folder / HELD_OUT, "\n".join(prompts) + "\n")
        lines = commands(name, device, folder, options)
        report["stages"] = []
        for stage in (stage for stage in STAGES if stage in chosen):
            if not clock.allows():
                report["stages"].append({"stage": stage, "stopped": OUT_OF_TIME})
                break
            with watched(folder) as facts:
                if stage == "generate":
                    sampler = setting.sampler(options["generate_steps"], str(device), count)
                    found = generate(sampler, folder / PLAN, prompts, device, clock)
                    del sampler
                else:
                    found = run_command(lines[stage], clock, count)
            if stage in ("calibrate", "compile"):
                found |= store_facts(folder / STORE)
            if stage == "compile" and not found["exit_code"]:
                found |= plan_facts(folder / PLAN)
            _let_go(device)
            report["stages"].append({"stage": stage, **facts, **found})
            click.echo(json.dumps(report["stages"][-1]))
            write_report(output, report)
            if found["exit_code"]:
                break
    write_report(output, report)
    if any(record.get("exit_code") or "stopped" in record for record in report["stages"]):
        raise SystemExit(1)


def _measured(
    setting: Setting, layers: int, kinds: list[str], options: dict[str, Any], device: torch.device, clock: Clock
) -> Iterator[dict[str, Any]]:
    """Records of `measure_sampling` and what follows, for each place of inputs that there is time for."""
    steps = options["steps"] or 2
    if steps < 2:
        raise click.UsageError("--steps must be at least 2 with --measure: one is measured, the others are not")
    size = {"vectors": options["vectors"] or 1, "block_size": options["block_size"], "device": device}
    if device.type == "cuda":  # one layer, so that kernels are compiled before anything is timed
        measure_sampling(setting.sampler(steps, str(device), 1), inputs=kinds[0], **size)
        _let_go(device)
    begun = time.perf_counter()
    sampler = setting.sampler(steps, str(device), layers)
    made_s = time.perf_counter() - begun
    click.echo(f"made the model in {made_s:.1f} s")
    spent = 0.0
    for inputs in kinds:
        if not clock.allows(1e3 * spent):
            yield {"inputs": inputs, "stopped": OUT_OF_TIME}
            continue
        begun = time.perf_counter()
        try:
            found = measure_sampling(sampler, inputs=inputs, **size)
        except torch.cuda.OutOfMemoryError:
            found = None
        spent = time.perf_counter() - begun
        _let_go(device)
        if found is None:
            yield {"inputs": inputs, "stopped": "out of device memory"}
        else:
            whole = extrapolated(found, options["to_samples"], options["to_steps"])
            yield {**found, "made_s": made_s, "seconds": spent, "extrapolated": whole}


def _let_go(device: torch.device) -> None:
    """Frees device memory for the next stage, which may be a process of its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
