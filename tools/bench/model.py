"""A whole transformer with and without a plan: ``calibatt-bench model -o FILE.json --figure FILE.png``.

\b
Published architectures at published sizes, weights random, in bfloat16. Timed are
  one forward                       at the noisiest time,
  one sampling of --steps forwards  with its scheduler (UniPC); no text encoder, no VAE, one forward a step,
eager, and compiled block by block (regional) or as a whole (full), with self-attention computed by
  sdpa-cudnn         the dense kernel of cuDNN, by diffusers' set_attention_backend (on a CPU: sdpa)
  flash-attention-4  dense, where it is installed
  plan D             a plan of density D: synthetic masks, every head listed, a segment for each step, from a file
  copy               a copy of the values: what is left is the time of everything but self-attention.

All cases of a size and a mode of running take turns, so that clocks and temperature favour none. The bound of a plan is
the time of everything else + its executed density x the time of dense attention; below 1 the ratio to it says that our
kernel is faster than the dense one. Every case is checked before it is timed: its result is finite, and a plan's op was
called once a layer.
"""

from __future__ import annotations

import datetime
import gc
import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from calibatt.plans import Blocks, write_plan
from calibatt.plans.files import write_text
from calibatt.runtime import Plan, load_plan
from calibatt.runtime.adapters import adapter_for
from calibatt.tools.bench.kernel import milliseconds, state, versions
from calibatt.tools.bench.model_figure import draw
from calibatt.tools.bench.published import MODELS, Published, token_grid
from calibatt.tools.bench.trace import traced
from calibatt.tools.bench.variants import (
    COPY,
    DISTINCT,
    FLASH_4,
    SHIFT,
    Variant,
    copied,
    counted_calls,
    dense,
    flash_attention_4,
    plan_shaped,
    planned,
)

MODES = ("eager", "regional", "full")
OUT_OF_TIME = "out of time"


DENSE = ("sdpa-cudnn", "sdpa", FLASH_4)
"""Names of the variants that others are measured against."""


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
    """One thing to time: a way to run the model and a way to compute its self-attention."""

    mode: str
    variant: Variant

    @property
    def key(self) -> dict[str, Any]:
        """What identifies its records."""
        return {"mode": self.mode, "attention": self.variant.name, "density": self.variant.density}


class Runner:
    """Runs one model in every mode.

    Args:
        model: On its device.
        modes: Of `MODES`; the model's blocks stay compiled if ``regional`` is one of them.
        backend: Of `torch.compile`.
    """

    def __init__(self, model: Any, modes: Sequence[str], backend: str) -> None:
        self.model = model
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
        if "regional" in modes:
            model.compile_repeated_blocks(**options)
        self._whole = torch.compile(model, **options) if "full" in modes else None

    @contextmanager
    def running(self, case: Case) -> Iterator[Callable[..., Tensor]]:
        """A function of the model's arguments, for as long as the context lasts."""
        whole = self._whole if case.mode == "full" else self.model
        stance = torch.compiler.set_stance("force_eager") if case.mode == "eager" else nullcontext()
        with torch.no_grad(), stance, case.variant.attached(self.model):
            yield lambda **inputs: whole(**inputs)[0]


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


def spread(times_ms: Sequence[float]) -> dict[str, Any]:
    """Median, spread and number of measurements."""
    low, median, high = (float(value) for value in np.percentile(times_ms, (10, 50, 90)))
    return {"median_ms": median, "p10_ms": low, "p90_ms": high, "min_ms": min(times_ms), "rounds": len(times_ms)}


class SizeBench:
    """All that is measured at one size; results go into a report as they come.

    Args:
        row: The model's.
        runner: Of the model.
        size: Its name.
        inputs: Of a forward.
        device: Where the model is.
        clock: When to stop.
        report: What `main` writes.
        done: Called after every warming or timed call.
    """

    def __init__(
        self,
        row: Published,
        runner: Runner,
        size: str,
        inputs: dict[str, Any],
        device: torch.device,
        clock: Clock,
        report: dict[str, Any],
        done: Callable[[], None],
    ) -> None:
        self.row, self.runner, self.size, self.inputs, self.device = row, runner, size, inputs, device
        self.clock, self.report, self.done = clock, report, done
        self._dense: dict[str, Tensor] = {}
        self._plans: dict[str, Plan] = {}

    def attach_plan(self, path: Path, density: float) -> Variant:
        """Loads a plan and attaches it once, timed; the report says what both cost."""
        begun = time.perf_counter()
        plan = load_plan(path)
        load_s, before = time.perf_counter() - begun, allocated_bytes(self.device)
        begun = time.perf_counter()
        with plan.attach(self.runner.model):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            attach_s, after = time.perf_counter() - begun, allocated_bytes(self.device)
        variant = planned(plan, density)
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
        reference = self._dense.setdefault(case.mode, out.float()) if case.variant.density == 1 else None
        reference = self._dense.get(case.mode) if reference is None else reference
        self.report["checks"].append(
            {
                "size": self.size,
                **case.key,
                "finite": finite,
                "planned_calls": calls(),
                "difference_to_dense": None
                if reference is None
                else float((out.float() - reference).norm() / reference.norm()),
                "first_call_s": first_call_s,
                "grown_device_bytes": None if before is None or after is None else after - before - out.nbytes,
                "plan_bytes": None if plan is None else plan.bound_bytes,
            }
        )
        return True

    def time_forwards(self, cases: Sequence[Case], rounds: int) -> dict[Case, float]:
        """Milliseconds of a forward of every case, by turns; medians."""
        times: dict[Case, list[float]] = {case: [] for case in cases}
        peaks: dict[Case, int | None] = {}
        graphs: Counter[Case] = Counter()
        for turn in range(rounds):
            if not self.clock.allows(sum(float(np.median(each)) for each in times.values() if each)):
                click.echo(f"{self.size}: out of time after {turn} of {rounds} rounds")
                break
            for case in cases:
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
            BenchError: A final latent is not finite.
        """
        times: dict[Case, list[float]] = {case: [] for case in cases}
        graphs: Counter[Case] = Counter()
        for _ in range(rounds):
            for case in sorted(cases, key=lambda case: MODES.index(case.mode), reverse=True):
                what = f"{self._name(case)}, sampling"
                if not self.clock.allows(steps * forward_ms.get(case, 0.0)):
                    if not times[case]:
                        self.report["missing"][what] = OUT_OF_TIME
                    continue
                final: list[Tensor] = []
                known = compiled_graphs()
                with self.runner.running(case) as forward:
                    run = partial(sample, self.row, forward, self.inputs, steps)
                    times[case].append(milliseconds(lambda run=run, final=final: final.append(run()), self.device))
                graphs[case] += compiled_graphs() - known
                if not final[0].isfinite().all():
                    raise BenchError(f"{what}: final latents must be finite, got others")
                self.done()
        for case, found in times.items():
            if found:
                self._add("samplings", case, {"steps": steps, **spread(found), "recompiled_graphs": graphs[case]})
        self.report["states"].append({"size": self.size, "after": "samplings", **state(self.device)})

    def trace(self, cases: Sequence[Case]) -> None:
        """Profiles a forward of each case, after one that reads what an attachment reads once."""
        for case in cases:
            with self.runner.running(case) as forward:
                forward(**self.inputs)
                found = traced(partial(forward, **self.inputs), self.device)
            self.report["traces"].append({"size": self.size, **case.key, **found})
            waits = ", ".join(f"{name} {count}" for name, count in found["waits"].items()) or "none"
            click.echo(f"{self.size}: {case.mode}, {case.variant.name}: waits of the host: {waits}")
            self.done()

    def _name(self, case: Case) -> str:
        return f"{self.size}, {case.mode}, {case.variant.name}"

    def _add(self, kind: str, case: Case, found: dict[str, Any]) -> None:
        self.report[kind].append({"size": self.size, **case.key, **found})
        click.echo(
            f"{self.size}: {kind[:-1]:>8}, {case.mode:>8}, {case.variant.name:>17}: {found['median_ms']:10.1f} ms "
            f"({found['p10_ms']:.1f} to {found['p90_ms']:.1f}, {found['rounds']})"
        )


def derived(forwards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What follows from the times of the forwards, for every size and mode whose copy was timed.

    Returns:
        Records of every dense kernel, ``attention_share`` of a forward, and of every plan against each dense kernel:
        ``bound_ms`` = everything else + density x dense attention, ``ratio_to_bound``, ``speedup``.
    """
    places = list(dict.fromkeys((row["size"], row["mode"]) for row in forwards))
    found = []
    for size, mode in places:
        here = [row for row in forwards if (row["size"], row["mode"]) == (size, mode)]
        rest = next((row["median_ms"] for row in here if row["attention"] == COPY), None)
        if rest is None:
            continue
        references = [row for row in here if row["attention"] in DENSE]
        for row in references:
            ms = row["median_ms"]
            kind = {"size": size, "mode": mode, "attention": row["attention"]}
            found.append({**kind, "ms": ms, "other_ms": rest, "attention_share": (ms - rest) / ms})
        for row in here:
            if row["attention"] == COPY or row in references:
                continue
            ms, density = row["median_ms"], row["density"]
            for reference in references:
                bound = rest + density * (reference["median_ms"] - rest)
                found.append(
                    {
                        "size": size,
                        "mode": mode,
                        "attention": row["attention"],
                        "density": density,
                        "ms": ms,
                        "other_ms": rest,
                        "attention_share": (ms - rest) / ms,
                        "against": reference["attention"],
                        "bound_ms": bound,
                        "ratio_to_bound": ms / bound,
                        "speedup": reference["median_ms"] / ms,
                    }
                )
    return found


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


def header(command: str, row: Published, name: str, layers: int, device: torch.device) -> dict[str, Any]:
    """How every report about a model begins."""
    config = row.config
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "versions": {**versions(), "diffusers": version("diffusers")},
        "model": name,
        "what": row.what,
        "layers": layers,
        "published_layers": row.layers,
        "heads": config["num_attention_heads"],
        "head_dim": config["attention_head_dim"],
        "dtype": str(row.dtype),
        "weights": "random, seed 0",
    }


def choose(text: str | None, known: Sequence[str], option: str) -> list[str]:
    """Names joined by commas; all that are known if absent.

    Raises:
        click.UsageError: One is not known.
    """
    names = [name.strip() for name in text.split(",")] if text else list(known)
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"{option} must be some of {', '.join(known)}; got {unknown[0]!r}")
    return list(dict.fromkeys(names))


def pick_modes(text: str | None, row: Published) -> list[str]:
    """Modes that a model can run in; by default eager, and compiled in the smallest parts that diffusers offers.

    Raises:
        click.UsageError: One is not known, or regional where diffusers does not compile the model's blocks.
    """
    found = choose(text or f"eager,{'regional' if row.repeats else 'full'}", MODES, "--modes")
    if "regional" in found and not row.repeats:
        raise click.UsageError(f"--modes must be eager or full: diffusers compiles {row.architecture} only as a whole")
    return found


def read_densities(text: str) -> list[float]:
    """Numbers in (0, 1] joined by commas.

    Raises:
        click.UsageError: One is none.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < value <= 1 for value in found):
        raise click.UsageError(f"--densities must be numbers in (0, 1] joined by commas, got {text!r}")
    return found


def pick_layers(layers: int | None, row: Published) -> int:
    """How many layers to make, all if not said.

    Raises:
        click.UsageError: More than the model has.
    """
    if layers is not None and layers > row.layers:
        raise click.UsageError(f"--layers must be at most the model's {row.layers}, got {layers}")
    return layers or row.layers


def progress_bar() -> Progress:
    """On the terminal's error stream; silent where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal)


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(list(MODELS)), default="wan-14b", show_default=True)
@click.option("--sizes", help="Names, separated by commas: 480p, 720p [all of the model's].")
@click.option("--densities", default="0.5,0.3", show_default=True, help="Of the plans.")
@click.option("--modes", help="Of eager, regional, full [eager,regional; eager,full where blocks are no regions].")
@click.option("--layers", type=click.IntRange(1), help="Fewer layers than the model has; said in the report [all].")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Forwards of each case.")
@click.option("--steps", type=click.IntRange(0), default=4, show_default=True, help="Of a sampling; 0: none.")
@click.option("--samplings", type=click.IntRange(1), default=1, show_default=True, help="Samplings of each case.")
@click.option("--peers/--no-peers", default=True, show_default=True, help="FlashAttention-4 too.")
@click.option("--trace", is_flag=True, help="Also profile a forward, dense and sparsest: what does the host wait for?")
@click.option("--compiler", help="Backend of torch.compile [inductor; on a CPU aot_eager].")
@click.option("--seconds", type=float, default=float("inf"), help="Begin nothing that would take longer than these.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON to write after every measurement.")
@click.option("--figure", type=click.Path(path_type=Path), help="PNG to draw.")
def main(
    model: str,
    sizes: str | None,
    densities: str,
    modes: str | None,
    layers: int | None,
    rounds: int,
    steps: int,
    samplings: int,
    peers: bool,
    trace: bool,
    compiler: str | None,
    seconds: float,
    device: str,
    output: Path | None,
    figure: Path | None,
) -> None:
    row, where, clock = MODELS[model], torch.device(device), Clock(seconds)
    names, ways = choose(sizes, list(row.sizes), "--sizes"), pick_modes(modes, row)
    shares, count = read_densities(densities), pick_layers(layers, row)
    compiler = compiler or ("inductor" if where.type == "cuda" else "aot_eager")
    options = f"--model {model} --sizes {','.join(names)} --densities {densities} --modes {','.join(ways)}"
    options += f" --layers {count} --rounds {rounds} --steps {steps} --samplings {samplings}"
    options += f" --compiler {compiler}" + ("" if peers else " --no-peers") + (" --trace" if trace else "")
    report: dict[str, Any] = {
        **header(f"calibatt-bench model {options}", row, model, count, where),
        "masks": "synthetic, structured; every head listed; a segment for each step",
        "distinct_layers": min(DISTINCT, count),
        "compiler": compiler,
        "sizes": [],
        "attachments": [],
        "checks": [],
        "forwards": [],
        "samplings": [],
        "derived": [],
        "traces": [],
        "states": [],
        "missing": {},
    }
    click.echo(f"{report['device']}, {report['versions']}, {count} of {row.layers} layers")

    def save() -> None:
        report["derived"] = derived(report["forwards"])
        if output is not None:
            write_text(output, json.dumps(report, indent=1) + "\n")

    def measure(size: str, folder: Path) -> None:
        """Everything at one size; its plans are let go of at the end."""
        torch.compiler.reset()
        inputs = row.inputs(size, where)
        grid = token_grid(transformer, inputs)
        report["sizes"].append({"name": size, "grid": asdict(grid), "tokens": grid.tokens, "block": row.block})
        bench = SizeBench(row, runner, size, inputs, where, clock, report, lambda: progress.advance(task))
        progress.reset(task, description=f"{size}: plans", total=None)
        signature, variants = adapter_for(transformer).signature(transformer), [*base]
        for share in shares:
            path = folder / f"{size}-{share:g}.plan"
            write_plan(path, plan_shaped(signature, grid, Blocks(row.block, row.block), share, max(steps, 1)))
            variants.append(bench.attach_plan(path, share))
        cases = [Case(way, variant) for way in ways for variant in variants]
        timed = (rounds + 1) * len(cases) + samplings * (steps > 0) * len(ways) * (len(variants) - 1) + 2 * trace
        progress.reset(task, description=size, total=timed)
        cases = [case for case in cases if bench.warm_up(case)]
        save()
        medians = bench.time_forwards(cases, rounds)
        save()
        attending = [case for case in cases if case.variant.name != COPY]
        if trace:
            last = [case for case in attending if case.mode == ways[-1]]
            few = {*last[:1], *sorted(last, key=lambda case: case.variant.density)[:1]}
            bench.trace([case for case in last if case in few and clock.allows(2 * medians.get(case, 0.0))])
            save()
        if steps:
            bench.time_samplings(attending, steps, samplings, medians)
            save()

    with progress_bar() as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("making the model", total=None)
        transformer = row.make(count, where)
        report["parameters"] = sum(parameter.numel() for parameter in transformer.parameters())
        base = [dense(transformer), copied()]
        if peers and isinstance(found := flash_attention_4(where), Variant):
            base.append(found)
        elif peers:
            report["missing"][FLASH_4] = found
        runner = Runner(transformer, ways, compiler)
        for name in names:
            if clock.allows():
                measure(name, Path(folder))
                gc.collect()
            else:
                report["missing"][name] = OUT_OF_TIME
    save()
    for line in _summary(report):
        click.echo(line)
    for what, reason in report["missing"].items():
        click.echo(f"not measured: {what}: {reason}")
    if figure is not None:
        draw(report, figure)
    if any(reason != OUT_OF_TIME and FLASH_4 not in what for what, reason in report["missing"].items()):
        raise SystemExit(1)


def _summary(report: dict[str, Any]) -> list[str]:
    lines = []
    for row in report["derived"]:
        told = f"{row['size']}, {row['mode']}, {row['attention']}: {row['ms']:.1f} ms"
        told += f", {row['other_ms']:.1f} of them not attention"
        if "against" in row:
            told += (
                f"; {row['speedup']:.2f} times as fast as {row['against']}, {row['ratio_to_bound']:.3f} of the bound"
            )
        else:
            told += f" (attention: {row['attention_share']:.0%})"
        lines.append(told)
    return lines


if __name__ == "__main__":
    main()
