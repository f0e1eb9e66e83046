"""What heads would compute in 8 bits: inputs rounded as the runtime rounds them, then exact attention.

Every device can do so. What rounding probabilities to e4m3 does is measured by `effects.block_effects`, which sees
them all, and added. Left out are that tensor cores cut sums of e4m3 products, and that rounded queries and keys have
other probabilities to round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibatt.plans import INT8_FP8
from calibatt.runtime.quantise import QUERY_GROUP, e4m3_channels, rounded_rows
from calibatt.tools.calibrate.attention import attention


def attend_8bit(q: Tensor, k: Tensor, v: Tensor, precision: int, video: slice, block_k: int) -> Tensor:
    """Attention of the video's queries, whose other inputs than probabilities are rounded.

    Args:
        q: ``(H, N, D)``; one scale for 64 queries, from the first one of the video on.
        k: ``(H, N, D)``; less its mean, one scale for a block, of the prefix, the video and the suffix.
        v: ``(H, N, D)``; with `INT8_FP8` less its mean, in e4m3 with one scale a channel.
        precision: `INT8` or `INT8_FP8`.
        video: The video's tokens.
        block_k: Keys of a block.

    Returns:
        float32 ``(H, V, D)``.
    """
    start, stop, _ = video.indices(q.shape[1])
    dtype = torch.float16 if q.dtype == torch.bfloat16 else q.dtype  # bf16 would round what is rounded again
    q, k, v = q[:, video].float(), k.float(), v.float()
    parts = (k - k.mean(1, keepdim=True)).tensor_split((start, stop), 1)
    q, k = rounded_rows(q, QUERY_GROUP), torch.cat([rounded_rows(part, block_k) for part in parts], 1)
    codes, scales, mean = e4m3_channels(v)
    v = codes * scales if precision == INT8_FP8 else v - mean
    out, _ = attention(*(x[None].to(dtype) for x in (q, k, v)))
    return out[0].float() + mean
