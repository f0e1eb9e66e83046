"""``calibatt-compile``: statistics in, plan out."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from calibatt.compiler import report
from calibatt.compiler.collect import collect
from calibatt.compiler.cost import DEVICES, Device, device_named
from calibatt.compiler.emit import make_plan
from calibatt.compiler.errors import CompileError, PassSyntaxError
from calibatt.compiler.ir import Job
from calibatt.compiler.language import DEFAULT_PASSES, parse_passes
from calibatt.compiler.passes import Pass
from calibatt.compiler.passes.select import Select
from calibatt.compiler.pipeline import Account, run
from calibatt.compiler.stats import Store, StoreError
from calibatt.plans import PlanError, write_plan


def with_budget(text: str, target_density: float | None, max_error: float | None) -> tuple[Pass, ...]:
    """The passes of a pass string, with the budget of the command line given to `select`.

    Raises:
        PassSyntaxError: A budget on the command line and another, or no `select` to give it to.
        CompileError: The pass string or an option is wrong.
    """
    passes = parse_passes(text)
    if target_density is None and max_error is None:
        return passes
    if target_density is not None and max_error is not None:
        raise PassSyntaxError("a budget must be --target-density or --max-error, got both")
    if "target-density=" in text.replace(" ", "") or "max-error=" in text.replace(" ", ""):
        raise PassSyntaxError("a budget must be given in --passes or on the command line, got both")
    if not any(isinstance(each, Select) for each in passes):
        raise PassSyntaxError(f"a budget must have a select in --passes, got {text!r}")
    return tuple(
        replace(each, target_density=target_density, max_error=max_error) if isinstance(each, Select) else each
        for each in passes
    )


EPILOG = """\b
Passes run in the order in which they are given; options and their defaults:
  vote{agreement=0.5}  a block of a plane is kept if so many of the samples keep it
  protect{sinks=false,diagonal=false,first-times=0,last-times=0,first-layers=0,last-layers=0}
      blocks that no mask drops: text, and if asked the first frame and the diagonal; heads that stay dense:
      so many of the noisiest (first) and cleanest (last) times, and of the layers
  select{target-density=0.5,max-error,menu=planes+windows+cuts,levels-per-octave=4}
      each head's mask at each time: least error within one density over all, or fewest blocks within max-error
  anchors{safety=4.0,max-group-rows=4}  rows that are computed once and copied to their neighbours
  schedule  the order of the work
  lower  makes the plan's arrays; comes last

\b
Examples:
  calibatt-compile stats/ -o plans/mine.plan
  calibatt-compile stats_a/ stats_b/ -o plans/mine.plan --target-density 0.35
  calibatt-compile stats/ -o plans/mine.plan --passes "vote,protect{last-times=1},select,schedule,lower"

Exit codes: 0 the plan is written; 2 the call or the statistics are wrong, and no plan is written.
"""


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.argument("stats_dirs", nargs=-1, required=True, metavar="STATS_DIR...", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, metavar="OUT.plan", type=click.Path(path_type=Path), help="The plan.")
@click.option("--passes", "text", default=DEFAULT_PASSES, show_default=True, help="name{option=value,...},name,...")
@click.option("--target-density", type=float, help="Most of dense attention's blocks to compute. Default 0.5.")
@click.option("--max-error", type=float, help="Most output error times time weight over the whole job, instead.")
@click.option("--device", default="h200-triton", show_default=True, help=f"Whose time: {', '.join(DEVICES)}.")
@click.option("--json", "json_path", metavar="REPORT", type=click.Path(path_type=Path), help="Report as JSON.")
@click.option("--print-after-all", is_flag=True, help="Print every time and layer after every pass.")
@click.option("--time-passes", is_flag=True, help="Print what each pass took, as it ends.")
@click.option("--notes", default="", help="Text stored in the plan.")
@click.option("--ignore-interrupted", is_flag=True, help="Compile without samples whose recording was interrupted.")
@click.option("--force", is_flag=True, help="Replace OUT.plan and REPORT if they exist.")
def command(
    stats_dirs: tuple[Path, ...],
    output: Path,
    text: str,
    target_density: float | None,
    max_error: float | None,
    device: str,
    json_path: Path | None,
    print_after_all: bool,
    time_passes: bool,
    notes: str,
    ignore_interrupted: bool,
    force: bool,
) -> None:
    """Compiles the statistics of calibatt-calibrate, of one store or several, into a plan.

    A plan says, for each layer, head and denoising time, which blocks of attention are computed. One budget holds for
    all of them: they go where an error would cost the final video most. The same statistics and options always give
    the same bytes; the passes are stored in the plan.
    """
    try:
        _check_targets([output, json_path], force)
        passes = with_budget(text, target_density, max_error)
        coefficients = device_named(device)
        store = Store.open(stats_dirs)
        if store.interrupted and not ignore_interrupted:
            found = ", ".join(map(str, store.interrupted))
            rule = "be recorded again (calibatt-calibrate), deleted, or left out (--ignore-interrupted)"
            raise CompileError(f"interrupted samples must {rule}, got {found}")
        console = Console()
        job = _collect(store, coefficients)

        def after(account: Account) -> None:
            if time_passes:
                console.print(f"{account.name}: {account.seconds:.3f} s", markup=False, highlight=False)
            if print_after_all:
                console.print(f"after {account.passes}", markup=False, highlight=False, soft_wrap=True)
                for line in report.unit_lines(job):
                    console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)

        accounts = run(job, passes, after)
        plan = make_plan(job, store, passes, notes)
        file_bytes = write_plan(output, plan)
        if json_path is not None:
            value = report.as_json(job, plan, accounts, file_bytes)
            json_path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", "utf-8")
        report.show(console, job, plan, accounts, file_bytes)
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


def _collect(store: Store, device: Device) -> Job:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    units = len(store.manifest.times) * store.manifest.model.layers
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading statistics", total=units)
        return collect(store, device, lambda: progress.advance(task))


if __name__ == "__main__":
    main()
