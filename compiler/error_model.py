"""The price of a mask from statistics of its blocks: the only place where statistics become prices.

A head's mask costs the sum over query blocks of (the sum over dropped blocks of sqrt(x))^2: effects of blocks dropped
for the same queries point the same way, because the blocks that are kept are scaled up in their place. For a block
x = S^(w / 2) (E R)^(1 - w / 2). S is its mean squared effect on the final latent, which is unbiased but known from few
measurements; E is its mean error in the metric of the head's gradient, which is steadier. Both are first drawn to the
mean of all blocks at that distance from their queries. R is one factor a head, which puts E on the scale of the
measured effects of windows.

With n measurements, w = n / (n + `PRIOR`). Picking the least of many noisy prices would pick the luckiest, so a head's
own measurements count by w and the rest comes from others: R is drawn to that of the layer's heads, a window to the
price that its blocks give, a copy to the mean of all rows, or frames, at that offset, a precision to the mean of the
layer's heads. The price of a precision is added to that of the mask.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from calibatt.compiler.bits import Bits, Bool, unpack
from calibatt.compiler.ir import Float32, Float64, UnitIR
from calibatt.compiler.stats import Manifest, Window, code_values, window_keep

CODES = 256
PRIOR = 8.0
"""So many measurements weigh as much as the estimate from others."""
PRICED_ROWS = 64
"""Least number of query blocks of a head that are used to price its masks, if it has as many."""


def priced_rows(q_blocks: int) -> slice:
    """Evenly spread query blocks, at least `PRICED_ROWS` (or all), that stand for all of a head."""
    return slice(None, None, max(1, q_blocks // PRICED_ROWS))


def rows_scale(q_blocks: int) -> float:
    """How many query blocks each of the `priced_rows` stands for."""
    return q_blocks / len(range(q_blocks)[priced_rows(q_blocks)])


class Bands:
    """Bands of blocks: all whose keys are equally far from their queries.

    Args:
        manifest: Of the store.
    """

    def __init__(self, manifest: Manifest) -> None:
        own = np.arange(manifest.q_blocks) * manifest.blocks.block_q // manifest.blocks.block_k
        self._band = ((own.max() - own)[:, None] + np.arange(manifest.k_blocks)).reshape(-1)
        self._number = np.bincount(self._band)

    def steady(self, values: Float32, count: float) -> Float32:
        """Values ``(Q, K)``, means of `count` measurements, drawn to the mean of their band, which counts as one."""
        means = np.bincount(self._band, values.reshape(-1)) / self._number
        drawn = values * np.float32(count / (count + 1))
        drawn += (means / (count + 1)).astype(np.float32).take(self._band).reshape(values.shape)
        found: Float32 = drawn
        return found


@lru_cache(maxsize=2)
def bands(manifest: Manifest) -> Bands:
    """The bands of a manifest, made once a process."""
    return Bands(manifest)


@lru_cache(maxsize=2)
def _dropped(manifest: Manifest) -> tuple[Float32, ...]:
    """Which blocks of the `priced_rows` each window drops, as 0 or 1."""

    def one(window: Window) -> Float32:
        keep = window_keep(window, manifest.grid, manifest.blocks)[priced_rows(manifest.q_blocks)]
        return (~keep).astype(np.float32)

    return tuple(map(one, manifest.windows))


def trust(measurements: float) -> float:
    """w: the weight of own measurements against the estimate from others, from 0 to 1."""
    return measurements / (measurements + PRIOR)


class HeadPrices:
    """Prices of the blocks and windows of all heads of a unit.

    Args:
        errors: float32 ``(Q, K)`` a head: mean errors of blocks.
        windows: float64 ``(W, H)``: mean squared effects of windows.
        samplings: How many samplings the means are of.
        measurements: Samplings times random vectors.
        of: The store's manifest.
    """

    def __init__(
        self, errors: list[Float32], windows: Float64, samplings: int, measurements: float, of: Manifest
    ) -> None:
        self._manifest, self._measured, self._measurements = of, windows, measurements
        self._errors = [bands(of).steady(error, samplings) for error in errors]
        ratios = np.array([self._ratio(head) for head in range(len(errors))])
        others, w = float(np.nanmean(ratios)) if np.isfinite(ratios).any() else 0.0, trust(measurements)
        self._factors = np.exp(np.where(np.isnan(ratios), others, w * ratios + (1 - w) * others))

    def _ratio(self, head: int) -> float:
        """Logarithm of measured / estimated price, mean over windows; NaN where nothing is known."""
        prices, windows = self._windows(self._errors[head]), self._measured[:, head]
        known = (prices > 0) & (windows > 0)
        return float(np.log(windows[known] / prices[known]).mean()) if known.any() else np.nan

    def _windows(self, values: Float32) -> Float64:
        """The price of each window from the values of its blocks, float64 ``(W,)``."""
        rows = self._manifest.q_blocks
        sizes = np.sqrt(values[priced_rows(rows)])
        sums = [np.einsum("qk,qk->q", sizes, drop).astype(np.float64) for drop in _dropped(self._manifest)]
        return np.array([rows_scale(rows) * (each @ each) for each in sums])

    def of(self, head: int, effect: Float32) -> tuple[Float32, Float64]:
        """Prices of a head's blocks and windows.

        Args:
            head: Which head.
            effect: float32 ``(Q, K)``: mean squared effects of its blocks.

        Returns:
            x float32 ``(Q, K)``, and float64 ``(W,)``.
        """
        w = trust(self._measurements)
        prices: Float32 = bands(self._manifest).steady(effect, self._measurements) ** np.float32(w / 2)
        prices *= (self._errors[head] * np.float32(self._factors[head])) ** np.float32(1 - w / 2)
        model, measured = self._windows(prices), self._measured[:, head]
        both = (model > 0) & (measured > 0)
        windows: Float64 = np.where(
            both, np.where(both, measured, 1.0) ** w * np.where(both, model, 1.0) ** (1 - w), measured
        )
        return prices, windows


def copy_prices(effect: Float64, measurements: float) -> Float64:
    """Prices of copies, each drawn to the mean of all at its offset; also of precisions, with heads as members.

    Args:
        effect: float64 ``(H, members, 2 R)``: mean squared effects; NaN where there is no such member.
        measurements: How many measurements the means are of.
    """
    there = ~np.isnan(effect)
    mean = np.where(there, effect, 0).sum(1, keepdims=True) / np.maximum(there.sum(1, keepdims=True), 1)
    w = trust(measurements)
    prices: Float64 = w * effect + (1 - w) * mean
    return prices


def code_counts(unit: UnitIR, head: int, classes: npt.NDArray[np.uint8]) -> tuple[Float64, Float64]:
    """Number and size of the blocks of each code, for two classes of blocks.

    Args:
        unit: The unit of the head.
        head: Number of the head.
        classes: uint8 ``(Q, K)``, 0 or 1.

    Returns:
        Number of blocks, float64 ``(2, 256)``; and for `priced_rows` the sum of the roots of x, float64
        ``(rows, 2, 256)``: a mask that drops some of them costs `rows_scale` times ``(sums.sum(dropped) ** 2).sum()``.
    """
    index = classes.astype(np.uint16) << 8 | unit.means.error_code[head]
    number = np.bincount(index.reshape(-1), minlength=2 * CODES).astype(np.float64)
    some = index[priced_rows(unit.q_blocks)]
    by_row = np.arange(len(some))[:, None] * (2 * CODES) + some
    sums = np.bincount(by_row.reshape(-1), minlength=len(some) * 2 * CODES).reshape(-1, 2, CODES)
    sizes: Float64 = np.sqrt(code_values(float(unit.means.error_peak[head])).astype(np.float64))
    return number.reshape(2, CODES), sums * sizes


def cuts(unit: UnitIR, head: int) -> tuple[Float64, Float64]:
    """Blocks and errors of a head's cuts: those that keep the blocks of codes below 0, 1, ... 255, and required ones.

    Returns:
        Both float64 ``(256,)``; more blocks and less error from one to the next.
    """
    number, sums = code_counts(unit, head, unpack(unit.required[head], unit.k_blocks).view(np.uint8))
    blocks = unit.dense_blocks - np.cumsum(number[0][::-1])[::-1]
    by_code = np.cumsum(sums[:, 0, ::-1], 1)[:, ::-1]
    return blocks, rows_scale(unit.q_blocks) * (by_code**2).sum(0)


def at_shares(blocks: Float64, error: Float64, shares: tuple[float, ...], dense_blocks: int) -> Float64:
    """Errors of a head's cuts at some densities, float64 ``(shares,)``, interpolated between its `cuts`."""
    wanted = np.log(np.array(shares) * dense_blocks)
    errors: Float64 = np.interp(wanted, np.log(np.maximum(blocks, 1)), np.sqrt(error)) ** 2
    return errors


def mask_errors(unit: UnitIR, keep: Bits) -> Float64:
    """float64 ``(H,)``: errors of any masks, packed ``(H, Q, ceil(K / 8))``."""
    errors = np.zeros(unit.heads)
    for head in range(unit.heads):
        kept: Bool = unpack(keep[head], unit.k_blocks)
        _, sums = code_counts(unit, head, kept.view(np.uint8))
        errors[head] = rows_scale(unit.q_blocks) * (sums[:, 0].sum(1) ** 2).sum()
    return errors
