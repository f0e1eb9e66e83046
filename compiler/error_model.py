"""What a mask costs in output error, from the block errors it drops.

The only place that turns statistics into a price of a mask; `select` asks it and knows nothing of how it is done.

The error of a mask is the mean over queries of the sum of the mean block errors it drops, times one factor for the
whole job: errors of dropped blocks are not quite orthogonal and the kept mass is renormalised, so measured errors are a
few times larger. The factor is the median of measured / predicted over all planes and windows of all heads; it puts
masks on one scale with errors that are measured (windows, copied rows). A factor for each head, interpolated over the
error, was tried on the demo model and gave worse videos.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibatt.compiler.ir import Float64, UnitMeans
from calibatt.compiler.stats import dequantise

CODES = 256


@dataclass(frozen=True, eq=False)
class HeadErrors:
    """Prices of one head's masks at one time; squared output error relative to the residual stream.

    Args:
        block_error: float64 ``(Q, K)``: each block's mean error times the share of queries in its row, times the job's
            factor, so that a mask's error is the sum over what it drops; None if the store has none.
    """

    block_error: Float64 | None

    def of_mask(self, keep: npt.NDArray[np.bool_]) -> float:
        """Error of any mask, bool ``(Q, K)``; needs block errors."""
        assert self.block_error is not None
        return float(self.block_error[~keep].sum())


def head_errors(means: UnitMeans, head: int, queries: Float64, factor: float) -> HeadErrors:
    """The error model of one head.

    Args:
        means: The unit's statistics.
        head: Which head.
        queries: float64 ``(Q,)``, the share of queries in each query block.
        factor: Of `coherence`.
    """
    if means.error_code is None:
        return HeadErrors(None)
    return HeadErrors(dequantise(means.error_code[head], means.error_peak[head]) * queries[:, None] * factor)


def coherence(units: Iterable[UnitMeans]) -> float:
    """Median over all heads, planes and windows of measured error / sum of the block errors dropped; 1 if unknown."""
    ratios = [np.zeros(0)]
    for means in units:
        if means.menu_predicted is not None:
            known = (means.menu_predicted > 0) & (means.menu_residual_error > 0)
            ratios.append(means.menu_residual_error[known] / means.menu_predicted[known])
    found = np.concatenate(ratios)
    return float(np.median(found)) if len(found) else 1.0
