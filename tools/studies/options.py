"""What the command lines of studies share: options, and that what goes wrong is one line."""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path
from typing import Any

import click

from calibatt.plans.command import one_line
from calibatt.tools.bench.options import SECONDS, Decorator, count_option, device_option, file_option, output_option
from calibatt.tools.calibrate.models import MODEL_HELP
from calibatt.tools.calibrate.work import MODEL_ERRORS

PATH, FILE = click.Path(path_type=Path), click.Path(path_type=Path, exists=True, dir_okay=False)


def study_command(name: str, text: str) -> Decorator:
    """Makes a function a command; what is expected to go wrong in it is one line and an exit code.

    Args:
        name: Of the command.
        text: Its help; lines that are indented, which are commands, stay lines.
    """
    text = re.sub(r"\n\n(?=    )", "\n\n\b\n", text)
    return lambda main: click.command(help=text)(one_line(name, *MODEL_ERRORS)(main))


def all_of(*options: Decorator) -> Decorator:
    """Several options at once, in their order."""

    def decorate(main: Any) -> Any:
        return reduce(lambda inner, option: option(inner), reversed(options), main)

    return decorate


def prompts_option(default: int = 32) -> Decorator:
    return count_option("--prompts", default, "Held-out prompts.")


TABLE = file_option("--table", "markdown", text="Markdown to write.")
FIGURE = file_option("--figure", text="PNG to draw.")
JOIN = click.option("--join", type=FILE, multiple=True, help="JSON of another run, whose rows are taken in.")
STORES = all_of(
    click.option("--model", default="demo", show_default=True, help=MODEL_HELP),
    click.option("--stats", "stores", type=PATH, multiple=True, required=True, help="Store; may be repeated."),
    click.option("--held-out", type=PATH, help="One prompt a line; the demo model has its own."),
    prompts_option(64),
    count_option("--calibration", 16, "Prompts that errors are measured on."),
    count_option("--batch", 32, "Videos at a time."),
)
"""Of studies of one model and its stores."""
NEW_STORES = click.option("--stores", type=PATH, required=True, help="Folder of the stores, which are made here.")
JUDGED = all_of(SECONDS, device_option(), output_option("JSON to write or to continue.", required=True))
"""Of studies whose rows are kept in `judgements.Judgements`."""
TRAINING = all_of(
    click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder."),
    click.option("--seed", default=1, show_default=True),
    count_option("--check-prompts", 64, "Held-out prompts of the last check."),
    device_option("cuda"),
)
