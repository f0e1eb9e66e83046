"""What rounding to 8 bits changes in the inputs of attention, as the runtime rounds them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from calibatt.runtime.quantise import QUERY_GROUP, e4m3_channels, rounded_rows


def input_changes(q: Tensor, k: Tensor, v: Tensor, video: slice, block_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The change of each input when it is rounded, float32 ``(H, N, D)`` each.

    Args:
        q: ``(H, N, D)``, to int8: one scale for 64 queries, from the first one of the video on; others stay.
        k: ``(H, N, D)``, less its mean to int8: one scale for a block, of the prefix, the video and the suffix.
        v: ``(H, N, D)``, less its mean to e4m3: one scale a channel.
        video: The video's tokens.
        block_k: Keys of a block.
    """
    start, stop, _ = video.indices(q.shape[1])
    q, k, v = q.float(), k.float(), v.float()
    queries = q[:, start:stop]
    of_q = F.pad(rounded_rows(queries, QUERY_GROUP) - queries, (0, 0, start, q.shape[1] - stop))
    parts = (k - k.mean(1, keepdim=True)).tensor_split((start, stop), 1)
    of_k = torch.cat([rounded_rows(part, block_k) - part for part in parts], 1)
    codes, scales, mean = e4m3_channels(v)
    return of_q, of_k, codes * scales + mean - v
