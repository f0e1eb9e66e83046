"""Trains the demo model on a GPU within a time budget; one command made the weights in this folder.

    python -m calibatt.tools.demo.train --seconds 940 --part-seconds 500 --checkpoint demo.pt -o out/     # twice

Rectified flow on videos rendered on the fly. The matrices of the blocks are trained by Muon (orthogonalised momentum,
K. Jordan et al. 2024), everything else by AdamW; exponential moving average of the weights. The first part of the time
goes to short clips. Writes weights.safetensors, train.json (loss curve, settings, checks), a picture of the curve and
a sample sheet.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import click
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from calibatt.plans.files import whole_file, write_text
from calibatt.tools.demo import world
from calibatt.tools.demo.model import DemoModel, generate

ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
MUON_RATE, MUON_MOMENTUM = 3e-3, 0.95
ADAM_RATE, ADAM_BETAS = 1.5e-3, (0.9, 0.98)
DECAY = 0.01
EMA = 0.998
WARMUP_STEPS = 150
COOLDOWN_SHARE = 0.5
SHORT_SHARE, SHORT_FRAMES, SHORT_BATCH = 0.15, 2, 128
BATCH = 32


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


def draw_times(count: int, generator: torch.Generator) -> Tensor:
    """Times ``(count,)`` in (0, 1]: mostly logit-normal, a fifth uniform, shifted towards noise like the sampler's."""
    device = generator.device
    centre = torch.sigmoid(torch.randn(count, generator=generator, device=device))
    even = torch.rand(count, generator=generator, device=device)
    pick = torch.rand(count, generator=generator, device=device) < 0.2
    even, centre = 6 * even / (1 + 5 * even), 3 * centre / (1 + 2 * centre)
    return torch.where(pick, even, centre).clamp(0.001, 1)


def sheet(video: Tensor, path: Path, scale: int = 2) -> None:
    """Writes videos ``(n, 3, F, H, W)`` as a picture, a row each."""
    from PIL import Image

    framed = torch.nn.functional.pad(video.float().cpu().clamp(-1, 1), (1, 1, 1, 1), value=1.0)
    rows = torch.cat([torch.cat(list(one.transpose(0, 1)), 2) for one in framed], 1)
    picture = ((rows + 1) * 127.5).byte().permute(1, 2, 0)
    picture = picture.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    Image.fromarray(picture.numpy()).save(path, optimize=True)


def draw_loss(record: dict, path: Path) -> None:
    """Draws the loss curve of train.json; short clips and full videos are different tasks, hence two lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for frames in sorted({row[2] for row in record["loss"]}):
        part = [row for row in record["loss"] if row[2] == frames]
        axes.plot([row[1] for row in part], [row[3] for row in part], label=f"{frames} frames")
    axes.set(xlabel="step", ylabel="mean squared velocity error", yscale="log")
    axes.set_title(f"Training of the demo model: {record['seconds']:.0f} s on one {record['device']}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    with whole_file(path) as file:
        figure.savefig(file, dpi=120, facecolor="white", format="png")


def check(model: DemoModel, count: int, steps: int) -> dict[str, float]:
    """Rates of right colour, shape and direction over held-out prompts."""
    scenes = world.scenes(count, torch.Generator().manual_seed(77), test=True)
    prompts = [world.sentence(scene) for scene in scenes]
    video = generate(model, prompts, list(range(9000, 9000 + count)), steps)
    return world.measure(video.cpu(), scenes).rates()


@click.command(help=__doc__)
@click.option("--seconds", default=960.0, show_default=True, help="Training time over all parts.")
@click.option("--part-seconds", default=0.0, help="Stop after this long, keeping a checkpoint (0: never).")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Where to keep and find the checkpoint.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--device", default="cuda", show_default=True)
def main(seconds: float, part_seconds: float, checkpoint: Path | None, output: Path, seed: int, device: str) -> None:
    began = time.time()
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = DemoModel()
    torch.nn.init.zeros_(model.transformer.proj_out.weight)
    torch.nn.init.zeros_(model.transformer.proj_out.bias)
    model = model.to(device).train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    matrices = [p for n, p in model.named_parameters() if ".blocks." in n and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(rest, lr=ADAM_RATE, betas=ADAM_BETAS, weight_decay=DECAY, fused=device == "cuda")
    muon = Muon(matrices)
    generator = torch.Generator(device=device).manual_seed(seed)
    step, before, curve, seen = 0, 0.0, [], {"short": 0, "full": 0}
    if checkpoint and checkpoint.exists():
        kept = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(kept["model"]), average.load_state_dict(kept["average"])
        adam.load_state_dict(kept["adam"]), generator.set_state(kept["generator"].cpu())
        muon.momentum = dict(zip(muon.momentum, kept["muon"], strict=True))
        step, before, curve, seen = kept["step"], kept["elapsed"], kept["curve"], kept["seen"]
    if device == "cuda":
        for block in model.transformer.blocks:
            block.compile(dynamic=False)
    every, averaged = list(model.parameters()), list(average.parameters())
    total, since, counted = torch.zeros((), device=device), time.time(), 0
    while True:
        elapsed = before + time.time() - began
        if elapsed > seconds or (part_seconds and time.time() - began > part_seconds):
            break
        short = elapsed < SHORT_SHARE * seconds
        frames, batch = (SHORT_FRAMES, SHORT_BATCH) if short else (world.FRAMES, BATCH)
        cooling = max(0.0, (elapsed / seconds - (1 - COOLDOWN_SHARE)) / COOLDOWN_SHARE)
        rate = min(1.0, (step + 1) / WARMUP_STEPS) * max(0.01, 1 - cooling)
        scenes = world.scenes(batch, generator)
        video = world.render(scenes, generator, frames)
        noise = torch.randn(video.shape, generator=generator, device=device)
        now = draw_times(batch, generator)
        mixed = torch.lerp(video, noise, now.view(-1, 1, 1, 1, 1))
        with torch.autocast(device, torch.bfloat16), sdpa_kernel(ATTENTION, set_priority=True):
            velocity = model(mixed, now, world.scene_words(scenes))
        loss = (velocity.float() - (noise - video)).pow(2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for group in adam.param_groups:
            group["lr"] = ADAM_RATE * rate
        adam.step()
        muon.step(MUON_RATE * rate)
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(averaged, every, 1 - min(EMA, (step + 1) / (step + 20)))
        total += loss.detach()
        counted, step = counted + 1, step + 1
        seen["short" if short else "full"] += batch
        if step % 20 == 0 and time.time() - since > 10:
            mean = float(total / counted)
            curve.append([round(elapsed, 1), step, frames, round(mean, 5)])
            speed = counted * batch / (time.time() - since)
            click.echo(f"{elapsed:6.1f} s  step {step}  {frames} frames  loss {mean:.4f}  {speed:.0f} videos/s")
            total.zero_()
            counted, since = 0, time.time()
    if checkpoint:
        kept = {"model": model.state_dict(), "average": average.state_dict(), "adam": adam.state_dict()}
        kept |= {"muon": list(muon.momentum.values()), "generator": generator.get_state(), "step": step}
        torch.save(kept | {"elapsed": elapsed, "curve": curve, "seen": seen}, checkpoint)
    average.save(output / "weights.safetensors", seed=seed, seconds=seconds, steps=step, videos=seen)
    final = DemoModel.load(output / "weights.safetensors", device)
    checks = {str(steps): check(final, 64, steps) for steps in (8, 12)}
    click.echo(f"after {step} steps, {seen} videos: held-out checks by sampling steps {checks}")
    name = torch.cuda.get_device_name() if device == "cuda" else device
    record = {"seed": seed, "seconds": seconds, "steps": step, "videos": seen, "device": name}
    record |= {"torch": torch.__version__, "checks": checks, "loss": curve}
    record["loss_columns"] = ["seconds", "step", "frames", "mean velocity error"]
    write_text(output / "train.json", json.dumps(record, indent=1) + "\n")
    draw_loss(record, output / "loss.png")
    scenes = world.scenes(8, torch.Generator().manual_seed(78), test=True)
    prompts = [world.sentence(scene) for scene in scenes]
    sheet(generate(final, prompts, list(range(100, 108))), output / "samples.png")
    write_text(output / "samples.txt", "\n".join(prompts) + "\n")


if __name__ == "__main__":
    main()
