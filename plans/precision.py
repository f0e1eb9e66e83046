"""Number formats in which a head multiplies; the compiler's pass `select` decides which one a head has."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BF16, INT8, INT8_FP8 = 0, 1, 2
"""In `head_precision`: the inputs' own 16-bit dtype; int8 queries and keys, values as they are; int8 queries and keys,
probabilities and values in e4m3, summed in fp32."""
EIGHT_BITS = INT8, INT8_FP8
PRECISIONS = {BF16: "16 bit", INT8: "int8 QK", INT8_FP8: "int8 QK with fp8 PV"}
"""What each is called in reports."""


def told_precisions(heads: npt.NDArray[np.uint8]) -> str:
    """Shares of heads, of any shape, in each of `PRECISIONS`, in words."""
    counts = np.bincount(heads.reshape(-1), minlength=len(PRECISIONS))
    if counts.max() == heads.size:
        return f"all heads in {PRECISIONS[int(counts.argmax())]}"
    return ", ".join(
        f"{count / heads.size:.1%} of heads in {PRECISIONS[each]}" for each, count in enumerate(counts) if count
    )
