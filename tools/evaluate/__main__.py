"""`calibatt-evaluate`: not there yet, and it says so."""

from __future__ import annotations

import sys

import click


@click.command()
def main() -> None:
    """Judges plans on prompts never calibrated on. NOT YET AVAILABLE: this command evaluates nothing so far.

    Until then, `calibatt-demo` compares dense and planned videos of the demo model.
    """
    click.echo("calibatt-evaluate: not yet available; nothing was evaluated (see calibatt-demo meanwhile)", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main(prog_name="calibatt-evaluate")
