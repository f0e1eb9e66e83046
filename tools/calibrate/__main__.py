"""`calibatt-calibrate`: measures a model's attention while it samples prompts, and probes what errors cost when."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from calibatt.compiler.stats import (
    DEFAULT_THRESHOLDS,
    Ladders,
    Manifest,
    Store,
    StoreError,
    StoreWriter,
    default_windows,
)
from calibatt.compiler.stats.refinement import DEFAULT_KINDS, DEFAULT_SHARES, KINDS
from calibatt.plans import BLOCK_SIZES, Blocks, PlanError
from calibatt.runtime.adapters import UnknownModelError, adapter_for
from calibatt.tools.calibrate.listen import ListenError
from calibatt.tools.calibrate.models import MODEL_HELP, PROMPTS, default_prompts, make_sampler
from calibatt.tools.calibrate.probing import FINAL, STEP, Trajectory
from calibatt.tools.calibrate.ranks import RankLostError, Ranks
from calibatt.tools.calibrate.recorder import Measure, Recorder, nearest_step, sample_name
from calibatt.tools.calibrate.refining import QUERY_BLOCKS, Refiner
from calibatt.tools.calibrate.sampler import Sampler
from calibatt.tools.calibrate.statistics import unit_statistics

NAME = "calibatt-calibrate"
DEFAULT_SAMPLES = 8
ROW_RADIUS, FRAME_RADIUS = 3, 4
PROBE_THRESHOLD = 0.8
"""Probes drop what the keep plane of the threshold nearest to this drops."""

Work = list[tuple[str, int]]
"""Prompts and their seeds."""


def make_manifest(
    sampler: Sampler,
    *,
    block_size: int = 64,
    times: int | None = None,
    every: int | None = None,
    mass: bool = False,
    query_stride: int = 1,
    thresholds: tuple[float, ...] = DEFAULT_THRESHOLDS,
) -> Manifest:
    """What to measure of a sampler's model.

    Args:
        sampler: The sampler.
        block_size: Tokens per query and per key block.
        times: How many of the steps are recorded, evenly spread from the first to the last; all if absent.
        every: In place of `times`: record every so many steps, from the first one on.
        mass: Also keep the block mass.
        query_stride: Measure every `query_stride`-th query of a block.
        thresholds: Mass that each keep plane reaches, ascending.

    Returns:
        Its manifest.

    Raises:
        ListenError: There are not so many steps, or both ways to choose them are used.
        StoreError: A value breaks its rule.
        UnknownModelError: No adapter fits the model.
    """
    count = len(sampler.times) if times is None else times
    if count > len(sampler.times):
        raise ListenError(f"the number of recorded times must be at most {len(sampler.times)} steps, got {count}")
    if times is not None and every is not None:
        raise ListenError(f"recorded steps must be chosen by times or by every, got times {times} and every {every}")
    chosen = spread(len(sampler.times), count) if every is None else range(0, len(sampler.times), every)
    transformer = sampler.transformer
    return Manifest(
        model=adapter_for(transformer).signature(transformer),
        grid=sampler.grid,
        blocks=Blocks(block_size, block_size),
        times=tuple(sorted(sampler.times[step] for step in chosen)),
        thresholds=thresholds,
        windows=default_windows(sampler.grid),
        query_stride=query_stride,
        row_radius=min(ROW_RADIUS, sampler.grid.height - 1),
        frame_radius=min(FRAME_RADIUS, sampler.grid.frames - 1),
        has_mass=mass,
        versions={
            "calibatt": importlib.metadata.version("calibatt"),
            "torch": torch.__version__,
            **sampler.versions,
        },
    )


def spread(size: int, count: int) -> list[int]:
    """At most `count` of the numbers below `size`, evenly spread, the first and last among them."""
    return sorted({int(index) for index in np.linspace(0, size - 1, min(count, size)).round()})


def open_store(path: Path, manifest: Manifest, ranks: Ranks) -> StoreWriter:
    """The one store that all ranks write, each its own samples.

    Raises:
        StoreError: It cannot be continued with this manifest, or another job has it open.
        RankLostError: A rank has failed.
    """
    writer = StoreWriter.open(path, manifest) if ranks.is_first else None
    ranks.wait()
    return writer or StoreWriter.join(path, manifest)


def pick_branches(sampler: Sampler, branches: int | None) -> int:
    """How many branches of guidance to record: as many as asked for, else all that the sampler is known to have.

    Raises:
        ListenError: It has fewer.
    """
    known = getattr(sampler, "branches", None)
    if branches is not None and known is not None and branches > known:
        raise ListenError(f"--branches must be at most the {known} that a step has, got {branches}")
    return branches or known or 1


def outstanding(
    writer: StoreWriter, work: Work, probed: Work, ranks: Ranks, console: Console, branches: int = 1
) -> tuple[Work, Work]:
    """What this rank records, and what it probes: of the samples recorded now, its own. A prompt is recorded unless
    all of its branches are.

    Raises:
        RankLostError: A rank has failed.
    """
    # Of rank 0, before anyone writes: all must divide the same work.
    done, interrupted = ranks.from_first((writer.done(), writer.interrupted()))
    named = {each: {sample_name(*each, branch) for branch in range(branches)} for each in work}
    todo = [each for each in work if not named[each] <= set(done)]
    if len(todo) < len(work):
        console.print(f"{len(work) - len(todo)} of {len(work)} samples are done: skipped")
    for name in interrupted:
        again = any(name in named[each] for each in todo)
        fate = "discarded and recorded again" if again else "left aside: not among these prompts"
        console.print(f"sample {name} was interrupted: {fate}")
    mine = ranks.share(todo)
    older = ranks.share([sample for sample in probed if sample not in todo])
    return mine, [sample for sample in probed if sample in mine or sample in older]


def record(
    writer: StoreWriter,
    sampler: Sampler,
    todo: Work,
    measure: Measure,
    probed: Work,
    progress: Progress,
    branches: int = 1,
) -> dict[tuple[str, int], Trajectory]:
    """Records the branches of samples that are not done; returns the trajectories of those that will be probed."""
    manifest, done = writer.manifest, writer.done()
    left = {each: [at for at in range(branches) if sample_name(*each, at) not in done] for each in todo}
    total = sum(map(len, left.values())) * len(manifest.times) * manifest.model.layers
    task = progress.add_task("units", total=total)
    recorder = Recorder(sampler, manifest, measure, on_unit=lambda: progress.advance(task))
    found = {}
    for prompt, seed in todo:
        if (prompt, seed) in probed:
            run = partial(recorder.record, writer, prompt, seed, branches=left[prompt, seed])
            found[prompt, seed] = Trajectory(sampler, prompt, seed, recorder.steps, run)
        else:
            recorder.record(writer, prompt, seed, branches=left[prompt, seed])
    return found


def probe(
    writer: StoreWriter,
    sampler: Sampler,
    work: Work,
    times: int,
    layer_times: int,
    by_part: dict[str, str],
    recorded: Mapping[tuple[str, int], Trajectory],
    progress: Progress,
) -> int:
    """Probes the time weight on these samples, at some times `by_part` as well (see `Trajectory.probe`).

    Returns how many probes said nothing.

    A sample that was not recorded just now is sampled once more, for the latents from which its probes start.
    """
    manifest = writer.manifest
    plane = min(range(len(manifest.thresholds)), key=lambda at: abs(manifest.thresholds[at] - PROBE_THRESHOLD))
    done, wanted = writer.probed(), spread(len(manifest.times), times) if times else []
    by_layer = {wanted[at] for at in spread(len(wanted), min(layer_times, len(wanted)))} if layer_times else set()
    todo = {
        (prompt, seed): [index for index in wanted if (sample_name(prompt, seed), index) not in done]
        for prompt, seed in work
    }
    store = Store.open(writer.path)
    task = progress.add_task("probes", total=sum(map(len, todo.values())))
    silent = 0
    for (prompt, seed), indices in todo.items():
        name = sample_name(prompt, seed)
        steps = {index: nearest_step(sampler.times, manifest.times[index]) for index in indices}
        dense = recorded.get((prompt, seed))
        if indices and dense is None:
            dense = Trajectory(sampler, prompt, seed, steps.values())
        for index in indices if dense else ():

            def keep(layer: int, name: str = name, index: int = index) -> torch.Tensor:
                return torch.from_numpy(store.unit(name, index, layer).keep(plane, manifest))

            found = dense.probe(
                name, index, steps[index], keep, manifest.blocks, **(by_part if index in by_layer else {})
            )
            if found:
                writer.write_probe(found)
            else:
                silent += 1
            progress.advance(task)
    return silent


def refine(
    writer: StoreWriter,
    sampler: Sampler,
    asked: Ladders,
    query_blocks: int,
    ranks: Ranks,
    progress: Progress,
) -> int:
    """Measures ladders of the kinds and shares asked for, each rank some samples; returns how many this rank measured.

    Raises:
        StoreError: The store cannot be refined with these ladders.
        RankLostError: A rank has failed.
    """
    store = Store.open(writer.path)
    ladders = replace(asked, samples=store.samples)
    done = ranks.from_first(writer.refine(ladders) if ranks.is_first else ())
    todo = ranks.share([name for name in store.samples if name not in done])
    sampler.check([store.meta[name]["prompt"] for name in todo])
    units = len(store.manifest.times) * store.manifest.model.layers
    task = progress.add_task("refining, units", total=len(todo) * units)
    refiner = Refiner(sampler, store, ladders, query_blocks, on_unit=lambda: progress.advance(task))
    for name in todo:
        refiner.refine(writer, name)
    return len(todo)


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines do not count.

    Raises:
        ValueError: The file is not UTF-8 or has no prompt.
        OSError: It cannot be read.
    """
    try:
        prompts = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8, got {error}") from None
    if not prompts:
        raise ValueError(f"{path} must have at least one prompt, one a line, got none")
    return prompts


def read_numbers(option: str, text: str | None, default: tuple[float, ...]) -> tuple[float, ...]:
    """Numbers joined by commas; the default ones if absent.

    Raises:
        ValueError: Something is no number.
    """
    if text is None:
        return default
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise ValueError(f"{option} must be numbers joined by commas, got {text!r}") from None


def plan_work(model: str, path: Path | None, samples: int | None, seed: int) -> Work:
    """The prompts and their seeds: `seed` for the first, one more for each.

    Raises:
        ValueError: More samples than prompts.
        OSError: The file cannot be read.
    """
    if path is not None:
        prompts = read_prompts(path)
        if samples is not None and samples > len(prompts):
            raise ValueError(f"--samples must be at most the {len(prompts)} prompts of {path}, got {samples}")
        prompts = prompts[:samples]
    elif model in PROMPTS:
        prompts = PROMPTS[model](samples or DEFAULT_SAMPLES, seed)
    else:
        known = default_prompts()
        if samples is not None and samples > len(known):
            raise ValueError(
                f"--samples must be at most our {len(known)} prompts, or come with --prompts, got {samples}"
            )
        prompts = known[: samples or DEFAULT_SAMPLES]
    return [(prompt, seed + index) for index, prompt in enumerate(prompts)]


def pick_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu or cuda, got {device!r}") from None
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device must be a device of this machine, got {device!r}")
    return device


def _summary(writer: StoreWriter, recorded: int, refined: int, seconds: float) -> str:
    store = Store.open(writer.path)
    size = store.size_bytes / 2**20
    weights = store.error_weights()
    now = f"{recorded} recorded now, {f'{refined} refined, ' if refined else ''}{seconds:.1f} s"
    lines = [f"{writer.path}: {len(store.samples)} samples, {size:.1f} MiB; {now}"]
    if store.ladders is not None:
        ladders = store.ladders
        of = f"{len(store.refined)} of {len(ladders.samples)} samples"
        stale = "" if ladders.samples == store.samples else "; made before other samples came: of no use"
        lines.append(f"refined: {'+'.join(ladders.kinds)} at {len(ladders.shares)} shares, {of}{stale}")
    lines.append(weights.told)
    if weights.probed:
        lines.append("weight from clean to noise: " + " ".join(f"{value:.2g}" for value in weights.unit.mean(1)))
    return "\n".join(lines)


EPILOG = """\b
Examples:
  calibatt-calibrate -o stats/
  calibatt-calibrate --prompts prompts.txt --samples 4 --query-stride 8 -o stats/
  calibatt-calibrate --model my_wan:sampler --steps 30 --times 15 --block-size 128 --query-stride 8 -o stats/
  torchrun --nproc-per-node 8 -m calibatt.tools.calibrate --model my_wan:sampler --block-size 128 -o stats/
  calibatt-calibrate -o stats/ --refine
  calibatt-compile stats/ -o plans/mine.plan

Exit codes: 0 all is recorded; 1 stopped, run it again to continue; 2 the call or the store is wrong.
"""


@click.command(name=NAME, epilog=EPILOG)
@click.option("--model", default="demo", show_default=True, help=MODEL_HELP)
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="One prompt a line [ours; the demo model has its own]."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Store to create or continue.")
@click.option("--samples", type=click.IntRange(1), help=f"Prompts to record [all of the file, or {DEFAULT_SAMPLES}].")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the first prompt; +1 for each.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps [the model's own].")
@click.option("--times", type=click.IntRange(1), help="Steps to record, evenly spread [all].")
@click.option("--every", type=click.IntRange(1), help="Record every n-th step, instead of --times.")
@click.option("--branches", type=click.IntRange(1), help="Branches of guidance to record, each a sample [all].")
@click.option("--probes", type=click.IntRange(0), default=8, show_default=True, help="Times to probe; 0: none.")
@click.option("--probe-samples", type=click.IntRange(0), help="Samples to probe them on [all].")
@click.option("--layer-probes", type=click.IntRange(0), help="Probed times also probed by layer [all].")
@click.option(
    "--probe-layers",
    type=click.Choice([STEP, FINAL]),
    default=STEP,
    show_default=True,
    help="Follow what one layer did for one step or to the final result.",
)
@click.option(
    "--probe-heads",
    type=click.Choice(["no", STEP, FINAL]),
    default="no",
    show_default=True,
    help="The same with each head alone; followed to the end instead of layers.",
)
@click.option("--mass/--no-mass", default=False, show_default=True, help="Keep the block mass: about twice the bytes.")
@click.option("--thresholds", help=f"Mass of the keep planes [{','.join(map(str, DEFAULT_THRESHOLDS))}].")
@click.option("--block-size", type=click.Choice([str(size) for size in BLOCK_SIZES]), default="64", show_default=True)
@click.option("--query-stride", type=click.IntRange(1), default=1, show_default=True, help="Measure every n-th query.")
@click.option("--refine", "refine_too", is_flag=True, help="Then measure the masks that a plan may choose.")
@click.option(
    "--refine-blocks",
    type=click.IntRange(1),
    default=QUERY_BLOCKS,
    show_default=True,
    help="Query blocks of a head to measure masks on.",
)
@click.option("--refine-shares", help=f"Densities of the masks [{','.join(map(str, DEFAULT_SHARES))}].")
@click.option(
    "--ladders", default="+".join(DEFAULT_KINDS), show_default=True, help=f"What orders blocks: {', '.join(KINDS)}."
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto: cuda where there is one.")
def main(
    model: str,
    prompts: Path | None,
    output: Path,
    samples: int | None,
    seed: int,
    steps: int | None,
    times: int | None,
    every: int | None,
    branches: int | None,
    probes: int,
    probe_samples: int | None,
    layer_probes: int | None,
    probe_layers: str,
    probe_heads: str,
    mass: bool,
    thresholds: str | None,
    block_size: str,
    query_stride: int,
    refine_too: bool,
    refine_blocks: int,
    refine_shares: str | None,
    ladders: str,
    device: str,
) -> None:
    """Measures attention while prompts are sampled; the result is what calibatt-compile reads.

    Recorded for each prompt, recorded step, layer and head: which key blocks hold how much of each query block's
    attention, what dropping a block would change in the output, and how alike the outputs of neighbouring rows, and of
    neighbouring frames, are. Probes then disturb single steps and compare the final results: what an error costs at
    which time.

    Branches of guidance are samples of their own, whether a model computes them in two forwards or in a batch.

    Cost: each prompt is sampled once. In a recorded step every layer computes its attention once more (twice more on
    a GPU); --query-stride n divides that by n. A probe samples a prompt again from its step on, half of all steps on
    average, and one by layer takes one more step for each layer. What errors cost differs more from prompt to prompt
    than anything else that is measured: fewer probed samples are the wrong place to save. At the end the bytes written
    and the seconds taken are told.

    --refine measures once more, when all prompts are recorded: which masks a plan may choose follows from them, and
    what each mask really changes is then measured while every prompt is sampled again, instead of being estimated from
    its blocks; calibatt-compile uses it by itself. It costs one more sampling of each prompt, and in a recorded step
    --refine-blocks query blocks of attention. It is of just these prompts: if more come, it must be made again.

    --probe-layers final follows what one layer did to the final result instead of to the next step: half of all steps
    for each layer instead of one. --probe-heads does the same for each head alone, at as many times the cost as a layer
    has heads: for small models.

    Run it again to continue where it stopped: finished samples are skipped, and at most the sample in progress is
    lost. Stores made on several machines with one set of options are given to calibatt-compile together.

    Started by torchrun, every process has a GPU and samples its part of the prompts; all write one store, and where one
    fails all end.
    """
    ranks = Ranks.of_environment()
    console = Console(stderr=True, quiet=not ranks.is_first)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        work = plan_work(model, prompts, samples, seed)
        sampler = make_sampler(model, steps, ranks.own_device(pick_device(device)))
        sampler.check([prompt for prompt, _ in work])
        manifest = make_manifest(
            sampler,
            block_size=int(block_size),
            times=times,
            every=every,
            mass=mass,
            query_stride=query_stride,
            thresholds=read_numbers("--thresholds", thresholds, DEFAULT_THRESHOLDS),
        )
        count = pick_branches(sampler, branches)
        shares = read_numbers("--refine-shares", refine_shares, DEFAULT_SHARES)
        asked = Ladders(("every",), tuple(ladders.split("+")), shares)
        if refine_too:
            asked.check(manifest)
        begun = time.perf_counter()
        with (
            ranks,
            open_store(output, manifest, ranks) as writer,
            Progress(*columns, TimeRemainingColumn(), console=console, disable=not ranks.is_first) as progress,
        ):
            todo, probed = outstanding(writer, work, work[:probe_samples] if probes else [], ranks, console, count)
            trajectories = record(writer, sampler, todo, unit_statistics, probed, progress, count)
            ranks.wait()  # a probe needs a store in which every sample is whole
            by_layer = probes if layer_probes is None else layer_probes
            by_part = {"layers": probe_layers} | ({"heads": probe_heads} if probe_heads != "no" else {})
            silent = ranks.total(probe(writer, sampler, probed, probes, by_layer, by_part, trajectories, progress))
            refined = 0
            if refine_too:
                ranks.wait()
                refined = ranks.total(refine(writer, sampler, asked, refine_blocks, ranks, progress))
            recorded, seconds = ranks.total(len(todo)), time.perf_counter() - begun
        if silent:
            console.print(f"{silent} probes dropped nothing and say nothing of their time")
        if ranks.is_first:
            click.echo(_summary(writer, recorded, refined, seconds))
    except (StoreError, PlanError, UnknownModelError, ListenError, RankLostError, OSError, ValueError) as error:
        _fail(error, ranks)


def _fail(error: Exception, ranks: Ranks) -> NoReturn:
    """One line for the user, exit code 2."""
    told = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    who = f"{NAME}: rank {ranks.rank}" if ranks.count > 1 else NAME
    click.echo(f"{who}: {' '.join(told.split())}", err=True)
    raise SystemExit(2)


if __name__ == "__main__":
    main(prog_name=NAME)
