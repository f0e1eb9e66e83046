"""``calibatt-compile``: statistics in, plan out."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from calibatt.compiler import report
from calibatt.compiler.cost import DEVICES, device_named
from calibatt.compiler.emit import make_plan, require_lowered
from calibatt.compiler.errors import CompileError, PassSyntaxError
from calibatt.compiler.gather import StatisticsSource
from calibatt.compiler.language import DEFAULT_PASSES, parse_passes
from calibatt.compiler.passes import Pass
from calibatt.compiler.passes.select import CHOICES, Select
from calibatt.compiler.pipeline import Map, Work, processes, run
from calibatt.compiler.shelf import DiskShelf
from calibatt.compiler.stats import Store, StoreError
from calibatt.compiler.stats.files import require_outside
from calibatt.compiler.stats.manifest import MAX_TIMES
from calibatt.plans import write_plan
from calibatt.plans.command import Incomplete, one_line, told
from calibatt.plans.errors import legible
from calibatt.plans.files import alone

NAME = "calibatt-compile"
BUDGETS = ("target_density", "target_db")


def with_options(text: str, **options: Any) -> tuple[Pass, ...]:
    """The passes of a pass string, with the budget and precision of the command line given to every `select`.

    Args:
        text: The pass string.
        options: Fields of `Select`: at most one of `BUDGETS`, and ``precision``; None: as the text says.

    Raises:
        PassSyntaxError: Two budgets are given, or one, or a precision, is given here and in the text, or there is no
            `select`.
        CompileError: The pass string or an option is wrong.
    """
    passes, spaceless = parse_passes(text), text.replace(" ", "")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    selects = any(isinstance(each, Select) for each in passes)
    for name in given:
        same = [each.replace("_", "-") for each in (BUDGETS if name in BUDGETS else (name,))]
        if not selects or any(f"{each}=" in spaceless for each in same):
            rule = f"{' or '.join(same)} must be given in --passes or on the command line, and to a select"
            raise PassSyntaxError(f"{rule}, got --{name.replace('_', '-')} with {text!r}")
    if len(given.keys() & set(BUDGETS)) > 1:
        raise PassSyntaxError("a budget must be one of --target-density and --target-db, got both")
    if given.keys() & set(BUDGETS):
        given = dict.fromkeys(BUDGETS) | given
    return tuple(replace(each, **given) if isinstance(each, Select) else each for each in passes)


EPILOG = """\b
Passes run in the order in which they are given; options and their defaults:
  select{target-density=0.5,target-db,menu=windows+cuts,precision=bf16}
      each head's mask, and with precision=auto its precision, at each time: least error within one cost over all
      steps, or least cost that is predicted to reach so many dB of the final latent
  anchors{max-group-rows=4,max-group-frames=8}  rows, or frames, computed once and copied to neighbours
  merge-heads{max-growth=0.01}  heads of a layer share their masks at all times
  schedule  the order of the work
  lower  makes the plan's arrays; comes last
The paper's own method, of a store with thresholds (calibatt-calibrate --thresholds): vote,repeat,lower
  vote{agreement=0.5,threshold=0.9}  the blocks that so many of the samples need to reach the threshold's mass
  repeat{max-difference=0.1,group=3}  heads whose rows differ less compute one row of a group
Tokens that are no video are kept for all queries and are in no mask.

\b
Examples:
  calibatt-compile stats/ -o plans/mine.plan
  calibatt-compile stats_a/ stats_b/ -o plans/mine.plan --target-density 0.35 --report report.html
  calibatt-compile stats/ -o plans/mine.plan --target-db 30
  calibatt-compile stats/ -o plans/mine.plan --passes "select{menu=windows},schedule,lower"

Exit codes: 0 the plan is written; 2 the call or the statistics are wrong, and no plan is written; 3 the plan is
written, the report is not; 130 interrupted.
"""


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.argument("stats_dirs", nargs=-1, required=True, metavar="STATS_DIR...", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, metavar="OUT.plan", type=click.Path(path_type=Path), help="The plan.")
@click.option(
    "--passes", "text", default=DEFAULT_PASSES, show_default=True, help="name{option=value,...},name,... as below."
)
@click.option(
    "--target-density",
    type=float,
    help="Most that attention may cost, as a share of dense attention in 16 bit: the mean over the steps of the "
    "sampling (see --steps), layers and heads. Default 0.5. If all heads are in 16 bit, this is the share of blocks "
    "that are computed, the density; with --precision auto a plan computes more.",
)
@click.option(
    "--target-db",
    type=float,
    help="Least predicted signal-to-noise of the final latent, instead; see docs/evaluation.md.",
)
@click.option(
    "--precision",
    type=click.Choice(CHOICES),
    help="auto: heads compute in 8 bits where that is worth its measured error; such a plan runs only where a backend "
    "has 8 bits. bf16, the default: all heads compute in the 16 bits of their inputs, which runs everywhere.",
)
@click.option(
    "--steps",
    type=click.IntRange(1, MAX_TIMES),
    help="Steps (of two experts, those of this one) of the samplings that the plan is for, spaced as the calibrated "
    "ones: each time of the plan weighs as many as fall into its segment. A plan runs with any number, but only with "
    "these does a sampling execute --target-density on average. Default: the steps of the calibration, measured "
    "(--times) or not.",
)
@click.option("--device", default="h200-hopper", show_default=True, help=f"Whose time: {', '.join(DEVICES)}.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes; the plan is the same.")
@click.option(
    "--report", "report_path", metavar="REPORT", type=click.Path(path_type=Path), help="Report as .html, or JSON."
)
@click.option("--notes", default="", help="Text stored in the plan.")
@click.option("--force", is_flag=True, help="Replace OUT.plan and REPORT if they exist.")
@one_line(NAME, CompileError, StoreError)
def command(
    stats_dirs: tuple[Path, ...],
    output: Path,
    text: str,
    target_density: float | None,
    target_db: float | None,
    precision: str | None,
    steps: int | None,
    device: str,
    jobs: int,
    report_path: Path | None,
    notes: str,
    force: bool,
) -> None:
    """Compiles the statistics of calibatt-calibrate, of one store or several, into a plan.

    A plan says, for each layer, head and denoising time, which blocks of attention are computed. One budget holds for
    all of them: they go where an error would cost the final video most. The same statistics and options always give
    the same bytes; the passes are stored in the plan.
    """
    _check_targets(output, report_path, force)
    passes = with_options(text, target_density=target_density, target_db=target_db, precision=precision)
    require_lowered(passes)
    store = Store.open(stats_dirs)
    source = StatisticsSource(store)
    job = source.make_job(device_named(device), steps)
    with _work_folder(output, force) as folder, processes(jobs) as spread, _shown(spread, job.units) as over:
        shelf = DiskShelf(folder)
        done = run(source, job, passes, shelf, over)
        plan = make_plan(job, store, passes, done, shelf, over, notes)
        file_bytes = write_plan(output, plan)
    try:
        value = report.as_json(job, plan, done, file_bytes)
        if report_path is not None:
            report.write(report_path, value)
        console = Console()
        with console.capture() as shown:  # rich would end the program if nobody reads its output
            report.show(console, value)
        if waiting := ", ".join(store.unfinished):
            print(legible(f"samplings in progress, not counted: {waiting}"))
        print(shown.get(), end="", flush=True)
    except OSError as error:
        raise Incomplete(f"{output} is written, but not all of what there is to say about it: {told(error)}") from None


def main() -> None:
    """The console script."""
    command.main(prog_name=NAME)


@contextmanager
def _work_folder(output: Path, force: bool) -> Iterator[Path]:
    """A folder beside the plan for units, under a lock of the plan; what killed jobs left there is removed."""
    busy = CompileError(f"{output} must be made by one process at a time, got another that is at it")
    with alone(output, busy):
        _check_new(output, force)  # again: another job may have made it meanwhile
        for left in output.parent.iterdir():
            if re.fullmatch(rf"\.{re.escape(output.name)}\.\w{{8}}\.work", left.name):
                shutil.rmtree(left)
        with TemporaryDirectory(prefix=f".{output.name}.", suffix=".work", dir=output.parent) as folder:
            yield Path(folder)


def _check_new(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise CompileError(f"{path} must not exist (--force replaces it), got a file there")


def _check_targets(output: Path, report_path: Path | None, force: bool) -> None:
    """Refuses, before any work, outputs that could not be written or would destroy something else."""
    files = [output] if report_path is None else [output, report_path]
    for path in files:
        if not path.parent.is_dir():
            raise CompileError(f"{path} must be in a folder that exists, got no folder {path.parent}")
        if not os.access(path.parent, os.W_OK):
            raise CompileError(f"{path} must be in a folder that can be written, got {path.parent}")
        if path.is_dir():
            raise CompileError(f"{path} must be a file, got a folder there")
        _check_new(path, force)
        require_outside(path)
    if report_path is not None and report_path.resolve() == output.resolve():
        raise CompileError(f"--report must be another file than -o, got {report_path} for both")


@contextmanager
def _shown(over: Map, units: int) -> Iterator[Map]:
    """The same map with a bar that shows how much of a stage is left."""
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
