"""Kernels at a GPU's power limit.

    python -m calibatt.tools.studies.energy -o FILE.json

A large GPU that computes attention without a pause runs at its power limit: its driver lowers the clock until the power
fits, and the time of a kernel is then the energy it needs over the power it gets, however few cycles it takes. So each
case runs back to back for a whole window, after a short untimed one, and the joules are read from the device's counter.
The cases take turns, every round in another order. Beside them runs `matmul`, a product of two square matrices of
the same values by cuBLAS: what the same power buys where nothing but multiplying is done. With ``--values zeros`` no
bit flips, and power is no limit: what is left is how well a kernel uses its cycles.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
import torch
from torch import Tensor

from calibatt.plans import BF16, PRECISIONS, Blocks
from calibatt.plans.precision import EIGHT_BITS
from calibatt.runtime.ops import attend, supports
from calibatt.tools.bench.kernel import GPU_SIZES, Size
from calibatt.tools.bench.options import choose, count_option, device_option, output_option
from calibatt.tools.bench.peers import DENSE_PEERS, SPARSE_PEERS, dense_peer, sparse_peer
from calibatt.tools.bench.record import gpu_name, header, state, write_report
from calibatt.tools.bench.schedules import in_precision, structured_schedule
from calibatt.tools.studies.options import study_command

EIGHT = {f"hopper {PRECISIONS[precision]}": precision for precision in EIGHT_BITS}
"""The precision of all heads where these names stand for `hopper`; quantisation included."""
KERNELS = ("hopper", *EIGHT, "triton", *SPARSE_PEERS, *DENSE_PEERS, "matmul")
VALUES = {"random": torch.randn, "zeros": torch.zeros}
MATRIX = 8192
"""Rows and columns of the matrices of `matmul`."""
WARM = 0.2
"""Share of a window that runs before it, untimed."""
LINE = (
    "{kernel:>24} density {density:.3f}: {ms:8.2f} ms ({ms_least:.2f} to {ms_most:.2f}), {joules:7.3f} J, "
    "{watts:3.0f} W, {mhz:4.0f} MHz, {tflops:.0f} TFLOP/s, {picojoules_a_flop:.3f} pJ a FLOP"
)
"""Of a record, for people."""


class Meter(Protocol):
    """Reads a device."""

    def joules(self) -> float:
        """Energy that it has used since its driver was loaded."""

    def megahertz(self) -> int:
        """The clock of its multiprocessors now."""


class NvmlMeter:
    """The driver's own counters.

    Args:
        device: A CUDA device.

    Raises:
        click.UsageError: nvidia-ml-py is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise click.UsageError("reading joules needs the package nvidia-ml-py") from error
        pynvml.nvmlInit()
        self._nvml = pynvml
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(gpu_name(device))

    def joules(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3

    def megahertz(self) -> int:
        return int(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))


@dataclass(frozen=True)
class Case:
    """What runs.

    Args:
        kernel: One of `KERNELS`.
        density: Share of dense work that it executes.
        flops: Of one call.
        run: One call; returns before the device is done.
    """

    kernel: str
    density: float
    flops: float
    run: Callable[[], object]


def cases(
    size: Size, kernels: list[str], values: Callable[..., Tensor], device: torch.device, missing: dict[str, str]
) -> list[Case]:
    """Every kernel at every density of a size; dense ones once. Why others are `missing`."""
    shape = (1, size.grid.tokens, size.heads, size.head_dim)
    q, k, v = (values(shape, device=device, dtype=size.dtype).transpose(1, 2) for _ in range(3))
    flops = 4 * size.grid.tokens**2 * size.head_dim * size.heads
    found: list[Case] = []
    for kernel in kernels:
        if kernel == "matmul":
            a, b = (values((MATRIX, MATRIX), device=device, dtype=size.dtype) for _ in range(2))
            found.append(Case(kernel, 1.0, 2 * MATRIX**3, partial(torch.mm, a, b)))
        elif kernel in DENSE_PEERS:
            run = dense_peer(kernel, q, k, v)
            if isinstance(run, str):
                missing[kernel] = run
            else:
                found.append(Case(kernel, 1.0, flops, run))
    for density in size.densities:
        schedule = structured_schedule(size.grid, Blocks(size.block, size.block), size.heads, density)
        for kernel in (kernel for kernel in kernels if kernel not in (*DENSE_PEERS, "matmul")):
            if kernel in SPARSE_PEERS:
                sparse = sparse_peer(kernel, q, k, v, schedule)
                if isinstance(sparse, str):
                    missing[kernel] = sparse
                    continue
            else:
                ours, backend = in_precision(schedule, EIGHT.get(kernel, BF16)), kernel.split()[0]
                if reasons := supports(ours, device, size.dtype, size.head_dim, backend):
                    missing[kernel] = "; ".join(reasons)
                    continue
                sparse = partial(attend, q, k, v, ours, backend)
            found.append(Case(kernel, schedule.density, flops * schedule.density, sparse))
    return found


def window(
    case: Case, seconds: float, call_s: float, meter: Meter, synchronize: Callable[[], None]
) -> dict[str, float]:
    """Runs a case for about so many seconds: milliseconds and joules of a call, watts, and the clock in MHz."""
    calls = max(1, round(seconds / call_s))
    for _ in range(max(1, round(WARM * calls))):
        case.run()
    synchronize()
    before, begun = meter.joules(), time.perf_counter()
    for _ in range(calls):
        case.run()
    clock = meter.megahertz()  # while the last calls are still being computed
    synchronize()
    spent, used = time.perf_counter() - begun, meter.joules() - before
    return {"ms": spent / calls * 1e3, "joules": used / calls, "watts": used / spent, "mhz": clock}


def measure(
    made: list[Case], rounds: int, seconds: float, meter: Meter, synchronize: Callable[[], None]
) -> list[dict[str, Any]]:
    """One record a case: medians over the rounds, the spread of its time, and what a floating-point operation costs."""
    call_s = {}
    for case in made:
        case.run()
        synchronize()
        begun = time.perf_counter()
        case.run()
        synchronize()
        call_s[case] = time.perf_counter() - begun
    found: dict[Case, list[dict[str, float]]] = {case: [] for case in made}
    order = random.Random(0)
    for _ in range(rounds):
        for case in order.sample(made, len(made)):
            found[case].append(window(case, seconds, call_s[case], meter, synchronize))
    records = []
    for case, windows in found.items():
        record: dict[str, Any] = {"kernel": case.kernel, "density": case.density, "rounds": rounds}
        for key in ("ms", "joules", "watts", "mhz"):
            record[key] = float(np.median([each[key] for each in windows]))
        times = [each["ms"] for each in windows]
        record |= {"ms_least": min(times), "ms_most": max(times)}
        record["tflops"] = case.flops / record["ms"] / 1e9
        record["picojoules_a_flop"] = record["joules"] / case.flops * 1e12
        records.append(record)
    return records


def compared(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times the time and the energy of `hopper` the other kernels take, at each size and density."""
    ours = {(row["size"], row["density"]): row for row in records if row["kernel"] == "hopper"}
    return [
        {
            "size": row["size"],
            "density": row["density"],
            "kernel": row["kernel"],
            "time": row["ms"] / ours[place]["ms"],
            "energy": row["joules"] / ours[place]["joules"],
        }
        for row in records
        if row["kernel"] not in ("hopper", "matmul") and (place := (row["size"], row["density"])) in ours
    ]


@study_command("python -m calibatt.tools.studies.energy", __doc__)
@click.option("--sizes", default="480p,720p", show_default=True, help="Of calibatt-bench kernel.")
@click.option("--kernels", default="hopper,flash-attention-4 sparse,sdpa-cudnn,matmul", show_default=True)
@click.option("--values", type=click.Choice(list(VALUES)), default="random", show_default=True, help="Of the tensors.")
@count_option("--rounds", 4, "Windows of each case.")
@click.option(
    "--window",
    "seconds",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Seconds of a window.",
)
@device_option("cuda", kinds=("cuda",))
@output_option("JSON to write after every size.")
def main(
    sizes: str, kernels: str, values: str, rounds: int, seconds: float, device: torch.device, output: Path | None
) -> None:
    known = {size.name: size for size in GPU_SIZES}
    names, chosen = choose(sizes, list(known), "--sizes"), choose(kernels, KERNELS, "--kernels")
    torch.manual_seed(0)
    report: dict[str, Any] = {
        **header("python -m calibatt.tools.studies.energy", device),
        "mask": "structured",
        "matrix": MATRIX,
        "sizes": [known[name].as_json() for name in names],
        "states": [],
        "missing": {},
        "measurements": [],
        "compared": [],
    }
    click.echo(f"{report['device']}, {report['versions']}")
    meter = NvmlMeter(device)
    for name in names:
        made = cases(known[name], chosen, VALUES[values], device, report["missing"])
        for record in measure(made, rounds, seconds, meter, lambda: torch.cuda.synchronize(device)):
            report["measurements"].append({"size": name, **record})
            click.echo(f"{name:>8} {LINE.format(**record)}")
        report["compared"] = compared(report["measurements"])
        report["states"].append({"size": name, **state(device)})
        write_report(output, report)
    for row in report["compared"]:
        click.echo(
            "{size:>8} {kernel:>24} {density:.3f}: {time:.3f} x hopper's time, {energy:.3f} x its energy".format(**row)
        )
    for kernel, reason in report["missing"].items():
        click.echo(f"not measured: {kernel}: {reason}")


if __name__ == "__main__":
    main()
