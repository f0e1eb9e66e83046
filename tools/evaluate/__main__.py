"""`calibatt-evaluate`: what plans lose on prompts that were not calibrated on, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from calibatt.plans.command import one_line
from calibatt.tools.calibrate.models import FIRST_SEED, MODEL_HELP

NAME = "calibatt-evaluate"


@click.command(
    epilog="Exit codes: 0 all is well; 1 a requirement does not hold, or a plan has drifted; 2 the call, a plan or the "
    "model is wrong; 3 not all could be shown; 130 interrupted, run it again to continue."
)
@click.option("--model", default="demo", show_default=True, help=MODEL_HELP)
@click.option("--plan", "paths", type=click.Path(path_type=Path), multiple=True, required=True, help="May be repeated.")
@click.option("--prompts", type=click.Path(path_type=Path), required=True, help="Held-out prompts, one a line.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Videos of each prompt.")
@click.option("--first-seed", type=click.IntRange(0), default=FIRST_SEED, show_default=True, help="+1 for each video.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps [the model's own].")
@click.option(
    "--head-prompts", type=click.IntRange(0), default=4, show_default=True, help="Videos to measure heads on."
)
@click.option(
    "--floor-prompts", type=click.IntRange(0), default=4, show_default=True, help="Videos to measure the floor."
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto: cuda where there is one.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the report; not for --quick.")
@click.option(
    "--require", default="", help="latent>=25,psnr.worst>=24,ratio<=3,broken<=0: exit 1 if one does not hold."
)
@click.option("--stamp", is_flag=True, help="Write the verdict into each plan's header; calibatt-inspect shows it.")
@click.option(
    "--quick",
    is_flag=True,
    help="Only: does a plan still fit the model? A few times of one or two samplings.",
)
@one_line(NAME)
def main(**options: Any) -> None:
    """Judges plans on prompts never calibrated on.

    \b
    1. every prompt is generated dense and under each plan, from the same noise: signal-to-noise of the final latent,
       then PSNR, SSIM, flicker and LPIPS of the video, where the sampler can decode it;
    2. the floor: the same between two exact dense kernels;
    3. what every head does to the final latent, measured by differentiating dense samplings as calibration does,
       against what calibration promised;
    4. OUTPUT/report.json, and OUTPUT/report.html, one file with the worst cases first.

    Run it again to continue where it stopped: what is measured is not measured again.

    A head's squared effect is what it alone does to the final latent, squared and relative to its size. A head is
    *broken* if that is ten times what calibration promised, and what is beyond that at least 2 % of the whole plan's.
    --quick measures the same on few times: a LoRA or a distilled model may need a plan of its own.
    """
    from calibatt.tools.evaluate.command import run  # torch, which --help does without

    run(**options)


if __name__ == "__main__":
    main(prog_name=NAME)
