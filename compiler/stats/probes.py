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


SINCE_THEN = ("head_factors", "layer_weights", "head_weights")
"""Fields that the first probes did not have."""


def _numbers(values: object) -> bool:
    return isinstance(values, tuple) and all(type(value) is float and 0 <= value < math.inf for value in values)


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
        head_factors: The same for each head of each layer, 0 where its errors said nothing. Empty if not measured.
        layer_weights: For each layer, `weight` when errors are made there alone and followed to the final latent; 0
            where nothing was said. Empty if not measured.
        head_weights: The same for each head of each layer.

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
    head_factors: tuple[tuple[float, ...], ...] = ()
    layer_weights: tuple[float, ...] = ()
    head_weights: tuple[tuple[float, ...], ...] = ()

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
        for name in SINCE_THEN:
            values = getattr(self, name)
            lists = values if name.startswith("head") else (values,)
            if not isinstance(values, tuple) or not all(map(_numbers, lists)) or len({len(x) for x in lists}) > 1:
                rule = "equally many non-negative numbers for each layer" if lists is values else "non-negative numbers"
                raise ProbeError(f"probe.{name} of {self.sample!r} must be {rule}, got {values!r}")

    @property
    def file_name(self) -> str:
        return f"{self.sample}_t{self.time_index}.json"

    def check_shape(self, layers: int, heads: int) -> None:
        """Proves what was measured by layer or head against the model.

        Raises:
            ProbeError: It is of other numbers of layers or heads.
        """
        for name in ("layer_factors", *SINCE_THEN):
            values = getattr(self, name)
            if len(values) not in (0, layers):
                raise ProbeError(f"probe.{name} must be none or {layers}, one a layer, got {len(values)}")
            if values and name.startswith("head") and len(values[0]) != heads:
                raise ProbeError(f"probe.{name} must have {heads} heads for each layer, got {len(values[0])}")

    def to_json(self) -> str:
        """The canonical text; what was not measured, and early probes did not have, is left out."""
        value = {name: part for name, part in asdict(self).items() if name not in SINCE_THEN or part}
        return json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n"

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
        names = {each.name for each in fields(cls)} - set(SINCE_THEN)
        if not isinstance(value, dict) or set(value) - set(SINCE_THEN) != names:
            raise ProbeError(f"{what}: a probe must have the fields {sorted(names)}, got {value!r}")
        try:
            for name in {"layer_factors", *SINCE_THEN} & set(value):
                if not isinstance(value[name], list):
                    raise ProbeError(f"probe.{name} must be a list, got {value[name]!r}")
                value[name] = tuple(tuple(part) if isinstance(part, list) else part for part in value[name])
            return cls(**value)
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


@dataclass(frozen=True, eq=False)
class ErrorWeights:
    """What an output error costs the final latent, wherever it is made.

    Args:
        time: float64 ``(times,)``: made in all layers.
        unit: float64 ``(times, layers)``: made in one layer.
        head: float64 ``(times, layers, heads)``: made in one head; None where heads were not probed.
        probed: False where all is 1 for want of a probe.
        told: Where they come from, in words.
    """

    time: npt.NDArray[np.float64]
    unit: npt.NDArray[np.float64]
    head: npt.NDArray[np.float64] | None
    probed: bool
    told: str


def error_weights(times: Sequence[float], layers: int, heads: int, probes: Sequence[Probe]) -> ErrorWeights:
    """The weights that probes say, by the finest of what they measured.

    What was followed to the final latent counts before what was compared after one step, heads before layers. Weights
    followed to the end are means over samples, each relative to its own level. What was compared after one step spreads
    the weight of all layers over them.

    Args:
        times: Recorded times, ascending.
        layers: Of the model.
        heads: Of each layer.
        probes: In any order.
    """
    time, info = time_weight(times, probes)
    told = str(info)
    if by_head := [probe for probe in probes if probe.head_weights]:
        head = _followed(times, by_head, [probe.head_weights for probe in by_head])
        return ErrorWeights(time, head.mean(2), head, True, f"{told}; every head followed to the end: {len(by_head)}")
    spread = _head_factor(times, probes)
    if by_layer := [probe for probe in probes if probe.layer_weights]:
        rows = [tuple((value,) for value in probe.layer_weights) for probe in by_layer]
        unit = _followed(times, by_layer, rows)[..., 0]
        told = f"{told}; every layer followed to the end: {len(by_layer)}"
        if spread is not None:
            spread = spread / spread.mean(2, keepdims=True)
    else:
        unit = time[:, None] * layer_factor(times, layers, probes)
        if spread is not None:
            unit = time[:, None] * spread.mean(2)
            spread = spread / spread.mean(2, keepdims=True)
    if spread is None:
        return ErrorWeights(time, unit, None, info.probes > 0, told)
    return ErrorWeights(time, unit, unit[..., None] * spread, True, f"{told}; heads by the next latent")


Rows = Sequence[tuple[tuple[float, ...], ...]]


def _followed(times: Sequence[float], probes: Sequence[Probe], values: Rows) -> npt.NDArray[np.float64]:
    """Weights ``(times, layers, parts)``: a level for each sample, and for each time, layer and part the mean over the
    samples relative to their levels; a level is all of a sample's values over the weights of the same places."""
    indices, time = np.unique([probe.time_index for probe in probes], return_inverse=True)
    _, sample = np.unique([probe.sample for probe in probes], return_inverse=True)
    found = np.array(values, dtype=np.float64)
    known = found > 0
    shape = (len(indices), *found.shape[1:])
    number = np.zeros(shape)
    np.add.at(number, time, known)
    level = np.ones(sample.max() + 1)
    weight = np.ones(shape)
    for _ in range(ROUNDS):
        total = np.zeros(shape)
        np.add.at(total, time, found / level[sample][:, None, None])
        weight = total / np.maximum(number, 1)
        over = np.bincount(sample, (weight[time] * known).sum((1, 2)))
        level = np.bincount(sample, found.sum((1, 2))) / np.maximum(over, 1e-300)
        level = np.maximum(level / level.mean(), 1e-300)
    weight = _filled(weight, number > 0)
    return _between(times, indices, np.log(weight))


def _head_factor(times: Sequence[float], probes: Sequence[Probe]) -> npt.NDArray[np.float64] | None:
    """How the time weight spreads over the heads, ``(times, layers, heads)``: the mean of the probes; None unprobed."""
    some = [probe for probe in probes if probe.head_factors]
    if not some:
        return None
    indices, time = np.unique([probe.time_index for probe in some], return_inverse=True)
    found = np.array([probe.head_factors for probe in some], dtype=np.float64)
    total, number = np.zeros((2, len(indices), *found.shape[1:]))
    np.add.at(total, time, found)
    np.add.at(number, time, found > 0)
    return _between(times, indices, np.log(_filled(total / np.maximum(number, 1), number > 0)))


def _filled(weight: npt.NDArray[np.float64], known: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """The mean of what is known of a layer, else of a time, where nothing is known of a part."""
    for axes in ((2,), (1, 2), (0, 1, 2)):
        number = known.sum(axes, keepdims=True)
        mean = np.where(known, weight, 0).sum(axes, keepdims=True) / np.maximum(number, 1)
        weight = np.where(known, weight, mean)
        known = known | (number > 0)
    return np.where(known, weight, 1.0)


def _between(
    times: Sequence[float], indices: npt.NDArray[np.int64], logs: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Log-linear between probed times, held beyond them."""
    at = [times[index] for index in indices]
    flat = logs.reshape(len(indices), -1)
    found = np.stack([np.interp(times, at, column) for column in flat.T], axis=1)
    weights: npt.NDArray[np.float64] = np.exp(found).reshape(len(times), *logs.shape[1:])
    return weights
