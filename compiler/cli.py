"""``calibatt-compile``: statistics in, plan out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from calibatt.compiler import from_plan, report
from calibatt.compiler.cost import DEVICES, device_named
from calibatt.compiler.emit import make_plan, provenance, require_lowered, segments
from calibatt.compiler.errors import CompileError, PassSyntaxError
from calibatt.compiler.gather import StatisticsSource
from calibatt.compiler.language import DEFAULT_PASSES, parse_passes, print_passes
from calibatt.compiler.passes import Pass
from calibatt.compiler.passes.select import Select
from calibatt.compiler.pipeline import Account, Map, Work, processes, run
from calibatt.compiler.shelf import DiskShelf
from calibatt.compiler.stats import Store, StoreError
from calibatt.plans import Blocks, PlanError, write_plan

BUDGETS = ("target_density", "target_db")


def with_budget(text: str, budget: dict[str, float | None]) -> tuple[Pass, ...]:
    """The passes of a pass string, with the budget of the command line given to every `select`.

    Args:
        text: The pass string.
        budget: By name of `BUDGETS`; at most one is not None.

    Raises:
        PassSyntaxError: Several budgets, or one here and another in the text, or no `select` to give it to.
        CompileError: The pass string or an option is wrong.
    """
    passes = parse_passes(text)
    given = [name for name, value in budget.items() if value is not None]
    options = [f"--{name.replace('_', '-')}" for name in budget]
    if not given:
        return passes
    if len(given) > 1:
        raise PassSyntaxError(f"a budget must be one of {', '.join(options)}, got {len(given)} of them")
    if any(f"{name[2:]}=" in text.replace(" ", "") for name in options):
        raise PassSyntaxError("a budget must be given in --passes or on the command line, got both")
    if not any(isinstance(each, Select) for each in passes):
        raise PassSyntaxError(f"a budget must have a select in --passes, got {text!r}")
    changes: dict[str, Any] = {**dict.fromkeys(BUDGETS), **budget}
    return tuple(replace(each, **changes) if isinstance(each, Select) else each for each in passes)


EPILOG = """\b
Passes run in the order in which they are given; options and their defaults:
  protect{sinks=false,diagonal=false,first-times=0,last-times=0,first-layers=0,last-layers=0}
      blocks that no mask drops: text, and if asked the first frame and the diagonal; heads that stay dense:
      so many of the noisiest (first) and cleanest (last) times, and of the layers
  select{target-density=0.5,target-db,menu=windows+cuts}
      each head's mask at each time: least error within one density over all, or fewest blocks that are predicted to
      reach so many dB of the final latent
  anchors{safety=1.0,max-group-rows=4,max-group-frames=8}  rows, or frames, computed once and copied to neighbours
  fill-gaps{max-gap-blocks=1,max-growth=0.01}  joins short runs of blocks
  merge-times{max-growth=0.01,max-times=8}  neighbouring times share their masks
  merge-heads{max-growth=0.01}  heads of a layer share their masks
  schedule  the order of the work
  lower  makes the plan's arrays; comes last
The paper's own method, of a store with thresholds (calibatt-calibrate --thresholds): vote,protect,uniform,repeat,lower
  vote{agreement=0.5,threshold=0.9}  the blocks that so many of the samples need to reach the threshold's mass
  uniform  every head keeps what was voted
  repeat{max-difference=0.1,group=3}  heads whose rows differ less compute one row of a group
Every pass takes from-time and to-time: the range of denoising times (1: noise) that it is for.

\b
Examples:
  calibatt-compile stats/ -o plans/mine.plan
  calibatt-compile stats_a/ stats_b/ -o plans/mine.plan --target-density 0.35 --report report.html
  calibatt-compile stats/ -o plans/mine.plan --target-db 30
  calibatt-compile stats/ -o plans/mine.plan --passes "protect{last-times=1},select,schedule,lower"
  calibatt-compile a_few_layers/ -o plans/part.plan --extrapolate 40x50
  calibatt-compile --from-plan plans/mine.plan --block-size 128 -o plans/coarse.plan

Exit codes: 0 the plan is written; 2 the call or the statistics are wrong, and no plan is written.
"""


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.argument("stats_dirs", nargs=-1, metavar="STATS_DIR...", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, metavar="OUT.plan", type=click.Path(path_type=Path), help="The plan.")
@click.option("--from-plan", "old", metavar="OLD.plan", type=click.Path(path_type=Path), help="Instead of statistics.")
@click.option("--block-size", type=int, help="Of a plan from a plan: a multiple of the old one's.")
@click.option("--passes", "text", help=f"name{{option=value,...}},name,... [{DEFAULT_PASSES}]")
@click.option("--target-density", type=float, help="Most of dense attention's blocks to compute. Default 0.5.")
@click.option("--target-db", type=float, help="Least predicted signal-to-noise of the final latent, instead.")
@click.option("--device", default="h200-hopper", show_default=True, help=f"Whose time: {', '.join(DEVICES)}.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes; the plan is the same.")
@click.option("--resume", is_flag=True, help="Go on with what an interrupted run of this very job has left.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for units in progress [OUT.plan.work].")
@click.option(
    "--report", "report_path", metavar="REPORT", type=click.Path(path_type=Path), help="Report as .html, or JSON."
)
@click.option(
    "--extrapolate", metavar="LAYERSxTIMES", help="Report also what a whole job of so many layers and times will take."
)
@click.option("--print-after-all", is_flag=True, help="Print every time and layer after every pass.")
@click.option("--time-passes", is_flag=True, help="Print what each pass took, as it ends.")
@click.option("--notes", default="", help="Text stored in the plan.")
@click.option("--force", is_flag=True, help="Replace OUT.plan and REPORT if they exist.")
def command(
    stats_dirs: tuple[Path, ...],
    output: Path,
    old: Path | None,
    block_size: int | None,
    text: str | None,
    target_density: float | None,
    target_db: float | None,
    device: str,
    jobs: int,
    resume: bool,
    work: Path | None,
    report_path: Path | None,
    extrapolate: str | None,
    print_after_all: bool,
    time_passes: bool,
    notes: str,
    force: bool,
) -> None:
    """Compiles the statistics of calibatt-calibrate, of one store or several, into a plan, or a plan into another.

    A plan says, for each layer, head and denoising time, which blocks of attention are computed. One budget holds for
    all of them: they go where an error would cost the final video most. The same statistics and options always give
    the same bytes; the passes are stored in the plan.
    """
    try:
        _check_targets([output, report_path], force)
        whole = _read_whole(extrapolate)
        budget = dict(zip(BUDGETS, (target_density, target_db), strict=True))
        if (old is None) == (not stats_dirs):
            raise CompileError(f"a plan must come from statistics or --from-plan, got {'both' if old else 'neither'}")
        if text is None:
            text = DEFAULT_PASSES if old is None else from_plan.DEFAULT_PASSES
        passes = with_budget(text, budget)
        require_lowered(passes)
        coefficients = device_named(device)
        source: StatisticsSource | from_plan.PlanSource
        unfinished: tuple[str, ...] = ()
        if old is not None:
            from_plan.check_passes(passes)
            source = from_plan.PlanSource(old, None if block_size is None else Blocks(block_size, block_size))
            job = source.make_job(coefficients)
            origin = {**source.plan.provenance, "from_plan": source.plan.digest, "from_passes": source.plan.passes}
            parts, key = source.plan.segments, [source.plan.digest, str(block_size)]
        else:
            if block_size is not None:
                raise CompileError(f"--block-size must come with --from-plan, got {block_size} with statistics")
            store = Store.open(stats_dirs)
            unfinished = store.unfinished
            source = StatisticsSource(store)
            job = source.make_job(coefficients)
            origin, parts = provenance(job, store), segments(job.manifest.times)
            key = [store.content()]
        console = Console()

        def after(account: Account) -> None:
            if time_passes:
                console.print(f"{account.name}: {account.seconds:.3f} s", markup=False, highlight=False)
            if print_after_all:
                console.print(f"after {account.passes}", markup=False, highlight=False, soft_wrap=True)
                for line in account.units:
                    console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)

        folder = work or output.with_name(f"{output.name}.work")
        shelf = DiskShelf.open(folder, _key([*key, print_passes(passes), device]), resume)
        try:
            with processes(jobs) as spread, _shown(spread, job.units) as over:
                found = run(source, job, passes, shelf, over, after, print_after_all)
                plan = make_plan(job, origin, parts, passes, found, shelf, over, notes)
            file_bytes = write_plan(output, plan)
        except Exception:
            shelf.remove()
            raise
        shelf.remove()
        if report_path is not None:
            value = report.as_json(job, plan, found, file_bytes, whole)
            report.write(report_path, value)
        if unfinished:
            console.print(f"samplings in progress, not counted: {', '.join(unfinished)}", markup=False, highlight=False)
        report.show(console, job, plan, found, file_bytes, whole)
    except (CompileError, StoreError, PlanError, OSError) as error:
        click.echo(f"calibatt-compile: {' '.join(str(error).split())}", err=True)
        sys.exit(2)


def main() -> None:
    """The console script."""
    command.main(prog_name="calibatt-compile")


def _check_targets(paths: list[Path | None], force: bool) -> None:
    """Refuses before any work what could not be written after it."""
    for path in paths:
        if path is None:
            continue
        if not path.parent.is_dir():
            raise CompileError(f"{path} must be in a folder that exists, got no folder {path.parent}")
        if path.is_dir():
            raise CompileError(f"{path} must be a file, got a folder there")
        if path.exists() and not force:
            raise CompileError(f"{path} must not exist (--force replaces it), got a file there")


def _read_whole(text: str | None) -> report.Whole:
    """Layers and times of a whole job.

    Raises:
        CompileError: They are not two positive integers joined by an x.
    """
    if text is None:
        return None
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise CompileError(f"--extrapolate must be LAYERSxTIMES, such as 40x50, got {text!r}")
    return int(parts[0]), int(parts[1])


def _key(parts: Sequence[str]) -> str:
    """Stands for everything that decides what the units of a job become."""
    return blake2b(json.dumps([*parts, version("calibatt")]).encode(), digest_size=16).hexdigest()


@contextmanager
def _shown(over: Map, units: int) -> Iterator[Map]:
    """The same with a bar that says how much of a stage is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:

        def shown(work: Work, arguments: Sequence[Any]) -> Iterator[tuple[int, Any]]:
            task = progress.add_task(f"stage {len(progress.tasks)}, units", total=units)
            for each in over(work, arguments):
                progress.advance(task)
                yield each

        yield shown


if __name__ == "__main__":
    main()
