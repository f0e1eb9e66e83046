"""The attention backends against torch's dense attention: `python -m calibatt.tools.bench.kernel -o FILE.json`.

On a CUDA device: triton against the flash and cuDNN kernels of scaled_dot_product_attention, at the sizes of Wan 2.1
14B (480p and 720p, 81 frames). On a CPU: the torch backend against scaled_dot_product_attention, at the size of the
demo. The masks are synthetic: neighbouring query blocks keep similar key blocks, and the number kept varies by 20 %.
All cases of a size take turns, so that clocks and temperature favour none.
"""

from __future__ import annotations

import datetime
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from calibatt.plans import Blocks, TokenGrid
from calibatt.plans import LayerSchedule as CoreSchedule
from calibatt.runtime.backends import load_backend
from calibatt.runtime.ops import attend
from calibatt.runtime.schedule import LayerSchedule


@dataclass(frozen=True)
class Size:
    """What one set of cases attends over."""

    name: str
    grid: TokenGrid
    block: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    densities: tuple[float, ...]


GPU_SIZES = tuple(
    Size(name, TokenGrid(21, height, width), 128, 40, 128, torch.bfloat16, (1.0, 0.5, 0.3, 0.1))
    for name, height, width in (("480p", 30, 52), ("720p", 45, 80))
)
CPU_SIZES = (Size("demo", TokenGrid(8, 24, 24), 64, 4, 64, torch.float32, (1.0, 0.7, 0.5, 0.35, 0.2)),)
SWEEP = [(128, block_n, warps, stages) for block_n in (64, 128) for warps in (4, 8) for stages in (2, 3, 4)]
"""Configurations of the triton kernel for `--sweep`."""


def structured_schedule(
    grid: TokenGrid, blocks: Blocks, heads: int, density: float, seed: int = 0, neighbours: int = 8
) -> LayerSchedule:
    """A schedule of listed heads, in the order of their tiles, whose masks change slowly from one tile to the next.

    Args:
        grid: The token sequence.
        blocks: Block sizes.
        heads: Number of heads.
        density: Mean share of key blocks kept; a tile keeps up to 20 % more or fewer.
        seed: Of the generator.
        neighbours: Over how many tiles the random scores of a key block are averaged.
    """
    rng = np.random.default_rng(seed)
    tiles, columns = blocks.q_blocks(grid.tokens), blocks.k_blocks(grid.tokens)
    lists = []
    for _ in range(heads):
        total = rng.standard_normal((tiles + neighbours, columns), dtype=np.float32).cumsum(axis=0)
        ranking = (total[neighbours:] - total[:-neighbours]).argsort(axis=1)
        spread = 0.2 * (density < 1)
        kept = density * columns * rng.uniform(1 - spread, 1 + spread, tiles)
        lists += [
            np.sort(row[-n:]) for row, n in zip(ranking, np.clip(kept.round(), 1, columns).astype(int), strict=True)
        ]
    core = CoreSchedule(
        grid=grid,
        blocks=blocks,
        row_ptr=np.cumsum([0, *map(len, lists)], dtype=np.int32),
        col_idx=np.concatenate(lists).astype(np.uint16),
        head_list=np.arange(heads, dtype=np.int32) * tiles,
        head_anchor=np.full(heads, -1, dtype=np.int32),
        anchor_ptr=np.zeros(1, dtype=np.int32),
        group_start=np.zeros(0, dtype=np.int32),
        anchor_row=np.zeros(0, dtype=np.int32),
        tile_order=np.arange(heads * tiles, dtype=np.int32),
    )
    core.check()
    return LayerSchedule(core)


def cases(size: Size, device: torch.device, sweep: bool) -> dict[tuple[str, float], Callable[[], object]]:
    """Every (backend, density) of a size as a function to time."""
    shape = (1, size.grid.tokens, size.heads, size.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=size.dtype).transpose(1, 2) for _ in range(3))
    on_gpu = device.type == "cuda"
    backend = "triton" if on_gpu else "torch"

    def dense(kernel: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v)

    made: dict[tuple[str, float], Callable[[], object]] = {
        ("sdpa-flash", 1.0): partial(dense, SDPBackend.FLASH_ATTENTION)
    }
    if on_gpu:
        made["sdpa-cudnn", 1.0] = partial(dense, SDPBackend.CUDNN_ATTENTION)
    for density in size.densities:
        schedule = structured_schedule(size.grid, Blocks(size.block, size.block), size.heads, density)
        made[backend, schedule.density] = partial(attend, q, k, v, schedule, backend)
        if sweep and on_gpu:
            triton = load_backend("triton")
            for config in (triton.Config(*fields) for fields in SWEEP):
                if config.shared_bytes(size.head_dim) <= triton.shared_bytes(device):
                    run = partial(triton.run, q, k, v, schedule.bind(device), size.head_dim**-0.5, False, config)
                    made[str(config), schedule.density] = run
    return made


def milliseconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


def measure(size: Size, device: torch.device, rounds: int, sweep: bool) -> list[dict[str, Any]]:
    """One record a case: what it was, its median and spread over the rounds, and how fast it computed kept blocks."""
    made = cases(size, device, sweep)
    for function in made.values():
        milliseconds(function, device)
    times = {case: [] for case in made}
    for _ in range(rounds):
        for case, function in made.items():
            times[case].append(milliseconds(function, device))
    flops = 4 * size.grid.tokens**2 * size.head_dim * size.heads
    records = []
    for (backend, density), ms in times.items():
        low, median, high = np.percentile(ms, (10, 50, 90))
        record = {"backend": backend, "density": density, "median_ms": median, "p10_ms": low, "p90_ms": high}
        records.append({"size": size.name, **record, "min_ms": min(ms), "tflops": flops * density / median / 1e9})
    return records


@click.command()
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--rounds", default=10, show_default=True, help="Measurements of each case.")
@click.option("--sweep", is_flag=True, help="Also every configuration of the triton kernel.")
@click.option("--threads", type=int, help="Threads of torch, on a CPU.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the measurements here, as JSON.")
def main(device: str, rounds: int, sweep: bool, threads: int | None, output: Path | None) -> None:
    """Times the attention backends against torch's dense attention."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    where = torch.device(device)
    on_gpu = where.type == "cuda"
    report: dict[str, Any] = {
        "command": " ".join(["python", "-m", "calibatt.tools.bench.kernel", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(where) if on_gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "sizes": [],
        "measurements": [],
    }
    if on_gpu:
        report["versions"] |= {
            "triton": load_backend("triton").triton.__version__,
            "cudnn": torch.backends.cudnn.version(),
        }
    click.echo(f"{report['device']}, {report['versions']}")
    for size in GPU_SIZES if on_gpu else CPU_SIZES:
        report["sizes"].append({**asdict(size), "dtype": str(size.dtype)})
        for record in measure(size, where, rounds, sweep):
            report["measurements"].append(record)
            click.echo(
                "{size:>5} {backend:>12} density {density:.3f}: {median_ms:8.2f} ms "
                "({p10_ms:.2f} to {p90_ms:.2f}), {tflops:.3g} TFLOP/s".format(**record)
            )
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
