"""Attention kernels side by side: ``calibatt-bench kernel -o FILE.json``.

On a CUDA device the hopper and triton backends against the dense kernels of scaled_dot_product_attention, and, where
they are installed, FlashAttention-4 (dense and block sparse) and FlexAttention on the same masks and tensors; on a CPU
the torch backend against scaled_dot_product_attention. The masks are synthetic: *structured*, where neighbouring query
blocks keep similar key blocks and the number kept varies by 20 %, or *random*.

All cases of a size and density take turns, every round in another order. Right before its timed run each runs once
untimed: at its power limit a GPU's clocks are those that the kernel before has left. The timed run is queued while that
one computes, so that the host's time for a call is not in it; for our kernels it is measured apart. L2 is not flushed:
it holds what the untimed run left of queries, keys and values of 75 MB and more (an H100 and an H200 have 50 MB of L2).
TFLOP/s count the blocks that are computed. Outputs of kernels with the same masks are compared, and a kernel that
computes something else is not timed.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from calibatt.plans import BF16, FRAMES, PRECISIONS, ROWS, Blocks, TokenGrid
from calibatt.runtime.ops import attend, supports
from calibatt.tools.bench.options import ROUNDS, SECONDS, choose, count_option, device_option, output_option
from calibatt.tools.bench.peers import DENSE_PEERS, SPARSE_PEERS, dense_peer, sparse_peer
from calibatt.tools.bench.record import header, state, write_report
from calibatt.tools.bench.schedules import anchored_schedule, in_precision, structured_schedule

OURS = ("hopper", "triton", "torch")
COMPARED = (*DENSE_PEERS, *OURS, *SPARSE_PEERS)
"""Kernels that must agree on the same masks; others have other masks, inputs or precisions."""
MOST_OFF = 0.02
"""Most that two outputs may differ by, relative to their size; in 16 bits kernels differ by some thousandths."""
DISAGREES = "it must compute what others do"
"""How the reason begins for which such a kernel is not timed; the command then ends with exit code 1."""


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

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "dtype": str(self.dtype), "tokens": self.grid.tokens}


USUAL = (1.0, 0.5, 0.3, 0.2, 0.1)
GPU_SIZES = (
    Size("480p", TokenGrid(21, 30, 52), 128, 40, 128, torch.bfloat16, USUAL),
    Size("720p", TokenGrid(21, 45, 80), 128, 40, 128, torch.bfloat16, USUAL),
    Size("mochi", TokenGrid(28, 30, 53), 128, 24, 128, torch.bfloat16, (0.3,)),
    Size("few heads", TokenGrid(21, 45, 80), 128, 3, 128, torch.bfloat16, (0.3,)),
    Size("head size 64", TokenGrid(13, 30, 45), 128, 30, 64, torch.bfloat16, (0.3,)),
    Size("small", TokenGrid(4, 32, 32), 128, 24, 128, torch.bfloat16, (0.3,)),
)
CPU_SIZES = (Size("demo", TokenGrid(8, 24, 24), 64, 4, 64, torch.float32, (1.0, 0.7, 0.5, 0.35, 0.2)),)


def cases(
    size: Size, density: float, device: torch.device, mask: str, peers: bool, missing: dict[str, str]
) -> dict[tuple[str, float], Callable[[], Tensor]]:
    """Every (kernel, density) of a size and a density as a function to time; why others are `missing`."""
    shape = (1, size.grid.tokens, size.heads, size.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=size.dtype).transpose(1, 2) for _ in range(3))
    blocks = Blocks(size.block, size.block)
    neighbours = 1 if mask == "random" else 8
    schedule = structured_schedule(size.grid, blocks, size.heads, density, neighbours=neighbours)
    found: dict[tuple[str, float], Any] = {}
    dense = (name for name in DENSE_PEERS if peers or name.startswith("sdpa"))
    found.update({(name, 1.0): dense_peer(name, q, k, v) for name in dense})
    ours = [name for name in OURS if name != "torch" or device.type == "cpu"]
    for name in ours:
        if reasons := supports(schedule, device, size.dtype, size.head_dim, name):
            missing[name] = "; ".join(reasons)
            continue
        found[name, schedule.density] = partial(attend, q, k, v, schedule, name)
    if peers and device.type == "cuda":
        found.update({(name, schedule.density): sparse_peer(name, q, k, v, schedule) for name in SPARSE_PEERS})
    if ("hopper", schedule.density) in found:
        for precision in sorted(PRECISIONS.keys() - {BF16}):
            eight = in_precision(schedule, precision)
            if reasons := supports(eight, device, size.dtype, size.head_dim, "hopper"):
                missing[f"hopper {PRECISIONS[precision]}"] = "; ".join(reasons)
                continue
            found[f"hopper {PRECISIONS[precision]}", schedule.density] = partial(attend, q, k, v, eight, "hopper")
    if device.type == "cuda" and density < 1 and ("hopper", schedule.density) in found:
        for name, axis in (("hopper anchored", ROWS), ("hopper anchored frames", FRAMES)):
            anchored = anchored_schedule(schedule, axis)
            found[name, anchored.density] = partial(attend, q, k, v, anchored, "hopper")
        rising = k * torch.linspace(1, 0.02, size.grid.tokens, device=device, dtype=k.dtype)[:, None]
        found["hopper overshooting", schedule.density] = partial(attend, 40 * q, rising, v, schedule, "hopper")
    return agreeing(found, missing)


def agreeing(
    found: dict[tuple[str, float], Callable[[], Tensor] | str], missing: dict[str, str]
) -> dict[tuple[str, float], Callable[[], Tensor]]:
    """The cases that can be run, whose outputs agree where they must; why others are `missing`."""
    made: dict[tuple[str, float], Callable[[], Tensor]] = {}
    first: dict[float, Tensor] = {}
    for (name, density), run in found.items():
        if isinstance(run, str):
            missing[name] = run
            continue
        if name in COMPARED:
            out = run().float()
            off = float((out - first.setdefault(density, out)).norm() / first[density].norm())
            if not off <= MOST_OFF:
                missing[name] = f"{DISAGREES}, got an output that is {off:.3f} off"
                continue
        made[name, density] = run
    return made


def milliseconds(
    function: Callable[[], object], device: torch.device, before: Callable[[], object] = lambda: None
) -> float:
    """Time of one call: on a GPU that between two events.

    Args:
        function: What is timed.
        device: Where it computes.
        before: Is run untimed, and not waited for. While a GPU computes it, the host queues what is timed, so that the
            host's time is not in it; where nothing is before, it is.
    """
    before()
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


def spread(times_ms: Sequence[float]) -> dict[str, Any]:
    """Median, spread and number of measurements."""
    low, median, high = (float(value) for value in np.percentile(times_ms, (10, 50, 90)))
    return {"median_ms": median, "p10_ms": low, "p90_ms": high, "min_ms": min(times_ms), "rounds": len(times_ms)}


def measure(
    size: Size, made: dict[tuple[str, float], Callable[[], object]], device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """One record a case: what it was, its median and spread over the rounds, and how fast it computed kept blocks."""
    for function in made.values():
        for _ in range(2):
            milliseconds(function, device)
    times: dict[tuple[str, float], list[float]] = {case: [] for case in made}
    order = random.Random(0)
    for _ in range(rounds):
        for case in order.sample(list(made), len(made)):
            times[case].append(milliseconds(made[case], device, before=made[case]))
    flops = 4 * size.grid.tokens**2 * size.head_dim * size.heads
    records = []
    for (backend, density), ms in times.items():
        record = {"size": size.name, "backend": backend, "density": density, **spread(ms)}
        records.append({**record, "tflops": flops * density / record["median_ms"] / 1e9})
    return records


def host_us(device: torch.device, calls: int = 150) -> dict[str, float]:
    """Microseconds that a call takes the host, by backend and precision, for a schedule so small that the device hardly
    lags behind; fewer launches than a stream takes before the host waits (1,024).
    """
    schedule = structured_schedule(TokenGrid(1, 16, 16), Blocks(128, 128), 4, 0.5)
    q = torch.randn(1, 4, 256, 128, device=device, dtype=torch.bfloat16)
    found = {}
    for backend, precision in itertools.product((name for name in OURS if name != "torch"), PRECISIONS):
        tiny = in_precision(schedule, precision)
        if supports(tiny, device, q.dtype, q.shape[-1], backend):
            continue
        for _ in range(20):
            attend(q, q, q, tiny, backend)
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            attend(q, q, q, tiny, backend)
        spent = time.perf_counter() - begin
        torch.cuda.synchronize(device)
        name = backend if precision == BF16 else f"{backend} {PRECISIONS[precision]}"
        found[name] = round(spent / calls * 1e6, 1)
    return found


@click.command(help=__doc__)
@device_option()
@click.option("--sizes", help="Names, separated by commas [all].")
@click.option("--mask", type=click.Choice(["structured", "random"]), default="structured", show_default=True)
@click.option("--peers/--no-peers", default=True, show_default=True, help="FlashAttention-4 and FlexAttention too.")
@ROUNDS
@SECONDS
@count_option("--threads", None, "Threads of torch, on a CPU.")
@output_option("JSON to write after every density.")
def main(
    device: torch.device,
    sizes: str | None,
    mask: str,
    peers: bool,
    rounds: int,
    seconds: float,
    threads: int | None,
    output: Path | None,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    on_gpu = device.type == "cuda"
    known = {size.name: size for size in (GPU_SIZES if on_gpu else CPU_SIZES)}
    chosen = [known[name] for name in choose(sizes, list(known), "--sizes")]
    missing: dict[str, str] = {}
    report: dict[str, Any] = {
        **header("calibatt-bench kernel", device),
        "mask": mask,
        "sizes": [size.as_json() for size in chosen],
        "states": [],
        "missing": missing,
        "measurements": [],
    }
    click.echo(f"{report['device']}, {report['versions']}")
    begun = time.perf_counter()
    if on_gpu:
        report["host_us_a_call"] = host_us(device)
        click.echo(f"host microseconds a call: {report['host_us_a_call']}")
    for size in chosen:
        for density in size.densities:
            if time.perf_counter() - begun > seconds:
                click.echo(f"out of time before {size.name} at density {density:g}")
                continue
            for record in measure(size, cases(size, density, device, mask, peers, missing), device, rounds):
                report["measurements"].append(record)
                click.echo(
                    "{size:>12} {backend:>24} density {density:.3f}: {median_ms:8.2f} ms "
                    "({p10_ms:.2f} to {p90_ms:.2f}), {tflops:.3g} TFLOP/s".format(**record)
                )
            report["states"].append({"size": size.name, "density": density, **state(device)})
            write_report(output, report)
    for name, reason in missing.items():
        click.echo(f"not measured: {name}: {reason}")
    if any(reason.startswith(DISAGREES) for reason in missing.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
