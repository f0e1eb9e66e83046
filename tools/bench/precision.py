"""Heads of 8 bits on this card: ``calibatt-bench precision``.

Times the triton backend on heads of 16 bits, in int8, and in int8 with fp8, in turns, on structured masks of density
0.3, after each has been held against the oracle on a small schedule. What was found is remembered in the user's cache
folder, and from then on decides whether plans with such heads are executed on this card: where they are not faster, or
wrong, they are refused. Times are of whole calls, quantisation included.
"""

from __future__ import annotations

import datetime
from functools import partial
from typing import Any

import click
import torch

from calibatt.plans import BF16, PRECISIONS, Blocks, TokenGrid
from calibatt.plans.precision import EIGHT_BITS
from calibatt.runtime import eight_bits
from calibatt.runtime.ops import attend
from calibatt.runtime.reference import reference_attention
from calibatt.tools.bench.kernel import Size, measure
from calibatt.tools.bench.options import ROUNDS, device_option
from calibatt.tools.bench.schedules import in_precision, structured_schedule

DENSITY, HEADS = 0.3, 16
GRIDS = {"480p": TokenGrid(21, 30, 52), "720p": TokenGrid(21, 45, 80)}
SIZES = [
    Size(f"{name}, head size {head_dim}", grid, 128, HEADS, head_dim, torch.bfloat16, (DENSITY,))
    for head_dim in (128, 64)
    for name, grid in GRIDS.items()
]
CHECKED = TokenGrid(5, 16, 26)
QUERIES = 256
"""Compared with the oracle."""


def inputs(grid: TokenGrid, heads: int, head_dim: int, device: torch.device) -> list[torch.Tensor]:
    """q, k and v as a model makes them, keys and values with means."""
    shape = (1, grid.tokens, heads, head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    return [q, k + 1, v + 1]


def wrong(precision: int, head_dim: int, device: torch.device) -> str:
    """Why a precision must not be used on a device: it fails, or is more than twice as far from fp64 as it may be.

    Raises:
        torch.cuda.OutOfMemoryError: The device has too little memory left.
    """
    schedule = in_precision(structured_schedule(CHECKED, Blocks(128, 128), 3, 0.5), precision)
    q, k, v = inputs(CHECKED, 3, head_dim, device)
    try:
        out = attend(q, k, v, schedule, "triton").double()
    except torch.cuda.OutOfMemoryError:  # says nothing about the card: others may be using it
        raise
    except Exception as error:  # whatever a compiler or driver raises: this card cannot do it
        return f"it fails: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}"
    queries = torch.arange(0, CHECKED.tokens, CHECKED.tokens // QUERIES)
    at, doubles = queries.to(device), [x.double() for x in (q, k, v)]
    truth, _ = reference_attention(*doubles, schedule, queries=queries, exact_weights=True)
    rounded, _ = reference_attention(q, k, v, schedule, queries=queries)
    found, most = ((x - truth).square().mean().sqrt().item() for x in (out[:, :, at], rounded.double()))
    return "" if found <= 2 * most else f"it is wrong: {found:.3g} off, at most {2 * most:.3g} is right"


def timings(size: Size, problems: dict[int, str], device: torch.device, rounds: int) -> list[eight_bits.Timing]:
    """What each precision gains at a size; problems are of those that are not timed."""
    q, k, v = inputs(size.grid, size.heads, size.head_dim, device)
    schedule = structured_schedule(size.grid, Blocks(size.block, size.block), size.heads, DENSITY)
    made = {
        (PRECISIONS[precision], DENSITY): partial(attend, q, k, v, in_precision(schedule, precision), "triton")
        for precision in (BF16, *EIGHT_BITS)
        if not problems.get(precision)
    }
    records: list[dict[str, Any]] = measure(size, made, device, rounds)
    for record in records:
        click.echo("{size:>24} {backend:>20}: {median_ms:8.3f} ms ({p10_ms:.3f} to {p90_ms:.3f})".format(**record))
    medians = {record["backend"]: record["median_ms"] for record in records}
    return [
        eight_bits.Timing(
            precision, size.head_dim, size.grid.tokens,
            0.0 if problems[precision] else round(medians[PRECISIONS[BF16]] / medians[PRECISIONS[precision]], 3),
            problems[precision],
        )
        for precision in EIGHT_BITS
    ]  # fmt: skip


@click.command(help=__doc__)
@device_option("cuda", kinds=("cuda",))
@ROUNDS
def main(device: torch.device, rounds: int) -> None:
    torch.manual_seed(0)
    found: list[eight_bits.Timing] = []
    eight_bits.timings_file(device)  # before long work: it needs a folder
    try:
        for size in SIZES:
            problems = {precision: wrong(precision, size.head_dim, device) for precision in EIGHT_BITS}
            found += timings(size, problems, device, rounds)
    except torch.cuda.OutOfMemoryError as error:
        reason = f"{device} must have memory left to measure {size.name}, nothing is remembered: {error}"
        raise click.ClickException(" ".join(reason.split())) from None
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    path = eight_bits.remember(device, found, {"date": now, "torch": torch.__version__})
    for timing in found:
        _, told = eight_bits.verdict(timing.precision, device, timing.head_dim, timing.tokens)
        click.echo(f"head size {timing.head_dim}: {told.replace(f' ({path})', '')}")
    click.echo(f"remembered in {path}")


if __name__ == "__main__":
    main()
