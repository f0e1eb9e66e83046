"""Trains the demo model on a GPU within a time budget; so the weights in tools/demo_model and in its grown/ were made:

    python -m calibatt.tools.studies.train --seconds 940 --part-seconds 500 --checkpoint demo.pt -o out/     # twice
    python -m calibatt.tools.studies.train --from tools/demo_model/weights.safetensors --size medium --seconds 90 \\
        -o medium/
    python -m calibatt.tools.studies.train --from medium/weights.safetensors --size large --size medium --seconds 130 \\
        -o large/

Rectified flow on videos rendered on the fly. The matrices of the blocks are trained by Muon (orthogonalised momentum,
K. Jordan et al. 2024), everything else by AdamW; exponential moving average of the weights. From nothing, the first
part of the time goes to short clips; with --from, training goes on from averaged weights with fresh momenta and a
quarter of the rates, so that it can be spread over any number of days. Several sizes take turns, a step each. Writes
weights.safetensors (every minute, too), train.json (loss curve, settings, checks), a picture of the curve and a sample
sheet of every size.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from calibatt.plans.files import whole_file, write_text
from calibatt.tools.bench.options import file_option
from calibatt.tools.bench.record import header
from calibatt.tools.demo_model import world
from calibatt.tools.demo_model.model import STEPS, DemoModel, generate
from calibatt.tools.inspect_plan.drawing import save_figure
from calibatt.tools.studies import rendering
from calibatt.tools.studies.options import FILE, TRAINING, study_command

NAME = "python -m calibatt.tools.studies.train"
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
MUON_RATE, MUON_MOMENTUM = 3e-3, 0.95
ADAM_RATE, ADAM_BETAS = 1.5e-3, (0.9, 0.98)
DECAY = 0.01
EMA = 0.998
WARMUP_STEPS = 150
COOLDOWN_SHARE = 0.5
SHORT_SHARE, SHORT_FRAMES, SHORT_BATCH = 0.15, 2, 128
BATCH_TOKENS = 32 * 4608
CONTINUED_RATE, CONTINUED_WARMUP_STEPS, CONTINUED_EMA, CONTINUED_COOLDOWN = 0.25, 40, 0.99, 0.7
"""Of training that goes on from trained weights."""
TELL_SECONDS, SAVE_SECONDS = 10, 60
CHECK_BATCH_TOKENS = 16 * 16384


class Muon:
    """Momentum whose update is orthogonalised by five Newton-Schulz steps, batched over equal shapes."""

    def __init__(self, parameters: list[Tensor]):
        self.groups: dict[tuple[int, ...], list[Tensor]] = {}
        for parameter in parameters:
            self.groups.setdefault(tuple(parameter.shape), []).append(parameter)
        self.momentum = {s: torch.zeros(len(g), *s, device=g[0].device) for s, g in self.groups.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, group in self.groups.items():
            gradient, momentum = torch.stack([p.grad for p in group]), self.momentum[shape]
            momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
            x = gradient.lerp(momentum, MUON_MOMENTUM).bfloat16()
            tall = shape[0] > shape[1]
            x = x.mT if tall else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
            x = (x.mT if tall else x).float() * (0.2 * max(shape) ** 0.5)
            torch._foreach_mul_(group, 1 - rate * DECAY)
            torch._foreach_add_(group, list(x.unbind(0)), alpha=-rate)


def draw_times(count: int, generator: torch.Generator, shift: float) -> Tensor:
    """Times ``(count,)`` in (0, 1]: mostly logit-normal, a fifth uniform, shifted towards noise like the sampler's."""
    device = generator.device
    centre = torch.sigmoid(torch.randn(count, generator=generator, device=device))
    even = torch.rand(count, generator=generator, device=device)
    pick = torch.rand(count, generator=generator, device=device) < 0.2
    even = 2 * shift * even / (1 + (2 * shift - 1) * even)
    centre = shift * centre / (1 + (shift - 1) * centre)
    return torch.where(pick, even, centre).clamp(0.001, 1)


def sheet(video: Tensor, path: Path) -> None:
    """Writes videos ``(n, 3, F, H, W)`` as a picture, a row each."""
    from PIL import Image

    framed = torch.nn.functional.pad(video.float().cpu().clamp(-1, 1), (1, 1, 1, 1), value=1.0)
    rows = torch.cat([torch.cat(list(one.transpose(0, 1)), 2) for one in framed], 1)
    picture = ((rows + 1) * 127.5).byte().permute(1, 2, 0)
    scale = 2 if video.shape[-1] <= 48 else 1
    picture = picture.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    Image.fromarray(picture.numpy()).save(path, optimize=True)


def draw_loss(record: dict, path: Path) -> None:
    """Draws the loss curve of train.json; short clips and videos of every grid are different tasks: a line each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for kind in dict.fromkeys(row[2] for row in record["loss"]):
        part = [row for row in record["loss"] if row[2] == kind]
        axes.plot([row[1] for row in part], [row[3] for row in part], label=kind)
    axes.set(xlabel="step", ylabel="mean squared velocity error", yscale="log")
    axes.set_title(f"Training of the demo model: {record['seconds']:.0f} s on one {record['device']}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    save_figure(figure, path)


def save_model(path: Path, model: DemoModel, **notes: object) -> None:
    """Writes bfloat16 weights with the configuration, the clip and its shift; the file is whole or absent."""
    tensors = {name: p.detach().to(torch.bfloat16).contiguous().cpu() for name, p in model.state_dict().items()}
    about = {"config": model.config, "clip": dataclasses.asdict(model.clip), "shift": model.shift, "notes": notes}
    with whole_file(path) as file:
        file.write(save(tensors, {name: json.dumps(value) for name, value in about.items()}))


def drawn(model: DemoModel, prompts: list[str], first_seed: int, steps: int = STEPS, **options: bool) -> Tensor:
    """Videos of prompts on the CPU, some at a time; see `generate`."""
    batch = max(1, CHECK_BATCH_TOKENS // model.grid.tokens)
    parts = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        seeds = list(range(first_seed + start, first_seed + start + len(some)))
        parts.append(generate(model, some, seeds, steps, **options).cpu())
    return torch.cat(parts)


def check(model: DemoModel, count: int = 64, steps: int = STEPS, **options: bool) -> dict[str, float | None]:
    """Rates of right colour, shape and direction over held-out prompts; see `generate` for the options."""
    scenes = world.scenes(count, torch.Generator().manual_seed(77), test=True)
    video = drawn(model, [world.sentence(scene) for scene in scenes], 9000, steps, **options)
    return rendering.measure(video, scenes).rates()


def sample_prompts(count: int = 8) -> list[str]:
    """Held-out prompts of the sample sheets."""
    return [world.sentence(scene) for scene in world.scenes(count, torch.Generator().manual_seed(78), test=True)]


class Training:
    """A model, its average, and the optimisers that train it.

    Args:
        model: The model, on its device.
        rate: What the rates are multiplied with.
        warmup_steps: Steps over which they rise.
        ema: Decay of the average.
    """

    def __init__(self, model: DemoModel, rate: float, warmup_steps: int, ema: float) -> None:
        self.model, self.rate, self.warmup_steps, self.ema, self.step = model, rate, warmup_steps, ema, 0
        self.device = next(model.parameters()).device.type
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        matrices = [p for n, p in model.named_parameters() if ".blocks." in n and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        self.rest = [p for p in model.parameters() if id(p) not in chosen]
        fused = self.device == "cuda"
        self.adam = torch.optim.AdamW(self.rest, lr=ADAM_RATE, betas=ADAM_BETAS, weight_decay=DECAY, fused=fused)
        self.muon = Muon(matrices)

    def state(self) -> dict[str, Any]:
        kept = {"model": self.model.state_dict(), "average": self.average.state_dict(), "adam": self.adam.state_dict()}
        return kept | {"muon": list(self.muon.momentum.values()), "step": self.step}

    def load_state(self, kept: dict[str, Any]) -> None:
        self.model.load_state_dict(kept["model"]), self.average.load_state_dict(kept["average"])
        self.adam.load_state_dict(kept["adam"])
        self.muon.momentum = dict(zip(self.muon.momentum, kept["muon"], strict=True))
        self.step = kept["step"]

    def learn(self, batch: int, frames: int | None, generator: torch.Generator, cooling: float) -> Tensor:
        """One step on fresh videos of the model's clip; the loss.

        Args:
            batch: Videos.
            frames: Of each; all of the clip's if absent.
            generator: Of scenes, videos, noise and times.
            cooling: Of the rates, from 0 to 1 at the end.
        """
        rate = self.rate * min(1.0, (self.step + 1) / self.warmup_steps) * max(0.01, 1 - cooling)
        scenes = world.scenes(batch, generator)
        video = rendering.render(scenes, generator, self.model.clip, frames)
        noise = torch.randn(video.shape, generator=generator, device=self.device)
        now = draw_times(batch, generator, self.model.shift)
        mixed = torch.lerp(video, noise, now.view(-1, 1, 1, 1, 1))
        with torch.autocast(self.device, torch.bfloat16), sdpa_kernel(ATTENTION, set_priority=True):
            velocity = self.model(mixed, now, rendering.scene_words(scenes))
        loss = (velocity.float() - (noise - video)).pow(2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = ADAM_RATE * rate
        self.adam.step()
        self.muon.step(MUON_RATE * rate)
        self.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            averaged, every = list(self.average.parameters()), list(self.model.parameters())
            torch._foreach_lerp_(averaged, every, 1 - min(self.ema, (self.step + 1) / (self.step + 20)))
        self.step += 1
        return loss.detach()


class Curve:
    """Mean losses of every kind of batch, told every few seconds."""

    def __init__(self, rows: list[list[Any]]) -> None:
        self.rows, self.since = rows, time.time()
        self.sums: dict[str, list[Any]] = {}

    def add(self, kind: str, loss: Tensor, batch: int) -> None:
        total, steps, videos = self.sums.get(kind, (0.0, 0, 0))
        self.sums[kind] = [total + loss, steps + 1, videos + batch]

    def tell(self, elapsed: float, step: int, *, at_once: bool = False) -> None:
        if not at_once and time.time() - self.since < TELL_SECONDS:
            return
        for kind, (total, steps, videos) in self.sums.items():
            mean = float(total) / steps
            self.rows.append([round(elapsed, 1), step, kind, round(mean, 5)])
            speed = videos / (time.time() - self.since)
            click.echo(f"{elapsed:6.1f} s  step {step}  {kind}  loss {mean:.4f}  {speed:.1f} videos/s")
        self.sums, self.since = {}, time.time()


@study_command(NAME, __doc__)
@click.option("--seconds", default=960.0, show_default=True, help="Training time over all parts.")
@click.option("--part-seconds", default=0.0, help="Stop after this long, keeping a checkpoint (0: never).")
@file_option("--checkpoint", text="Where to keep and find the checkpoint.")
@click.option("--from", "start", type=FILE, help="Weights to go on from.")
@click.option("--size", "sizes", type=click.Choice(list(world.CLIPS)), multiple=True, default=("small",))
@TRAINING
def main(
    seconds: float,
    part_seconds: float,
    checkpoint: Path | None,
    start: Path | None,
    sizes: tuple[str, ...],
    output: Path,
    seed: int,
    check_prompts: int,
    device: torch.device,
) -> None:
    began = time.time()
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    if start:
        model = DemoModel.load(start).requires_grad_(True)
        training = Training(model.to(device).train(), CONTINUED_RATE, CONTINUED_WARMUP_STEPS, CONTINUED_EMA)
    else:
        model = DemoModel()
        torch.nn.init.zeros_(model.transformer.proj_out.weight)
        torch.nn.init.zeros_(model.transformer.proj_out.bias)
        training = Training(model.to(device).train(), 1.0, WARMUP_STEPS, EMA)
    generator = torch.Generator(device=device).manual_seed(seed)
    before, seen, curve = 0.0, dict.fromkeys(("short", *sizes), 0), Curve([])
    if checkpoint and checkpoint.exists():
        kept = torch.load(checkpoint, map_location=device, weights_only=True)
        training.load_state(kept)
        generator.set_state(kept["generator"].cpu())
        before, seen, curve = kept["elapsed"], kept["seen"], Curve(kept["curve"])
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch._dynamo.config.recompile_limit = 64
        for block in model.transformer.blocks:
            block.compile(dynamic=False)
    cooldown = CONTINUED_COOLDOWN if start else COOLDOWN_SHARE
    weights, saved = output / "weights.safetensors", time.time()

    def save() -> None:
        training.average.set_clip(world.CLIPS[sizes[0]])
        save_model(weights, training.average, seed=seed, seconds=seconds, steps=training.step, videos=seen)

    while (elapsed := before + time.time() - began) <= seconds:
        if part_seconds and time.time() - began > part_seconds:
            break
        short = not start and elapsed < SHORT_SHARE * seconds
        kind = "short" if short else sizes[training.step % len(sizes)]
        clip = world.CLIPS[sizes[0] if short else kind]
        if clip != model.clip:
            model.set_clip(clip)
        batch = SHORT_BATCH if short else max(1, BATCH_TOKENS // model.grid.tokens)
        cooling = max(0.0, (elapsed / seconds - (1 - cooldown)) / cooldown)
        loss = training.learn(batch, SHORT_FRAMES if short else None, generator, cooling)
        seen[kind] += batch
        curve.add(kind, loss, batch)
        curve.tell(elapsed, training.step)
        if time.time() - saved > SAVE_SECONDS:
            save()
            saved = time.time()
    curve.tell(elapsed, training.step, at_once=True)
    if checkpoint:
        kept = training.state() | {"generator": generator.get_state(), "elapsed": elapsed, "curve": curve.rows}
        torch.save(kept | {"seen": seen}, checkpoint)
    save()
    record = header(NAME, device) | {"from": start.name if start else None, "seed": seed, "seconds": seconds}
    record |= {"steps": training.step, "videos": seen, "checks": {}, "loss": curve.rows}
    record["loss_columns"] = ["seconds", "step", "videos of", "mean velocity error"]
    write_text(output / "train.json", json.dumps(record, indent=1) + "\n")
    draw_loss(record, output / "loss.png")
    write_text(output / "samples.txt", "\n".join(sample_prompts()) + "\n")
    dtype = torch.bfloat16 if start and on_gpu else torch.float32
    for size in sizes:
        final = DemoModel.load(weights, device, world.CLIPS[size], dtype)
        sheet(drawn(final, sample_prompts(), 100), output / f"samples_{size}.png")
        record["checks"][size] = check(final, check_prompts)
        click.echo(f"{time.time() - began:6.1f} s  {size}, {STEPS} steps, held out: {record['checks'][size]}")
        write_text(output / "train.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
