"""What recording statistics costs: ``calibatt-bench recorder -o FILE.json``.

\b
A forward that calibatt-calibrate records, its store written to a temporary folder, against the same forward that is
not recorded; in turns, on published architectures at published sizes with random weights, eager. Then each statistic
of one layer's call alone:
  projection factor  of every head, from the output projection
  projected values   behind the output projection
  block statistics   mass and error of every block pair (a triton kernel on a GPU, PyTorch elsewhere)
  keep planes        from the mass
  menu errors        exact masked attention on a few query blocks
  copy errors        how alike the outputs of neighbouring rows, and frames, are
  all                what calibatt-calibrate computes of a call, on the host at the end
  write              of one unit into the store

The cost is the same in every layer, so two layers say what all of them take. A calibration records some of its steps
only, and every n-th query with --query-strides n.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from calibatt.compiler.stats import Manifest, StoreWriter, window_keep
from calibatt.tools.bench.kernel import milliseconds, state
from calibatt.tools.bench.model import (
    allocated_bytes,
    choose,
    header,
    peak_bytes,
    pick_layers,
    progress_bar,
    reset_peak,
    spread,
)
from calibatt.tools.bench.published import MODELS, NOISIEST, token_grid
from calibatt.tools.bench.variants import dense
from calibatt.tools.calibrate.__main__ import make_manifest
from calibatt.tools.calibrate.listen import Call, listening
from calibatt.tools.calibrate.recorder import Recorder
from calibatt.tools.calibrate.sampler import OnStep
from calibatt.tools.calibrate.statistics import (
    block_statistics,
    copy_errors,
    keep_planes,
    menu_errors,
    projected_values,
    projection_factor,
    unit_statistics,
)

PROMPT = "benchmark"


class OneForward:
    """A `calibatt.tools.calibrate.sampler.Sampler` whose every run is one forward of the same arguments.

    Args:
        transformer: The model.
        inputs: Of the forward.
    """

    def __init__(self, transformer: Any, inputs: dict[str, Any]) -> None:
        self.transformer, self.inputs = transformer, inputs
        self.grid, self.times = token_grid(transformer, inputs), [NOISIEST / 1000]
        self.versions: dict[str, str] = {}

    def check(self, prompts: Sequence[str]) -> None:
        """Any prompt will do."""

    @torch.no_grad()
    def run(
        self, prompt: str, seed: int, start_step: int = 0, start: Tensor | None = None, on_step: OnStep | None = None
    ) -> Tensor:
        """What the model returns."""
        return self.transformer(**self.inputs)[0]


def captured(sampler: OneForward) -> Call:
    """The first layer's self-attention call."""
    calls: list[Call] = []

    def on_call(call: Call) -> None:
        if not calls:
            calls.append(call)

    with listening(sampler.transformer, sampler.grid, lambda time: True, on_call):
        sampler.run(PROMPT, 0)
    return calls[0]


def statistics(call: Call, manifest: Manifest) -> dict[str, Callable[[], Any]]:
    """Each statistic of a call as a function to time; see the head of this file."""
    grid, blocks, stride = manifest.grid, manifest.blocks, manifest.query_stride
    q, k, v = call.q, call.k, call.v
    heads, _, head_dim = q.shape
    factor = projection_factor(call.projection, heads, head_dim)
    project = partial(projected_values, v, factor, q.dtype if q.is_cuda else torch.float32)
    projected = project()
    if q.is_cuda:
        from calibatt.tools.calibrate.kernels import block_statistics as measure
    else:
        measure = block_statistics
    mass, _ = measure(q, k, projected, blocks, stride)
    planes = keep_planes(mass, manifest.thresholds)
    windows = torch.stack([torch.tensor(window_keep(w, grid, blocks), device=q.device) for w in manifest.windows])
    menu = torch.cat([planes, windows[:, None].expand(-1, heads, -1, -1)])
    everything = {"projection": call.projection, "residual_square": call.residual_square, "seed": 0}
    return {
        "projection factor": partial(projection_factor, call.projection, heads, head_dim),
        "projected values": project,
        "block statistics": partial(measure, q, k, projected, blocks, stride),
        "keep planes": partial(keep_planes, mass, manifest.thresholds),
        "menu errors": partial(menu_errors, q, k, v, menu, factor, blocks, stride, 0),
        "copy errors": partial(copy_errors, call.out, factor, grid, manifest.row_radius, manifest.frame_radius),
        "all": partial(unit_statistics, q, k, v, call.out, manifest=manifest, **everything),
    }


def block_statistics_flops(manifest: Manifest) -> int:
    """Of the scores and the products with the values, both computed twice."""
    model, tokens = manifest.model, manifest.grid.tokens
    queries = sum(
        len(range(first, min(first + manifest.blocks.block_q, tokens), manifest.query_stride))
        for first in range(0, tokens, manifest.blocks.block_q)
    )
    return 8 * queries * tokens * model.head_dim * model.heads


class RecorderBench:
    """What recording costs at one size.

    Args:
        sampler: Of the model.
        block: Tokens of a query or key block.
        device: Where the model is.
        rounds: Measurements of everything.
        folder: For the stores.
        done: Called after every timed forward and statistic.
    """

    def __init__(
        self,
        sampler: OneForward,
        block: int,
        device: torch.device,
        rounds: int,
        folder: Path,
        done: Callable[[], None],
    ) -> None:
        self.sampler, self.block, self.device = sampler, block, device
        self.rounds, self.folder, self.done = rounds, folder, done

    def manifest(self, stride: int) -> Manifest:
        return make_manifest(self.sampler, block_size=self.block, query_stride=stride)

    def forwards(self, strides: Sequence[int]) -> list[dict[str, Any]]:
        """Forwards as they are and recorded with every stride, by turns."""
        writers = {stride: StoreWriter.open(self.folder / str(stride), self.manifest(stride)) for stride in strides}
        recorders = {stride: Recorder(self.sampler, writer.manifest, unit_statistics)
                     for stride, writer in writers.items()}  # fmt: skip
        times: dict[int, list[float]] = {0: [], **{stride: [] for stride in strides}}
        peaks: dict[int, int | None] = {}
        layers = self.manifest(1).model.layers
        for seed in range(self.rounds + 1):  # the first round warms up
            for stride, found in times.items():
                run: Callable[[], Any] = partial(self.sampler.run, PROMPT, seed)
                if stride:
                    run = partial(recorders[stride].record, writers[stride], PROMPT, seed)
                reset_peak(self.device)
                before = allocated_bytes(self.device)
                found.append(milliseconds(run, self.device))
                peak = peak_bytes(self.device)
                peaks[stride] = None if peak is None or before is None else peak - before
                self.done()
        plain = spread(times[0][1:])
        records = [{"recorded": False, **plain, "peak_device_bytes": peaks[0]}]
        for stride in strides:
            writers[stride].close()
            found = spread(times[stride][1:])
            size = sum(path.stat().st_size for path in writers[stride].path.rglob("*") if path.is_file())
            more, least = peaks[stride], peaks[0]
            records.append(
                {
                    "recorded": True,
                    "query_stride": stride,
                    **found,
                    "ratio": found["median_ms"] / plain["median_ms"],
                    "extra_ms_a_layer": (found["median_ms"] - plain["median_ms"]) / layers,
                    "peak_device_bytes": more,
                    "extra_peak_device_bytes": None if more is None or least is None else more - least,
                    "store_bytes_a_layer": size // (layers * (self.rounds + 1)),
                }
            )
        return records

    def statistics(self, strides: Sequence[int]) -> list[dict[str, Any]]:
        """Every statistic of one call alone, and the writing of what they are."""
        call, records = captured(self.sampler), []
        for stride in strides:
            manifest = self.manifest(stride)
            for name, run in statistics(call, manifest).items():
                reset_peak(self.device)
                before = allocated_bytes(self.device)
                unit = run()
                peak = peak_bytes(self.device)
                found = spread([milliseconds(run, self.device) for _ in range(self.rounds)])
                record = {"statistic": name, "query_stride": stride, **found}
                record["extra_peak_device_bytes"] = None if peak is None or before is None else peak - before
                if name == "block statistics":
                    record["tflops"] = block_statistics_flops(manifest) / found["median_ms"] / 1e9
                records.append(record)
                self.done()
            with StoreWriter.open(self.folder / f"write-{stride}", manifest) as writer:
                sample, times = writer.begin("sample"), []
                for layer in range(min(self.rounds, manifest.model.layers)):
                    begun = time.perf_counter()
                    sample.write(0, layer, unit)
                    times.append(1e3 * (time.perf_counter() - begun))
            records.append({"statistic": "write", "query_stride": stride, **spread(times)})
        return records


def read_strides(text: str) -> list[int]:
    """Positive whole numbers joined by commas.

    Raises:
        click.UsageError: One is none.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.UsageError(f"--query-strides must be positive whole numbers joined by commas, got {text!r}")
    return list(dict.fromkeys(map(int, parts)))


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(list(MODELS)), default="wan-14b", show_default=True)
@click.option("--sizes", help="Names, separated by commas: 480p, 720p [all of the model's].")
@click.option("--layers", type=click.IntRange(1), default=2, show_default=True, help="Of the model.")
@click.option("--query-strides", default="1,8", show_default=True, help="Measure every n-th query, for each n.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Measurements of everything.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON to write after every size.")
def main(
    model: str,
    sizes: str | None,
    layers: int,
    query_strides: str,
    rounds: int,
    device: str,
    output: Path | None,
) -> None:
    row, where, strides = MODELS[model], torch.device(device), read_strides(query_strides)
    names, count = choose(sizes, list(row.sizes), "--sizes"), pick_layers(layers, row)
    options = f"--model {model} --sizes {','.join(names)} --layers {count} --query-strides {query_strides}"
    report: dict[str, Any] = {
        **header(f"calibatt-bench recorder {options} --rounds {rounds}", row, model, count, where),
        "block": row.block,
        "sizes": [],
        "forwards": [],
        "statistics": [],
        "states": [],
    }
    click.echo(f"{report['device']}, {report['versions']}, {count} of {row.layers} layers")
    calls = len(names) * ((rounds + 1) * (1 + len(strides)) + 6 * len(strides))
    with progress_bar() as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("recorder", total=calls)
        transformer = row.make(count, where)
        dense(transformer)
        for name in names:
            sampler = OneForward(transformer, row.inputs(name, where))
            report["sizes"].append({"name": name, "grid": asdict(sampler.grid), "tokens": sampler.grid.tokens})
            bench = RecorderBench(
                sampler, row.block, where, rounds, Path(folder) / name, lambda: progress.advance(task)
            )  # fmt: skip
            for kind, found in (("forwards", bench.forwards(strides)), ("statistics", bench.statistics(strides))):
                report[kind] += [{"size": name, **record} for record in found]
                for record in found:
                    click.echo(f"{name}: {_told(record)}")
            report["states"].append({"size": name, **state(where)})
            if output is not None:
                output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def _told(record: dict[str, Any]) -> str:
    what = record.get("statistic") or ("recorded forward" if record["recorded"] else "forward")
    told = f"{what:>17}: {record['median_ms']:9.1f} ms ({record['p10_ms']:.1f} to {record['p90_ms']:.1f})"
    if "query_stride" in record:
        told += f", query stride {record['query_stride']}"
    if "ratio" in record:
        told += f", {record['ratio']:.2f} times the forward"
    if record.get("extra_peak_device_bytes") is not None:
        told += f", {record['extra_peak_device_bytes'] / 2**20:.0f} MiB more at its peak"
    if "tflops" in record:
        told += f", {record['tflops']:.3g} TFLOP/s"
    return told


if __name__ == "__main__":
    main()
