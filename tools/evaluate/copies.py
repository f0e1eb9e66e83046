"""Would copies of whole frames pay, as those of anchor rows do?

    python -m calibatt.tools.evaluate.copies --stats stats/ -o docs/benchmarks/copies_cpu.json

On dense trajectories, what every head's output loses where groups of neighbouring rows of a frame, or of neighbouring
frames, get the output of their middle one; and what the compiler would make of it: a group saves milliseconds at the
price that `select` found, and costs its error times weight. Prompts that nothing was chosen by say what is left of it.
The packing of anchor rows into tiles is not counted, neither for rows nor for frames.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch import Tensor

from calibatt.compiler.cost import device_named
from calibatt.compiler.gather import StatisticsSource
from calibatt.compiler.language import parse_passes
from calibatt.compiler.passes.anchors import head_ms
from calibatt.compiler.pipeline import in_turn, run
from calibatt.compiler.shelf import MemoryShelf
from calibatt.compiler.stats import Store
from calibatt.plans import TokenGrid
from calibatt.tools.calibrate.models import MODEL_HELP
from calibatt.tools.evaluate.bench import Bench, Moment, Work
from calibatt.tools.evaluate.harness import about
from calibatt.tools.evaluate.pareto import make_study

DENSITIES = (0.2, 0.35, 0.5)
SIZES = {"rows": (2, 3, 4), "frames": (2, 3, 8)}
"""Members of a group."""

Errors = dict[str, npt.NDArray[np.float64]]
"""By what is copied: ``(sizes, T, L, H)``, mean ||(copies - O) W||^2 / mean ||x||^2."""

console = Console(stderr=True)


def anchors(count: int, size: int) -> Tensor:
    """Whose output each of `count` rows or frames gets, int64 ``(count,)``; groups of `size`, the last may be short."""
    first = torch.arange(count) // size * size
    members = torch.minimum(torch.full_like(first, size), count - first)
    return first + (members - 1) // 2


def copied(out: Tensor, grid: TokenGrid, what: str, size: int) -> Tensor:
    """Outputs ``(..., N, D)`` of the video's tokens where groups of rows, or of frames, get that of their anchor."""
    cells = out.unflatten(-2, (grid.frames, grid.height, grid.width))
    axis, count = (-3, grid.height) if what == "rows" else (-4, grid.frames)
    return cells.index_select(axis, anchors(count, size).to(out.device)).flatten(-4, -2)


def measure(bench: Bench, work: Work) -> Errors:
    """Errors of copies, means over prompts: one dense sampling of each."""
    grid = bench.sampler.grid
    found = {what: torch.zeros(len(sizes), *bench.shape, dtype=torch.float64) for what, sizes in SIZES.items()}

    def on_moment(moment: Moment) -> None:
        out = (moment.out.float() @ moment.factor)[:, :, grid.text_before :][:, :, : grid.video_tokens]
        for what, sizes in SIZES.items():
            for index, size in enumerate(sizes):
                lost = (copied(out, grid, what, size) - out).square().sum(-1).mean(-1) / moment.square[:, None]
                found[what][index, moment.step, moment.layer] += lost.sum(0).double().cpu() / len(work)

    for start in range(0, len(work), bench.batch):
        bench.calibrate(on_moment, work[start : start + bench.batch])
    return {what: errors.numpy() for what, errors in found.items()}


def priced(store: Store, density: float) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """What `select` alone makes of a store, at this density.

    Returns:
        What each head's milliseconds are worth, in error times weight, and what it loses: both float64 ``(T, L, H)``,
        the times ascending.
    """
    source, shelf = StatisticsSource(store), MemoryShelf()
    job = source.make_job(device_named("h200-triton"))
    passes = source.settle(job, parse_passes(f"protect,select{{target-density={density:g}}}"))
    run(source, job, passes, shelf, in_turn)
    assert job.multiplier is not None
    worth, loss = np.zeros((2, *job.unit_weights.shape, job.manifest.model.heads))
    for index, unit in shelf.units.items():
        at = job.place(index)
        worth[at] = job.multiplier * head_ms(job, unit)
        loss[at] = unit.error * (unit.weight if unit.head_weight is None else unit.head_weight)
    return worth, loss


def gains(worth: npt.NDArray[np.float64], weight: npt.NDArray[np.float64], errors: Errors) -> Errors:
    """What each group saves of the milliseconds' worth, less what its copies cost."""
    return {
        what: np.stack([worth * (1 - 1 / size) - weight * error for size, error in zip(SIZES[what], each, strict=True)])
        for what, each in errors.items()
    }


def decided(
    worth: npt.NDArray[np.float64],
    loss: npt.NDArray[np.float64],
    weight: npt.NDArray[np.float64],
    seen: Errors,
    held_out: Errors,
) -> dict[str, float]:
    """What heads would choose by the errors seen, and what is left of it by those of other prompts.

    Returns:
        Shares of all heads: `rows` that gain by groups of rows; `frames` that gain more by groups of frames. What
        frames save beside rows, relative to the error: `saved` as seen, `saved_held_out`.
    """
    by_seen, truly = gains(worth, weight, seen), gains(worth, weight, held_out)
    pick = {what: each.argmax(0)[None] for what, each in by_seen.items()}
    best = {what: np.take_along_axis(each, pick[what], 0)[0] for what, each in by_seen.items()}
    real = {what: np.take_along_axis(each, pick[what], 0)[0] for what, each in truly.items()}
    rows = best["rows"] > 0
    frames = best["frames"] > np.maximum(best["rows"], 0)

    def more(of: Errors) -> float:
        return float((of["frames"] - np.where(rows, of["rows"], 0))[frames].sum() / loss.sum())

    return {
        "rows": float(rows.mean()),
        "frames": float(frames.mean()),
        "saved": more(best),
        "saved_held_out": more(real),
    }


@click.command(help=__doc__)
@click.option("--model", default="demo", show_default=True, help=MODEL_HELP)
@click.option("--stats", "stores", type=click.Path(path_type=Path), multiple=True, required=True)
@click.option("--held-out", type=click.Path(path_type=Path), help="One prompt a line; the demo model has its own.")
@click.option("--prompts", type=click.IntRange(1), default=4, show_default=True, help="Held out.")
@click.option("--calibration", type=click.IntRange(1), default=8, show_default=True, help="Prompts to choose by.")
@click.option("--batch", type=click.IntRange(1), default=2, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="JSON to write.")
def main(output: Path, **options: Any) -> None:
    study = make_study(**options, steps=None)
    bench, work = study.bench, study.bench.calibration
    result: dict[str, Any] = {"about": about("python -m calibatt.tools.evaluate.copies", study.sampler)}
    result |= {"calibration": len(work), "prompts": len(bench.held_out), "sizes": SIZES}
    seen, others = measure(bench, work), measure(bench, bench.held_out)
    for what in SIZES:
        result[f"median error, {what}"] = np.median(seen[what], (1, 2, 3)).tolist()
        ratio = np.median(others[what] / np.maximum(seen[what], 1e-12), (1, 2, 3))
        result[f"held out / seen, {what}"] = ratio.tolist()
    result["frames of 2 below rows of 2"] = float((seen["frames"][0] < seen["rows"][0]).mean())
    at = [bench.step(now) for now in study.store.manifest.times]
    weight = bench.weight.double().cpu().numpy()[at]
    seen, others = ({what: each[:, at] for what, each in of.items()} for of in (seen, others))
    for density in DENSITIES:
        found = decided(*priced(study.store, density), weight, seen, others)
        result[f"density {density:g}"] = found
        console.print(f"density {density:g}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
