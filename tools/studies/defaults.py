"""What the defaults of calibration are worth on a larger model: one change at a time, at equal executed density.

    python -m calibatt.tools.studies.defaults --stores kept/ -o defaults.json --table defaults.md

The defaults are 8 prompts with one random vector each, blocks of 128 tokens, all denoising times. Varied are prompts
(1 to 16) and vectors (4), block size, the times that are recorded, calibration with half the steps, shrinking towards
what is known without measurements, and one noise level's plan used at all. Last, tokens in raster order against 3D
cubes of 4 x 4 x 4: masks by votes under a budget, since a calibration measures blocks of raster order alone. Run again,
it does only what is not there yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import click
import torch

from calibatt.compiler import error_model
from calibatt.compiler.gather import Samplings
from calibatt.plans import Blocks
from calibatt.tools.bench.options import count_option, densities_option
from calibatt.tools.calibrate.models import DEMOS, make_sampler
from calibatt.tools.calibrate.sampler import Sampler
from calibatt.tools.calibrate.work import Work, plan_work, spread
from calibatt.tools.evaluate.harness import about
from calibatt.tools.studies.ablations import BASE, variants_page
from calibatt.tools.studies.bench import Bench, Rule
from calibatt.tools.studies.judgements import Judgements
from calibatt.tools.studies.options import JUDGED, NEW_STORES, TABLE, prompts_option, study_command
from calibatt.tools.studies.sizes import BATCH_TOKENS
from calibatt.tools.studies.stores import AtTimes, grown
from calibatt.tools.studies.study import METHODS, OURS, Study, held_out_work

NAME = "python -m calibatt.tools.studies.defaults"
SAMPLES, BLOCK = 8, 128
COUNTS, MANY_VECTORS = (1, 2, 4, 8, 16), 4
SMALLER_BLOCK = 64
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95)
"""So that the study of sizes can use the store of all prompts, too."""
ORDERS = ("budget: votes", "budget: votes, tokens in cubes")


@dataclass(eq=False)
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

    sampler: Sampler
    halved: Sampler
    held_out: Work
    work: Work
    stores: Path
    batch: int
    blocks: tuple[int, int] = (BLOCK, SMALLER_BLOCK)
    _studies: dict[str, Study] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.counts = [count for count in COUNTS if count <= len(self.work)]
        self.usual = min(SAMPLES, len(self.work))
        blocks = Blocks(self.blocks[0], self.blocks[0])
        self.bench = Bench(self.sampler, blocks, self.held_out, self.work[: self.usual], self.batch)

    def study(self, name: str, store: Callable[[], Samplings]) -> Study:
        if name not in self._studies:
            found = store()
            bench = replace(self.bench, blocks=found.manifest.blocks, like=self.bench)
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
            folder = self.stores / f"{name}_x{vectors}"
            options = {"vectors": vectors, "block_size": block, "thresholds": THRESHOLDS}
            return grown(folder, sampler, self.work, counts, **options)[count]

        return self.study(f"{name} {count} x {vectors}", store)

    def at_times(self, indices: Sequence[int]) -> Study:
        base = self.measured(self.usual)
        return self.study(f"times {indices}", lambda: AtTimes(base.store, tuple(indices)))  # type: ignore[arg-type]

    def not_shrunk(self, study: Study, density: float) -> Rule:
        with patch.object(error_model, "PRIOR", 0.0):
            return Study(study.bench, study.store, "auto").compiled(density)

    def changes(self) -> Iterator[tuple[str, Callable[[], Study], Callable[[Study, float], Rule]]]:
        """Each change, the most telling first: its name, the study of its statistics, and what is made of them."""
        large, small = self.blocks
        usual = partial(self.measured, self.usual)
        compiled = METHODS[OURS]
        yield BASE, usual, compiled
        for count in reversed(self.counts):
            if count != self.usual:
                yield f"calibration prompts: {count}", partial(self.measured, count), compiled
        times = len(self.sampler.times)
        for count in sorted({max(1, times // 2), max(1, times // 4)}, reverse=True):
            yield f"times recorded: {count} of {times}", partial(self.at_times, spread(times, count)), compiled
        for index in spread(times, 3):
            now = sorted(self.sampler.times)[index]
            yield f"the plan of time {now:.2f} at all times", partial(self.at_times, (index,)), compiled
        yield "not shrunk", usual, self.not_shrunk
        for name in ORDERS:
            yield f"{name}, blocks of {large}", usual, METHODS[name]
        finer = partial(self.measured, self.usual, 1, small)
        yield f"blocks of {small}", finer, compiled
        for name in ORDERS:
            yield f"{name}, blocks of {small}", finer, METHODS[name]
        half = len(self.halved.times)
        yield f"calibrated on {half} steps", partial(usual, half_the_steps=True), compiled
        for count in (max(1, self.usual // 2), self.usual):
            name = f"calibration prompts: {count}, random vectors: {MANY_VECTORS}"
            yield name, partial(self.measured, count, MANY_VECTORS), compiled


@study_command(NAME, __doc__)
@click.option("--model", type=click.Choice(DEMOS), default="demo-medium", show_default=True)
@NEW_STORES
@count_option("--samples", max(COUNTS), "Most prompts of a calibration.")
@prompts_option()
@densities_option("0.35,0.2")
@count_option("--batch-tokens", BATCH_TOKENS, "Tokens of the videos that are generated at a time.")
@JUDGED
@TABLE
def main(
    model: str,
    stores: Path,
    samples: int,
    prompts: int,
    densities: list[float],
    batch_tokens: int,
    seconds: float,
    device: torch.device,
    output: Path,
    markdown: Path | None,
) -> None:
    judged = Judgements(output, seconds, timed=False)
    sampler = make_sampler(model, None, str(device))
    halved = make_sampler(model, max(1, len(sampler.times) // 2), str(device))
    batch, work = max(1, batch_tokens // sampler.grid.tokens), plan_work(model, None, samples, 0)
    defaults = Defaults(sampler, halved, held_out_work(model, None, prompts), work, stores, batch)
    judged.begin(about(NAME, sampler), model=model, tokens=sampler.grid.tokens, prompts=prompts, samples=samples)
    for density in densities:
        for name, study, make in defaults.changes():
            judged.judge(
                defaults.bench,
                "compiled",
                density,
                lambda study=study, make=make, density=density: make(study(), density),
                lambda study=study: study().store,
                variant=name,
            )
    judged.finish(partial(variants_page, "Defaults"), markdown)


if __name__ == "__main__":
    main()
