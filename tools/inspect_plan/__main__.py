"""The command line of the plan inspector."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import click

from calibatt.plans import PlanError, PlanFile
from calibatt.tools.inspect_plan import compare, summary

NAME = "calibatt-inspect"


@click.command(name=NAME, epilog="Exit codes: 0 all is well; 2 the file is no good plan, or the call is wrong.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON instead.")
@click.option("--layer", type=click.IntRange(0), help="Layer of the mask to draw, from 0.")
@click.option("--head", type=click.IntRange(0), help="Head of the mask to draw, from 0.")
@click.option(
    "--time",
    type=click.FloatRange(0, 1),
    help="Denoising time of the mask to draw: 1 is pure noise, 0 the finished video.  [default: 0.5]",
)
@click.option("--diff", "other", type=click.Path(path_type=Path), help="Show what is different in this plan.")
@click.option("--png", type=click.Path(path_type=Path), help="Draw the mask of --layer and --head into this file.")
@click.option(
    "--overview-png",
    type=click.Path(path_type=Path),
    help="Draw the density of every head, layer and time into this file.",
)
def main(
    file: Path,
    as_json: bool,
    layer: int | None,
    head: int | None,
    time: float | None,
    other: Path | None,
    png: Path | None,
    overview_png: Path | None,
) -> None:
    """Checks a plan FILE and shows what is in it.

    A plan says, for each layer, head and denoising time, which blocks of attention are computed. Its density is the
    share of dense attention that is left. A head is dense (computes all), sparse (computes the blocks it lists) or
    anchored (computes some rows, or frames, of the video, which stand for their neighbours).

    \b
    See all of it at a glance:
      calibatt-inspect wan.plan
    Draw one mask, late in the denoising:
      calibatt-inspect wan.plan --layer 12 --head 3 --time 0.2 --png mask.png
    Draw every head's density:
      calibatt-inspect wan.plan --overview-png overview.png
    See what another compilation changed:
      calibatt-inspect wan.plan --diff wan_new.plan
    Ask a script's question:
      calibatt-inspect wan.plan --json | jq .density

    The whole file is checked first, byte by byte; what is wrong is said in one line. FORMAT.md has the rules.
    """
    if png is None and not (layer is head is time is None):
        raise click.UsageError("--layer, --head and --time say what --png draws, and there is no --png")
    if png is not None and (layer is None or head is None):
        raise click.UsageError("--png draws one mask and needs --layer and --head")
    try:
        plan = PlanFile.read(file)
    except (PlanError, OSError) as error:
        _fail(error)
    for option, value, count in (("--layer", layer, plan.signature.layers), ("--head", head, plan.signature.heads)):
        if value is not None and value >= count:
            raise click.UsageError(f"{option} must be 0 to {count - 1} in this plan, got {value}")
    try:
        if other is not None:
            found = compare.compare(plan, PlanFile.read(other))
            if as_json:
                click.echo(json.dumps(found, indent=2))
            else:
                compare.show(found)
        elif as_json:
            click.echo(json.dumps(summary.summarise(plan, file), indent=2, default=bytes.hex))
        elif png is None and overview_png is None:
            summary.show(plan, file)
        if png is not None and layer is not None and head is not None:
            _drawing().draw_mask(plan, layer, head, 0.5 if time is None else time, file.name, png)
        if overview_png is not None:
            _drawing().draw_overview(plan, file.name, overview_png)
    except (PlanError, OSError) as error:
        _fail(error)


def _drawing() -> ModuleType:
    """The drawing module, which needs matplotlib: loaded only where a picture is wanted."""
    try:
        from calibatt.tools.inspect_plan import drawing
    except ModuleNotFoundError as error:
        _fail(f"a picture needs {error.name}: pip install 'calibatt[tools]'")
    return drawing


def _fail(reason: Exception | str) -> NoReturn:
    if isinstance(reason, OSError) and reason.filename:
        reason = f"{reason.filename}: {reason.strerror}"
    click.echo(f"{NAME}: {summary.printable(str(reason))}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main(prog_name=NAME)
