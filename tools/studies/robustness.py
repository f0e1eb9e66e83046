"""What a plan loses where it was not calibrated: on prompts of another kind, and on weights that are not the same.

    python -m calibatt.tools.studies.robustness --stores kept/ -o docs/benchmarks/robustness.json \\
        --table docs/robustness.md

Prompts: the demo's world is split in halves by shapes, by backgrounds, by speeds, by the number of shapes. A plan of
each half, and one of all prompts, is used on held-out prompts of each half. Weights: a plan of the demo model is used
with a style LoRA (trained here for some seconds: paler, warmer videos), with the LoRA for four steps, and on the
weights that were trained on at larger grids; beside a plan that was calibrated there. Every difference is paired by
prompt. And what `calibatt-evaluate --quick` would say of each plan before anything is generated. A plan of another
resolution is refused; what is said then is kept, too. Run again, it does only what is not there yet.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from peft import LoraConfig
from torch import Tensor

from calibatt.compiler.stats import Store
from calibatt.plans import Blocks
from calibatt.plans.errors import PlanError
from calibatt.plans.files import write_text
from calibatt.tools.calibrate.work import Work, pick_device
from calibatt.tools.demo_model import world
from calibatt.tools.demo_model.model import GROWN, LORA, STEPS, WEIGHTS, DemoModel, generate, trained
from calibatt.tools.demo_model.sampler import DemoSampler
from calibatt.tools.evaluate.command import QUICK_PROMPTS
from calibatt.tools.evaluate.evaluation import Candidate, Cells, quick_findings
from calibatt.tools.evaluate.harness import about
from calibatt.tools.evaluate.metrics import psnr_db
from calibatt.tools.studies import rendering
from calibatt.tools.studies.bench import Bench, Planned
from calibatt.tools.studies.distill import RANK, TARGETS, save_lora, velocity
from calibatt.tools.studies.judgements import Judgements, console, mean_and_error
from calibatt.tools.studies.stores import grown
from calibatt.tools.studies.study import Study
from calibatt.tools.studies.train import draw_times

KINDS = {
    "shapes": ((world.FIRST + 2, world.SECOND + 2), world.SHAPES[:3]),
    "backgrounds": ((world.PATTERN,), world.PATTERNS[:2]),
    "speeds": ((world.FIRST + 4, world.SECOND + 4), world.SPEEDS[:1]),
    "number of shapes": ((world.COUNT,), ("one",)),
}
"""Columns of a scene, and the words of its first half; the second half has the others."""
ALL = "all prompts"
DENSITY, BLOCKS = 0.35, Blocks(64, 64)
STYLE_CONTRAST, STYLE_TINT = 0.6, (0.3, 0.05, -0.3)
STYLE_RATE = 1e-3
HELD_OUT_SEED, CALIBRATION_SEED = 6, 0


def halves(kind: str) -> tuple[str, str]:
    """The words of both halves of a kind."""
    columns, first = KINDS[kind]
    rest = [word for word in world.SLOTS[columns[0]] if word not in first]
    return ", ".join(first), ", ".join(rest)


def of_half(scenes: Tensor, kind: str, half: int) -> Tensor:
    """bool ``(n,)``: scenes all of whose words of this kind are in one half."""
    columns, first = KINDS[kind]
    codes = scenes[:, list(columns)]
    return ((codes < 0) | ((codes >= len(first)) == bool(half))).all(1)


def prompts_of(kind: str, half: int, count: int, *, test: bool) -> list[str]:
    """Held-out prompts of one half of a kind, or (not `test`) such as calibration may see."""
    scenes = world.scenes(16 * count, torch.Generator().manual_seed(HELD_OUT_SEED if test else 0), test=test)
    return [world.sentence(scene) for scene in scenes[of_half(scenes, kind, half)][:count]]


def numbered(prompts: list[str], first: int) -> Work:
    return [(prompt, first + index) for index, prompt in enumerate(prompts)]


def styled(video: Tensor) -> Tensor:
    """Paler and warmer: what the style LoRA is to paint in place of a video ``(n, 3, F, H, W)``."""
    return STYLE_CONTRAST * video + torch.tensor(STYLE_TINT, device=video.device).view(3, 1, 1, 1)


def train_style(path: Path, device: str, steps: int, batch: int, seed: int = 1) -> None:
    """Trains the style LoRA on styled videos and writes it."""
    torch.manual_seed(seed)
    model, generator = DemoModel.load(WEIGHTS, device), torch.Generator(device=device).manual_seed(seed)
    model.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), LORA)
    learned = [p.requires_grad_(True) for name, p in model.transformer.named_parameters() if "lora_" in name]
    adam = torch.optim.AdamW(learned, lr=STYLE_RATE, weight_decay=0.0)
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = STYLE_RATE * min(1.0, (step + 1) / 10, 2 * (1 - step / steps))
        scenes = world.scenes(batch, generator)
        video = styled(rendering.render(scenes, generator, model.clip))
        noise = torch.randn(video.shape, generator=generator, device=device)
        now = draw_times(batch, generator, model.shift)
        mixed = torch.lerp(video, noise, now.view(-1, 1, 1, 1, 1))
        loss = (velocity(model, mixed, now, rendering.scene_words(scenes)) - (noise - video)).square().mean()
        loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == steps - 1:
            console.print(f"style LoRA, step {step}: loss {float(loss.detach()):.4f}")
    save_lora(path, model)


@dataclass(frozen=True, eq=False)
class Place:
    """Where plans are used.

    Args:
        case: What differs.
        name: Of this place.
        bench: Of its model, and its held-out prompts.
        stores: By what they were calibrated on, the place's own first.
    """

    case: str
    name: str
    bench: Bench
    stores: dict[str, Callable[[], Store]]

    def rule(self, calibrated_on: str) -> Planned:
        made = Study(self.bench, self.stores[calibrated_on](), "auto").compiled(DENSITY)
        assert isinstance(made, Planned)
        return made


class Places:
    """All places.

    Args:
        stores: Folder of the stores and of the style LoRA.
        device: Where models run.
        samples: Prompts of each calibration.
        vectors: Random vectors of each.
        prompts: Held-out prompts of each place.
        batch: Videos generated at a time.
        style: Steps and batch size of the style LoRA's training.
    """

    def __init__(
        self, stores: Path, device: str, samples: int, vectors: int, prompts: int, batch: int, style: tuple[int, int]
    ) -> None:
        self.folder, self.device, self.samples, self.vectors = stores, device, samples, vectors
        self.prompts, self.batch, self.style = prompts, batch, style
        self.folder.mkdir(parents=True, exist_ok=True)
        self.demo = DemoSampler(device=device)

    def store(self, name: str, sampler: DemoSampler, prompts: list[str]) -> Store:
        work = numbered(prompts, CALIBRATION_SEED)
        folder = self.folder / name.replace(" ", "_")
        return grown(folder, sampler, work, [self.samples], vectors=self.vectors)[self.samples]

    def everything(self, count: int, *, test: bool) -> list[str]:
        generator = torch.Generator().manual_seed(HELD_OUT_SEED if test else CALIBRATION_SEED)
        return [world.sentence(scene) for scene in world.scenes(count, generator, test=test)]

    def bench(self, sampler: DemoSampler, prompts: list[str]) -> Bench:
        return Bench(sampler, BLOCKS, numbered(prompts, 5000), [], self.batch)

    def all_prompts(self) -> Store:
        return self.store("all", self.demo, self.everything(self.samples, test=False))

    def of_prompts(self, kinds: Sequence[str]) -> Iterator[Place]:
        for kind in kinds or KINDS:
            names = [f"{kind}: {words}" for words in halves(kind)]

            def half(index: int, kind: str = kind) -> Store:
                return self.store(f"{kind} {index}", self.demo, prompts_of(kind, index, self.samples, test=False))

            for index, name in enumerate(names):
                bench = self.bench(self.demo, prompts_of(kind, index, self.prompts, test=True))
                other = 1 - index
                stores = {name: lambda i=index, h=half: h(i), names[other]: lambda i=other, h=half: h(i)}
                yield Place(kind, name, bench, stores | {ALL: self.all_prompts})

    def of_weights(self, result: dict[str, Any]) -> Iterator[Place]:
        for name, make in (
            ("style LoRA", lambda: self.style_model(result)),
            ("LoRA for four steps", lambda: trained("demo-few-steps", self.device)[0]),
            ("trained on at larger grids", lambda: DemoModel.load(GROWN, self.device, world.SMALL)),
        ):
            sampler = DemoSampler(make(), device=self.device)
            own = lambda n=name, s=sampler: self.store(n, s, self.everything(self.samples, test=False))  # noqa: E731
            bench = self.bench(sampler, self.everything(self.prompts, test=True))
            yield Place("weights", name, bench, {name: own, "the demo's weights": self.all_prompts})

    def style_model(self, result: dict[str, Any]) -> DemoModel:
        """The demo with its style LoRA; how near its videos are to the style goes into the result, once."""
        path = self.folder / "style.safetensors"
        if not path.exists():
            train_style(path, self.device, *self.style)
        model = DemoModel.load(WEIGHTS, self.device).load_lora(path)
        model.steps = STEPS
        if "style" not in result:
            some, seeds = self.everything(4, test=True), [1, 2, 3, 4]
            with_it, without = generate(model, some, seeds), generate(DemoModel.load(WEIGHTS, self.device), some, seeds)
            pairs = {"styled dense video": styled(without), "dense video without it": without}
            result["style"] = {name: float(psnr_db(with_it, video).mean()) for name, video in pairs.items()}
        return model


def refusal(store: Store, device: str) -> str:
    """What is said of a plan of the small grid in a model of the medium one."""
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    medium = DemoSampler(DemoModel.load(GROWN, device, world.CLIPS["medium"], dtype), device=device, steps=1)
    bench = Bench(medium, store.manifest.blocks, [], [])
    made = Study(bench, store, "auto").compiled(DENSITY)
    assert isinstance(made, Planned)
    try:
        with made.plan.attach(medium.transformer):
            medium.run(world.sentence(world.scenes(1, torch.Generator().manual_seed(1))[0]), 1)
    except (PlanError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("a plan of another grid must be refused, but it ran")


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    told = result["about"]
    lines = [
        "# Robustness",
        "",
        f"Density {DENSITY}, {result['prompts']} held-out prompts each; PSNR in dB against the",
    ]
    lines += [
        "dense video (standard error), and in brackets the change from the plan that was calibrated there, paired"
    ]
    lines += ["by prompt. Last, what `calibatt-evaluate --quick` says: squared effect / promised.", ""]
    lines += [f"`{told['command']}`; {told['device']}, {told['versions']}, {told['date']}.", ""]
    lines += ["| used on | calibrated on | PSNR | --quick |", "|---|---|---|---|"]
    own = {row["used_on"]: row for row in result["rows"] if row["used_on"] == row["calibrated_on"]}
    for row in result["rows"]:
        quality, base = mean_and_error(row["psnr"]), own.get(row["used_on"])
        cell = f"{quality['mean']:.1f} ({quality['standard_error']:.1f})"
        if base is not None and base is not row:
            change = mean_and_error([a - b for a, b in zip(row["psnr"], base["psnr"], strict=True)])
            cell += f" [{change['mean']:+.1f} ({change['standard_error']:.1f})]"
        said = row.get("quick")
        words = f"{said['ratio']:.2f}, {'fits' if said['fits'] else 'has drifted'}" if said else ""
        lines.append(f"| {row['used_on']} | {row['calibrated_on']} | {cell} | {words} |")
    if style := result.get("style"):
        near = ", ".join(f"{value:.1f} dB from the {name}" for name, value in style.items())
        lines += ["", f"Dense videos with the style LoRA are {near}."]
    lines += ["", f"Another resolution: {result['another_resolution']}"] if "another_resolution" in result else []
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.option("--stores", type=click.Path(path_type=Path), required=True, help="Folder of the stores.")
@click.option("--samples", type=click.IntRange(1), default=8, show_default=True, help="Prompts of a calibration.")
@click.option("--vectors", type=click.IntRange(1), default=4, show_default=True, help="Random vectors of each.")
@click.option("--prompts", type=click.IntRange(1), default=32, show_default=True, help="Held-out prompts of each.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Videos at a time.")
@click.option("--style-steps", type=click.IntRange(1), default=150, show_default=True)
@click.option("--style-batch", type=click.IntRange(1), default=16, show_default=True)
@click.option("--case", "cases", type=click.Choice(["weights", "prompts"]), multiple=True, help="Of both, this alone.")
@click.option("--kind", "kinds", type=click.Choice(list(KINDS)), multiple=True, help="Of all kinds, this alone.")
@click.option("--join", type=click.Path(path_type=Path, exists=True), multiple=True, help="JSON of another run.")
@click.option("--seconds", type=float, default=math.inf, help="Begin nothing after so many seconds.")
@click.option("--device", default="auto", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="JSON to write or to continue.")
@click.option("--table", "markdown", type=click.Path(path_type=Path), help="Markdown to write.")
def main(
    stores: Path,
    samples: int,
    vectors: int,
    prompts: int,
    batch: int,
    style_steps: int,
    style_batch: int,
    cases: tuple[str, ...],
    kinds: tuple[str, ...],
    join: tuple[Path, ...],
    seconds: float,
    device: str,
    output: Path,
    markdown: Path | None,
) -> None:
    judged, device = Judgements(output, seconds, timed=False), pick_device(device)
    places, result = Places(stores, device, samples, vectors, prompts, batch, (style_steps, style_batch)), judged.result
    result |= {"about": about("python -m calibatt.tools.studies.robustness", places.demo), "prompts": prompts}
    for path in join:
        judged.join(path)
    every = {"weights": lambda: places.of_weights(result), "prompts": lambda: places.of_prompts(kinds)}

    def judge(place: Place, name: str, *, quickly: bool) -> None:
        labels = {"case": place.case, "used_on": place.name, "calibrated_on": name}
        judged.judge(place.bench, "compiled", DENSITY, lambda: place.rule(name), **labels)
        for row in result["rows"] if quickly and judged.elapsed <= seconds else ():
            if (row["used_on"], row["calibrated_on"]) == (place.name, name) and "quick" not in row:
                row["quick"] = quick(place, name)
                console.print(f"{judged.elapsed:6.1f} s  --quick: {row['quick']}", markup=False)
                judged.write()

    seen = []
    for place in itertools.chain.from_iterable(make() for name, make in every.items() if name in (cases or every)):
        seen.append(place)
        own, other, *_ = place.stores
        judge(place, own, quickly=False)
        judge(place, other, quickly=True)
        if judged.elapsed > seconds:
            break
    for place in seen:  # what matters less
        for name in place.stores:
            judge(place, name, quickly=name != ALL)
    if "another_resolution" not in result and judged.elapsed <= seconds:
        result["another_resolution"] = refusal(places.all_prompts(), device)
    judged.write()
    if markdown is not None:
        write_text(markdown, table(result))
    console.print(f"{judged.elapsed:.1f} s: {output}")


def quick(place: Place, calibrated_on: str) -> dict[str, Any]:
    """What `calibatt-evaluate --quick` finds on the first held-out prompts."""
    candidate = Candidate("plan", place.rule(calibrated_on).plan)
    with tempfile.TemporaryDirectory() as folder:
        work = place.bench.held_out[:QUICK_PROMPTS]
        found = quick_findings(place.bench.sampler, candidate, work, Cells(Path(folder), {}))
    return {"ratio": round(found["ratio"], 4), "fits": bool(found["fits"])}


if __name__ == "__main__":
    main()
