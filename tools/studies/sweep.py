"""Configurations of the triton kernel side by side: what feeds the table of its backend.

    python -m calibatt.tools.studies.sweep --sizes 480p,720p -o sweep.json

Every configuration takes turns with that of the table, on the sizes, densities and masks of `calibatt-bench kernel`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from calibatt.plans import Blocks
from calibatt.runtime.backends import load_backend
from calibatt.runtime.ops import attend
from calibatt.tools.bench.kernel import GPU_SIZES, Size, measure
from calibatt.tools.bench.options import ROUNDS, choose, device_option, output_option
from calibatt.tools.bench.record import header, state, write_report
from calibatt.tools.bench.schedules import structured_schedule
from calibatt.tools.studies.options import study_command

SWEEP = [
    *((64, block_n, 4, stages, None) for block_n in (32, 64, 128) for stages in (2, 3)),
    *(
        (128, block_n, warps, stages, registers)
        for block_n in (32, 64, 128)
        for warps, squeezed in ((4, 168), (8, 128))
        for stages in (2, 3)
        for registers in (None, squeezed)
    ),
]
"""Configurations of the triton kernel; squeezed ones leave registers for another program on the SM."""


def cases(size: Size, density: float, device: torch.device) -> dict[tuple[str, float], Callable[[], object]]:
    """The table's configuration and every one of the sweep that the device can run, as functions to time."""
    shape = (1, size.grid.tokens, size.heads, size.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=size.dtype).transpose(1, 2) for _ in range(3))
    schedule = structured_schedule(size.grid, Blocks(size.block, size.block), size.heads, density)
    triton, bound = load_backend("triton"), schedule.bind(device)
    found: dict[tuple[str, float], Callable[[], object]] = {
        ("triton", schedule.density): partial(attend, q, k, v, schedule, "triton")
    }
    for config in (triton.Config(*fields) for fields in SWEEP):
        run = partial(triton.run, q, k, v, bound, size.head_dim**-0.5, False, config=config)
        if (reason := refused_config(run)) is None:
            found[str(config), schedule.density] = run
        else:
            click.echo(f"not measured: {config}: {reason}")
    return found


def refused_config(run: Callable[[], object]) -> str | None:
    """Why the device cannot run a configuration of the triton kernel; None if it can."""
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        run()
    except (OutOfResources, PTXASError) as error:
        return str(error)
    return None


def ranking(records: list[dict[str, Any]], size: Size, device: torch.device) -> list[str]:
    """What feeds the table of the triton backend: every configuration of a sweep, fastest first.

    By the geometric mean over the densities of its speed relative to the table's configuration in the same rounds.
    """
    times: dict[str, dict[float, float]] = {}
    for record in records:
        if record["size"] == size.name and record["backend"].startswith(("triton", "Config")):
            times.setdefault(record["backend"], {})[record["density"]] = record["median_ms"]
    now = times.pop("triton", {})
    speeds = {
        name: float(np.exp(np.mean([np.log(now[density] / ms) for density, ms in each.items()])))
        for name, each in times.items()
    }
    sm = load_backend("triton").device_sm(device)
    return [
        f"sm{sm}, head_dim {size.head_dim}, {size.name}: {speed:.3f} x the table's: {name}"
        for name, speed in sorted(speeds.items(), key=lambda each: -each[1])
    ]


@study_command("python -m calibatt.tools.studies.sweep", __doc__)
@click.option("--sizes", default=",".join(size.name for size in GPU_SIZES), show_default=True)
@ROUNDS
@device_option("cuda", kinds=("cuda",))
@output_option("JSON to write after every size.", required=True)
def main(sizes: str, rounds: int, device: torch.device, output: Path) -> None:
    torch.manual_seed(0)
    known = {size.name: size for size in GPU_SIZES}
    chosen = [known[name] for name in choose(sizes, list(known), "--sizes")]
    report: dict[str, Any] = {
        **header("python -m calibatt.tools.studies.sweep", device),
        "sizes": [size.as_json() for size in chosen],
        "measurements": [],
        "ranking": [],
        "states": [],
    }
    for size in chosen:
        for density in size.densities:
            report["measurements"] += measure(size, cases(size, density, device), device, rounds)
        report["ranking"] += ranking(report["measurements"], size, device)
        report["states"].append({"size": size.name, **state(device)})
        write_report(output, report)
    click.echo("\n".join(report["ranking"]))


if __name__ == "__main__":
    main()
