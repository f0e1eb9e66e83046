"""Makes units from a store: prices of blocks, windows and copies, head by head, so that the work stays in cache."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from calibatt.compiler.cost import Device
from calibatt.compiler.error_model import HeadPrices, copy_prices
from calibatt.compiler.ir import Job, UnitIR, UnitMeans, column_bits
from calibatt.compiler.stats import Manifest, Table, Unit, dequantise, fast_codes
from calibatt.compiler.steps import measured_times, of_segments, steps_of


class Samplings(Protocol):
    """The statistics of a job: a `Store`, or its stand-in in a test."""

    @property
    def manifest(self) -> Manifest: ...
    @property
    def samplings(self) -> tuple[str, ...]: ...
    @property
    def meta(self) -> dict[str, dict[str, Any]]: ...
    def unit(self, time_index: int, layer: int) -> Unit: ...
    def table(self) -> Table: ...
    def __hash__(self) -> int: ...


@lru_cache(maxsize=1)
def _table(store: Samplings) -> Table:
    """The tables of all samplings; each process reads them once."""
    return store.table()


class StatisticsSource:
    """A store of statistics as the source of units for `run`.

    Args:
        store: The statistics.
    """

    def __init__(self, store: Samplings) -> None:
        self.store = store

    def make_job(self, device: Device, steps: int | None = None) -> Job:
        """The job: everything that is known before any unit is read.

        Args:
            device: The device for which milliseconds are predicted.
            steps: How many steps the sampling will have; those that were calibrated if absent.

        Raises:
            StoreError: A sampling's file is damaged, or samplings have different steps.
            CompileError: There is no plan for so many steps.
        """
        manifest = self.store.manifest
        measured = measured_times(manifest.times, self.store.meta)
        counted = steps_of(manifest.times, measured, steps)
        table = of_segments(_table(self.store), manifest.times, measured)
        return Job(manifest, device, counted, table.time_level, table)

    def unit(self, job: Job, time_index: int, layer: int) -> UnitIR:
        """The unit of one (time, layer).

        Raises:
            StoreError: The unit, or a sampling's file, is damaged.
        """
        manifest, table = job.manifest, _table(self.store)
        unit, level = self.store.unit(time_index, layer), job.levels[time_index]
        windows = table.window_error[time_index, layer]
        known = sum(each.vectors for each in table.samplings) / len(table.samplings)
        measurements = unit.n * known
        shape = (manifest.model.heads, manifest.q_blocks, manifest.k_blocks)
        codes, peaks = np.empty(shape, np.uint8), np.zeros(shape[0], np.float32)
        errors = [dequantise(unit.error[head], unit.error_peak[head]) for head in range(shape[0])]
        heads, window_error = HeadPrices(errors, windows, unit.n, measurements, manifest), np.empty_like(windows)
        for head in range(shape[0]):
            effect = dequantise(unit.effect[head], unit.effect_peak[head])
            prices, window_error[:, head] = heads.of(head, effect)
            peaks[head] = prices.max()
            codes[head] = fast_codes(prices, peaks[head])
        eight = copy_prices(table.precision_error[time_index, layer].T[None] * level, measurements)[0]
        means = UnitMeans(
            error_code=codes,
            error_peak=peaks * np.float32(level),
            window_error=window_error * level,
            row_error=copy_prices(unit.row_effect * level, measurements),
            precision_error=np.concatenate([np.zeros((1, shape[0])), eight.T]),
            frame_error=None if unit.frame_effect is None else copy_prices(unit.frame_effect * level, measurements),
            votes=unit.votes,
            vote_samples=unit.vote_samples,
            row_difference=unit.row_difference,
        )
        required = column_bits(codes.argmin(2), manifest.k_blocks)
        share_error = np.zeros((len(manifest.shares), shape[0]))
        return UnitIR(time_index, layer, manifest.grid, manifest.blocks, means, required, share_error)
