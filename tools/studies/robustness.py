"""What a plan loses where it was not calibrated: on prompts of another kind, and on weights that are not the same.

    python -m calibatt.tools.studies.robustness --stores kept/ -o robustness.json --table robustness.md

Prompts: the demo's world is split in halves by shapes, by backgrounds, by speeds, by the number of shapes. A plan of
each half, and one of all prompts, is used on held-out prompts of each half. Weights: a plan of the demo model is used
with a style LoRA (trained here for some seconds: paler, warmer videos), with the LoRA for four steps, and on the
weights that were trained on at larger grids; beside a plan that was calibrated there. Every difference is paired by
prompt. And what `calibatt-evaluate --quick` would say of each plan before anything is generated. A plan of another
resolution is refused; what is said then is kept, too. Run again, it does only what is not there yet.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from calibatt.compiler.stats import Store
from calibatt.plans import Blocks
from calibatt.plans.errors import PlanError
from calibatt.tools.bench.options import count_option
from calibatt.tools.calibrate.work import Work
from calibatt.tools.demo_model import world
from calibatt.tools.demo_model.model import GROWN, STEPS, WEIGHTS, DemoModel, generate, trained
from calibatt.tools.demo_model.sampler import DemoSampler
from calibatt.tools.evaluate.command import QUICK_PROMPTS
from calibatt.tools.evaluate.evaluation import Candidate, Cells, quick_findings
from calibatt.tools.evaluate.harness import about
from calibatt.tools.evaluate.metrics import psnr_db
from calibatt.tools.studies import rendering
from calibatt.tools.studies.bench import Bench, Planned
from calibatt.tools.studies.distill import lora_of, save_lora, velocity
from calibatt.tools.studies.judgements import Judgements, cell, console, page, table
from calibatt.tools.studies.options import JOIN, JUDGED, NEW_STORES, TABLE, prompts_option, study_command
from calibatt.tools.studies.stores import grown
from calibatt.tools.studies.study import Study
from calibatt.tools.studies.train import draw_times

NAME = "python -m calibatt.tools.studies.robustness"
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
    """Held-out prompts of one half of a kind, or (not `test`) such as calibration may see.

    Raises:
        ValueError: There are fewer among those that are drawn.
    """
    scenes = world.scenes(16 * count, torch.Generator().manual_seed(HELD_OUT_SEED if test else 0), test=test)
    found = scenes[of_half(scenes, kind, half)][:count]
    if len(found) < count:
        what = f"{kind}: {halves(kind)[half]}"
        raise ValueError(f"a half must leave {count} prompts of {len(scenes)}, got {len(found)}: {what}")
    return [world.sentence(scene) for scene in found]


def numbered(prompts: list[str], first: int) -> Work:
    return [(prompt, first + index) for index, prompt in enumerate(prompts)]


def styled(video: Tensor) -> Tensor:
    """Paler and warmer: what the style LoRA is to paint in place of a video ``(n, 3, F, H, W)``."""
    return STYLE_CONTRAST * video + torch.tensor(STYLE_TINT, device=video.device).view(3, 1, 1, 1)


def train_style(path: Path, device: torch.device | str, steps: int, batch: int, seed: int = 1) -> None:
    """Trains the style LoRA on styled videos and writes it."""
    torch.manual_seed(seed)
    model, generator = DemoModel.load(WEIGHTS, device), torch.Generator(device=device).manual_seed(seed)
    learned = lora_of(model)
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
        return Study(self.bench, self.stores[calibrated_on](), "auto").compiled(DENSITY)


@dataclass(eq=False)
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

    stores: Path
    device: torch.device
    samples: int
    vectors: int
    prompts: int
    batch: int
    style: tuple[int, int]

    def __post_init__(self) -> None:
        self.stores.mkdir(parents=True, exist_ok=True)
        self.demo = DemoSampler(device=str(self.device))

    def store(self, name: str, sampler: DemoSampler, prompts: list[str]) -> Store:
        work = numbered(prompts, CALIBRATION_SEED)
        folder = self.stores / name.replace(" ", "_")
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
            sampler = DemoSampler(make(), device=str(self.device))
            own = lambda n=name, s=sampler: self.store(n, s, self.everything(self.samples, test=False))  # noqa: E731
            bench = self.bench(sampler, self.everything(self.prompts, test=True))
            yield Place("weights", name, bench, {name: own, "the demo's weights": self.all_prompts})

    def style_model(self, result: dict[str, Any]) -> DemoModel:
        """The demo with its style LoRA; how near its videos are to the style goes into the result, once."""
        path = self.stores / "style.safetensors"
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


def refusal(store: Store, device: torch.device) -> str:
    """What is said of a plan of the small grid in a model of the medium one."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    medium = DemoSampler(DemoModel.load(GROWN, device, world.CLIPS["medium"], dtype), device=str(device), steps=1)
    bench = Bench(medium, store.manifest.blocks, [], [])
    plan = Study(bench, store, "auto").compiled(DENSITY).plan
    try:
        with plan.attach(medium.transformer):
            medium.run(world.sentence(world.scenes(1, torch.Generator().manual_seed(1))[0]), 1)
    except (PlanError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("a plan of another grid must be refused, but it ran")


def robustness_page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    text = (
        f"Density {DENSITY}, {result['prompts']} held-out prompts each; PSNR in dB against the dense video (standard "
        "error), and in square brackets the change from the plan that was calibrated there, paired by prompt. Last, "
        "what `calibatt-evaluate --quick` says: squared effect / promised."
    )
    own = {row["used_on"]: row for row in result["rows"] if row["used_on"] == row["calibrated_on"]}
    rows = []
    for row in result["rows"]:
        said = row.get("quick")
        words = f"{said['ratio']:.2f}, {'fits' if said['fits'] else 'has drifted'}" if said else ""
        rows.append([row["used_on"], row["calibrated_on"], cell(row, own.get(row["used_on"])), words])
    more = []
    if style := result.get("style"):
        near = ", ".join(f"{value:.1f} dB from the {name}" for name, value in style.items())
        more += [f"Dense videos with the style LoRA are {near}.", ""]
    more += [f"Another resolution: {result['another_resolution']}", ""] if "another_resolution" in result else []
    return page("Robustness", result, text, table(["used on", "calibrated on", "PSNR", "--quick"], rows), more)


@study_command(NAME, __doc__)
@NEW_STORES
@count_option("--samples", 8, "Prompts of a calibration.")
@count_option("--vectors", 4, "Random vectors of each.")
@prompts_option()
@count_option("--batch", 32, "Videos at a time.")
@count_option("--style-steps", 150, "Steps of the style LoRA's training.")
@count_option("--style-batch", 16, "Videos of each.")
@click.option("--case", "cases", type=click.Choice(["weights", "prompts"]), multiple=True, help="Of both, this alone.")
@click.option("--kind", "kinds", type=click.Choice(list(KINDS)), multiple=True, help="Of all kinds, this alone.")
@JOIN
@JUDGED
@TABLE
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
    device: torch.device,
    output: Path,
    markdown: Path | None,
) -> None:
    judged, style = Judgements(output, seconds, timed=False), (style_steps, style_batch)
    for path in join:
        judged.join(path)
    places = Places(stores, device, samples, vectors, prompts, batch, style)
    result = judged.result
    judged.begin(about(NAME, places.demo), prompts=prompts, samples=samples, vectors=vectors)
    every = {"weights": lambda: places.of_weights(result), "prompts": lambda: places.of_prompts(kinds)}

    def judge(place: Place, name: str, *, quickly: bool) -> None:
        labels = {"case": place.case, "used_on": place.name, "calibrated_on": name}
        judged.judge(place.bench, "compiled", DENSITY, lambda: place.rule(name), place.stores[name], **labels)
        for row in judged.rows if quickly and not judged.is_over else ():
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
        if judged.is_over:
            break
    for place in seen:  # what matters less
        for name in place.stores:
            judge(place, name, quickly=name != ALL)
    if "another_resolution" not in result and not judged.is_over:
        result["another_resolution"] = refusal(places.all_prompts(), device)
    judged.finish(robustness_page, markdown)


def quick(place: Place, calibrated_on: str) -> dict[str, Any]:
    """What `calibatt-evaluate --quick` finds on the first held-out prompts."""
    candidate = Candidate("plan", place.rule(calibrated_on).plan)
    with tempfile.TemporaryDirectory() as folder:
        work = place.bench.held_out[:QUICK_PROMPTS]
        found = quick_findings(place.bench.sampler, candidate, work, Cells(Path(folder), {}))
    return {"ratio": round(found["ratio"], 4), "fits": bool(found["fits"])}


if __name__ == "__main__":
    main()
