"""`calibatt-bench`: how fast are the parts, beside what else there is."""

from __future__ import annotations

import click

from calibatt.tools.bench import compiler, energy, journey, kernel, model


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measures kernels, whole models and the compiler; results are JSON files that say what made them."""


main.add_command(kernel.main, "kernel")
main.add_command(energy.main, "energy")
main.add_command(model.main, "model")
main.add_command(compiler.main, "compiler")
main.add_command(journey.main, "journey")

if __name__ == "__main__":
    main(prog_name="calibatt-bench")
