"""Judges the demo model and a plan on prompts that neither training nor calibration saw.

    python -m calibatt.tools.demo.quality plans/demo.plan -o docs/benchmarks/demo_quality.json

Generates every prompt dense, planned, and dense by a second exact kernel (the floor: what no plan can beat), measures
what the videos show against what the prompts say, and how concentrated attention is in the trained model and in the
same architecture before training.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import sys
from pathlib import Path

import click
import torch
from rich.progress import track
from torch import Tensor

from calibatt.plans import Blocks
from calibatt.runtime import Plan, load_plan
from calibatt.runtime.adapters import adapter_for
from calibatt.runtime.intercept import Attend, InterceptedSite, Interception
from calibatt.tools.calibrate.statistics import block_statistics, keep_planes
from calibatt.tools.demo import measure, world
from calibatt.tools.demo.model import STEPS, DemoModel, generate, times

FIRST_SEED = 5000
MASS = 0.95
QUERY_STRIDE = 8


def second_kernel(q: Tensor, k: Tensor, v: Tensor, site: InterceptedSite, context: object) -> Tensor:
    """Dense attention ``(B, N, H, D)`` written out, a head at a time: exact, but with sums in another order."""
    out = torch.empty_like(q)
    for sample in range(len(q)):
        for head in range(q.shape[2]):
            scores = q[sample, :, head].float() @ k[sample, :, head].float().T * q.shape[-1] ** -0.5
            out[sample, :, head] = torch.softmax(scores, -1).to(v.dtype) @ v[sample, :, head]
    return out


def generate_through(model: DemoModel, attend: Attend, prompts: list[str], seeds: list[int]) -> Tensor:
    """`generate` with every self-attention call sent through `attend`."""
    interception = Interception(model.transformer, adapter_for(model.transformer), attend)
    try:
        return generate(model, prompts, seeds)
    finally:
        interception.detach()


def density_at_mass(model: DemoModel, prompt: str, seed: int, blocks: Blocks) -> list[list[float]]:
    """Share of key blocks that hold `MASS` of the attention, [layer][head], mean over the sampler's times."""
    layers = model.config["num_layers"]
    found: list[list[Tensor]] = [[] for _ in range(layers)]

    def attend(q: Tensor, k: Tensor, v: Tensor, site: InterceptedSite, context: object) -> Tensor:
        heads = [x[0].transpose(0, 1) for x in (q, k, v)]
        mass, _ = block_statistics(heads[0], heads[1], heads[2].float(), blocks, QUERY_STRIDE)
        found[site.layer].append(keep_planes(mass, (MASS,))[0].float().mean((1, 2)))
        return site.stock(q, k, v)

    generate_through(model, attend, [prompt], [seed])
    return [[round(float(x), 3) for x in torch.stack(layer).mean(0)] for layer in found]


def summary(values: list[float]) -> dict[str, float]:
    """Mean, standard error, least."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {
        "mean": round(statistics.mean(values), 2),
        "standard_error": round(error, 2),
        "least": round(min(values), 2),
    }


def judge(model: DemoModel, plan: Plan, count: int) -> dict:
    """Everything this file is about, ready for JSON; see the module's docstring."""
    prompts = measure.held_out_prompts(count)
    scenes = torch.stack([world.parse(prompt) for prompt in prompts])
    dense, planned, planned_db, floor_db = [], [], [], []
    for seed, prompt in enumerate(track(prompts, "held-out prompts"), FIRST_SEED):
        (pair,) = measure.pairs(model, plan, [prompt], seed, lambda _: None)
        exact = generate_through(model, second_kernel, [prompt], [seed])[0].cpu()
        dense.append(pair.dense)
        planned.append(pair.planned)
        planned_db.append(pair.psnr_db)
        floor_db.append(float(measure.psnr_db(exact[None], pair.dense[None])))
    calls = measure.attention_ms(model, plan, prompts[0], FIRST_SEED)
    (dense_ms, dense_spread), (planned_ms, planned_spread) = measure.total_ms(calls, 0), measure.total_ms(calls, 1)
    torch.manual_seed(0)
    untrained = DemoModel(model.config).to(next(model.parameters()).device).eval().requires_grad_(False)
    return {
        "executed_density": round(measure.executed_density(plan, times()[:-1].tolist()), 4),
        "psnr_db": summary(planned_db),
        "floor_db": summary(floor_db),
        "psnr_db_by_prompt": dict(zip(prompts, [round(x, 2) for x in planned_db], strict=True)),
        "attention_ms_of_one_video": {
            "dense": round(dense_ms, 1),
            "dense_spread": round(dense_spread, 1),
            "planned": round(planned_ms, 1),
            "planned_spread": round(planned_spread, 1),
        },
        "right": {
            "dense": world.measure(torch.stack(dense), scenes).rates(),
            "planned": world.measure(torch.stack(planned), scenes).rates(),
        },
        "density_at_mass_0.95_by_layer_and_head": {
            "trained": density_at_mass(model, prompts[0], FIRST_SEED, plan.blocks),
            "untrained": density_at_mass(untrained, prompts[0], FIRST_SEED, plan.blocks),
        },
    }


@click.command(help=__doc__)
@click.argument("plan", type=click.Path(exists=True, path_type=Path))
@click.option("--prompts", type=click.IntRange(1), default=32, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
def main(plan: Path, prompts: int, device: str, output: Path) -> None:
    model = DemoModel.load(device=device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    about = {
        "command": " ".join(["python -m calibatt.tools.demo.quality", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "prompts": prompts,
        "steps": STEPS,
    }
    found = judge(model, load_plan(plan), prompts)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**about, **found}, indent=1) + "\n")
    click.echo(f"density {found['executed_density']}, {found['psnr_db']} dB, floor {found['floor_db']} dB: {output}")


if __name__ == "__main__":
    main()
