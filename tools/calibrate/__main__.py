"""`calibatt-calibrate`: what every error of attention costs the final video, measured while a model samples prompts."""

from __future__ import annotations

import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import click
import torch
from rich.console import Console

from calibatt.compiler.stats import Manifest, Store, StoreError, StoreWriter
from calibatt.plans import BLOCK_SIZES, PlanError
from calibatt.runtime.adapters import UnknownModelError
from calibatt.tools.calibrate import estimate
from calibatt.tools.calibrate.calibration import BACKWARD_COST, CalibrationError, Calibrator, sampling_name
from calibatt.tools.calibrate.chain import ChainError
from calibatt.tools.calibrate.checks import CheckError
from calibatt.tools.calibrate.models import MODEL_HELP, make_sampler
from calibatt.tools.calibrate.pipeline import PipelineError, with_images
from calibatt.tools.calibrate.progress import steps as progress_of
from calibatt.tools.calibrate.ranks import RankLostError, Ranks
from calibatt.tools.calibrate.work import (
    DEFAULT_SAMPLES,
    MOST_TIMES,
    SMALL_TOKENS,
    Work,
    check_sampler,
    default_vectors,
    device_of,
    make_manifest,
    pick_device,
    plan_work,
    read_images,
)

NAME = "calibatt-calibrate"
ERRORS = (
    StoreError,
    PlanError,
    UnknownModelError,
    CalibrationError,
    ChainError,
    CheckError,
    PipelineError,
    RankLostError,
    OSError,
    ValueError,
)

LEAST_WITH_LADDER = 2
FEW = (
    "few samplings: each is judged by masks that earlier ones ordered; with fewer than {} a plan predicts no "
    "signal-to-noise"
)

EPILOG = """\b
Examples:
  calibatt-calibrate -o stats/
  calibatt-calibrate --model my_wan:sampler --steps 15 --dry-run -o stats/
  calibatt-calibrate --model my_wan:sampler --steps 15 --samples 8 -o stats/
  calibatt-calibrate --model my_wan:sampler --prompts prompts.txt -o stats/
  torchrun --nproc-per-node 8 -m calibatt.tools.calibrate --model my_wan:sampler --steps 15 -o stats/
  calibatt-compile stats/ -o plans/mine.plan

\b
How to get cheaper: fewer --samples (8 are good, 4 are usable), fewer --steps than you will sample with later (a plan
is keyed by denoising time, so a schedule of 15 steps serves one of 50), fewer --times.

Exit codes: 0 all is measured; 1 stopped, run it again to continue; 2 the call, the model or the store is wrong.
"""


def open_store(path: Path, manifest: Manifest, ranks: Ranks) -> StoreWriter:
    """The one store that all ranks write, each its own samplings.

    Raises:
        StoreError: It cannot be continued with this manifest, or another job has it open.
        RankLostError: A rank has failed.
    """
    writer = StoreWriter.open(path, manifest) if ranks.is_first else None
    ranks.wait()
    return writer or StoreWriter.join(path, manifest)


def outstanding(writer: StoreWriter, work: Work, ranks: Ranks, console: Console) -> Work:
    """What this rank measures: its part of the samplings that are not finished.

    Raises:
        RankLostError: A rank has failed.
    """
    begun = sorted(path.name for path in (writer.path / "progress").iterdir())
    done, begun = ranks.from_first((writer.done(), begun))  # all must divide the same work
    todo = [each for each in work if sampling_name(*each) not in done]
    for name in set(begun) & set(done) if ranks.is_first else ():
        writer.drop_progress(name)  # a job that was killed after the last write
    begun = [name for name in begun if name not in done]
    if len(todo) < len(work):
        console.print(f"{len(work) - len(todo)} of {len(work)} samplings are done: skipped")
    for name in begun:
        again = any(sampling_name(*each) == name for each in todo)
        fate = "goes on where it stopped" if again else "left aside: not among these prompts"
        console.print(f"sampling {name} was interrupted: {fate}")
    return ranks.share(todo)


def costs(calibrator: Calibrator, samplings: int, ranks: int, trial: estimate.Trial | None) -> str:
    """The table that is shown before any work of so many samplings by so many ranks."""
    sampler, manifest = calibrator.sampler, calibrator.manifest
    model, grid, device = manifest.model, manifest.grid, device_of(sampler)
    forwards, pulled = estimate.forwards_of(calibrator)
    latent = grid.tokens * 256  # patches of 1 x 2 x 2 with 16 channels in float32
    disk = estimate.disk_bytes(manifest, samplings, forwards, calibrator.vectors, latent)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rows = [
        ("model", f"{model.architecture}, {model.layers} layers x {model.heads} heads x {model.head_dim}"),
        (
            "tokens",
            f"{grid.tokens:,}: {grid.frames} x {grid.height} x {grid.width}, blocks of {manifest.blocks.block_q}",
        ),
        (
            "samplings",
            f"{samplings} of {len(sampler.times)} steps, {forwards} forwards; {len(manifest.times)} times measured",
        ),
        ("differentiated", f"{samplings * pulled} forwards, {calibrator.vectors} random vectors each"),
        ("device", where),
        ("disk", f"{disk.finished / estimate.GB:.2f} GB when finished, {disk.peak / estimate.GB:.2f} GB at most"),
    ]
    if trial is not None:
        hours = trial.hours(forwards, pulled, -(-samplings // ranks))
        seconds = f"{trial.forward_seconds:.2f} s a forward, {trial.pull_seconds:.2f} s to differentiate it"
        rows.append(("time", f"{hours:.2f} hours ({seconds}; attention by {trial.kernels})"))
        if trial.peak_bytes:
            kept = "the CPU" if calibrator.transformer.inputs_on_cpu else "the device"
            rows.append(("device memory", f"{trial.peak_bytes / estimate.GB:.1f} GB, inputs of blocks on {kept}"))
    rows.append(("to get cheaper", "fewer --samples, --steps or --times; --help says what that costs"))
    return estimate.table(rows)


@click.command(name=NAME, epilog=EPILOG)
@click.option("--model", default="demo", show_default=True, help=MODEL_HELP)
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="One prompt a line [ours; the demo model has its own]."
)
@click.option("--images", type=click.Path(path_type=Path), help="One image path a line, beside the prompts.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Store to create or continue.")
@click.option("--samples", type=click.IntRange(1), help=f"Prompts to sample [all of the file, or {DEFAULT_SAMPLES}].")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the first prompt; +1 for each.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps [the model's own].")
@click.option("--times", type=click.IntRange(1), help=f"Steps to measure, evenly spread [all, at most {MOST_TIMES}].")
@click.option("--every", type=click.IntRange(1), help="Measure every n-th step, instead of --times.")
@click.option("--vectors", type=click.IntRange(1), help="Random vectors for each sampling [1; 8 on a GPU if small].")
@click.option(
    "--block-size",
    type=click.Choice([str(size) for size in BLOCK_SIZES if size <= 128]),
    help=f"Tokens of a block [128 on a GPU for more than {SMALL_TOKENS} tokens, else 64].",
)
@click.option(
    "--thresholds", help="Also count the blocks that hold these shares of the mass: for the paper's own method."
)
@click.option(
    "--inputs-on-cpu/--inputs-on-device",
    default=None,
    help="Where what enters the blocks of a forward is kept [the CPU if the device would be full].",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto: cuda where there is one.")
@click.option("--dry-run", is_flag=True, help="Time two steps, say what all will cost, and stop.")
def main(
    model: str,
    prompts: Path | None,
    images: Path | None,
    output: Path,
    samples: int | None,
    seed: int,
    steps: int | None,
    times: int | None,
    every: int | None,
    vectors: int | None,
    block_size: str | None,
    thresholds: str | None,
    inputs_on_cpu: bool | None,
    device: str,
    dry_run: bool,
) -> None:
    """Measures what every error of attention costs the final video; the result is what calibatt-compile reads.

    Every prompt is sampled once, as ever, and then differentiated, last step first: what dropping a block of keys for a
    block of queries changes in the final latent, what every window and every copied row or frame does, for each layer,
    head and denoising time at once. Scheduler, guidance, LoRA, quantised weights and offloading are as in use.

    A sampling takes about as long as seven of it, whatever the number of layers and heads; with --vectors V the part
    after the sampling itself takes V times as long. Step caches and torch.compile must be off; attention kernels are
    our own here. Disk does not grow with the number of prompts.

    Run it again to continue where it stopped: finished samplings are skipped, and of one in progress at most the step
    in progress is lost. Stores made on several machines with one set of options are given to calibatt-compile together.

    Started by torchrun, every process has a GPU and samples its part of the prompts; all write one store, and where one
    fails all end.
    """
    ranks = Ranks.of_environment()
    console = Console(stderr=True, quiet=not ranks.is_first)
    try:
        work = plan_work(model, prompts, samples, seed)
        sampler = make_sampler(model, steps, ranks.own_device(pick_device(device)))
        if images is not None:
            with_images(sampler, read_images(images, [prompt for prompt, _ in work]))
        sampler.check([prompt for prompt, _ in work])
        size = None if block_size is None else int(block_size)
        manifest = make_manifest(
            sampler, block_size=size, times=times, every=every, thresholds=_numbers("--thresholds", thresholds)
        )
        check_sampler(sampler)
        vectors = vectors or default_vectors(sampler.grid, device_of(sampler))
        begun = time.perf_counter()
        if dry_run and not ranks.is_first:
            return
        with (
            tempfile.TemporaryDirectory() as scratch,
            nullcontext() if dry_run else ranks,
            open_store(Path(scratch), manifest, Ranks()) if dry_run else open_store(output, manifest, ranks) as writer,
        ):
            todo = work if dry_run else outstanding(writer, work, ranks, console)
            calibrator = Calibrator(sampler, writer, vectors=vectors)
            calibrator.keep_inputs(on_cpu=estimate.wants_cpu(calibrator) if inputs_on_cpu is None else inputs_on_cpu)
            large = sampler.grid.tokens > SMALL_TOKENS
            trial = estimate.trial(calibrator, *work[0]) if dry_run or (todo and large) else None
            samplings = len(todo) if dry_run else ranks.total(len(todo))
            told = costs(calibrator, samplings, ranks.count, trial)
            console.print(told, highlight=False, markup=False, soft_wrap=True)
            if writer.done() == () and samplings < ranks.count + LEAST_WITH_LADDER:
                console.print(
                    FEW.format(ranks.count + LEAST_WITH_LADDER), highlight=False, markup=False, soft_wrap=True
                )
            if dry_run:
                return
            forwards, pulled = estimate.forwards_of(calibrator)
            total = len(todo) * (forwards + pulled * BACKWARD_COST)
            with progress_of(NAME, total, console, quiet=not ranks.is_first) as shown_progress:
                calibrator.on_progress = shown_progress.advance
                for prompt, number in todo:
                    calibrator.calibrate(prompt, number, steps=len(sampler.times))
            measured = ranks.total(len(todo))
            if ranks.is_first:
                writer.close_units()
        if ranks.is_first:
            click.echo(_summary(output, measured, time.perf_counter() - begun, device_of(sampler)))
    except torch.cuda.OutOfMemoryError:
        _fail(
            MemoryError(
                "device memory must suffice, got too little; --inputs-on-cpu takes less, so does offloading "
                "(enable_model_cpu_offload, group offloading) or a smaller video"
            ),
            ranks,
        )
    except ERRORS as error:
        _fail(error, ranks)


def _numbers(option: str, text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        return tuple(sorted(map(float, text.split(","))))
    except ValueError:
        raise ValueError(f"{option} must be numbers joined by commas, got {text!r}") from None


def _summary(path: Path, measured: int, seconds: float, device: torch.device) -> str:
    store = Store.open(path)
    size = store.size_bytes / 2**20
    lines = [f"{path}: {len(store.samplings)} samplings, {size:.1f} MiB; {measured} measured now, {seconds:.1f} s"]
    if device.type == "cuda":
        lines.append(f"peak device memory {torch.cuda.max_memory_allocated(device) / estimate.GB:.1f} GB")
    levels = store.table().time_level
    lines.append(
        "squared effects of single blocks, from clean to noise: " + " ".join(f"{value:.2g}" for value in levels)
    )
    return "\n".join(lines)


def _fail(error: Exception, ranks: Ranks) -> NoReturn:
    """One line for the user, exit code 2."""
    told = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    who = f"{NAME}: rank {ranks.rank}" if ranks.count > 1 else NAME
    click.echo(f"{who}: {' '.join(told.split())}", err=True)
    raise SystemExit(2)


if __name__ == "__main__":
    main(prog_name=NAME)
