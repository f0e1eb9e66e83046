"""What the defaults of calibration are worth on a larger model: one change at a time, at equal executed density.

    python -m calibatt.tools.studies.defaults --stores kept/ -o docs/benchmarks/defaults.json --table docs/defaults.md

The defaults are 8 prompts with one random vector each, blocks of 128 tokens, all denoising times. Varied are prompts
(1 to 16) and vectors (4), block size, the times that are recorded, calibration with half the steps, shrinking towards
what is known without measurements, and one noise level's plan used at all. Last, tokens in raster order against 3D
cubes of 4 x 4 x 4: masks by votes under a budget, since a calibration measures blocks of raster order alone. Run again,
it does only what is not there yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import click

from calibatt.compiler import error_model
from calibatt.compiler.gather import Samplings
from calibatt.plans import Blocks
from calibatt.plans.files import write_text
from calibatt.tools.calibrate.models import MODEL_HELP, make_sampler
from calibatt.tools.calibrate.sampler import Sampler
from calibatt.tools.calibrate.work import Work, pick_device, plan_work, spread
from calibatt.tools.evaluate.harness import about
from calibatt.tools.studies.ablations import BASE, table
from calibatt.tools.studies.bench import Bench, Rule
from calibatt.tools.studies.judgements import Judgements, console
from calibatt.tools.studies.sizes import BATCH_TOKENS
from calibatt.tools.studies.stores import AtTimes, grown
from calibatt.tools.studies.study import METHODS, Study, held_out_work

SAMPLES, BLOCK = 8, 128
COUNTS, MANY_VECTORS = (1, 2, 4, 8, 16), 4
SMALLER_BLOCK = 64
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95)
"""So that the study of sizes can use the store of all prompts, too."""
ORDERS = ("budget: votes", "budget: votes, tokens in cubes")
Make = Callable[[float], Rule]


class Defaults:
    """Every change, made when it is asked for.

    Args:
        sampler: The sampler, with all its steps.
        halved: The same with half of them.
        held_out: Prompts to judge on.
        work: Prompts to calibrate on.
        stores: Folder of the stores.
        batch: Videos generated at a time.
        blocks: Block size of the defaults, and a smaller one.
    """

    def __init__(
        self,
        sampler: Sampler,
        halved: Sampler,
        held_out: Work,
        work: Work,
        stores: Path,
        batch: int,
        blocks: tuple[int, int] = (BLOCK, SMALLER_BLOCK),
    ) -> None:
        self.sampler, self.halved, self.work, self.folder, self.blocks = sampler, halved, work, stores, blocks
        self.counts = [count for count in COUNTS if count <= len(work)]
        self.usual = min(SAMPLES, len(work))
        self.bench = Bench(sampler, Blocks(blocks[0], blocks[0]), held_out, work[: self.usual], batch)
        self._studies: dict[str, Study] = {}

    def study(self, name: str, store: Callable[[], Samplings]) -> Study:
        if name not in self._studies:
            found = store()
            bench = Bench(
                self.sampler,
                found.manifest.blocks,
                self.bench.held_out,
                self.bench.calibration,
                self.bench.batch,
                self.bench,
            )
            self._studies[name] = Study(bench, found, "auto")
        return self._studies[name]

    def measured(
        self, count: int, vectors: int = 1, block: int | None = None, *, half_the_steps: bool = False
    ) -> Study:
        """The study of a store of the first samplings."""
        block = block or self.blocks[0]
        name = f"blocks_{block}" + ("_half_the_steps" if half_the_steps else "")
        counts = [each for each in self.counts if each <= count] if vectors == 1 else [count]
        sampler = self.halved if half_the_steps else self.sampler

        def store() -> Samplings:
            folder = self.folder / f"{name}_x{vectors}"
            options = {"vectors": vectors, "block_size": block, "thresholds": THRESHOLDS}
            return grown(folder, sampler, self.work, counts, **options)[count]

        return self.study(f"{name} {count} x {vectors}", store)

    def at_times(self, indices: Sequence[int]) -> Study:
        base = self.measured(self.usual)
        return self.study(f"times {indices}", lambda: AtTimes(base.store, tuple(indices)))  # type: ignore[arg-type]

    def not_shrunk(self, density: float) -> Rule:
        with patch.object(error_model, "PRIOR", 0.0):
            return Study(self.bench, self.measured(self.usual).store, "auto").compiled(density)

    def order(self, name: str, block: int, density: float) -> Rule:
        return METHODS[name](self.measured(self.usual, 1, block), density)

    def changes(self) -> Iterator[tuple[str, Make]]:
        """Each change by name, the most telling first."""

        def compiled(make: Callable[[], Study], density: float) -> Rule:
            return make().compiled(density)

        def by(make: Callable[[], Study]) -> Make:
            return partial(compiled, make)

        yield BASE, by(lambda: self.measured(self.usual))
        for count in reversed(self.counts):
            if count != self.usual:
                yield f"calibration prompts: {count}", by(partial(self.measured, count))
        times = len(self.sampler.times)
        for count in sorted({max(1, times // 2), max(1, times // 4)}, reverse=True):
            yield f"times recorded: {count} of {times}", by(partial(self.at_times, spread(times, count)))
        for index in spread(times, 3):
            now = sorted(self.sampler.times)[index]
            yield f"the plan of time {now:.2f} at all times", by(partial(self.at_times, (index,)))
        yield "not shrunk", self.not_shrunk
        for name in ORDERS:
            yield f"{name}, blocks of {self.blocks[0]}", partial(self.order, name, self.blocks[0])
        yield f"blocks of {self.blocks[1]}", by(lambda: self.measured(self.usual, 1, self.blocks[1]))
        for name in ORDERS:
            yield f"{name}, blocks of {self.blocks[1]}", partial(self.order, name, self.blocks[1])
        half = len(self.halved.times)
        yield f"calibrated on {half} steps", by(lambda: self.measured(self.usual, half_the_steps=True))
        few = max(1, self.usual // 2)
        for count in (few, self.usual):
            name = f"calibration prompts: {count}, random vectors: {MANY_VECTORS}"
            yield name, by(partial(self.measured, count, MANY_VECTORS))


@click.command(help=__doc__)
@click.option("--model", default="demo-medium", show_default=True, help=MODEL_HELP)
@click.option("--stores", type=click.Path(path_type=Path), required=True, help="Folder of the stores.")
@click.option("--samples", type=click.IntRange(1), default=max(COUNTS), show_default=True, help="Most prompts.")
@click.option("--prompts", type=click.IntRange(1), default=32, show_default=True, help="Held-out prompts.")
@click.option("--densities", default="0.35,0.2", show_default=True)
@click.option("--batch-tokens", type=click.IntRange(1), default=BATCH_TOKENS, show_default=True, help="At a time.")
@click.option("--seconds", type=float, default=math.inf, help="Begin nothing after so many seconds.")
@click.option("--device", default="auto", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="JSON to write or to continue.")
@click.option("--table", "markdown", type=click.Path(path_type=Path), help="Markdown to write.")
def main(
    model: str,
    stores: Path,
    samples: int,
    prompts: int,
    densities: str,
    batch_tokens: int,
    seconds: float,
    device: str,
    output: Path,
    markdown: Path | None,
) -> None:
    judged, device = Judgements(output, seconds, timed=False), pick_device(device)
    sampler = make_sampler(model, None, device)
    halved = make_sampler(model, max(1, len(sampler.times) // 2), device)
    batch, work = max(1, batch_tokens // sampler.grid.tokens), plan_work(model, None, samples, 0)
    found = Defaults(sampler, halved, held_out_work(model, None, prompts), work, stores, batch)
    judged.result |= {"about": about("python -m calibatt.tools.studies.defaults", sampler), "prompts": prompts}
    judged.result |= {"model": model, "tokens": sampler.grid.tokens}
    for density in map(float, densities.split(",")):
        for name, make in found.changes():
            judged.judge(found.bench, "compiled", density, partial(make, density), variant=name)
    judged.write()
    if markdown is not None:
        write_text(markdown, table(judged.result, "Defaults"))
    console.print(f"{judged.elapsed:.1f} s: {output}")


if __name__ == "__main__":
    main()
