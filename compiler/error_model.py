"""What a mask costs in output error, from the block errors it drops.

The only place that turns statistics into a price of a mask; `select` asks it and knows nothing of how it is done.

A mask's error is the mean over queries of the square of the sum of the square roots of the block errors it drops, times
one factor for the whole job. Errors of dropped blocks point the same way, because whatever is kept is scaled up to
make good for what is not: fitted to the logarithms of errors measured on the demo model, this sum of sizes has the
exponent 0.8 and the plain sum of squared sizes 0.2. The factor is the median of measured / predicted over all windows,
and planes if they are read; it puts masks on one scale with errors that are measured (windows, copied rows).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from calibatt.compiler.bits import Bits, Bool, unpack
from calibatt.compiler.ir import Float32, Float64, UnitIR, UnitMeans, query_weights
from calibatt.compiler.stats import code_values

CODES = 256
PRICED_ROWS = 64
"""At least so many query blocks of a head are looked at to price its masks."""


def priced_rows(q_blocks: int, least: int = PRICED_ROWS) -> slice:
    """Evenly spread query blocks, at least so many (or all), that stand for all of a head."""
    return slice(None, None, max(1, q_blocks // least))


def row_weights(unit: UnitIR) -> Float64:
    """float64 ``(rows,)``: shares of the queries of `priced_rows`; they sum to 1."""
    found = query_weights(unit.grid, unit.blocks)[priced_rows(unit.q_blocks)]
    share: Float64 = found / found.sum()
    return share


def code_counts(unit: UnitIR, head: int, classes: npt.NDArray[np.uint8] | None, kinds: int) -> tuple[Float64, Float64]:
    """How many blocks of every class and code there are, and how much their errors are in size.

    Args:
        unit: With block error.
        head: Which head.
        classes: uint8 ``(Q, K)``, the class of each block, below `kinds`; None: all are of class 0.
        kinds: Number of classes.

    Returns:
        Number of blocks, float64 ``(kinds, 256)``; and for `priced_rows` the sum of the square roots of the block
        errors, float64 ``(rows, kinds, 256)``: a mask that drops some of them has, but for the job's factor, the error
        ``row_weights @ sums.sum(dropped) ** 2``.
    """
    assert unit.means.error_code is not None
    codes = unit.means.error_code[head]
    index = codes if classes is None else classes.astype(np.uint16) << 8 | codes
    number = np.bincount(index.reshape(-1), minlength=kinds * CODES).astype(np.float64)
    some = index[priced_rows(unit.q_blocks)]
    by_row = np.arange(len(some))[:, None] * (kinds * CODES) + some
    sums = np.bincount(by_row.reshape(-1), minlength=len(some) * kinds * CODES).reshape(-1, kinds, CODES)
    sizes: Float64 = np.sqrt(code_values(float(unit.means.error_peak[head])).astype(np.float64))
    return number.reshape(kinds, CODES), sums * sizes


def mask_errors(unit: UnitIR, keep: Bits, factor: float, plane: int) -> Float64:
    """float64 ``(H,)``: errors of any masks, packed ``(H, Q, ceil(K / 8))``.

    Without block error in the store: what was measured of the plane that the masks come from.
    """
    if unit.means.error_code is None:
        measured: Float64 = unit.means.menu_residual_error[plane]
        return measured
    weights = row_weights(unit)
    found = np.zeros(unit.heads)
    for head in range(unit.heads):
        _, sums = code_counts(unit, head, unpack(keep[head], unit.k_blocks).view(np.uint8), 2)
        found[head] = weights @ sums[:, 0].sum(1) ** 2 * factor
    return found


def dropped_error(error: Float32, drop: Bool, weights: Float32) -> Float64:
    """The error of masks from block errors themselves, but for the job's factor.

    Args:
        error: float32 ``(rows, K)``.
        drop: bool ``(..., rows, K)``.
        weights: float32 ``(rows,)``.

    Returns:
        float64 ``(...)``.
    """
    sums = (np.sqrt(error) * drop).sum(-1)
    found: Float64 = (sums.astype(np.float64) ** 2) @ weights
    return found


def ratios(means: UnitMeans) -> Float64:
    """Measured / predicted error, of all planes and windows of all heads where both are known."""
    if means.menu_predicted is None:
        return np.zeros(0)
    known = (means.menu_predicted > 0) & (means.menu_residual_error > 0)
    found: Float64 = means.menu_residual_error[known] / means.menu_predicted[known]
    return found


def coherence(units: Iterable[Float64]) -> float:
    """The median of all `ratios`; 1 if unknown."""
    found = np.concatenate([np.zeros(0), *units])
    return float(np.median(found)) if len(found) else 1.0
