"""Probes of the time weight: how much the final latent changes for attention errors made at one time, and where."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import numpy.typing as npt

from calibatt.compiler.stats.errors import ProbeError

ENOUGH_TIMES = 6
ENOUGH_SAMPLES = 8
ROUNDS = 50
"""In which weights and factors are fitted to each other."""


@dataclass(frozen=True)
class Probe:
    """One measurement.

    Args:
        sample: Name of the sample whose trajectory was disturbed.
        time_index: The recorded time at which it was.
        weight: `final_error` / `injected_error`.
        injected_error: Errors made, relative to the residual stream, summed over layers and heads; positive.
        final_error: mean ||final - dense final||^2 / mean ||dense final||^2; positive.
        seconds: What it cost.
        layer_factors: For each layer, how much more an error made there changes the next latent than one of the same
            size spread as this probe's errors were: positive, 1 on average over those errors. Empty if not measured.

    Raises:
        ProbeError: A value breaks its rule.
    """

    sample: str
    time_index: int
    weight: float
    injected_error: float
    final_error: float
    seconds: float
    layer_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if type(self.time_index) is not int or self.time_index < 0:
            raise ProbeError(f"probe.time_index must be a non-negative integer, got {self.time_index!r}")
        for name, least in (("injected_error", True), ("final_error", True), ("weight", True), ("seconds", False)):
            value = getattr(self, name)
            if type(value) is not float or not math.isfinite(value) or value < 0 or (least and value == 0):
                rule = "a positive number" if least else "a non-negative number"
                raise ProbeError(f"probe.{name} of {self.sample!r} must be {rule}, got {value!r}")
        if not math.isclose(self.weight, self.final_error / self.injected_error, rel_tol=1e-6):
            rule = f"final_error / injected_error = {self.final_error / self.injected_error}"
            raise ProbeError(f"probe.weight of {self.sample!r} must be {rule}, got {self.weight}")
        factors = self.layer_factors
        if not isinstance(factors, tuple) or not all(type(f) is float and 0 < f < math.inf for f in factors):
            raise ProbeError(f"probe.layer_factors of {self.sample!r} must be positive numbers, got {factors!r}")

    @property
    def file_name(self) -> str:
        return f"{self.sample}_t{self.time_index}.json"

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, what: str) -> Probe:
        """Reads one probe file; `what` names it in errors.

        Raises:
            ProbeError: It is no JSON map of just the fields, or a value breaks its rule.
        """
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProbeError(f"{what}: a probe must be JSON, got {error}") from None
        names = {each.name for each in fields(cls)}
        if not isinstance(value, dict) or set(value) != names:
            raise ProbeError(f"{what}: a probe must have the fields {sorted(names)}, got {value!r}")
        try:
            if not isinstance(value["layer_factors"], list):
                raise ProbeError(f"probe.layer_factors must be a list, got {value['layer_factors']!r}")
            return cls(**{**value, "layer_factors": tuple(value["layer_factors"])})
        except ProbeError as error:
            raise ProbeError(f"{what}: {error}") from None


@dataclass(frozen=True)
class TimeWeightInfo:
    """Where a time weight comes from.

    Args:
        probes: How many it is made of; 0: never probed, the weight is 1 everywhere.
        samples: Names of the samples probed.
        time_indices: Times probed; between them the weight is interpolated, beyond them it is held.
        seconds: What all probes cost.
    """

    probes: int
    samples: tuple[str, ...]
    time_indices: tuple[int, ...]
    seconds: float

    def __str__(self) -> str:
        if not self.probes:
            return "time weight: never probed, 1 at every time"
        text = f"{self.probes} probes at {len(self.time_indices)} times of {len(self.samples)} samples"
        few = len(self.time_indices) < ENOUGH_TIMES or len(self.samples) < ENOUGH_SAMPLES
        hint = f"; fewer than {ENOUGH_TIMES} times or {ENOUGH_SAMPLES} samples: a rough weight" if few else ""
        return f"time weight: {text}, {self.seconds:.1f} s{hint}"


def time_weight(times: Sequence[float], probes: Sequence[Probe]) -> tuple[npt.NDArray[np.float64], TimeWeightInfo]:
    """The weight of every recorded time: typical of the samples, log-linear between probed times, held beyond them.

    How much a sample suffers from errors differs up to 100-fold from sample to sample, at all times alike, so that a
    plain mean is the weight of the few that suffer most. Here every sample has a factor and every time a weight: the
    factor is the mean of the sample's probes relative to the weights, the weight the mean of the time's probes relative
    to the factors. Means, not medians: a time at which probes differ much is a time at which errors may cost much.

    Args:
        times: Recorded times, ascending.
        probes: In any order; every `time_index` counts in `times`.

    Returns:
        float64 (times,), all positive, and where it comes from.
    """
    probes = sorted(probes, key=lambda probe: probe.file_name)
    indices = tuple(sorted({probe.time_index for probe in probes}))
    samples = tuple(sorted({probe.sample for probe in probes}))
    info = TimeWeightInfo(len(probes), samples, indices, math.fsum(probe.seconds for probe in probes))
    if not indices:
        return np.ones(len(times)), info
    found = np.array([probe.weight for probe in probes])
    time = np.array([indices.index(probe.time_index) for probe in probes])
    sample = np.array([samples.index(probe.sample) for probe in probes])
    factors = np.ones(len(samples))
    for _ in range(ROUNDS):
        weight = np.bincount(time, found / factors[sample]) / np.bincount(time)
        factors = np.bincount(sample, found / weight[time]) / np.bincount(sample)
        factors /= factors.mean()
    weight = np.bincount(time, found / factors[sample]) / np.bincount(time)
    return np.exp(np.interp(times, [times[index] for index in indices], np.log(weight))), info


def layer_factor(times: Sequence[float], layers: int, probes: Sequence[Probe]) -> npt.NDArray[np.float64]:
    """How the time weight spreads over the layers: the geometric mean of the probes, log-linear between probed times.

    Args:
        times: Recorded times, ascending.
        layers: Layers of the model; every probe with `layer_factors` has that many.
        probes: In any order.

    Returns:
        float64 (times, layers), all positive; 1 everywhere if no probe measured layers.
    """
    found: dict[int, list[tuple[float, ...]]] = {}
    for probe in sorted(probes, key=lambda probe: probe.file_name):
        if probe.layer_factors:
            found.setdefault(probe.time_index, []).append(probe.layer_factors)
    if not found:
        return np.ones((len(times), layers))
    indices = sorted(found)
    logs = np.array([np.log(found[index]).mean(0) for index in indices])
    at = [times[index] for index in indices]
    factors: npt.NDArray[np.float64] = np.exp(
        np.stack([np.interp(times, at, logs[:, layer]) for layer in range(layers)], axis=1)
    )
    return factors
