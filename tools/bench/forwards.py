"""Models at one size: cases are warmed up and proved, then forwards and samplings of all are timed by turns."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from calibatt.runtime import Plan, UnsupportedBackendError, load_plan
from calibatt.tools.bench.kernel import milliseconds, spread
from calibatt.tools.bench.published import Published
from calibatt.tools.bench.record import OUT_OF_TIME, state
from calibatt.tools.bench.trace import traced
from calibatt.tools.bench.variants import SHIFT, Variant, counted_calls, planned, step_cache

MODES = ("eager", "regional", "full")


MOST_OFF = 0.05
"""Most that results by two dense kernels may differ by, relative to their size; 0.005 after 40 layers of Wan 14B."""


class BenchError(RuntimeError):
    """What was to be timed does not compute what it must."""


class Clock:
    """How long the command has run, and whether there is time for more.

    Args:
        seconds: Nothing that would take it beyond these is begun.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._begun = time.perf_counter()

    @property
    def spent(self) -> float:
        return time.perf_counter() - self._begun

    def allows(self, expected_ms: float = 0.0) -> bool:
        return self.spent + expected_ms / 1e3 <= self.seconds


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Args:
        mode: How the model runs, of `MODES`.
        variant: What computes its self-attention.
        linears: Which model: its name in `Runner.models`.
        skip: Share of a sampling's forwards that a step cache skips; 0: there is no cache.
    """

    mode: str
    variant: Variant
    linears: str
    skip: float = 0.0

    @property
    def key(self) -> dict[str, Any]:
        """What identifies its records."""
        found = {"mode": self.mode, "linears": self.linears, "attention": self.variant.name}
        return {**found, "density": self.variant.density}


class Runner:
    """Runs models in every mode.

    Args:
        models: By name, of one architecture, on their device.
        modes: Of `MODES`; the models' blocks stay compiled if ``regional`` is one of them.
        backend: Of `torch.compile`.
    """

    def __init__(self, models: Mapping[str, Any], modes: Sequence[str], backend: str) -> None:
        self.models = models
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
        for model in models.values() if "regional" in modes else ():
            for block in model.modules():
                if type(block).__name__ in model._repeated_blocks:  # inside of a step cache, which decides in Python
                    block.forward = torch.compile(block.forward, **options)
        self._whole = {name: torch.compile(model, **options) for name, model in models.items() if "full" in modes}

    @contextmanager
    def running(self, case: Case) -> Iterator[Callable[..., Tensor]]:
        """A function of the model's arguments, for as long as the context lasts."""
        model = self.models[case.linears]
        run = self._whole[case.linears] if case.mode == "full" else model
        stance = torch.compiler.set_stance("force_eager") if case.mode == "eager" else nullcontext()
        with torch.no_grad(), stance, case.variant.attached(model):
            yield lambda **inputs: run(**inputs)[0]


def sample(row: Published, forward: Callable[..., Tensor], inputs: dict[str, Any], steps: int) -> Tensor:
    """A denoising loop as WanPipeline's, without guidance; returns the final latents, float32."""
    from diffusers import UniPCMultistepScheduler  # not needed by the commands beside this one

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    noise = inputs["hidden_states"]
    scheduler.set_timesteps(steps, device=noise.device)
    latents = noise.float()
    for now in scheduler.timesteps:
        timestep = row.timestep(now).expand(len(noise))
        found = forward(**{**inputs, "hidden_states": latents.to(noise.dtype), "timestep": timestep})
        latents = scheduler.step(found, now, latents, return_dict=False)[0]
    return latents


@dataclass(eq=False)
class SizeBench:
    """All that is measured at one size; results go into a report as they come.

    Args:
        row: The model's.
        runner: Of the models.
        size: Its name.
        inputs: Of a forward.
        device: Where the model is.
        clock: When to stop.
        report: What `main` writes.
        done: Called after every warming or timed call.
    """

    row: Published
    runner: Runner
    size: str
    inputs: dict[str, Any]
    device: torch.device
    clock: Clock
    report: dict[str, Any]
    done: Callable[[], None]
    _dense: dict[tuple[str, str], Tensor] = field(default_factory=dict, init=False)
    _plans: dict[str, Plan] = field(default_factory=dict, init=False)

    def attach_plan(self, path: Path, density: float) -> Variant | None:
        """Loads a plan and attaches it once, timed; the report says what both cost, or why it cannot be executed."""
        begun = time.perf_counter()
        plan = load_plan(path)
        load_s, before = time.perf_counter() - begun, allocated_bytes(self.device)
        variant, begun = planned(plan, density), time.perf_counter()
        try:
            with variant.attached(next(iter(self.runner.models.values()))):
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                attach_s, after = time.perf_counter() - begun, allocated_bytes(self.device)
        except UnsupportedBackendError as error:
            self.report["missing"][f"{self.size}, {variant.name}"] = str(error)
            return None
        self._plans[variant.name] = plan
        index_bytes = sum(schedule.bound_bytes for schedule in plan.layers(len(plan.segments) - 1))
        record = {
            "size": self.size,
            "attention": variant.name,
            "executed_density": variant.density,
            "segments": len(plan.segments),
            "file_bytes": path.stat().st_size,
            "load_s": load_s,
            "attach_s": attach_s,
            "index_bytes_a_segment": index_bytes,
            "attach_device_bytes": None if before is None or after is None else after - before,
        }
        self.report["attachments"].append(record)
        added = "" if record["attach_device_bytes"] is None else f", {record['attach_device_bytes'] / 2**20:.0f} MiB"
        click.echo(f"{self.size}: {variant.name}: loaded in {load_s:.2f} s, attached in {attach_s:.2f} s{added}")
        return variant

    def warm_up(self, case: Case) -> bool:
        """Runs a case once, which compiles it, and proves that it computes what it must; whether it can be timed.

        Raises:
            BenchError: It does not.
        """
        what, due = self._name(case), case.variant.planned * self.report["layers"]
        before, begun = allocated_bytes(self.device), time.perf_counter()
        try:
            with self.runner.running(case) as forward, counted_calls() as calls:
                out = forward(**self.inputs)
            finite = bool(out.isfinite().all())
            first_call_s = time.perf_counter() - begun
        except Exception as error:  # a kernel that cannot run here must not cost the others' numbers
            self.report["missing"][what] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
            return False
        finally:
            self.done()
        if calls() != due:
            raise BenchError(f"{what}: a forward must call planned attention {due} times, got {calls()}")
        if not finite:
            raise BenchError(f"{what}: the result must be finite, got {int((~out.isfinite()).sum())} that are not")
        after = allocated_bytes(self.device)
        plan = self._plans.get(case.variant.name)
        kind = case.mode, case.linears
        dense = case.variant.density == 1 and not case.variant.planned
        reference = self._dense.setdefault(kind, out.float()) if dense else self._dense.get(kind)
        off = None if reference is None else float((out.float() - reference).norm() / reference.norm())
        if dense and off is not None and off > MOST_OFF:
            raise BenchError(f"{what}: dense kernels must agree, got a result that is {off:.3f} off the first one's")
        self.report["checks"].append(
            {
                "size": self.size,
                **case.key,
                "finite": finite,
                "planned_calls": calls(),
                "difference_to_dense": off,
                "first_call_s": first_call_s,
                "grown_device_bytes": None if before is None or after is None else after - before - out.nbytes,
                "plan_bytes": None if plan is None else plan.bound_bytes,
            }
        )
        return True

    def time_forwards(self, cases: Sequence[Case], rounds: int) -> dict[Case, float]:
        """Medians of the milliseconds of a forward of every case, by turns, in another order every round.

        A variant is put into the model for each forward, so that a plan's is the first one after it was attached: it
        reads the time from the device, which the next ones do not.
        """
        order = random.Random(0)
        times: dict[Case, list[float]] = {case: [] for case in cases}
        peaks: dict[Case, int | None] = {}
        graphs: Counter[Case] = Counter()
        for turn in range(rounds):
            if not self.clock.allows(sum(float(np.median(each)) for each in times.values() if each)):
                click.echo(f"{self.size}: out of time after {turn} of {rounds} rounds")
                break
            for case in order.sample(cases, len(cases)):
                with self.runner.running(case) as forward:
                    reset_peak(self.device)
                    known = compiled_graphs()
                    times[case].append(milliseconds(partial(forward, **self.inputs), self.device))
                    graphs[case] += compiled_graphs() - known
                    peaks[case] = peak_bytes(self.device)
                self.done()
        for case, found in times.items():
            if found:
                more = {"recompiled_graphs": graphs[case], "peak_device_bytes": peaks[case]}
                self._add("forwards", case, {**spread(found), **more})
        self.report["states"].append({"size": self.size, "after": "forwards", **state(self.device)})
        return {case: float(np.median(found)) for case, found in times.items() if found}

    def time_samplings(self, cases: Sequence[Case], steps: int, rounds: int, forward_ms: dict[Case, float]) -> None:
        """Milliseconds of a sampling of every case, by turns, the last mode first: it matters most.

        Raises:
            BenchError: A final latent is not finite, or the step cache skipped other forwards than it must.
        """
        times: dict[Case, list[float]] = {case: [] for case in cases}
        graphs: Counter[Case] = Counter()
        skips: dict[Case, int] = {}
        for _ in range(rounds):
            for case in sorted(cases, key=lambda case: MODES.index(case.mode), reverse=True):
                what = f"{self._name(case)}, sampling"
                if not self.clock.allows(steps * forward_ms.get(replace(case, skip=0.0), 0.0)):
                    if not times[case]:
                        self.report["missing"][what] = OUT_OF_TIME
                    continue
                final: list[Tensor] = []
                known, model = compiled_graphs(), self.runner.models[case.linears]
                with self.runner.running(case) as forward, step_cache(model, case.skip) as skipped:
                    with counted_calls() as calls:
                        run = partial(sample, self.row, forward, self.inputs, steps)
                        times[case].append(milliseconds(lambda run=run, final=final: final.append(run()), self.device))
                graphs[case] += compiled_graphs() - known
                skips[case] = skipped()
                layers = self.report["layers"]
                due = case.variant.planned * (steps * layers - skips[case] * (layers - 1))
                if calls() != due:
                    raise BenchError(f"{what}: it must call planned attention {due} times, got {calls()}")
                if not final[0].isfinite().all():
                    raise BenchError(f"{what}: final latents must be finite, got others")
                self.done()
        for case, found in times.items():
            if found:
                more = {"skip": case.skip, "skipped_forwards": skips[case], "recompiled_graphs": graphs[case]}
                self._add("samplings", case, {"steps": steps, **spread(found), **more})
        self.report["states"].append({"size": self.size, "after": "samplings", **state(self.device)})

    def trace(self, cases: Sequence[Case]) -> None:
        """Profiles a forward of each case, after one that reads what an attachment reads once."""
        for case in cases:
            with self.runner.running(case) as forward:
                forward(**self.inputs)
                found = traced(partial(forward, **self.inputs), self.device)
            self.report["traces"].append({"size": self.size, **case.key, **found})
            waits = ", ".join(f"{name} {count}" for name, count in found["waits"].items()) or "none"
            click.echo(f"{self._name(case)}: waits of the host: {waits}")
            self.done()

    def _name(self, case: Case) -> str:
        cache = f", {case.skip:.0%} skipped" if case.skip else ""
        return f"{self.size}, {case.mode}, {case.linears} linears, {case.variant.name}{cache}"

    def _add(self, kind: str, case: Case, found: dict[str, Any]) -> None:
        self.report[kind].append({"size": self.size, **case.key, **found})
        low, median, high = (f"{found[key]:.1f}" for key in ("p10_ms", "median_ms", "p90_ms"))
        click.echo(f"{kind[:-1]:>8}: {self._name(case)}: {median} ms ({low} to {high}, {found['rounds']})")


def compiled_graphs() -> int:
    """Graphs that torch.compile has made so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def allocated_bytes(device: torch.device) -> int | None:
    """Held by tensors on a GPU; None elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def peak_bytes(device: torch.device) -> int | None:
    """The most that tensors held on a GPU since `reset_peak`; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
