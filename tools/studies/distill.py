"""Trains a LoRA with which the demo model samples in four steps what it samples in eight, on a GPU.

    python -m calibatt.tools.studies.distill --seconds 50 -o out/

Progressive distillation (Salimans and Ho, 2022): one Euler step of the student is to arrive where two of the teacher's
arrive, on the demo's own schedule; the teacher is the demo model without the LoRA. Both begin from rendered videos
mixed with noise, and every other time from videos that the student itself has sampled down from noise. Writes
few_steps.safetensors, distill.json (settings, loss curve, held-out checks of teacher and student) and a sample sheet.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from calibatt.plans.files import whole_file, write_text
from calibatt.tools.bench.options import count_option
from calibatt.tools.bench.record import header
from calibatt.tools.demo_model import world
from calibatt.tools.demo_model.model import FEW, LORA, STEPS, WEIGHTS, DemoModel, times
from calibatt.tools.studies import rendering
from calibatt.tools.studies.options import FILE, TRAINING, study_command
from calibatt.tools.studies.train import ATTENTION, Curve, check, drawn, sample_prompts, sheet

NAME = "python -m calibatt.tools.studies.distill"
RANK = 12
TARGETS = [f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")]
TARGETS += ["ffn.net.0.proj", "ffn.net.2"]
RATE, BETAS = 1e-3, (0.9, 0.98)
WARMUP_STEPS = 20
COOLDOWN_SHARE = 0.6
BATCH = 16


@contextmanager
def teaching(model: DemoModel) -> Iterator[None]:
    """The model without its LoRA."""
    model.transformer.disable_lora()
    try:
        yield
    finally:
        model.transformer.enable_lora()


def velocity(model: DemoModel, video: Tensor, now: Tensor, words: Tensor) -> Tensor:
    """In bfloat16, as float32."""
    with torch.autocast(video.device.type, torch.bfloat16), sdpa_kernel(ATTENTION, set_priority=True):
        return model(video, now, words).float()


@torch.no_grad()
def two_steps(model: DemoModel, mixed: Tensor, now: Tensor, middle: Tensor, then: Tensor, words: Tensor) -> Tensor:
    """The mean velocity of two Euler steps of the teacher from time `now` by `middle` to `then`, each ``(n,)``."""

    def wide(x: Tensor) -> Tensor:
        return x.view(-1, 1, 1, 1, 1)

    with teaching(model):
        first = velocity(model, mixed, now, words)
        there = mixed + wide(middle - now) * first
        second = velocity(model, there, middle, words)
    return (wide(middle - now) * first + wide(then - middle) * second) / wide(then - now)


@torch.no_grad()
def begin(model: DemoModel, start: int, own: bool, words: Tensor, video: Tensor, noise: Tensor) -> Tensor:
    """Videos at the time of the student's step `start`: mixed with noise, or sampled down to it by the student."""
    grid = times(FEW, model.shift).tolist()
    if not own:
        return torch.lerp(video, noise, grid[start])
    for now, then in itertools.pairwise(grid[: start + 1]):
        at = torch.full((len(noise),), now, device=noise.device)
        noise = noise + (then - now) * velocity(model, noise, at, words)
    return noise


def lora_of(model: DemoModel, start: Path | None = None) -> list[Tensor]:
    """Gives the model a LoRA to train, a new one or that of a file: its weights."""
    if start:
        model.load_lora(start)
    else:
        model.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), LORA)
    return [p.requires_grad_(True) for name, p in model.transformer.named_parameters() if "lora_" in name]


def save_lora(path: Path, model: DemoModel) -> None:
    """Writes the LoRA in bfloat16; the file is whole or absent."""
    found = get_peft_model_state_dict(model.transformer, adapter_name=LORA)
    tensors = {f"transformer.{name}": p.to(torch.bfloat16).contiguous().cpu() for name, p in found.items()}
    with whole_file(path) as file:
        file.write(save(tensors, {"format": "pt"}))


@study_command(NAME, __doc__)
@click.option("--seconds", default=90.0, show_default=True, help="Training time, without checks.")
@click.option("--weights", type=FILE, default=WEIGHTS, help="The model's.")
@click.option("--from", "start", type=FILE, help="A LoRA to go on from.")
@count_option("--batch", BATCH, "Videos of a step.")
@TRAINING
def main(
    seconds: float,
    weights: Path,
    start: Path | None,
    batch: int,
    output: Path,
    seed: int,
    check_prompts: int,
    device: torch.device,
) -> None:
    began = time.time()
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = DemoModel.load(weights, device)
    learned = lora_of(model, start)
    with teaching(model):
        checks = {f"without, {steps} steps": check(model, check_prompts, steps) for steps in (STEPS, FEW)}
    click.echo(f"{time.time() - began:6.1f} s  held out: {checks}")
    adam = torch.optim.AdamW(learned, lr=RATE, betas=BETAS, weight_decay=0.0, fused=device.type == "cuda")
    average = [parameter.detach().clone() for parameter in learned]
    generator = torch.Generator(device=device).manual_seed(seed)
    grid = times(STEPS, model.shift).to(device)
    step, curve, since = 0, Curve([]), time.time()
    while (elapsed := time.time() - since) <= seconds:
        cooling = max(0.0, (elapsed / seconds - (1 - COOLDOWN_SHARE)) / COOLDOWN_SHARE)
        for group in adam.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP_STEPS) * max(0.01, 1 - cooling)
        at, own = step % FEW, step // FEW % 2 == 1
        scenes = world.scenes(batch, generator)
        video, words = rendering.render(scenes, generator, model.clip), rendering.scene_words(scenes)
        noise = torch.randn(video.shape, generator=generator, device=device)
        mixed = begin(model, at, own, words, video, noise)
        now, middle, then = (grid[2 * at + i].expand(batch) for i in range(3))
        target = two_steps(model, mixed, now, middle, then, words)
        loss = (velocity(model, mixed, now, words) - target).pow(2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, learned, 1 - min(0.99, (step + 1) / (step + 20)))
        step += 1
        curve.add(f"step {at + 1} of {FEW}", loss.detach(), batch)
        curve.tell(elapsed, step)
    curve.tell(elapsed, step, at_once=True)
    with torch.no_grad():
        torch._foreach_copy_(learned, average)
    path = output / "few_steps.safetensors"
    save_lora(path, model)
    model = DemoModel.load(weights, device).load_lora(path)
    for name, new_noise in (("Euler", False), ("new noise", True)):
        found = check(model, check_prompts, FEW, new_noise=new_noise)
        checks[f"with the LoRA, {FEW} steps, {name}"] = found
        click.echo(f"{time.time() - began:6.1f} s  with the LoRA, {FEW} steps, {name}: {found}")
    record = header(NAME, device) | {"seed": seed, "seconds": seconds, "steps": step, "batch": batch, "rank": RANK}
    record |= {"checks": checks}
    record |= {"loss": curve.rows, "loss_columns": ["seconds", "step", "step of the schedule", "mean velocity error"]}
    write_text(output / "distill.json", json.dumps(record, indent=1) + "\n")
    sheet(drawn(model, sample_prompts(), 100, FEW), output / "samples_few_steps.png")


if __name__ == "__main__":
    main()
