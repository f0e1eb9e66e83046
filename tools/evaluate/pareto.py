"""Quality against executed density and attention time: our plans, and what else could choose the blocks.

    calibatt-calibrate --model demo --samples 8 --refine -o stats/
    python -m calibatt.tools.evaluate.pareto --stats stats/ -o docs/benchmarks/pareto.json \\
        --figure docs/pictures/pareto.png

Every method runs on the same held-out prompts from the same noise, through the same block-sparse kernel: only the masks
differ. *uniform*: one rule for all heads and times. *budget*: candidates of many densities for each head, their output
errors measured on the calibration prompts, chosen by the compiler's own budget of error times weight. Run again, it
does only what is not in the JSON yet.
"""

from __future__ import annotations

import copy
import json
import math
import statistics as stats
import time
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from torch import Tensor

from calibatt.compiler.cost import device_named
from calibatt.compiler.emit import compile_in_memory
from calibatt.compiler.gather import StatisticsSource
from calibatt.compiler.ir import Job, UnitIR
from calibatt.compiler.language import DEFAULT_PASSES, parse_passes
from calibatt.compiler.stats import Store
from calibatt.runtime import Plan
from calibatt.tools.calibrate.__main__ import pick_device, plan_work, read_prompts
from calibatt.tools.calibrate.models import MODEL_HELP, make_sampler
from calibatt.tools.evaluate import baselines, bench
from calibatt.tools.evaluate.bench import (
    Bench,
    BestOf,
    Exact,
    Kept,
    Measured,
    Moment,
    PerInput,
    Planned,
    Rule,
    Score,
    Seen,
)
from calibatt.tools.evaluate.harness import FIRST_SEED, about
from calibatt.tools.evaluate.masks import with_top

DENSITIES = (0.2, 0.35, 0.5, 0.65)
SHARES = (0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Densities of a head's candidates under a budget, besides dense."""
PROBE_SHARE = 0.35
"""Density of the masks that make the errors of probes."""
RANDOM_SEED = 5
OURS = "compiled"
"""What all others are compared with."""

console = Console(stderr=True)


class _Remembered:
    """Units that are gathered once and compiled many times."""

    def __init__(self, source: StatisticsSource) -> None:
        self._source = source
        self._units: dict[tuple[bool, bool, int, int], UnitIR] = {}

    def unit(self, job: Job, time_index: int, layer: int) -> UnitIR:
        key = job.planes, job.use_ladders, time_index, layer
        if key not in self._units:
            self._units[key] = self._source.unit(job, time_index, layer)
        return copy.deepcopy(self._units[key])


class Study:
    """All that the methods share, made when first asked for.

    Args:
        bench: The bench.
        store: The statistics that plans are compiled from.
    """

    def __init__(self, bench: Bench, store: Store) -> None:
        self.bench, self.store = bench, store
        self.sampler = bench.sampler
        self._measured: dict[str, tuple[Tensor, Measured]] = {}

    @cached_property
    def seen(self) -> Seen:
        return bench.see(self.bench)

    @cached_property
    def source(self) -> _Remembered:
        return _Remembered(StatisticsSource(self.store))

    def compiled(self, density: float, passes: str = DEFAULT_PASSES) -> Rule:
        """What calibatt-compile makes of the store."""
        text = passes.replace("select", f"select{{target-density={density:g}}}") if "{" not in passes else passes
        parsed = parse_passes(text)
        return Planned(
            self.bench, Plan(compile_in_memory(self.store, self.source, parsed, device_named("h200-triton")))
        )

    # scores of static masks, (T, L, H, Q, K)

    def score(self, name: str) -> Tensor:
        """A static score by name: a pattern, ``random``, ``vote`` (top-p, agreed on by half of the samples), ``mass``
        (mean mass), ``error`` (mean block error)."""
        steps, layers, heads = self.bench.shape
        if name == "vote":
            return baselines.mass_before(self.seen.mass).median(2).values
        if name == "mass":
            return self.seen.mass.mean(2)
        if name == "error":
            return self.seen.error.mean(2)
        tokens, blocks = self.sampler.grid.tokens, self.bench.blocks
        sizes = blocks.q_blocks(tokens), blocks.k_blocks(tokens)
        if name == "random":
            return baselines.random_score((steps, layers, heads, *sizes), RANDOM_SEED).to(self.bench.device)
        order = self.order if name == "cubes" else None
        score = baselines.pattern(name, self.sampler.grid, blocks, order, self.bench.device)
        return score.expand(steps, layers, heads, *sizes)

    @cached_property
    def order(self) -> Tensor:
        return baselines.cube_order(self.sampler.grid).to(self.bench.device)

    def uniform(self, name: str, density: float) -> Rule:
        """One rule for all: patterns at one density everywhere, others at one threshold everywhere."""
        score = self.score(name)
        threshold = bench.quantile_threshold(score, density)
        return Kept(self.bench, with_top(score > threshold, score), self.order if name == "cubes" else None)

    def ladder(
        self, name: str, seen_score: Tensor | None = None, order: Tensor | None = None
    ) -> tuple[Tensor, Measured]:
        """A score's masks at `SHARES` in every head, bool ``(C, T, L, H, Q, K)``, and what they cost; dense is last."""
        key = name if order is None else f"{name}, cubes"
        if key not in self._measured:
            score = self.score(name) if seen_score is None else seen_score
            thresholds = bench.head_thresholds(score, (*SHARES, 1.0))
            keep = with_top(score > thresholds[..., None, None], score.expand(len(thresholds), *score.shape))
            found = bench.measure(self.bench, lambda m: keep[:, m.step, m.layer], len(keep), order)
            self._measured[key] = keep, found
        return self._measured[key]

    def under_budget(
        self, names: Iterable[str], density: float, weight: Tensor | None = None, order: Tensor | None = None
    ) -> Rule:
        """Each head's mask from the ladders of these scores, by measured error x weight under one budget."""
        scores: dict[str, Callable[[], Tensor]] = {}
        if order is not None:
            scores["vote"] = lambda: baselines.mass_before(self.seen_in_cubes.mass).median(2).values
            scores["error"] = lambda: self.seen_in_cubes.error.mean(2)
        ladders = [self.ladder(name, scores[name]() if name in scores else None, order) for name in names]
        keep = torch.cat([masks for masks, _ in ladders])
        found = Measured.joined([measured for _, measured in ladders])
        pick = bench.budgeted(found, self.bench.weight if weight is None else weight, density)
        chosen = keep.gather(0, pick[None, ..., None, None].expand(1, *keep.shape[1:]))[0]
        return Kept(self.bench, chosen, order)

    @cached_property
    def seen_in_cubes(self) -> Seen:
        return bench.see(self.bench, self.order)

    # rules that look at the input

    def mass_score(self, q: Tensor, k: Tensor, v: Tensor, step: int, layer: int) -> Tensor:
        mass, _ = bench.statistics(q, k, v, self.bench.blocks)
        return baselines.mass_before(mass)

    def error_score(self, q: Tensor, k: Tensor, v: Tensor, step: int, layer: int) -> Tensor:
        values = bench.projected(v, self.seen.factor[step, layer])
        _, error = bench.statistics(q, k, values, self.bench.blocks)
        return error / self.seen.square[step, layer].mean() * self.bench.weight[step, layer][:, None, None]

    def skip_score(self, q: Tensor, k: Tensor, v: Tensor, step: int, layer: int) -> Tensor:
        if q.is_cuda:
            q, k = q.half(), k.half()
        return baselines.skip_softmax_score(q, k, self.bench.blocks)

    def everywhere(self, threshold: Tensor) -> Tensor:
        return threshold.expand(self.bench.shape)

    def dynamic_uniform(self, density: float) -> Rule:
        scores = baselines.mass_before(self.seen.mass)
        return PerInput(self.bench, self.mass_score, self.everywhere(bench.quantile_threshold(scores, density)))

    def dynamic_budget(self, density: float, score: Score, seen: Callable[[], Tensor]) -> Rule:
        """One threshold for each head at each time, under our budget; `seen` are the scores of the calibration."""
        key = "dynamic, " + getattr(score, "__name__", "")
        if key not in self._measured:
            scores = seen()
            thresholds = bench.head_thresholds(scores, (*SHARES, 1.0))

            def candidates(moment: Moment) -> Tensor:
                score = scores[moment.step, moment.layer]
                over = thresholds[:, moment.step, moment.layer, :, None, None]
                return with_top(score > over[:, None], score.expand(len(over), *score.shape))

            self._measured[key] = thresholds, bench.measure(self.bench, candidates, len(thresholds))
        thresholds, found = self._measured[key]
        pick = bench.budgeted(found, self.bench.weight, density)
        return PerInput(self.bench, score, thresholds.gather(0, pick[None])[0])

    def dynamic_error(self, density: float) -> Rule:
        scores = self.seen.error * self.bench.weight[:, :, None, :, None, None]
        return PerInput(self.bench, self.error_score, self.everywhere(bench.quantile_threshold(scores, density)))

    def skip_softmax(self, density: float) -> Rule:
        return PerInput(self.bench, self.skip_score, self.everywhere(self.skip_thresholds(density)))

    def skip_thresholds(self, density: float) -> Tensor:
        return bench.quantile_threshold(self.skip_scores, density)

    @cached_property
    def skip_scores(self) -> Tensor:
        found = torch.zeros_like(self.seen.mass)

        def on_moment(m: Moment) -> None:
            found[m.step, m.layer] = self.skip_score(m.q, m.k, m.v, m.step, m.layer)

        self.bench.calibrate(on_moment)
        return found

    def svg(self, density: float) -> Rule:
        keeps = []
        for name in ("spatial", "temporal"):
            score = self.score(name)[0, 0]
            keeps.append(with_top(score > bench.quantile_threshold(score, density), score))
        return BestOf(self.bench, keeps)

    # what an error costs, probed on all calibration prompts

    def probes(self, by_head: bool) -> Tensor:
        score = self.score("vote")
        keep = with_top(score > bench.head_thresholds(score, (PROBE_SHARE,))[0][..., None, None], score)
        return bench.probe_weights(self.bench, self.seen, keep, by_head)

    @cached_property
    def layer_probes(self) -> Tensor:
        return self.probes(False)

    @cached_property
    def head_probes(self) -> Tensor:
        return self.probes(True)


def normalised(probes: Tensor) -> Tensor:
    """Mean over the prompts ``(..., P)``, each prompt's probes first divided by their own mean: no prompt decides."""
    own = probes.flatten(0, -2).mean(0)
    return (probes / own).mean(-1) * own.mean()


NOT_REFINED = DEFAULT_PASSES.replace("select", "select{target-density=D,menu=windows+cuts}")
"""The default passes on a store that was not refined; D stands for the density."""
MENU = ("vote", "mass", "error", "frames", "rows", "box")
METHODS: dict[str, Callable[[Study, float], Rule]] = {
    OURS: lambda study, d: study.compiled(d),
    "compiled, not refined": lambda study, d: study.compiled(d, NOT_REFINED.replace("D", f"{d:g}")),
    "compiled, planes + windows": lambda study, d: study.compiled(
        d, f"vote,protect,select{{target-density={d:g},menu=planes+windows}},schedule,lower"
    ),
    "compiled, no anchors": lambda study, d: study.compiled(d, "protect,select,schedule,lower"),
    "budget: measured menu": lambda study, d: study.under_budget(MENU, d),
    "budget: measured menu, weights by final video": lambda study, d: study.under_budget(
        MENU, d, normalised(study.layer_probes)
    ),
    "budget: measured menu, weights by head": lambda study, d: study.under_budget(
        MENU, d, normalised(study.head_probes)
    ),
    "budget: votes": lambda study, d: study.under_budget(("vote",), d),
    "budget: votes + errors, tokens in cubes": lambda study, d: study.under_budget(
        ("vote", "error"), d, order=study.order
    ),
    "budget: windows": lambda study, d: study.under_budget(("frames", "rows", "box"), d),
    "budget: cubes (STA)": lambda study, d: study.under_budget(("cubes",), d, order=study.order),
    "budget: spatial or temporal (SVG)": lambda study, d: study.under_budget(("spatial", "temporal"), d),
    "budget: radial": lambda study, d: study.under_budget(("radial",), d),
    "budget: random": lambda study, d: study.under_budget(("random",), d),
    "dynamic: top-p, budget": lambda study, d: study.dynamic_budget(
        d, study.mass_score, lambda: baselines.mass_before(study.seen.mass)
    ),
    "dynamic: skip-softmax, budget": lambda study, d: study.dynamic_budget(
        d, study.skip_score, lambda: study.skip_scores
    ),
    "dynamic: block error x weight": lambda study, d: study.dynamic_error(d),
    "dynamic: top-p, one p": lambda study, d: study.dynamic_uniform(d),
    "dynamic: skip-softmax": lambda study, d: study.skip_softmax(d),
    "dynamic: spatial or temporal (SVG)": lambda study, d: study.svg(d),
    "uniform: votes, one threshold": lambda study, d: study.uniform("vote", d),
    "uniform: mean mass, one cut": lambda study, d: study.uniform("mass", d),
    "uniform: cubes (STA)": lambda study, d: study.uniform("cubes", d),
    "uniform: radial": lambda study, d: study.uniform("radial", d),
    "uniform: frames": lambda study, d: study.uniform("frames", d),
    "uniform: rows": lambda study, d: study.uniform("rows", d),
    "uniform: box": lambda study, d: study.uniform("box", d),
    "uniform: random": lambda study, d: study.uniform("random", d),
}
"""Methods by name, the most telling first."""
STATIC_PATTERNS = tuple(
    name for name in METHODS if name.startswith("uniform: ") and "mass" not in name and "vot" not in name
)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each density the paired differences in PSNR from what `OURS` reaches there, in dB."""
    ours = {row["target"]: row for row in rows if row["method"] == OURS}
    found = []
    for row in rows:
        base = ours.get(row["target"])
        if base is not None and row is not base:
            difference = [a - b for a, b in zip(row["psnr"], base["psnr"], strict=True)]
            found.append({"method": row["method"], "target": row["target"], **mean_and_error(difference)})
    return found


def mean_and_error(values: list[float]) -> dict[str, float]:
    error = stats.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": stats.fmean(values), "standard_error": error}


def draw(result: dict[str, Any], path: Path) -> None:
    """PSNR against density and against attention time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {
        OURS: ("#1b3d78", "-", "calibrated plan (ours)"),
        "compiled, not refined": ("#2694a0", "-", "the same, errors estimated"),
        "dynamic: top-p, budget": ("#7a5ea8", "--", "dynamic top-p, our budget"),
        "dynamic: top-p, one p": ("#b79fd6", "--", "dynamic top-p"),
        "dynamic: skip-softmax": ("#c24f7a", "--", "skip-softmax"),
        "dynamic: spatial or temporal (SVG)": ("#d78aa5", "--", "spatial or temporal (SVG)"),
        "budget: windows": ("#e4a03a", "-.", "windows, our budget"),
        "budget: random": ("#9aa0aa", "-.", "random, our budget"),
        "uniform: votes, one threshold": ("#7ac678", ":", "calibrated, one threshold"),
        "uniform: cubes (STA)": ("#e4572e", ":", "3D tiles (STA)"),
        "uniform: radial": ("#a8571e", ":", "radial"),
        "uniform: random": ("#5a606b", ":", "random"),
    }
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for name, (colour, style, label) in shown.items():
        rows = sorted((row for row in result["rows"] if row["method"] == name), key=lambda row: row["density"])
        if not rows:
            continue
        quality = [mean_and_error(row["psnr"]) for row in rows]
        for axis, key in zip(axes, ("density", "attention_ms"), strict=True):
            axis.errorbar(
                [row[key] for row in rows],
                [value["mean"] for value in quality],
                yerr=[value["standard_error"] for value in quality],
                color=colour,
                linestyle=style,
                marker="o",
                markersize=3.5,
                linewidth=2.2 if name == OURS else 1.3,
                label=label,
            )
    axes[0].set_xlabel("executed density (share of dense attention's blocks)")
    axes[1].set_xscale("log")
    axes[1].set_xlabel("attention of one video, ms (masks chosen from the input included)")
    axes[0].set_ylabel("PSNR against the dense video, dB")
    for row in result["rows"]:
        if row["method"] == "dense: PyTorch":
            axes[1].axvline(row["attention_ms"], color="#22262e", linewidth=0.8)
            axes[1].annotate(" dense", (row["attention_ms"], axes[1].get_ylim()[0]), fontsize=8, va="bottom")
    for axis in axes:
        axis.grid(color="#e4e2dc")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=7.5, frameon=False)
    told = result["about"]
    figure.suptitle(
        f"{result['prompts']} held-out prompts; {told['device']}, {told['versions']}, {told['date']}", fontsize=9
    )
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150, facecolor="white")


@click.command(help=__doc__)
@click.option("--model", default="demo", show_default=True, help=MODEL_HELP)
@click.option("--stats", "stores", type=click.Path(path_type=Path), multiple=True, required=True)
@click.option("--held-out", type=click.Path(path_type=Path), help="One prompt a line; the demo model has its own.")
@click.option("--prompts", type=click.IntRange(1), default=64, show_default=True, help="Held-out prompts.")
@click.option(
    "--calibration", type=click.IntRange(1), default=16, show_default=True, help="Prompts that errors are measured on."
)
@click.option("--densities", default=",".join(map(str, DENSITIES)), show_default=True)
@click.option("--methods", default="", help="Names, separated by semicolons; all if absent.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps [the model's own].")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Videos at a time.")
@click.option("--seconds", type=float, default=math.inf, help="Begin no method after so many seconds.")
@click.option("--device", default="auto", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="JSON to write or to continue.")
@click.option("--figure", type=click.Path(path_type=Path), help="PNG to draw.")
def main(
    model: str,
    stores: tuple[Path, ...],
    held_out: Path | None,
    prompts: int,
    calibration: int,
    densities: str,
    methods: str,
    steps: int | None,
    batch: int,
    seconds: float,
    device: str,
    output: Path,
    figure: Path | None,
) -> None:
    names = [name.strip() for name in methods.split(";")] if methods else list(METHODS)
    if unknown := [name for name in names if name not in METHODS]:
        raise click.UsageError(f"--methods must be some of {'; '.join(METHODS)}; got {unknown[0]!r}")
    began = time.perf_counter()
    study = make_study(model, stores, held_out, prompts, calibration, steps, batch, device)
    result = json.loads(output.read_text("utf-8")) if output.exists() else {"rows": []}
    result |= {"about": about("python -m calibatt.tools.evaluate.pareto", study.sampler)}
    result |= {"prompts": prompts, "calibration": calibration, "steps": len(study.sampler.times)}
    done = {(row["method"], row["target"]) for row in result["rows"]}

    def judge(name: str, target: float, make: Callable[[], Rule]) -> None:
        if (name, target) in done or time.perf_counter() - began > seconds:
            return
        start = time.perf_counter()
        row = {"method": name, "target": target, **study.bench.judge(make())}
        rounded = {
            key: [round(x, 4) for x in value] if isinstance(value, list) else value for key, value in row.items()
        }
        result["rows"].append(rounded)
        quality = mean_and_error(row["psnr"])
        console.print(
            f"{time.perf_counter() - began:6.1f} s (+{time.perf_counter() - start:.1f})  {name} @{target:g}: density "
            f"{row['density']:.3f}, {quality['mean']:.2f} ± {quality['standard_error']:.2f} dB, "
            f"{row['attention_ms']:.2f} ms",
            markup=False,
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result) + "\n", "utf-8")

    judge("dense: block-sparse kernel", 1.0, lambda: study.uniform("random", 1.0))
    judge("dense: PyTorch", 1.0, Exact)
    for name in names:
        for density in map(float, densities.split(",")):
            judge(name, density, lambda name=name, density=density: METHODS[name](study, density))
    result["difference_from_ours_db"] = summary(result["rows"])
    output.write_text(json.dumps(result) + "\n", "utf-8")
    if figure is not None:
        draw(result, figure)
    console.print(f"{time.perf_counter() - began:.1f} s: {output}")


def make_study(
    model: str,
    stores: tuple[Path, ...],
    held_out: Path | None,
    prompts: int,
    calibration: int,
    steps: int | None,
    batch: int,
    device: str,
) -> Study:
    """The study of a model from its statistics; the sampler's steps must be the times of the store."""
    store = Store.open(stores)
    sampler = make_sampler(model, steps, pick_device(device))
    if held_out is not None:
        lines = read_prompts(held_out)[:prompts]
    elif model == "demo":
        from calibatt.tools.demo.measure import held_out_prompts

        lines = held_out_prompts(prompts)
    else:
        raise click.UsageError(f"--held-out must be given for --model {model}, got none")
    work = [(prompt, FIRST_SEED + index) for index, prompt in enumerate(lines)]
    times = store.manifest.times
    at = [min(range(len(times)), key=lambda index: abs(times[index] - now)) for now in sampler.times]
    found = store.error_weights()
    weights = found.unit if found.head is None else found.head
    weight = torch.tensor(weights[at], dtype=torch.float32)
    calibrated = plan_work(model, None, calibration, 0)
    return Study(Bench(sampler, store.manifest.blocks, work, calibrated, weight, batch), store)


if __name__ == "__main__":
    main()
