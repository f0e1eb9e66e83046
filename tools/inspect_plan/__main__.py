"""The command line of the plan inspector."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import click

from calibatt.plans import PlanFile
from calibatt.plans.command import one_line
from calibatt.plans.files import store_around
from calibatt.tools.inspect_plan import compare, summary

NAME = "calibatt-inspect"


@click.command(
    name=NAME,
    epilog="Exit codes: 0 all is well; 2 the file is no good plan, or the call is wrong; 3 not all could be shown; "
    "130 interrupted.",
)
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
@one_line(NAME)
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
    time = 0.5 if time is None else time
    if not 0 <= time <= 1:  # click lets nan pass
        raise click.UsageError(f"--time must be from 0 to 1, got {time}")
    drawn = [path.resolve() for path in (png, overview_png) if path is not None]
    read = [path.resolve() for path in (file, other) if path is not None]
    if len(set(drawn)) < len(drawn) or set(drawn) & set(read):
        raise click.UsageError("--png and --overview-png must name files of their own")
    for path in drawn:
        if (folder := store_around(path)) is not None:
            raise click.UsageError(f"{path} must not be in a store of statistics, got {folder}")
    drawing = _drawing() if png is not None or overview_png is not None else None
    plan = PlanFile.read(file)
    for option, value, count in (("--layer", layer, plan.signature.layers), ("--head", head, plan.signature.heads)):
        if value is not None and value >= count:
            raise click.UsageError(f"{option} must be 0 to {count - 1} in this plan, got {value}")
    if other is not None:
        differences = compare.compare(plan, PlanFile.read(other))
        if as_json:
            print(json.dumps(differences, indent=2, default=bytes.hex))
        else:
            compare.show(differences)
    elif as_json:
        print(json.dumps(summary.summarise(plan, file), indent=2, default=bytes.hex))
    elif drawing is None:
        summary.show(plan, file)
    if drawing is not None and png is not None:
        drawing.draw_mask(plan, layer, head, time, file.name, png)
    if drawing is not None and overview_png is not None:
        drawing.draw_overview(plan, file.name, overview_png)


def _drawing() -> ModuleType:
    """The drawing module, which needs matplotlib: loaded only where a picture is wanted."""
    from calibatt.tools.inspect_plan import drawing

    return drawing


if __name__ == "__main__":
    main(prog_name=NAME)
