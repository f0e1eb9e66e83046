"""A whole transformer with and without a plan: ``calibatt-bench model -o FILE.json``.

\b
Published architectures at published sizes, weights random, in bfloat16. Timed are
  one forward                       at the noisiest time,
  one sampling of --steps forwards  with its scheduler (UniPC); no text encoder, no VAE, one forward a step;
                                    with --skip of dense and the last plan, with and without FirstBlockCache, which is
                                    made to skip that share of the forwards,
eager, and compiled block by block (regional) or as a whole (full), with self-attention computed by
  sdpa-cudnn         the dense kernel of cuDNN, by diffusers' set_attention_backend (on a CPU: sdpa)
  flash-attention-4  dense, where it is installed
  plan D             a plan of density D: synthetic masks, every head listed, a segment for each step, from a file;
                     with --precisions also with heads that multiply in 8 bits
  copy               a copy of the values: what is left is the time of everything but self-attention.

All cases of a size take turns, so that clocks and temperature favour none. With --linears bf16,fp8 there are two
models, which differ in the linear layers of their blocks: fp8 has weights and activations in e4m3, a scale a row
(torchao). The bound of a plan is the time of everything else + its executed density x the time of dense attention;
below 1 the ratio to it says that our kernel is faster than the dense one. Every case is checked before it is timed: its
result is finite, and a plan's op was called once a layer.
"""

from __future__ import annotations

import gc
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from calibatt.plans import Blocks, write_plan
from calibatt.runtime.adapters import adapter_for
from calibatt.tools.bench.derived import derived, of_all_layers, told
from calibatt.tools.bench.forwards import MODES, Case, Clock, Runner, SizeBench
from calibatt.tools.bench.options import choose, count_option, densities_option, device_option, output_option
from calibatt.tools.bench.published import MODELS, Published, token_grid
from calibatt.tools.bench.record import OUT_OF_TIME, header, write_report
from calibatt.tools.bench.variants import (
    COPY,
    DISTINCT,
    FLASH_4,
    NAMES,
    Variant,
    copied,
    dense,
    flash_attention_4,
    plan_shaped,
)

LINEARS = ("bf16", "fp8")


def model_header(command: str, row: Published, name: str, layers: int, device: torch.device) -> dict[str, Any]:
    """How every report about a model begins."""
    return {
        **header(command, device),
        "model": name,
        "what": row.what,
        "layers": layers,
        "published_layers": row.layers,
        "heads": row.config["num_attention_heads"],
        "head_dim": row.config["attention_head_dim"],
        "dtype": str(row.dtype),
        "weights": "random, seed 0",
    }


def pick_modes(text: str | None, row: Published) -> list[str]:
    """Modes that a model can run in; by default eager, and compiled in the smallest parts that diffusers offers.

    Raises:
        click.UsageError: One is not known, or regional where diffusers does not compile the model's blocks.
    """
    found = choose(text or f"eager,{'regional' if row.repeats else 'full'}", MODES, "--modes")
    if "regional" in found and not row.repeats:
        raise click.UsageError(f"--modes must be eager or full: diffusers compiles {row.architecture} only as a whole")
    return found


def pick_layers(layers: int | None, row: Published) -> int:
    """How many layers to make, all if not said.

    Raises:
        click.UsageError: More than the model has.
    """
    if layers is not None and layers > row.layers:
        raise click.UsageError(f"--layers must be at most the model's {row.layers}, got {layers}")
    return layers or row.layers


def with_linears(model: Any, linears: str) -> Any:
    """The model with the linears of its blocks as said by one of `LINEARS`.

    Raises:
        click.UsageError: torchao is not installed, or has no such linears for this device or these weights.
    """
    if linears == "bf16":
        return model
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError as error:
        raise click.UsageError(f"--linears fp8 needs torchao (pip install torchao), got {error}") from None

    def of_blocks(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and any(part.isdigit() for part in name.split("."))

    # As the other cases are compiled, not with inductor's settings for quantised models.
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    try:
        quantize_(model, config, filter_fn=of_blocks)
    except AssertionError as error:
        raise click.UsageError(f"--linears fp8 cannot be made here: torchao says {error}") from None
    return model


def check_skip(skip: float, layers: int, modes: Sequence[str]) -> None:
    """Whether forwards can be skipped.

    Raises:
        click.UsageError: There is no second layer to skip, or no mode in which a step cache can decide.
    """
    if skip and layers < 2:
        raise click.UsageError(f"--skip needs --layers to be at least 2, of which a cache computes one, got {layers}")
    if skip and set(modes) == {"full"}:
        raise click.UsageError("--skip needs --modes eager or regional: no step cache can decide in one graph")


def progress_bar() -> Progress:
    """On the terminal's error stream; silent where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal)


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(list(MODELS)), default="wan-14b", show_default=True)
@click.option("--sizes", help="Names, separated by commas: 480p, 720p [all of the model's].")
@densities_option("0.5,0.3", "Of the plans.")
@click.option(
    "--precisions", default="bf16", show_default=True, help=f"Of the plans' heads: some of {', '.join(NAMES)}."
)
@click.option("--linears", default="bf16", show_default=True, help=f"Of the blocks: some of {', '.join(LINEARS)}.")
@click.option("--modes", help="Of eager, regional, full [eager,regional; eager,full where blocks are no regions].")
@count_option("--layers", None, "Fewer layers than the model has; said in the report [all].")
@count_option("--rounds", 3, "Forwards of each case.")
@count_option("--steps", 4, "Of a sampling; 0: none.", least=0)
@click.option(
    "--skip",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Share of a sampling's forwards that FirstBlockCache skips, eager and regional; 0: no cache.",
)
@count_option("--samplings", 1, "Samplings of each case.")
@click.option("--peers/--no-peers", default=True, show_default=True, help="FlashAttention-4 too.")
@click.option("--trace", is_flag=True, help="Also profile a forward, dense and sparsest: what does the host wait for?")
@click.option("--compiler", help="Backend of torch.compile [inductor; on a CPU aot_eager].")
@click.option("--seconds", type=float, default=float("inf"), help="Begin nothing that would take longer than these.")
@device_option()
@output_option()
def main(
    model: str,
    sizes: str | None,
    densities: list[float],
    precisions: str,
    linears: str,
    modes: str | None,
    layers: int | None,
    rounds: int,
    steps: int,
    skip: float,
    samplings: int,
    peers: bool,
    trace: bool,
    compiler: str | None,
    seconds: float,
    device: torch.device,
    output: Path | None,
) -> None:
    row, clock = MODELS[model], Clock(seconds)
    names, ways = choose(sizes, list(row.sizes), "--sizes"), pick_modes(modes, row)
    count, kinds = pick_layers(layers, row), choose(linears, LINEARS, "--linears")
    check_skip(skip, count, ways)
    multiplied = [NAMES[name] for name in choose(precisions, list(NAMES), "--precisions")]
    compiler = compiler or ("inductor" if device.type == "cuda" else "aot_eager")
    report: dict[str, Any] = {
        **model_header("calibatt-bench model", row, model, count, device),
        "masks": "synthetic, structured; every head listed; a segment for each step",
        "linears": kinds,
        "distinct_layers": min(DISTINCT, count),
        "compiler": compiler,
        "sizes": [],
        "attachments": [],
        "checks": [],
        "forwards": [],
        "samplings": [],
        "derived": [],
        "of_all_layers": [],
        "traces": [],
        "states": [],
        "missing": {},
    }
    click.echo(f"{report['device']}, {report['versions']}, {count} of {row.layers} layers")

    def save() -> None:
        report["derived"] = derived(report["forwards"])
        report["of_all_layers"] = of_all_layers(report["samplings"], count, row.layers)
        write_report(output, report)

    def measure(size: str, folder: Path) -> None:
        """Everything at one size; its plans are let go of at the end."""
        torch.compiler.reset()
        inputs = row.inputs(size, device)
        grid = token_grid(transformer, inputs)
        report["sizes"].append({"name": size, "grid": asdict(grid), "tokens": grid.tokens, "block": row.block})
        bench = SizeBench(row, runner, size, inputs, device, clock, report, lambda: progress.advance(task))
        progress.reset(task, description=f"{size}: plans", total=None)
        signature, variants = adapter_for(transformer).signature(transformer), [*base]
        blocks = Blocks(row.block, row.block)
        for share, precision in itertools.product(densities, multiplied):
            path = folder / f"{size}-{share:g}-{precision}.plan"
            write_plan(path, plan_shaped(signature, grid, blocks, share, max(steps, 1), precision=precision))
            if (variant := bench.attach_plan(path, share)) is not None:
                variants.append(variant)
        cases = [Case(way, variant, kind) for way in ways for kind in kinds for variant in variants]
        sampled = [case for case in cases if case.variant.name != COPY] if steps else []
        if skip and steps:  # the whole stack first
            places = itertools.product((way for way in ways if way != "full"), reversed(kinds), (base[0], variants[-1]))
            sampled = [Case(way, variant, kind, share) for way, kind, variant in places for share in (0.0, skip)]
        timed = (rounds + 1) * len(cases) + samplings * len(sampled) + 2 * trace
        progress.reset(task, description=size, total=timed)
        cases = [case for case in cases if bench.warm_up(case)]
        sampled = [case for case in sampled if replace(case, skip=0.0) in cases]
        save()
        medians = bench.time_forwards(cases, rounds)
        save()
        if trace:
            last = [case for case in cases if case.variant.name != COPY and case.mode == ways[-1]]
            few = {*last[:1], *sorted(last, key=lambda case: case.variant.density)[:1]}
            bench.trace([case for case in last if case in few and clock.allows(2 * medians.get(case, 0.0))])
            save()
        if sampled:
            bench.time_samplings(sampled, steps, samplings, medians)
            save()

    # Of one function, a graph for every kernel and every kind of linears.
    graphs = torch._dynamo.config.patch(recompile_limit=64)
    with progress_bar() as progress, tempfile.TemporaryDirectory() as folder, graphs:
        task = progress.add_task("making the models", total=None)
        models = {kind: with_linears(row.make(count, device), kind) for kind in kinds}
        transformer = models[kinds[0]]
        report["parameters"] = sum(parameter.numel() for parameter in transformer.parameters())
        kernels = [dense(each) for each in models.values()]  # sets each to it
        base = [kernels[0], copied()]
        if peers and isinstance(found := flash_attention_4(device), Variant):
            base.append(found)
        elif peers:
            report["missing"][FLASH_4] = found
        runner = Runner(models, ways, compiler)
        for name in names:
            if clock.allows():
                measure(name, Path(folder))
                gc.collect()
            else:
                report["missing"][name] = OUT_OF_TIME
    save()
    for line in told(report):
        click.echo(line)
    for what, reason in report["missing"].items():
        click.echo(f"not measured: {what}: {reason}")
    if any(reason != OUT_OF_TIME and FLASH_4 not in what for what, reason in report["missing"].items()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
