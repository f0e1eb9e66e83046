"""Runs passes, and everything that happens between them.

Passes are run in *stages*. A stage takes one unit through the changes of several passes and ends with the survey of the
next pass that decides over all units. So a unit is read, changed and stored once in a stage, in any process.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from threading import Thread
from typing import Any, Protocol

import numpy as np

from calibatt.compiler.bits import count
from calibatt.compiler.errors import CompileError, VerifyError
from calibatt.compiler.ir import Float64, Job, UnitIR
from calibatt.compiler.language import print_passes
from calibatt.compiler.passes import Findings, Pass
from calibatt.compiler.prediction import CUT, DENSE, Masks
from calibatt.compiler.shelf import Shelf
from calibatt.plans import PRECISIONS, ScheduleError


class Source(Protocol):
    """Where units come from: a `StatisticsSource`, or its stand-in in a test."""

    def unit(self, job: Job, time_index: int, layer: int) -> UnitIR:
        """The unit before any pass."""


Work = Callable[[int, Any], Any]
Map = Callable[[Work, Sequence[Any]], Iterator[tuple[int, Any]]]
"""Applies a function to each unit's number and argument, in any order and process; yields number and result."""


@dataclass(frozen=True)
class Account:
    """The sums over a job after a pass.

    Args:
        name: Name of the pass; ``dense`` for the job before any.
        passes: The pass with its options, as in a pass string.
        seconds: Seconds of the pass, over all processes; reading statistics counts as ``dense``.
        blocks: Computed blocks over all steps of the sampling, layers and heads.
        density: `blocks` / blocks of dense attention.
        cost: `predicted_ms` / that of dense attention in 16 bit; equal to `density` if all heads are in 16 bit.
        plan_bytes: Bytes of the block lists as plain CSR; heads share lists only after `lower`.
        predicted_ms: Predicted milliseconds of one attention call, summed over all steps and layers.
        error: Predicted error, summed over all segments, layers and heads.
        findings: Findings of the pass.
    """

    name: str
    passes: str
    seconds: float
    blocks: int
    density: float
    cost: float
    plan_bytes: int
    predicted_ms: float
    error: float
    findings: dict[str, Any]


@dataclass(frozen=True)
class UnitAccount:
    """The sums over a unit after a pass; see `Account`.

    Args:
        kinds: Number of heads by kind.
        head_error: Predicted error of each head, copies and precision included.
        masks: The unit's part of what predicts the final latent; the first axis of each array is of heads or shares.
    """

    seconds: float
    blocks: int
    plan_bytes: int
    predicted_ms: float
    findings: Findings
    kinds: dict[str, int]
    head_error: Float64
    masks: Masks


@dataclass(frozen=True)
class Run:
    """The result of `run`: an account for each pass, and one for each unit after the last pass."""

    accounts: list[Account]
    units: list[UnitAccount]


@dataclass(frozen=True)
class Stage:
    """The changes of some passes, and the survey of the pass that decides next.

    Args:
        number: Number of the stage; 0 gathers units from the statistics.
        passes: The passes that change units; if the first one decides, it gets its decision.
        survey: The pass that decides next, if there is one.
    """

    number: int
    passes: tuple[Pass, ...]
    survey: Pass | None


@dataclass(frozen=True)
class Found:
    """The result of a stage for one unit."""

    accounts: tuple[UnitAccount, ...]
    survey: Any


def stages(passes: Sequence[Pass]) -> list[Stage]:
    """Cuts a list of passes into stages, before every pass that decides."""
    parts: list[list[Pass]] = [[]]
    for each in passes:
        if each.decides:
            parts.append([])
        parts[-1].append(each)
    after = [*(part[0] for part in parts[1:]), None]
    return [Stage(number, tuple(part), survey) for number, (part, survey) in enumerate(zip(parts, after, strict=True))]


def run(source: Source, job: Job, passes: Sequence[Pass], shelf: Shelf, over: Map) -> Run:
    """Runs passes in order; verifies and accounts after each.

    Args:
        source: Where units come from.
        job: The job of the source; decisions of passes are written into it.
        passes: The passes to run.
        shelf: Where the units are stored.
        over: How units are spread over processes: `in_turn`, or `processes`.

    Returns:
        The accounts: of the job before any pass, then one a pass; and of every unit after the last.

    Raises:
        StoreError: The statistics are damaged.
        PassError: A pass lacks what it requires.
        VerifyError: A pass left a broken unit.
    """
    for position, one in enumerate(passes):
        one.check(job, passes[:position])
    accounts: list[Account] = []
    decisions: Sequence[Any] = [None] * job.units
    for stage in stages(passes):
        work = partial(_work, source, job, stage, shelf)
        results = dict(over(work, decisions))
        ordered = [results[index] for index in range(job.units)]
        names: list[Pass | None] = [None] if stage.number == 0 else []
        for position, each in enumerate([*names, *stage.passes]):
            accounts.append(_sum(job, each, [unit.accounts[position] for unit in ordered]))
        if stage.survey is not None:
            decisions = stage.survey.decide(job, [each.survey for each in ordered])
    return Run(accounts, [each.accounts[-1] for each in ordered])


def in_turn(work: Work, arguments: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Applies a function to one unit after the other, in this process."""
    for index, argument in enumerate(arguments):
        yield index, work(index, argument)


def _serve() -> None:
    """Runs first in each process: it ignores Ctrl-C, which is for the parent, and ends when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)


@contextmanager
def processes(jobs: int) -> Iterator[Map]:
    """Spreads units over processes; 1 stays in this one."""
    if jobs == 1:
        yield in_turn
        return
    others = set(active_children())
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_serve) as pool:

        def over(work: Work, arguments: Sequence[Any]) -> Iterator[tuple[int, Any]]:
            waiting: dict[Future[Any], int] = {}
            try:
                for index, argument in enumerate(arguments):
                    waiting[pool.submit(work, index, argument)] = index
                for future in as_completed(waiting):
                    yield waiting[future], future.result()
            except BrokenProcessPool:
                for each in set(active_children()) - others:  # the pool would wait for a process that was just starting
                    each.kill()
                message = f"all {jobs} processes must go on to the end, got one that was killed; fewer take less memory"
                raise CompileError(message) from None
            finally:
                for future in waiting:
                    future.cancel()

        yield over


def _work(source: Source, job: Job, stage: Stage, shelf: Shelf, index: int, decision: Any) -> Found:
    """Takes one unit through a stage."""
    accounts: list[UnitAccount] = []
    start = time.perf_counter()
    if stage.number == 0:
        unit = source.unit(job, *job.place(index))
        accounts.append(_account(job, unit, time.perf_counter() - start, {}))
    else:
        unit = shelf.unit(index)
    for each in stage.passes:
        start = time.perf_counter()
        findings = each.change(job, unit, decision if each.decides else None)
        seconds = time.perf_counter() - start
        verify(unit, each.name)
        accounts.append(_account(job, unit, seconds, findings))
    if unit.means.votes is not None:
        unit.means = replace(unit.means, votes=None)
    result = Found(tuple(accounts), None if stage.survey is None else stage.survey.survey(job, unit))
    shelf.put(index, unit)
    return result


def _account(job: Job, unit: UnitIR, seconds: float, findings: Findings) -> UnitAccount:
    tiles, blocks = unit.computed()
    kinds = {"dense": DENSE, **{str(window): index for index, window in enumerate(job.manifest.windows)}}
    masks = Masks(
        kind=np.array([kinds.get(choice, CUT) for choice in unit.choice]),
        density=count(unit.keep, (1, 2)) / unit.dense_blocks,
        error=np.maximum(unit.error - unit.copy_error - unit.precision_error, 0.0),
        copied=unit.copy_error,
        share_error=unit.share_error,
        precision=unit.precision.astype(np.int64),
    )
    return UnitAccount(
        seconds=seconds,
        blocks=int(blocks.sum()),
        plan_bytes=_bytes(unit, tiles, blocks),
        predicted_ms=sum(map(job.cost, blocks.tolist(), unit.precision.tolist())) * job.block_ms,
        findings=findings,
        kinds=_kinds(unit, blocks),
        head_error=unit.error,
        masks=masks,
    )


def _kinds(unit: UnitIR, blocks: Any) -> dict[str, int]:
    """Number of heads that are dense, sparse or have anchors, and by name of mask."""
    anchored = sum(groups is not None for groups in unit.anchors)
    dense = int((blocks == unit.dense_blocks).sum())
    counts = {"dense": dense, "sparse": unit.heads - dense - anchored, "anchored": anchored}
    for choice in unit.choice:
        counts[f"mask {choice}"] = counts.get(f"mask {choice}", 0) + 1
    return counts


def _sum(job: Job, each: Pass | None, units: Iterable[UnitAccount]) -> Account:
    accounts = list(units)
    total: Findings = {}
    for unit in accounts:
        for name, value in unit.findings.items():
            total[name] = total.get(name, 0) + value
    findings = {} if each is None else each.report(job, total)
    if each is not None:
        job.findings[each.name] = findings
    steps = job.unit_steps.tolist()
    blocks, predicted_ms = (
        sum(number * getattr(unit, name) for number, unit in zip(steps, accounts, strict=True))
        for name in ("blocks", "predicted_ms")
    )
    return Account(
        name="dense" if each is None else each.name,
        passes="" if each is None else print_passes([each]),
        seconds=sum(unit.seconds for unit in accounts),
        blocks=blocks,
        density=blocks / job.dense_blocks,
        cost=predicted_ms / (job.dense_blocks * job.block_ms),
        plan_bytes=sum(unit.plan_bytes for unit in accounts),
        predicted_ms=predicted_ms,
        error=float(sum(unit.head_error.sum() for unit in accounts)),
        findings=dict(findings),
    )


def _bytes(unit: UnitIR, tiles: Any, blocks: Any) -> int:
    if unit.lowered is not None:
        return 4 * len(unit.lowered.list_bits) + 2 * int(count(unit.lowered.list_bits, (0, 1)))
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
        given = (bits.dtype.name, bits.shape)
        require(given == ("uint8", shape), what, f"be uint8 {shape}", given)
        require(not spare or not (bits[..., -1] >> (8 - spare)).any(), what, "have zero padding bits", "ones")
        dropped = bits is not unit.required and bool((unit.required & ~bits).any())
        if dropped or bits is unit.required:  # a mask that holds all required blocks has no empty row
            require(bool(bits.any(-1).all()), what, "hold a block for every query block", "an empty row")
        require(not dropped, what, "hold every required block", "one dropped")
    require(len(unit.choice) == unit.heads, "choice", f"name {unit.heads} heads", len(unit.choice))
    right = unit.error.shape == (unit.heads,) and bool((np.isfinite(unit.error) & (unit.error >= 0)).all())
    require(right, "error", f"be {unit.heads} finite numbers, none negative", unit.error)
    right = unit.precision.dtype == np.uint8 and unit.precision.shape == (unit.heads,)
    require(right and set(unit.precision.tolist()) <= set(PRECISIONS), "precision", "be known", unit.precision)
    require(len(unit.anchors) == unit.heads, "anchors", f"be given for {unit.heads} heads", len(unit.anchors))
    anchored = {head for head, groups in enumerate(unit.anchors) if groups is not None}
    require(set(unit.packed) == anchored, "packed masks", f"be those of heads {anchored}", set(unit.packed))
    if unit.lowered is not None:
        try:
            unit.lowered.check()
        except ScheduleError as error:
            raise VerifyError(f"{unit.name}: the schedule is broken after {after}: {error}") from None
        lowered = [unit.lowered.computed_blocks(head) for head in range(unit.heads)]
        blocks = unit.computed()[1].tolist()
        require(lowered == blocks, "the schedule", f"compute the blocks of the masks, {blocks}", lowered)
