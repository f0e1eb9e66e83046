"""Running passes: everything that happens between them happens here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from calibatt.compiler.errors import PassError, VerifyError
from calibatt.compiler.ir import Job, UnitIR
from calibatt.compiler.language import print_passes
from calibatt.compiler.passes import Pass
from calibatt.plans import ScheduleError

ARRAYS = ("row_ptr", "col_idx", "head_list", "head_anchor", "anchor_ptr", "group_start", "anchor_row", "tile_order")


@dataclass(frozen=True)
class Account:
    """What a job amounts to after a pass.

    Args:
        name: Of the pass; ``dense`` for the job before any.
        passes: The pass with its options, as in a pass string.
        seconds: What the pass took.
        blocks: Computed over all times, layers and heads.
        density: `blocks` / those of dense attention.
        plan_bytes: Of the arrays of schedules; before `lower`, of the block lists with nothing shared.
        predicted_ms: Milliseconds of one attention call, summed over all times and layers.
        error: Predicted output error times weight, summed over all.
        findings: What the pass reports.
    """

    name: str
    passes: str
    seconds: float
    blocks: int
    density: float
    plan_bytes: int
    predicted_ms: float
    error: float
    findings: dict[str, Any] = field(default_factory=dict)


def run(job: Job, passes: Sequence[Pass], after: Callable[[Account], None] = lambda _: None) -> list[Account]:
    """Runs passes in order; verifies and accounts after each.

    Args:
        job: Changed in place.
        passes: What to run.
        after: Called after each pass.

    Returns:
        The account of the job before any pass, then one a pass.

    Raises:
        PassError: A pass lacks what it requires, or the last one leaves more error than was allowed.
        VerifyError: A pass left a broken job.
    """
    accounts = [account(job, "dense", "", 0.0)]
    for each in passes:
        start = time.perf_counter()
        each.apply(job)
        seconds = time.perf_counter() - start
        for unit in job.units:
            verify(unit, each.name)
        accounts.append(account(job, each.name, print_passes([each]), seconds))
        after(accounts[-1])
    if job.error_budget is not None and job.total_error() > job.error_budget * (1 + 1e-9):
        rule = f"stay within max-error {job.error_budget:g} (another select after anchors sees to it)"
        raise PassError(f"passes must {rule}, got {job.total_error():.6g}")
    return accounts


def account(job: Job, name: str, passes: str, seconds: float) -> Account:
    """What the job amounts to now."""
    blocks = sum(int(unit.computed()[1].sum()) for unit in job.units)
    dense = sum(unit.heads * unit.dense_blocks for unit in job.units)
    return Account(
        name=name,
        passes=passes,
        seconds=seconds,
        blocks=blocks,
        density=blocks / dense,
        plan_bytes=sum(_bytes(unit) for unit in job.units),
        predicted_ms=sum(job.unit_ms(unit) for unit in job.units),
        error=job.total_error(),
        findings=dict(job.findings.get(name, {})),
    )


def _bytes(unit: UnitIR) -> int:
    if unit.lowered is not None:
        return sum(getattr(unit.lowered, name).nbytes for name in ARRAYS)
    tiles, blocks = unit.computed()
    listed = blocks < tiles * unit.k_blocks
    return int((2 * blocks + 4 * tiles)[listed].sum())


def verify(unit: UnitIR, after: str) -> None:
    """Proves a unit after a pass.

    Raises:
        VerifyError: The first broken rule; names pass, unit, rule and value.
    """

    def require(ok: bool, what: str, rule: str, value: object) -> None:
        if not ok:
            raise VerifyError(f"{unit.name}: {what} must {rule} after {after}, got {value}")

    shape = (unit.heads, unit.q_blocks, -(-unit.k_blocks // 8))
    spare = -unit.k_blocks % 8
    for what, bits in (("required", unit.required), ("keep", unit.keep)):
        if bits is None:
            continue
        found = (bits.dtype.name, bits.shape)
        require(found == ("uint8", shape), what, f"be uint8 {shape}", found)
        require(not spare or not (bits[..., -1] >> (8 - spare)).any(), what, "have zero padding bits", "ones")
        require(bool(bits.any(-1).all()), what, "hold a block for every query block", "an empty row")
    if unit.keep is not None:
        require(not (unit.required & ~unit.keep).any(), "keep", "hold every required block", "one dropped")
        require(len(unit.choice) == unit.heads, "choice", f"name {unit.heads} heads", len(unit.choice))
        right = unit.error.shape == (unit.heads,) and bool((np.isfinite(unit.error) & (unit.error >= 0)).all())
        require(right, "error", f"be {unit.heads} finite numbers, none negative", unit.error)
    require(len(unit.anchors) in (0, unit.heads), "anchors", f"be given for {unit.heads} heads", len(unit.anchors))
    if unit.lowered is not None:
        try:
            unit.lowered.check()
        except ScheduleError as error:
            raise VerifyError(f"{unit.name}: the schedule is broken after {after}: {error}") from None
        lowered = [unit.lowered.computed_blocks(head) for head in range(unit.heads)]
        blocks = unit.computed()[1].tolist()
        require(lowered == blocks, "the schedule", f"compute the blocks of the masks, {blocks}", lowered)
