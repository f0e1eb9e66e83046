"""`calibatt-calibrate`: what every error of attention costs the final video, measured while a model samples prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from calibatt.plans import BLOCK_SIZES
from calibatt.plans.command import one_line
from calibatt.tools.calibrate.models import DEFAULT_SAMPLES, MODEL_HELP, MOST_TIMES, SMALL_TOKENS

NAME = "calibatt-calibrate"
EPILOG = """\b
Examples:
  calibatt-calibrate -o stats/
  calibatt-calibrate --model my_wan:sampler --steps 15 --dry-run -o stats/
  calibatt-calibrate --model my_wan:sampler --steps 15 --samples 8 -o stats/
  calibatt-calibrate --model my_wan:sampler --prompts prompts.txt -o stats/
  torchrun --nproc-per-node 8 -m calibatt.tools.calibrate --model my_wan:sampler --steps 15 -o stats/
  calibatt-compile stats/ -o plans/mine.plan

\b
How to get cheaper: fewer --samples (8 are good, 4 are usable), fewer --steps than you will sample with later (a plan
is keyed by denoising time, so a schedule of 15 steps serves one of 50: calibatt-compile --steps 50), fewer --times
(which loses quality).

Exit codes: 0 all is measured; 2 the call, the model or the store is wrong, or a rank failed; 3 all is measured, not
all could be shown; 130 interrupted, run it again to continue.
"""

TIMES_HELP = f"""Steps to measure, evenly spread [all, at most {MOST_TIMES}]. With fewer, each stands for the steps
around it, which loses quality and makes predictions too good."""


@click.command(name=NAME, epilog=EPILOG)
@click.option("--model", default="demo", show_default=True, help=MODEL_HELP)
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="One prompt a line [ours; the demo model has its own]."
)
@click.option("--images", type=click.Path(path_type=Path), help="One image path a line, beside the prompts.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Store to create or continue.")
@click.option("--samples", type=click.IntRange(1), help=f"Prompts to sample [all of the file, or {DEFAULT_SAMPLES}].")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the first prompt; +1 for each.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps [the model's own].")
@click.option("--times", type=click.IntRange(1), help=TIMES_HELP)
@click.option("--every", type=click.IntRange(1), help="Measure every n-th step, instead of --times.")
@click.option("--vectors", type=click.IntRange(1), help="Random vectors for each sampling [1; 8 on a GPU if small].")
@click.option(
    "--block-size",
    type=click.Choice([str(size) for size in BLOCK_SIZES if size <= 128]),
    help=f"Tokens of a block [128 on a GPU for more than {SMALL_TOKENS} tokens, else 64].",
)
@click.option(
    "--thresholds", help="Also count the blocks that hold these shares of the mass: for the paper's own method."
)
@click.option(
    "--inputs-on-cpu/--inputs-on-device",
    default=None,
    help="Where what enters the blocks of a forward is kept [the CPU if the device would be full].",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto: cuda where there is one.")
@click.option("--dry-run", is_flag=True, help="Time two steps, say what all will cost, and stop.")
@one_line(NAME)
def main(**options: Any) -> None:
    """Measures what every error of attention costs the final video; the result is what calibatt-compile reads.

    Every prompt is sampled once, as usual, and then differentiated, last step first: what dropping a block of keys for
    a block of queries changes in the final latent, what every window and every copied row or frame does, for each
    layer, head and denoising time at once. Scheduler, guidance, LoRA, quantised weights and offloading are as in use.

    Calibrating on a prompt takes about as long as generating it seven times, whatever the number of layers and heads;
    with --vectors V the part after the sampling itself takes V times as long. Step caches and torch.compile must be
    off; attention kernels are our own here. Disk does not grow with the number of prompts.

    Run it again to continue where it stopped: finished samplings are skipped, and of one in progress at most the step
    in progress is lost. Stores made on several machines with one set of options are given to calibatt-compile together.

    Started by torchrun, every process has a GPU and samples its part of the prompts; all write one store, and where one
    fails all end.
    """
    from calibatt.tools.calibrate.command import run  # torch, which --help does without

    run(**options)


if __name__ == "__main__":
    main(prog_name=NAME)
