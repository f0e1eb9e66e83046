"""Predicts what a plan does to the final latent, from measured effects of whole masks.

The effects of all heads' masks and precisions are signed, and add up: for every sampling whose ladder was measured, and
every random vector, the effect of a plan is the sum of the effects of what it chooses. Its mean square over the vectors
is the squared error of the final latent, relative to its size; minus ten times its logarithm is the signal-to-noise in
dB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import digamma

from calibatt.compiler.ir import Float64, Int64
from calibatt.compiler.stats import SamplingTables, Table

DENSE, CUT = -1, -2
"""Kinds of masks other than windows."""
LEAST_SAMPLINGS = 2


class Masks(NamedTuple):
    """The masks of a plan; T times, L layers, H heads, C shares of the ladder. Axes may be flattened to one.

    Args:
        kind: int64 ``(T, L, H)``: index of a window, `DENSE`, or `CUT` for all others.
        density: float64 ``(T, L, H)``: blocks / all blocks, before rows or frames are copied.
        error: float64 ``(T, L, H)``: price by the error model, without copies and precisions.
        copied: float64 ``(T, L, H)``: price of copies.
        share_error: float64 ``(T, L, C, H)``: price of the head's own cut at each share of the ladder.
        precision: int64 ``(T, L, H)``: one of `plans.PRECISIONS`.
    """

    kind: Int64
    density: Float64
    error: Float64
    copied: Float64
    share_error: Float64
    precision: Int64


@dataclass(frozen=True)
class Prediction:
    """Signal-to-noise of the final latent.

    Args:
        mean: Mean over the samplings, dB; infinite where nothing changes.
        standard_error: Standard error of the mean.
        samplings: How many samplings have a measured ladder.
    """

    mean: float
    standard_error: float
    samplings: int

    def __str__(self) -> str:
        if np.isinf(self.mean):
            return "infinite: nothing changes"
        of = f"{self.samplings} samplings that measured a ladder"
        return f"{self.mean:.1f} dB (standard error {self.standard_error:.1f}, {of})"


def predict(table: Table, levels: Float64, shares: tuple[float, ...], masks: Masks) -> Prediction | str:
    """The predicted signal-to-noise of a plan, or, as text, why it cannot be predicted.

    Args:
        table: The tables of the samplings.
        levels: float64 ``(T,)``: the level of each time, by which errors are scaled.
        shares: Densities of the ladder's masks.
        masks: The masks of the plan.
    """
    if why := cannot_predict(table):
        return why
    samplings = [each for each in table.samplings if each.has_ladder]
    times, layers, rungs, heads = samplings[0].ladder_effect.shape[1:]
    shapes = {name: (times, layers, heads) for name in Masks._fields} | {"share_error": (times, layers, rungs, heads)}
    shaped = Masks(**{name: np.reshape(getattr(masks, name), shape) for name, shape in shapes.items()})
    decibels = np.array([_decibels(each, levels, shares, shaped) for each in samplings])
    error = 0.0 if np.isinf(decibels).any() else decibels.std(ddof=1) / np.sqrt(len(decibels))
    return Prediction(float(decibels.mean()), float(error), len(decibels))


def cannot_predict(table: Table) -> str:
    """Why nothing can be predicted; empty if it can."""
    count = sum(each.has_ladder for each in table.samplings)
    return "" if count >= LEAST_SAMPLINGS else f"needs {LEAST_SAMPLINGS} samplings with a measured ladder, got {count}"


def _decibels(sampling: SamplingTables, levels: Float64, shares: tuple[float, ...], masks: Masks) -> float:
    """The signal-to-noise of one sampling; infinite where nothing changes."""
    joint = np.zeros(sampling.vectors)
    time, layer, head = np.nonzero(masks.kind >= 0)
    window = masks.kind[time, layer, head]
    joint += sampling.window_effect[:, time, layer, window, head].sum(1, dtype=np.float64)
    time, layer, head = np.nonzero(masks.kind == CUT)
    density = np.log(masks.density[time, layer, head])
    share = np.abs(density[:, None] - np.log(shares)).argmin(1)
    own, error = masks.share_error[time, layer, share, head], masks.error[time, layer, head]
    scale = np.where(own > 0, np.sqrt(error / np.where(own > 0, own, 1.0)), error > 0)
    joint += (sampling.ladder_effect[:, time, layer, share, head] * scale).sum(1)
    time, layer, head = np.nonzero(masks.precision)
    joint += sampling.precision_effect[:, time, layer, masks.precision[time, layer, head] - 1, head].sum(1, np.float64)
    total = (joint**2).mean() / log_bias(sampling.vectors)
    total += float((masks.copied.sum((1, 2)) / levels) @ sampling.level)
    return float(-10 * np.log10(total)) if total > 0 else np.inf


def log_bias(vectors: int) -> float:
    """exp of the mean logarithm of a mean of so many squares of normal numbers of variance 1: a factor below 1."""
    return float(np.exp(digamma(vectors / 2) - np.log(vectors / 2)))
