"""`calibatt-calibrate`: what every error of attention costs the final video, measured while a model samples prompts."""

from __future__ import annotations

import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console

from calibatt.compiler.stats import Manifest, Store, StoreError, StoreWriter
from calibatt.compiler.stats.files import require_outside
from calibatt.plans.command import Incomplete, one_line, told
from calibatt.plans.errors import legible
from calibatt.tools.calibrate import estimate
from calibatt.tools.calibrate.calibration import BACKWARD_COST, Calibrator, sampling_name
from calibatt.tools.calibrate.models import SMALL_TOKENS, make_sampler
from calibatt.tools.calibrate.pipeline import with_images
from calibatt.tools.calibrate.progress import steps as progress_of
from calibatt.tools.calibrate.ranks import RankLostError, Ranks
from calibatt.tools.calibrate.work import (
    MODEL_ERRORS,
    Work,
    check_sampler,
    default_vectors,
    device_memory,
    device_of,
    make_manifest,
    pick_device,
    plan_work,
    read_images,
)

NAME = "calibatt-calibrate"

LEAST_WITH_LADDER = 2
FEW = (
    "few samplings: each is judged by masks that earlier ones ordered; with fewer than {} a plan predicts no "
    "signal-to-noise"
)


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
    """The samplings that this rank measures: its share of those that are not finished.

    Raises:
        RankLostError: A rank has failed.
    """
    begun = sorted(path.name for path in (writer.path / "progress").iterdir())
    done, begun = ranks.from_first((writer.done(), begun))  # all must divide the same work
    todo = [each for each in work if sampling_name(*each) not in done]
    for name in set(begun) & set(done) if ranks.is_first else ():
        writer.drop_progress(name)  # left by a job that was killed after its last write
    begun = [name for name in begun if name not in done]
    if len(todo) < len(work):
        console.print(f"{len(work) - len(todo)} of {len(work)} samplings are done: skipped")
    for name in begun:
        again = any(sampling_name(*each) == name for each in todo)
        fate = "goes on where it stopped" if again else "left aside: not among these prompts"
        console.print(f"sampling {legible(name)} was interrupted: {fate}", markup=False, highlight=False)
    return ranks.share(todo)


def costs(calibrator: Calibrator, samplings: int, ranks: int, trial: estimate.Trial | None) -> str:
    """The table of costs that is shown before any work."""
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


def _who() -> str:
    """The name of the command, with the rank if there are several."""
    ranks = Ranks.of_environment()
    return f"{NAME}: rank {ranks.rank}" if ranks.count > 1 else NAME


@one_line(_who, StoreError, RankLostError, *MODEL_ERRORS)
@device_memory(
    "--inputs-on-cpu takes less, so does offloading (enable_model_cpu_offload, group offloading) or a smaller video"
)
def run(
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
    """Does what the options of `calibatt-calibrate` say; one line and an exit code for what goes wrong."""
    ranks = Ranks.of_environment()
    console = Console(stderr=True, quiet=not ranks.is_first)
    require_outside(output)
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
        table = costs(calibrator, samplings, ranks.count, trial)
        console.print(table, highlight=False, markup=False, soft_wrap=True)
        if writer.done() == () and samplings < ranks.count + LEAST_WITH_LADDER:
            console.print(FEW.format(ranks.count + LEAST_WITH_LADDER), highlight=False, markup=False, soft_wrap=True)
        if dry_run:
            return
        begun = time.perf_counter()
        forwards, pulled = estimate.forwards_of(calibrator)
        total = len(todo) * (forwards + pulled * BACKWARD_COST)
        with progress_of(NAME, total, console, quiet=not ranks.is_first) as shown_progress:
            calibrator.on_progress = shown_progress.advance
            for prompt, number in todo:
                calibrator.calibrate(prompt, number)
        measured = ranks.total(len(todo))
        if ranks.is_first:
            writer.close_units()
    if not ranks.is_first:
        return
    try:
        print(_summary(output, measured, time.perf_counter() - begun, device_of(sampler)), flush=True)
    except OSError as error:
        raise Incomplete(f"{output} holds all that was measured, but this could not be shown: {told(error)}") from None


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
