"""What the compiler's defaults are worth: one change at a time, at equal executed density, on held-out prompts.

    python -m calibatt.tools.evaluate.ablations --stats stats/ --stats stats_32/ --stats stats_128/ \\
        -o docs/benchmarks/ablations_h100.json --table docs/ablations.md

The first store is the one that is varied; the others, of other block sizes, are compiled with the default passes. For
32 calibration prompts the first store must have 32 samples.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import click
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from calibatt.compiler.language import DEFAULT_PASSES
from calibatt.compiler.stats import (
    ErrorWeights,
    Manifest,
    Probe,
    RefinementError,
    Store,
    UnitStatistics,
    error_weights,
)
from calibatt.tools.calibrate.models import MODEL_HELP
from calibatt.tools.evaluate import bench
from calibatt.tools.evaluate.bench import Kept, Measured, Rule
from calibatt.tools.evaluate.harness import about
from calibatt.tools.evaluate.masks import with_top
from calibatt.tools.evaluate.pareto import Study, make_study, mean_and_error

PROMPTS = (1, 2, 4, 8, 16, 32)
AGREEMENTS = (0.125, 0.25, 0.5, 0.75, 1.0)
DENSITIES = (0.2, 0.35, 0.5)
BASE = "defaults"

console = Console(stderr=True)


@dataclass(frozen=True, eq=False)
class Part:
    """A store as if less had been recorded: what the compiler asks of a store.

    Args:
        store: The whole.
        count: Samples, the first ones by seed; all if absent.
        thresholds: Which of the thresholds there are; all if absent.
        time_weighted: Whether the time weight counts; 1 everywhere otherwise.
        layer_weighted: Whether its spread over the layers counts.
        head_weighted: Whether its spread over the heads of a layer counts.
        probed: Samples of which there are probes, the first ones by seed; all if absent.
    """

    store: Store
    count: int | None = None
    thresholds: tuple[float, ...] | None = None
    time_weighted: bool = True
    layer_weighted: bool = True
    head_weighted: bool = True
    probed: int | None = None

    def _first(self, count: int | None) -> tuple[str, ...]:
        ordered = sorted(self.store.samples, key=lambda name: self.store.meta[name]["seed"])
        return tuple(sorted(ordered[:count]))

    @property
    def samples(self) -> tuple[str, ...]:
        return self._first(self.count)

    @property
    def probes(self) -> tuple[Probe, ...]:
        return tuple(probe for probe in self.store.probes if probe.sample in self._first(self.probed))

    @property
    def meta(self) -> dict[str, dict[str, Any]]:
        return self.store.meta

    @property
    def manifest(self) -> Manifest:
        whole = self.store.manifest
        return whole if self.thresholds is None else replace(whole, thresholds=self.thresholds)

    def unit(self, sample: str, time_index: int, layer: int, planes: bool = True) -> UnitStatistics:
        unit = self.store.unit(sample, time_index, layer, planes)
        if self.thresholds is None:
            return unit
        whole = self.store.manifest.thresholds
        kept = [whole.index(threshold) for threshold in self.thresholds]
        menu = [*kept, *range(len(whole), len(unit.menu_error))]
        return replace(
            unit,
            planes=None if unit.planes is None else unit.planes[kept],
            menu_error=unit.menu_error[menu],
            menu_residual_error=unit.menu_residual_error[menu],
        )

    def expect(self, samples: Sequence[str], time_index: int, layer: int, planes: bool = True) -> None:
        self.store.expect(samples, time_index, layer, planes)

    def error_weights(self) -> ErrorWeights:
        model, times = self.manifest.model, self.manifest.times
        found = error_weights(times, model.layers, model.heads, self.probes)
        if not self.time_weighted:
            shape = len(times), model.layers
            return replace(found, time=np.ones(shape[0]), unit=np.ones(shape), head=None)
        if not self.layer_weighted:
            return replace(found, unit=found.time[:, None] * np.ones(model.layers), head=None)
        return found if self.head_weighted else replace(found, head=None)

    ladders: ClassVar[None] = None
    """What a refinement measured depends on every sample and threshold: a part of a store is not refined."""

    def check_refinement(self) -> tuple[str, ...]:
        raise RefinementError("a part of a store must do without ladders, got a pass that asks for them")

    def refined_error(self, time_index: int, layer: int) -> npt.NDArray[np.float64]:
        raise RefinementError("a part of a store must do without errors of ladders, got a pass that asks for them")


def compiled(study: Study, store: Any, passes: str = DEFAULT_PASSES) -> Any:
    """Density to rule, by the compiler."""
    part = study if store is study.store else Study(study.bench, store)
    return lambda density: part.compiled(density, passes.replace("D", f"{density:g}"))


def planes(agreement: float) -> str:
    """A pass string whose only masks are voted planes; D stands for the density."""
    return f"vote{{agreement={agreement:g}}},protect,select{{target-density=D,menu=planes}},schedule,lower"


def shared_votes(study: Study) -> Callable[[float], Rule]:
    """Voted masks under the budget, each head with one for all times."""

    def at(density: float) -> Rule:
        score = study.score("vote")
        score = score.mean(0, keepdim=True).expand_as(score)
        keep, found = study.ladder("vote, shared", score)
        weighted = (found.error * study.bench.weight).sum(1, keepdim=True)
        whole = Measured(weighted, found.density.mean(1, keepdim=True))
        pick = bench.budgeted(whole, torch.ones(1, weighted.shape[2]), density)
        return Kept(study.bench, keep.gather(0, pick[None, ..., None, None].expand(1, *keep.shape[1:]))[0])

    return at


def uniform_shared(study: Study) -> Callable[[float], Rule]:
    """Voted masks at one threshold everywhere, one mask for all times."""

    def at(density: float) -> Rule:
        score = study.score("vote")
        score = score.mean(0, keepdim=True).expand_as(score).contiguous()
        return Kept(study.bench, with_top(score > bench.quantile_threshold(score, density), score))

    return at


def variants(study: Study) -> dict[str, Callable[[float], Rule]]:
    """Every change by name, each a function from the density."""
    store = study.store
    found: dict[str, Callable[[float], Rule]] = {BASE: compiled(study, store)}
    if store.ladders is not None:
        select = "select{target-density=D,menu=%s}"
        for kind in store.ladders.kinds if len(store.ladders.kinds) > 1 else ():  # alone it is `no anchors`
            menu = f"windows+ladders,ladder-kinds={kind}"
            found[f"ladders {kind}, windows"] = compiled(study, store, f"protect,{select % menu},schedule,lower")
        menus = {"ladders alone": "ladders", "ladders, windows, cuts": "windows+cuts+ladders"}
        for name, menu in menus.items():
            found[name] = compiled(study, store, f"protect,{select % menu},schedule,lower")
        found["not refined"] = compiled(study, Part(store))  # and so is all that follows
    for count in PROMPTS:
        if count <= len(store.samples):
            found[f"calibration prompts: {count}"] = compiled(study, Part(store, count))
    probed = len({probe.sample for probe in store.probes})
    for count in PROMPTS:
        if count <= probed:
            found[f"probed prompts: {count}"] = compiled(study, Part(store, probed=count))
    for agreement in AGREEMENTS:
        found[f"planes alone, agreement {agreement:g}"] = compiled(study, store, planes(agreement))
    for threshold in store.manifest.thresholds:
        found[f"planes alone, threshold {threshold:g}"] = compiled(
            study, Part(store, thresholds=(threshold,)), planes(0.5)
        )
    for menu in ("planes", "windows", "cuts", "planes+windows", "planes+cuts"):
        found[f"menu {menu}"] = compiled(
            study, store, f"vote,protect,select{{target-density=D,menu={menu}}},schedule,lower"
        )
    found["no anchors"] = compiled(study, store, "protect,select,schedule,lower")
    select = "select{target-density=D}"
    for what, other in (("rows", "frames"), ("frames", "rows")):
        passes = f"protect,{select},anchors{{max-group-{other}=1}},{select},schedule,lower"
        found[f"anchors, {what} alone"] = compiled(study, store, passes)
    for safety in (0.25, 0.5, 2, 4, 16):
        passes = f"protect,{select},anchors{{safety={safety}}},{select},schedule,lower"
        found[f"anchors, safety {safety}"] = compiled(study, store, passes)
    found["no time weight"] = compiled(study, Part(store, time_weighted=False, layer_weighted=False))
    found["time weight alike in all layers"] = compiled(study, Part(store, layer_weighted=False))
    found["time weight alike in all heads of a layer"] = compiled(study, Part(store, head_weighted=False))
    found["votes under the budget, masks by time"] = lambda density: study.under_budget(("vote",), density)
    found["votes under the budget, one mask for all times"] = shared_votes(study)
    found["votes, one threshold, masks by time"] = lambda density: study.uniform("vote", density)
    found["votes, one threshold, one mask for all times"] = uniform_shared(study)
    return found


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: PSNR, and what each change does to it, paired by prompt."""
    rows = {(row["variant"], row["target"]): row for row in result["rows"]}
    targets = sorted({target for _, target in rows})
    names = list(dict.fromkeys(row["variant"] for row in result["rows"]))
    told = result["about"]
    lines = [
        "# Ablations",
        "",
        f"PSNR in dB against the dense video, {result['prompts']} held-out prompts; in brackets the change from the",
        "defaults, paired by prompt, with its standard error. Where a variant misses the density, it is named.",
        "",
        f"`{told['command']}`; {told['device']}, {told['versions']}, {told['date']}.",
        "",
        "| what changes | " + " | ".join(f"density {target:g}" for target in targets) + " |",
        "|---" * (len(targets) + 1) + "|",
    ]
    for name in names:
        cells = [_cell(rows.get((name, target)), rows.get((BASE, target)), target) for target in targets]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None, base: dict[str, Any] | None, target: float) -> str:
    if row is None:
        return "not possible"
    quality = mean_and_error(row["psnr"])
    text = f"{quality['mean']:.1f} ± {quality['standard_error']:.1f}"
    if base is not None and row is not base:
        change = mean_and_error([a - b for a, b in zip(row["psnr"], base["psnr"], strict=True)])
        text += f" ({change['mean']:+.1f} ± {change['standard_error']:.1f})"
    return text if abs(row["density"] - target) < 0.01 else f"{text} at {row['density']:.2f}"


@click.command(help=__doc__)
@click.option("--model", default="demo", show_default=True, help=MODEL_HELP)
@click.option("--stats", "stores", type=click.Path(path_type=Path), multiple=True, required=True)
@click.option("--held-out", type=click.Path(path_type=Path), help="One prompt a line; the demo model has its own.")
@click.option("--prompts", type=click.IntRange(1), default=64, show_default=True)
@click.option("--calibration", type=click.IntRange(1), default=16, show_default=True)
@click.option("--densities", default=",".join(map(str, DENSITIES)), show_default=True)
@click.option("--variants", "only", default="", help="Beginnings of names, separated by semicolons; all if absent.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True)
@click.option("--seconds", type=float, default=math.inf, help="Begin no run after so many seconds.")
@click.option("--device", default="auto", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="JSON to write or to continue.")
@click.option("--table", "markdown", type=click.Path(path_type=Path), help="Markdown to write.")
def main(
    model: str,
    stores: tuple[Path, ...],
    held_out: Path | None,
    prompts: int,
    calibration: int,
    densities: str,
    only: str,
    batch: int,
    seconds: float,
    device: str,
    output: Path,
    markdown: Path | None,
) -> None:
    began = time.perf_counter()
    result = json.loads(output.read_text("utf-8")) if output.exists() else {"rows": []}
    result["prompts"] = prompts
    done = {(row["variant"], row["target"]) for row in result["rows"]}

    def judge(study: Study, name: str, make: Callable[[float], Rule]) -> None:
        for target in map(float, densities.split(",")):
            if (name, target) in done or time.perf_counter() - began > seconds:
                continue
            try:
                rule = make(target)
            except ValueError as error:
                console.print(f"{name} @{target:g}: {error}", markup=False)
                continue
            found = study.bench.judge(rule)
            row = {"variant": name, "target": target, "density": found["density"], "psnr": found["psnr"]}
            result["rows"].append(row)
            quality = mean_and_error(row["psnr"])
            seconds_now = time.perf_counter() - began
            console.print(f"{seconds_now:6.1f} s  {name} @{target:g}: {quality['mean']:.2f} dB", markup=False)
            output.write_text(json.dumps(result) + "\n", "utf-8")

    output.parent.mkdir(parents=True, exist_ok=True)
    for index, path in enumerate(stores):
        study = make_study(model, (path,), held_out, prompts, calibration, None, batch, device)
        result["about"] = about("python -m calibatt.tools.evaluate.ablations", study.sampler)
        if index == 0:
            begins = tuple(part.strip() for part in only.split(";"))
            every = variants(study)
            if unknown := [part for part in begins if not any(name.startswith(part) for name in every)]:
                raise click.UsageError(f"--variants must begin some of {'; '.join(every)}; got {unknown[0]!r}")
            for name, make in every.items():
                if name.startswith(begins):
                    judge(study, name, make)
        else:
            blocks = study.bench.blocks
            judge(study, f"blocks of {blocks.block_q} x {blocks.block_k}", compiled(study, study.store))
    output.write_text(json.dumps(result) + "\n", "utf-8")
    if markdown is not None:
        markdown.write_text(table(result), "utf-8")


if __name__ == "__main__":
    main()
