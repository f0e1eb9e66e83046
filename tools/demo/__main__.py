"""The whole chain on the demo model, with the commands a user would type."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import click
from rich.console import Console

from calibatt.plans import PlanFile
from calibatt.plans.command import one_line
from calibatt.tools.calibrate.models import FIRST_SEED
from calibatt.tools.calibrate.progress import steps as progress_of

NAME = "calibatt-demo"
console = Console()


def _run(module: str, name: str, arguments: list[str]) -> None:
    """Runs one of our commands as the user would, and stops with its exit code if it fails."""
    console.print(f"\n$ {name} {shlex.join(arguments)}", style="bold", markup=False, highlight=False)
    code = subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode
    if code:
        raise SystemExit(code)


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    show_default=True,
    help="Folder for statistics, plan and report.",
)
@click.option("--calibration-prompts", type=click.IntRange(1), default=4, show_default=True)
@click.option("--held-out-prompts", type=click.IntRange(1), default=2, show_default=True)
@click.option("--few-steps", is_flag=True, help="The model distilled to four steps: a LoRA beside its weights.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto: cuda where there is one.")
@one_line(NAME, ValueError)
def main(output: Path, calibration_prompts: int, held_out_prompts: int, few_steps: bool, device: str) -> None:
    """Calibrates a small video model, compiles a plan, attaches it and shows the difference.

    \b
    1. calibatt-calibrate samples a few prompts and differentiates them: what every block of attention does to the video
       (resumes where it was stopped);
    2. calibatt-compile turns the statistics into a plan, and predicts what it will do;
    3. prompts that were never calibrated on are generated dense and on the plan, from the same noise;
    4. everything is shown in OUTPUT/report.html, one file that needs nothing else.
    """
    from calibatt.runtime import load_plan  # torch, which --help does without
    from calibatt.tools.calibrate.work import pick_device
    from calibatt.tools.demo import measure, report
    from calibatt.tools.demo_model.model import trained
    from calibatt.tools.evaluate.harness import about, executed_density

    device = pick_device(device)
    output.mkdir(parents=True, exist_ok=True)
    stats, path = output / "stats", output / "demo.plan"
    name = "demo-few-steps" if few_steps else "demo"
    calibrate = ["--model", name, "--samples", str(calibration_prompts), "--device", device, "-o", str(stats)]
    _run("calibatt.tools.calibrate", "calibatt-calibrate", calibrate)
    _run("calibatt.compiler.cli", "calibatt-compile", [str(stats), "-o", str(path), "--force"])
    _run("calibatt.tools.inspect_plan", "calibatt-inspect", [str(path)])

    (model, _), plan = trained(name, device), load_plan(path)
    prompts = measure.held_out_prompts(held_out_prompts)
    console.print(f"\n[bold]{held_out_prompts} held-out prompts, dense and planned[/bold]")
    with progress_of("generating", len(prompts), console) as shown:
        pairs = measure.pairs(model, plan, prompts, FIRST_SEED, lambda: shown.advance(1))
    for pair in pairs:
        console.print(f"{pair.latent_db:5.1f} dB latent SNR, {pair.psnr_db:5.1f} dB PSNR  {pair.prompt}")
    with console.status("timing attention, dense and planned in turn"):
        calls = measure.attention_ms(model, plan, prompts[0], FIRST_SEED)
    (dense, dense_spread), (planned, planned_spread) = measure.total_ms(calls, 0), measure.total_ms(calls, 1)
    density = executed_density(plan, model.times()[:-1].tolist())
    console.print(
        f"executed density {density:.3f}; attention of one video: {dense:.0f} ms dense, {planned:.0f} ms planned"
    )
    facts = {
        "density": density,
        "dense_ms": dense,
        "dense_spread_ms": dense_spread,
        "planned_ms": planned,
        "planned_spread_ms": planned_spread,
        **about(NAME, model),
        "command": f"{NAME} --few-steps" if few_steps else NAME,
    }
    target = output / "report.html"
    report.write_report(target, PlanFile.read(path), path.name, pairs, facts)
    console.print(f"\n[bold green]Open {target} in a browser.[/bold green]")


if __name__ == "__main__":
    main(prog_name=NAME)
