"""From a store of statistics to a `Job`: means over the samples, one sample's unit in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from calibatt.compiler.bits import Votes, unpack
from calibatt.compiler.cost import Device
from calibatt.compiler.error_model import coherence
from calibatt.compiler.ir import Float32, Float64, Job, UnitIR, UnitMeans, query_weights, row_required
from calibatt.compiler.stats import Manifest, Store, UnitStatistics, quantise, window_keep


def collect(store: Store, device: Device, progress: Callable[[], None] = lambda: None) -> Job:
    """Reads all of a store once.

    Args:
        store: The statistics.
        device: What predicts milliseconds.
        progress: Called after every (time, layer).

    Raises:
        StoreError: A unit is damaged.
    """
    manifest = store.manifest
    weights, info = store.time_weight()
    factors = store.layer_factor()
    job = Job(manifest, store.samples, weights, info.probes > 0, str(info), device, [])
    for time_index in range(len(manifest.times)):
        for layer in range(manifest.model.layers):
            means = _Means(manifest)
            for sample in store.samples:
                means.add(store.unit(sample, time_index, layer))
            unit_means = means.finish()
            required = row_required(unit_means.error_code, manifest.model.heads, manifest.q_blocks, manifest.k_blocks)
            weight = float(weights[time_index] * factors[time_index, layer])
            job.units.append(UnitIR(time_index, layer, manifest.grid, manifest.blocks, weight, unit_means, required))
            progress()
    job.error_factor = coherence(unit.means for unit in job.units)
    return job


class _Means:
    """Running sums over the samples of one (time, layer)."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.votes = Votes()
        self.sums: dict[str, Float64] = {}
        self.error: Float32 | None = None
        self.windows = [window_keep(window, manifest.grid, manifest.blocks) for window in manifest.windows]
        self.queries = query_weights(manifest.grid, manifest.blocks)

    def add(self, unit: UnitStatistics) -> None:
        self.votes.add(unit.planes)
        for name in ("menu_error", "menu_residual_error", "output_size", "row_residual_error"):
            self._add(name, getattr(unit, name))
        if self.manifest.has_block_error:
            error = unit.error()
            self._add("menu_predicted", self._menu_predicted(unit, error))
            self.error = error if self.error is None else self.error + error

    def _add(self, name: str, values: npt.NDArray[Any]) -> None:
        self.sums[name] = self.sums.get(name, np.zeros(values.shape)) + values.astype(np.float64)

    def _menu_predicted(self, unit: UnitStatistics, error: Float32) -> Float64:
        """float64 ``(M, H)``: the mean over queries of the block errors that each candidate drops."""
        weighted = error * self.queries.astype(np.float32)[None, :, None]
        planes = (unpack(plane, self.manifest.k_blocks) for plane in unit.planes)
        dropped = [np.where(plane, 0, weighted).sum((1, 2), dtype=np.float64) for plane in planes]
        dropped += [np.where(window, 0, weighted).sum((1, 2), dtype=np.float64) for window in self.windows]
        return np.stack(dropped)

    def finish(self) -> UnitMeans:
        samples = self.votes.voters
        means = {name: total / samples for name, total in self.sums.items()}
        code, peak = None, np.zeros(self.manifest.model.heads, np.float32)
        if self.error is not None:
            mean = self.error / np.float32(samples)
            peak = mean.max((1, 2))
            code = quantise(mean, peak[:, None, None])
        return UnitMeans(
            samples=samples,
            votes=self.votes,
            error_code=code,
            error_peak=peak,
            menu_predicted=means.pop("menu_predicted", None),
            **means,
        )
