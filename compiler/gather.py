"""From the samples of a store to one unit: means, votes and codes, head by head, so that the work stays in cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from calibatt.compiler.bits import Votes, unpack
from calibatt.compiler.cost import Device
from calibatt.compiler.error_model import dropped_error, priced_rows
from calibatt.compiler.ir import Float32, Float64, Job, UnitIR, UnitMeans, column_bits, query_weights, row_required
from calibatt.compiler.ladders import Codes, LadderMaker, Levels
from calibatt.compiler.passes import Pass
from calibatt.compiler.stats import (
    ErrorWeights,
    Ladders,
    Manifest,
    UnitStatistics,
    code_values,
    fast_codes,
    window_keep,
)

TOGETHER = 8
"""Samples that are mapped at once: memory does not grow with their number."""
PREDICTED_ROWS = 24
"""At least so many query blocks of a head are looked at to compare measured with predicted errors."""


class Samples(Protocol):
    """What a job is gathered from: a `Store`, or what stands in for it in a test."""

    @property
    def manifest(self) -> Manifest: ...
    @property
    def samples(self) -> tuple[str, ...]: ...
    def unit(self, sample: str, time_index: int, layer: int, planes: bool = True) -> UnitStatistics: ...
    def expect(self, samples: Sequence[str], time_index: int, layer: int, planes: bool = True) -> None: ...
    def error_weights(self) -> ErrorWeights: ...
    @property
    def ladders(self) -> Ladders | None: ...
    def check_refinement(self) -> tuple[str, ...]: ...
    def refined_error(self, time_index: int, layer: int) -> Float64: ...


class StatisticsSource:
    """A store of statistics as what `run` starts from.

    Args:
        store: The statistics.
    """

    def __init__(self, store: Samples) -> None:
        self.store = store

    def make_job(self, device: Device) -> Job:
        """What is known before any unit is read."""
        weights = self.store.error_weights()
        return Job(
            manifest=self.store.manifest,
            samples=self.store.samples,
            weights=weights.time,
            unit_weights=weights.unit,
            head_weights=weights.head,
            weights_probed=weights.probed,
            weights_source=weights.told,
            device=device,
            ladders=self.store.ladders,
        )

    def settle(self, job: Job, passes: Sequence[Pass]) -> tuple[Pass, ...]:
        """The passes with what they leave to the job decided, what they need proved to be there.

        Raises:
            RefinementError: They need a refinement that is not there, not finished or of other samples.
        """
        settled = tuple(each.settled(job) for each in passes)
        job.use_ladders = any(each.ladders for each in settled)
        if job.use_ladders:
            job.refinement = self.store.check_refinement()
        return settled

    def levels(self, ladders: Ladders, time_index: int, layer: int) -> Levels:
        """The ladders of one (time, layer), uint8 ``(S, H, Q, K)``: what a refinement measures.

        Raises:
            StoreError: A unit is damaged.
        """
        made = self._summed(ladders.samples, time_index, layer, "votes" in ladders.kinds, False, ladders).ladders
        assert made is not None
        return made.levels

    def unit(self, job: Job, time_index: int, layer: int) -> UnitIR:
        """One (time, layer), read from every sample once.

        Raises:
            StoreError: A unit is damaged.
        """
        manifest, ladders = job.manifest, job.ladders if job.use_ladders else None
        planes = job.planes or (ladders is not None and "votes" in ladders.kinds)
        following = time_index * manifest.model.layers + layer + 1
        if following < job.units:  # in whatever process it is made
            self.store.expect(job.samples[:TOGETHER], *job.place(following), planes)
        sums = self._summed(job.samples, time_index, layer, planes, job.codes, ladders)
        means = sums.means()
        if ladders is not None:
            means = replace(means, refined_error=self.store.refined_error(time_index, layer))
        required = column_bits(sums.required, manifest.k_blocks)
        weight = float(job.unit_weights[time_index, layer])
        unit = UnitIR(time_index, layer, manifest.grid, manifest.blocks, weight, means, required)
        unit.head_weight = None if job.head_weights is None else job.head_weights[time_index, layer]
        return unit

    def _summed(
        self, names: Sequence[str], time_index: int, layer: int, planes: bool, codes: bool, ladders: Ladders | None
    ) -> _Sums:
        sums = _Sums(self.store.manifest, len(names), planes, codes, ladders)
        for start in range(0, len(names), TOGETHER):
            part = names[start : start + TOGETHER]
            units = [self.store.unit(name, time_index, layer, planes) for name in part]
            sums.add(units, last=start + TOGETHER >= len(names))
        return sums


class _Sums:
    """Running sums over the samples of one (time, layer).

    Args:
        manifest: Of the store.
        samples: How many there will be.
        planes: Count the votes of the keep planes.
        codes: Keep the mean block error, and what it predicts of the menu.
        ladders: Make these, if any.
    """

    def __init__(self, manifest: Manifest, samples: int, planes: bool, codes: bool, ladders: Ladders | None) -> None:
        heads, q_blocks, k_blocks = manifest.model.heads, manifest.q_blocks, manifest.k_blocks
        self.manifest = manifest
        self.samples = samples
        self.votes = [Votes() for _ in range(heads if planes else 0)]
        self.small: dict[str, Float64] = {}
        self.totals: dict[tuple[str, int], Float32] = {}
        """What was summed so far, by what it is and head."""
        self.values = np.empty((q_blocks, k_blocks), np.float32)
        """Of the last array of codes."""
        kept = (heads, q_blocks, k_blocks) if codes and manifest.has_block_error else None
        self.code = None if kept is None else np.empty(kept, np.uint8)
        self.required = np.empty((heads, q_blocks), np.int64)
        """int64 ``(H, Q)``, of `row_required`."""
        self.peak = np.zeros(heads, np.float32)
        self.predicted = np.zeros((len(manifest.menu), heads))
        self.rows = priced_rows(q_blocks, PREDICTED_ROWS)
        queries = query_weights(manifest.grid, manifest.blocks)[self.rows]
        self.queries = (queries / queries.sum()).astype(np.float32)
        windows = [window_keep(window, manifest.grid, manifest.blocks)[self.rows] for window in manifest.windows]
        self.dropped = [~window for window in windows]
        self.ladders = None if ladders is None else LadderMaker(ladders, manifest)

    def add(self, units: Sequence[UnitStatistics], last: bool) -> None:
        """Counts some samples; `last`: there are no more."""
        names = ["menu_error", "menu_residual_error", "output_size", "row_residual_error"]
        names += ["frame_residual_error"] if self.manifest.frame_radius else []
        for unit in units:
            for name in names:
                values = getattr(unit, name).astype(np.float64)
                self.small[name] = self.small[name] + values if name in self.small else values
        for head in range(self.manifest.model.heads):
            for unit in units if self.votes else ():
                assert unit.planes is not None
                self.votes[head].add(unit.planes[:, head])
            total = self._add_error(units, head, last) if self.manifest.has_block_error else None
            mass = self._add_mass(units, head, last) if self.ladders is not None else None
            if last:
                self._finish(head, total, mass)

    def _finish(self, head: int, error: Float32 | None, mass: Float32 | None) -> None:
        """Makes what follows from the sums over all samples, float32 ``(Q, K)``."""
        codes = None
        if error is not None:
            self.peak[head] = error.max()
            codes = fast_codes(error, self.peak[head])
        self.required[head] = row_required(codes, self.manifest.q_blocks, self.manifest.k_blocks)
        if self.code is not None:
            assert error is not None
            assert codes is not None
            self.code[head] = codes
            rows = error[self.rows]
            for index, drop in enumerate(self.dropped, len(self.manifest.thresholds)):
                self.predicted[index, head] = dropped_error(rows, drop, self.queries)
        if self.ladders is not None:
            votes = self.votes[head] if self.votes else None
            self.ladders.add(head, self.required[head], error, codes, votes, mass)

    def _add_error(self, units: Sequence[UnitStatistics], head: int, last: bool) -> Float32:
        arrays = []
        for unit in units:
            assert unit.block_error is not None
            assert unit.block_error_peak is not None
            arrays.append((unit.block_error[head], unit.block_error_peak[head] / self.samples))
        for unit, (codes, peak) in zip(units, arrays, strict=True):
            if unit.planes is not None and self.code is not None:
                kept = unpack(unit.planes[:, head, self.rows], self.manifest.k_blocks)
                error = self._values(codes[self.rows], peak, self.values)
                self.predicted[: len(kept), head] += dropped_error(error, ~kept, self.queries)
        return self._add("error", head, arrays, last)

    def _add_mass(self, units: Sequence[UnitStatistics], head: int, last: bool) -> Float32 | None:
        assert self.ladders is not None
        if "mass" not in self.ladders.ladders.kinds:
            return None
        arrays = []
        for unit in units:
            assert unit.block_mass is not None
            arrays.append((unit.block_mass[head], np.float32(1)))
        return self._add("mass", head, arrays, last)

    def _add(self, what: str, head: int, arrays: Sequence[tuple[Codes, np.float32]], last: bool) -> Float32:
        """Adds what codes ``(Q, K)`` stand for under their peaks to the sum so far."""
        total = self.totals.pop((what, head), None)
        for codes, peak in arrays:
            if total is None:
                total = self._values(codes, peak, np.empty(codes.shape, np.float32))
            else:
                total += self._values(codes, peak, self.values)
        assert total is not None
        if not last:
            self.totals[what, head] = total
        return total

    def _values(self, codes: Codes, peak: np.float32, out: Float32) -> Float32:
        """What the codes stand for, float32 in the first of `out`; two codes a look-up."""
        flat = codes.reshape(-1)
        even = len(flat) // 2 * 2
        found = out.reshape(-1)[: len(flat)]
        _pairs().take(flat[:even].view(np.uint16), out=found[:even].view(np.complex64), mode="clip")
        if even < len(flat):
            found[even] = code_values(1.0)[flat[-1]]
        found *= np.float32(peak)
        return found.reshape(codes.shape)

    def means(self) -> UnitMeans:
        means: dict[str, Any] = {name: total / self.samples for name, total in self.small.items()}
        known = self.code is not None
        return UnitMeans(
            votes=self.votes,
            error_code=self.code,
            error_peak=self.peak,
            menu_predicted=self.predicted if known else None,
            levels=None if self.ladders is None else self.ladders.levels,
            level_blocks=None if self.ladders is None else self.ladders.blocks,
            **means,
        )


@lru_cache(maxsize=1)
def _pairs() -> npt.NDArray[np.complex64]:
    """For two codes as one little-endian number, both values under peak 1 as one number of two parts."""
    values = code_values(1.0)
    pairs = np.empty((256, 256, 2), np.float32)
    pairs[..., 0], pairs[..., 1] = values[None, :], values[:, None]
    found: npt.NDArray[np.complex64] = pairs.reshape(-1).view(np.complex64)
    return found
