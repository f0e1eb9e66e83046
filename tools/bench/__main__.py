"""`calibatt-bench`: measures kernels and whole models beside what a user has instead."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click

from calibatt.plans.command import one_line

NAME = "calibatt-bench"
STUDIES = "calibatt.tools.studies"
"""A package of a checkout: what it measures is not installed."""
PARTS = {
    "kernel": "Kernels of block-sparse attention, beside dense ones and peers.",
    "precision": "Heads of 8 bits on this card, which decides whether plans use them here.",
    "model": "Whole models, dense and on plans.",
}
if find_spec(STUDIES) is not None:
    PARTS["journey"] = "Everything from a model to a judged plan, by the commands; from a checkout."


class Parts(click.Group):
    """Loads a part when it is asked for: help is shown where torch is missing."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(PARTS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        package = STUDIES if cmd_name == "journey" else "calibatt.tools.bench"
        return import_module(f"{package}.{cmd_name}").main if cmd_name in PARTS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(PARTS.items()))

    @one_line(NAME)
    def invoke(self, ctx: click.Context) -> Any:
        return super().invoke(ctx)


@click.group(cls=Parts, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measures kernels and whole models; results are JSON files that say what made them."""


if __name__ == "__main__":
    main(prog_name=NAME)
