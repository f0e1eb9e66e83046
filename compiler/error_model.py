"""What a mask costs in output error, from the block errors it drops.

The only place that turns statistics into a price of a mask; `select` asks it and knows nothing of how it is done.

The error of a mask is the mean over queries of the sum of the mean block errors it drops, times one factor for the
whole job: errors of dropped blocks are not quite orthogonal and the kept mass is renormalised, so measured errors are a
few times larger. The factor is the median of measured / predicted over all windows, and planes if they are read; it
puts masks on one scale with errors that are measured (windows, copied rows). A factor for each head, interpolated over
the error, was tried on the demo model and gave worse videos.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from calibatt.compiler.bits import Bits, unpack
from calibatt.compiler.ir import Float64, UnitIR, UnitMeans, query_weights
from calibatt.compiler.stats import code_values

CODES = 256


def code_counts(unit: UnitIR, head: int, classes: npt.NDArray[np.uint8] | None, kinds: int) -> tuple[Float64, Float64]:
    """Of every class of blocks and code: how many blocks, and the mean over queries of their number.

    Args:
        unit: With block error.
        head: Which head.
        classes: uint8 ``(Q, K)``, the class of each block, below `kinds`; None: all are of class 0.
        kinds: Number of classes.

    Returns:
        Both float64 ``(kinds, 256)``; the second times the codes' values is an error.
    """
    assert unit.means.error_code is not None
    codes = unit.means.error_code[head]
    index = codes if classes is None else classes.astype(np.uint16) << 8 | codes
    share = query_weights(unit.grid, unit.blocks)
    whole = np.bincount(index[:-1].reshape(-1), minlength=kinds * CODES).astype(np.float64)
    last = np.bincount(index[-1], minlength=kinds * CODES).astype(np.float64)
    shape = (kinds, CODES)
    return (whole + last).reshape(shape), (whole * share[0] + last * share[-1]).reshape(shape)


def mask_errors(unit: UnitIR, keep: Bits, factor: float, plane: int) -> Float64:
    """float64 ``(H,)``: errors of any masks, packed ``(H, Q, ceil(K / 8))``.

    Without block error in the store: what was measured of the plane that the masks come from.
    """
    if unit.means.error_code is None:
        measured: Float64 = unit.means.menu_residual_error[plane]
        return measured
    found = np.zeros(unit.heads)
    for head in range(unit.heads):
        _, weighted = code_counts(unit, head, unpack(keep[head], unit.k_blocks).view(np.uint8), 2)
        found[head] = weighted[0] @ code_values(float(unit.means.error_peak[head])) * factor
    return found


def ratios(means: UnitMeans) -> Float64:
    """Measured error / sum of the block errors dropped, of all planes and windows of all heads where both are known."""
    if means.menu_predicted is None:
        return np.zeros(0)
    known = (means.menu_predicted > 0) & (means.menu_residual_error > 0)
    found: Float64 = means.menu_residual_error[known] / means.menu_predicted[known]
    return found


def coherence(units: Iterable[Float64]) -> float:
    """The median of all `ratios`; 1 if unknown."""
    found = np.concatenate([np.zeros(0), *units])
    return float(np.median(found)) if len(found) else 1.0
