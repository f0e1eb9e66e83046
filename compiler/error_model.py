"""What a mask costs in output error, from the block errors it drops and the errors that were measured.

The only place that turns statistics into a price of a mask; `select` asks it and knows nothing of how it is done.

The raw prediction of a mask is the mean over queries of the sum of the mean block errors it drops. It is off by a
factor that depends on the head (errors of dropped blocks are not quite orthogonal, and the kept mass is renormalised),
so it is corrected by what was seen where both are known, on the head's planes and windows: measured / predicted,
interpolated over the predicted error, both in logarithms, held at the ends.
"""

from __future__ import annotations

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
        block_error: float64 ``(Q, K)``: each block's mean error times the share of queries in its row, so that the
            raw prediction of a mask is the sum over what it drops; None if the store has none.
        log_predicted: float64 ``(points,)``, strictly ascending; predictions at which an error was measured.
        log_ratio: float64 ``(points,)``, measured / predicted there.
    """

    block_error: Float64 | None
    log_predicted: Float64
    log_ratio: Float64

    def correct(self, predicted: npt.ArrayLike) -> Float64:
        """Corrected errors of raw predictions; the same shape, float64."""
        raw = np.asarray(predicted, np.float64)
        if not len(self.log_predicted):
            return raw
        logs = np.log(np.maximum(raw, np.finfo(np.float64).tiny))
        ratio = np.exp(np.interp(logs, self.log_predicted, self.log_ratio))
        return np.where(raw > 0, raw * ratio, 0.0)

    def of_mask(self, keep: npt.NDArray[np.bool_]) -> float:
        """Error of any mask, bool ``(Q, K)``; needs block errors."""
        assert self.block_error is not None
        return float(self.correct(self.block_error[~keep].sum()))


def head_errors(means: UnitMeans, head: int, queries: Float64) -> HeadErrors:
    """The error model of one head.

    Args:
        means: The unit's statistics.
        head: Which head.
        queries: float64 ``(Q,)``, the share of queries in each query block.
    """
    none = np.zeros(0)
    if means.error_code is None or means.menu_predicted is None:
        return HeadErrors(None, none, none)
    block_error = dequantise(means.error_code[head], means.error_peak[head]) * queries[:, None]
    predicted, measured = means.menu_predicted[:, head], means.menu_residual_error[:, head]
    known = (predicted > 0) & (measured > 0)
    if not known.any():
        return HeadErrors(block_error, none, none)
    log_predicted, where = np.unique(np.log(predicted[known]), return_inverse=True)
    log_measured = np.log(measured[known])
    log_measured = np.bincount(where.reshape(-1), log_measured) / np.bincount(where.reshape(-1))
    return HeadErrors(block_error, log_predicted, log_measured - log_predicted)
