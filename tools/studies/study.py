"""All ways of choosing blocks that the studies judge, made from one store and one bench.

`pareto.py` says what their names mean.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import click
import torch
from torch import Tensor

from calibatt.compiler.cost import Speed, device_named
from calibatt.compiler.gather import Samplings, StatisticsSource
from calibatt.compiler.ir import Job, UnitIR
from calibatt.compiler.language import DEFAULT_PASSES, parse_passes
from calibatt.compiler.stats import Store, window_keep
from calibatt.plans import INT8, INT8_FP8
from calibatt.runtime import Plan, load_plan
from calibatt.tools.calibrate.models import DEMOS, FIRST_SEED, make_sampler
from calibatt.tools.calibrate.work import Work, plan_work, read_prompts
from calibatt.tools.evaluate.harness import executed_density
from calibatt.tools.studies import baselines, bench, candidates, sol_attn
from calibatt.tools.studies.bench import Bench, BestOf, Kept, Moment, PerInput, Planned, Rule
from calibatt.tools.studies.candidates import Measured
from calibatt.tools.studies.in_memory import compile_in_memory
from calibatt.tools.studies.masks import with_top
from calibatt.tools.studies.stores import sampling_counts

DENSITIES = (0.2, 0.35, 0.5, 0.65)
SHARES = (0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Densities of a head's candidates under a budget, besides dense."""
AGREEMENTS = (0.25, 0.5, 0.75)
"""Of the paper's own method."""
RANDOM_SEED = 5
DEFAULTS = DEFAULT_PASSES.replace("select", "select{target-density=D}")
"""D stands for the density."""
OURS = "compiled"
"""What all others are compared with."""
WHOLE_CALLS = {INT8: Speed({1: 1 / 1.20}), INT8_FP8: Speed({1: 1 / 1.30})}
"""What a block in 8 bits costs of one in 16 bits, pre-passes included, at 720p and density 0.3 (one H200, 2026-11-30);
the demo's own grid is too small for 8 bits to be faster."""


class _Remembered:
    """Units that are gathered once and compiled many times."""

    def __init__(self, source: StatisticsSource) -> None:
        self._source = source
        self._units: dict[tuple[int, int], UnitIR] = {}

    def unit(self, job: Job, time_index: int, layer: int) -> UnitIR:
        key = time_index, layer
        if key not in self._units:
            self._units[key] = self._source.unit(job, time_index, layer)
        return copy.deepcopy(self._units[key])


class Study:
    """All that the methods share, made when first asked for.

    Args:
        bench: The bench.
        store: The statistics that plans are compiled from.
        backend: Of the runtime, that executes plans; on a CPU there is one.
        plans: A folder in which plans are kept, so that none is compiled twice; nowhere if absent.
    """

    def __init__(self, bench: Bench, store: Samplings, backend: str = "triton", plans: Path | None = None) -> None:
        self.bench, self.store, self.backend, self.plans = bench, store, backend, plans
        self.sampler = bench.sampler
        self._measured: dict[str, tuple[Tensor, Measured]] = {}

    @cached_property
    def mass(self) -> Tensor:
        return bench.see(self.bench)

    @property
    def calibrated(self) -> str:
        """The samplings of the store x the random vectors of each."""
        counts = sampling_counts(self.store)
        return f"{counts['samplings']} samplings x {' or '.join(map(str, counts['vectors']))}"

    @cached_property
    def price(self) -> Tensor:
        """What a unit of squared output error costs, ``(T, L, H)``: geometric mean over the windows of the store."""
        of, table, heads = self.store.manifest, self.store.table(), self.bench.shape[2]
        keep = torch.stack([torch.tensor(window_keep(each, of.grid, of.blocks)) for each in of.windows])
        each = keep.to(self.bench.device)[:, None].expand(-1, heads, -1, -1)
        error = candidates.measure(self.bench, lambda moment: each, len(each)).error.movedim(0, 2)
        at = [bench.nearest(of.times, now) for now in self.sampler.times]
        prices = torch.tensor((table.window_error * table.time_level[:, None, None, None])[at]).to(error)
        known = (prices > 0) & (error > 0)
        ratio = torch.where(known, prices / error.where(known, 1.0), 1.0).log()
        return (ratio.sum(2) / known.sum(2).clamp(min=1)).exp()

    @cached_property
    def source(self) -> _Remembered:
        return _Remembered(StatisticsSource(self.store))

    def compiled(self, density: float, passes: str = DEFAULTS) -> Planned:
        """What calibatt-compile makes of the store; D in the passes stands for the density."""
        text = passes.replace("D", f"{density:g}")
        source = repr((self.store.manifest.digest, self.store.samplings, self.calibrated, text))
        kept = self.plans and self.plans / f"{blake2b(source.encode(), digest_size=8).hexdigest()}.plan"
        if kept and kept.exists():
            plan = load_plan(kept, prove=False)
        else:
            plan = Plan(compile_in_memory(self.store, self.source, parse_passes(text), device_named("h200-triton")))
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                plan.save(kept)
        return Planned(self.bench, plan, self.backend)

    def in_eight_bits(self, target: float, equal_density: bool) -> Planned:
        """A plan with heads in 8 bits where they pay.

        On a GPU `hopper` executes it, so that the store must be of blocks of 128; on a CPU 8 bits are emulated.

        Args:
            target: What it costs of dense attention in 16 bits, or with `equal_density` the blocks that it executes.
            equal_density: The cost is then found by bisection, to a thousandth of the density.
        """
        device = replace(device_named("h200-hopper"), eight_bit=WHOLE_CALLS)

        def at(cost: float) -> Plan:
            passes = parse_passes(DEFAULTS.replace("D", f"{cost:.5f},precision=auto"))
            return Plan(compile_in_memory(self.store, self.source, passes, device))

        low, high = target * min(speed.block(1) for speed in WHOLE_CALLS.values()), target
        plan = at(high)
        while equal_density and high - low > 5e-4 * target:
            middle = (low + high) / 2
            plan = at(middle)
            if executed_density(plan, self.sampler.times) > target:
                high = middle
            else:
                low = middle
        return Planned(self.bench, plan, "auto")

    @cached_property
    def papers(self) -> list[Planned]:
        """Plans of the paper's own method: each threshold of the store with each of `AGREEMENTS`."""
        passes = "vote{agreement=%g,threshold=%g},repeat,schedule,lower"
        return [self.compiled(1.0, passes % (a, t)) for t in self.store.manifest.thresholds for a in AGREEMENTS]

    def paper(self, density: float) -> Planned:
        """Of `papers` the one whose density is nearest; its own density cannot be chosen.

        Raises:
            ValueError: The store has no thresholds.
        """
        if not self.papers:
            raise ValueError("the store must have thresholds (calibatt-calibrate --thresholds), got none")
        return min(self.papers, key=lambda rule: abs(rule.density - density))

    # scores of static masks, (T, L, H, Q, K)

    def score(self, name: str) -> Tensor:
        """A static score by name: a pattern, ``random``, or ``vote`` (top-p, agreed on by half of the samples)."""
        steps, layers, heads = self.bench.shape
        if name == "vote":
            return baselines.mass_before(self.mass).median(2).values
        if name == "vote in cubes":
            return baselines.mass_before(bench.see(self.bench, self.order)).median(2).values
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
        threshold = candidates.quantile_threshold(score, density)
        return Kept(self.bench, with_top(score > threshold, score), self.order if name == "cubes" else None)

    def ladder(self, name: str, order: Tensor | None = None) -> tuple[Tensor, Measured]:
        """A score's masks at `SHARES` in every head, bool ``(C, T, L, H, Q, K)``, and what they cost; dense is last."""
        if name not in self._measured:
            score = self.score(name)
            thresholds = candidates.head_thresholds(score, (*SHARES, 1.0))
            keep = with_top(score > thresholds[..., None, None], score.expand(len(thresholds), *score.shape))
            found = candidates.measure(self.bench, lambda m: keep[:, m.step, m.layer], len(keep), order)
            self._measured[name] = keep, found
        return self._measured[name]

    def under_budget(self, names: Iterable[str], density: float, order: Tensor | None = None) -> Rule:
        """Each head's mask from the ladders of these scores, by measured error x price under one budget."""
        ladders = [self.ladder(name, order) for name in names]
        keep = torch.cat([masks for masks, _ in ladders])
        found = Measured.joined([measured for _, measured in ladders])
        pick = candidates.budgeted(found, self.price, density)
        chosen = keep.gather(0, pick[None, ..., None, None].expand(1, *keep.shape[1:]))[0]
        return Kept(self.bench, chosen, order)

    # rules that look at the input

    def mass_score(self, q: Tensor, k: Tensor, v: Tensor, step: int, layer: int) -> Tensor:
        return baselines.mass_before(bench.block_mass(q, k, v, self.bench.blocks))

    def skip_score(self, q: Tensor, k: Tensor, v: Tensor, step: int, layer: int) -> Tensor:
        if q.is_cuda:
            q, k = q.half(), k.half()
        return baselines.skip_softmax_score(q, k, self.bench.blocks)

    def everywhere(self, threshold: Tensor) -> Tensor:
        return threshold.expand(self.bench.shape)

    def dynamic_uniform(self, density: float) -> Rule:
        scores = baselines.mass_before(self.mass)
        return PerInput(self.bench, self.mass_score, self.everywhere(candidates.quantile_threshold(scores, density)))

    def dynamic_budget(self, density: float) -> Rule:
        """Top-p with a p for each head at each time, under our budget."""
        if "dynamic" not in self._measured:
            scores = baselines.mass_before(self.mass)
            thresholds = candidates.head_thresholds(scores, (*SHARES, 1.0))

            def masks_over(moment: Moment) -> Tensor:
                score = self.mass_score(moment.q, moment.k, moment.v, moment.step, moment.layer)
                over = thresholds[:, moment.step, moment.layer, :, None, None]
                return with_top(score > over[:, None], score.expand(len(over), *score.shape))

            self._measured["dynamic"] = thresholds, candidates.measure(self.bench, masks_over, len(thresholds))
        thresholds, found = self._measured["dynamic"]
        pick = candidates.budgeted(found, self.price, density)
        return PerInput(self.bench, self.mass_score, thresholds.gather(0, pick[None])[0])

    def skip_softmax(self, density: float) -> Rule:
        """A tile is skipped where its scores stay far below; one threshold, found on the calibration prompts."""
        scores = []
        self.bench.calibrate(lambda m: scores.append(self.skip_score(m.q, m.k, m.v, m.step, m.layer).flatten()))
        threshold = candidates.quantile_threshold(torch.cat(scores), density)
        return PerInput(self.bench, self.skip_score, self.everywhere(threshold))

    @cached_property
    def standing(self) -> Tensor:
        """`sol_attn.standing` of all calls of the calibration prompts, in one row."""
        found: list[Tensor] = []
        self.bench.calibrate(lambda m: found.append(sol_attn.standing(m.q, m.k, self.bench.blocks).flatten()))
        return torch.cat(found)

    def sol(self, density: float, dense_steps: int) -> Rule:
        """Sol-Attn; one threshold in standard deviations of a row, found on the calibration prompts.

        Raises:
            ValueError: The dense steps alone take more.
        """
        steps = len(self.sampler.times)
        rest = (density - dense_steps / steps) / (1 - dense_steps / steps)
        if rest <= 0:
            raise ValueError(f"density must be above that of {dense_steps} dense steps of {steps}, got {density}")
        threshold = self.everywhere(candidates.quantile_threshold(self.standing, rest)).clone()
        threshold[:dense_steps] = -torch.inf
        return sol_attn.SolAttn(self.bench, threshold)

    def svg(self, density: float) -> Rule:
        keeps = []
        for name in ("spatial", "temporal"):
            score = self.score(name)[0, 0]
            keeps.append(with_top(score > candidates.quantile_threshold(score, density), score))
        return BestOf(self.bench, keeps)


SELECT = "select{target-density=D}"
METHODS: dict[str, Callable[[Study, float], Rule]] = {
    OURS: lambda study, d: study.compiled(d),
    "compiled, no anchors": lambda study, d: study.compiled(d, f"{SELECT},schedule,lower"),
    "compiled, anchor rows alone": lambda study, d: study.compiled(
        d, f"{SELECT},anchors{{max-group-frames=1}},{SELECT},schedule,lower"
    ),
    "compiled, anchor frames alone": lambda study, d: study.compiled(
        d, f"{SELECT},anchors{{max-group-rows=1}},{SELECT},schedule,lower"
    ),
    "compiled, windows alone": lambda study, d: study.compiled(
        d, "select{target-density=D,menu=windows},schedule,lower"
    ),
    "compiled, 8 bits, equal time": lambda study, d: study.in_eight_bits(d, False),
    "compiled, 8 bits, equal density": lambda study, d: study.in_eight_bits(d, True),
    "the paper's own method": lambda study, d: study.paper(d),
    "budget: votes": lambda study, d: study.under_budget(("vote",), d),
    "budget: votes, tokens in cubes": lambda study, d: study.under_budget(("vote in cubes",), d, order=study.order),
    "budget: cubes (STA)": lambda study, d: study.under_budget(("cubes",), d, order=study.order),
    "budget: spatial or temporal (SVG)": lambda study, d: study.under_budget(("spatial", "temporal"), d),
    "budget: radial": lambda study, d: study.under_budget(("radial",), d),
    "budget: random": lambda study, d: study.under_budget(("random",), d),
    "dynamic: top-p, budget": lambda study, d: study.dynamic_budget(d),
    "dynamic: top-p, one p": lambda study, d: study.dynamic_uniform(d),
    "dynamic: skip-softmax": lambda study, d: study.skip_softmax(d),
    "dynamic: Sol-Attn": lambda study, d: study.sol(d, 0),
    "dynamic: Sol-Attn, first step dense": lambda study, d: study.sol(d, 1),
    "dynamic: spatial or temporal (SVG)": lambda study, d: study.svg(d),
    "uniform: votes, one threshold": lambda study, d: study.uniform("vote", d),
    "uniform: cubes (STA)": lambda study, d: study.uniform("cubes", d),
    "uniform: radial": lambda study, d: study.uniform("radial", d),
    "uniform: frames": lambda study, d: study.uniform("frames", d),
    "uniform: rows": lambda study, d: study.uniform("rows", d),
    "uniform: box": lambda study, d: study.uniform("box", d),
    "uniform: random": lambda study, d: study.uniform("random", d),
}
"""Methods by name, the most telling first."""


def held_out_work(model: str, path: Path | None, prompts: int) -> Work:
    """Prompts that nothing is calibrated on, and their seeds; the demo models have their own."""
    if path is not None:
        lines = read_prompts(path)[:prompts]
    elif model in DEMOS:
        from calibatt.tools.demo.measure import held_out_prompts

        lines = held_out_prompts(prompts)
    else:
        raise click.UsageError(f"--held-out must be given for --model {model}, got none")
    return [(prompt, FIRST_SEED + index) for index, prompt in enumerate(lines)]


def make_study(
    *,
    model: str,
    stores: tuple[Path, ...],
    prompts: int,
    calibration: int,
    batch: int,
    device: torch.device,
    held_out: Path | None = None,
    steps: int | None = None,
    backend: str = "triton",
    plans: Path | None = None,
    like: Study | None = None,
) -> Study:
    """The study of a model from its statistics.

    Args:
        model: Of ``--model``.
        stores: Folders of statistics of one manifest.
        prompts: How many prompts to judge on at most.
        calibration: How many prompts errors are measured on.
        batch: Videos at a time.
        device: Where the model runs.
        held_out: File of prompts to judge on; the demo models have their own.
        steps: Of the sampler; the model's own if absent. A step follows the time of the store that is nearest.
        backend: Of the runtime.
        plans: A folder in which plans are kept.
        like: One of the same model and prompts, whose dense videos are taken.

    Raises:
        click.UsageError: The store is of another grid, or made of a held-out prompt.
        ValueError: Model, prompts or store are wrong.
    """
    store = Store.open(stores)
    sampler = like.sampler if like else make_sampler(model, steps, str(device))
    if store.manifest.grid != sampler.grid:
        raise click.UsageError(
            f"--stats must be of {sampler.grid}, as --model {model} samples, got {store.manifest.grid}"
        )
    work = held_out_work(model, held_out, prompts)
    seen = {meta["prompt"] for meta in store.meta.values()}
    if known := [prompt for prompt, _ in work if prompt in seen]:
        raise click.UsageError(f"held-out prompts must be none that --stats was made of, got {known[0]!r}")
    calibrated = plan_work(model, None, calibration, 0)
    other = like.bench if like else None
    return Study(Bench(sampler, store.manifest.blocks, work, calibrated, batch, other), store, backend, plans)
