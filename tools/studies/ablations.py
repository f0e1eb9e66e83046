"""What the compiler's defaults are worth: one change at a time, at equal executed density, on held-out prompts.

    python -m calibatt.tools.studies.ablations --stats stats/ --stats stats_2/ --stats stats_128/ \\
        -o ablations.json --table ablations.md

The first store is the one that is varied; the others are compiled with the default passes and named by what they differ
in: calibration prompts, random vectors, block size. Run again, it does only what is not in the JSON yet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from calibatt.compiler.gather import Samplings
from calibatt.tools.bench.options import densities_option
from calibatt.tools.calibrate.effects import ladder
from calibatt.tools.evaluate.harness import about
from calibatt.tools.studies.bench import Kept, Rule, nearest
from calibatt.tools.studies.judgements import Judgements, by_target, page
from calibatt.tools.studies.options import JUDGED, STORES, TABLE, study_command
from calibatt.tools.studies.stores import sampling_counts
from calibatt.tools.studies.study import DEFAULTS, METHODS, Study, make_study

NAME = "python -m calibatt.tools.studies.ablations"
DENSITIES = (0.2, 0.35, 0.5)
BASE = "defaults"


def one_density(study: Study, density: float) -> Rule:
    """Blocks of the compiler's order, but the same share of them in every head at every time."""

    def order(time_index: int, layer: int) -> torch.Tensor:
        unit = study.store.unit(time_index, layer)
        return torch.from_numpy(unit.effect_values() * unit.error_values()).sqrt()

    steps = [nearest(study.store.manifest.times, now) for now in study.sampler.times]
    layers = range(study.bench.signature.layers)
    keep = [torch.stack([ladder(order(step, layer), (density,))[0] for layer in layers]) for step in steps]
    return Kept(study.bench, torch.stack(keep).to(study.bench.device))


VARIANTS: dict[str, Callable[[Study, float], Rule]] = {
    BASE: lambda study, density: study.compiled(density),
    "no anchors": METHODS["compiled, no anchors"],
    "anchors, rows alone": METHODS["compiled, anchor rows alone"],
    "anchors, frames alone": METHODS["compiled, anchor frames alone"],
    "no windows": lambda study, density: study.compiled(density, DEFAULTS.replace("=D", "=D,menu=cuts")),
    "windows alone": lambda study, density: study.compiled(density, DEFAULTS.replace("=D", "=D,menu=windows")),
    "no anchors, one density everywhere": one_density,
    "the paper's own method": METHODS["the paper's own method"],
}
"""Every change by name."""


def difference(base: Samplings, other: Samplings) -> str:
    """What another store differs in."""

    def facts(store: Samplings) -> list[str]:
        counts, blocks = sampling_counts(store), store.manifest.blocks
        prompts = f"calibration prompts: {counts['samplings']}"
        vectors = f"random vectors: {', '.join(map(str, counts['vectors']))}"
        return [prompts, vectors, f"blocks of {blocks.block_q} x {blocks.block_k}"]

    return ", ".join(mine for mine, theirs in zip(facts(other), facts(base), strict=True) if mine != theirs) or "again"


def variants_page(title: str, result: dict[str, Any]) -> str:
    """The result as Markdown: PSNR, and what each change does to it, paired by prompt."""
    text = (
        f"PSNR in dB against the dense video (standard error), {result['prompts']} held-out prompts; in square "
        "brackets the change from the defaults, paired by prompt. Where a variant misses the density, it is named."
    )
    return page(title, result, text, by_target(result["rows"], "variant", BASE))


@study_command(NAME, __doc__)
@STORES
@densities_option(",".join(map(str, DENSITIES)))
@click.option("--variants", "only", default="", help="Beginnings of names, separated by semicolons; all if absent.")
@JUDGED
@TABLE
def main(
    stores: tuple[Path, ...],
    densities: list[float],
    only: str,
    seconds: float,
    output: Path,
    markdown: Path | None,
    **options: Any,
) -> None:
    begins = tuple(part.strip() for part in only.split(";"))
    if unknown := [part for part in begins if not any(name.startswith(part) for name in VARIANTS)]:
        raise click.UsageError(f"--variants must begin some of {'; '.join(VARIANTS)}; got {unknown[0]!r}")
    judged = Judgements(output, seconds, timed=False)
    first: Study | None = None
    for path in stores:
        study = make_study(stores=(path,), **options)
        if first is None:
            first = study
            judged.begin(about(NAME, study.sampler), model=options["model"], **study.bench.counts)
            todo = {name: make for name, make in VARIANTS.items() if name.startswith(begins)}
        else:
            todo = {difference(first.store, study.store): VARIANTS[BASE]}
        for name, make in todo.items():
            for density in densities:
                rule = partial(make, study, density)
                judged.judge(study.bench, "compiled", density, rule, lambda s=study: s.store, variant=name)
    judged.finish(partial(variants_page, "Ablations"), markdown)


if __name__ == "__main__":
    main()
