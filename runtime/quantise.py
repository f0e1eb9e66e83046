"""What a head of 8 bits multiplies: the one definition, in plain torch. `kernels.quantise` computes the same on a GPU.

Queries and keys are int8: one scale for `QUERY_GROUP` queries that are computed together (of a head with anchors, the
packed ones), and one for each key block, which begin anew with the prefix, the video and the suffix. Before that keys
lose their mean over all keys, which changes no weight; what it adds to the log of the sum of exponentials is given
back. With `INT8_FP8`, values less their mean over all keys are e4m3, with one scale a channel; so are probabilities, of
2^`SHIFT` times those whose largest is 1; row sums are of what was not rounded. The mean is added to the output.

Queries of the prefix and the suffix are computed in 16 bits in every head.

All who compute codes get the same ones, so that they can be compared: half of a group's largest query, which 16-bit
numbers often are, lies exactly between two codes, and another order of roundings would take the other one. Codes are
therefore what fp32 makes of one factor and one product, whatever the dtype, and means are rounded to bf16: any vector
would do, and sums in another order seldom give another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from calibatt.plans.precision import INT8_FP8
from calibatt.plans.schedule import LayerSchedule

QUERY_GROUP = 64
INT8_MOST = 127
E4M3_MOST = 448
SHIFT = 5
"""Of probabilities in e4m3, which ends at 448: what the kernel's row reference may be too low by, and what is still
above e4m3's smallest, 2^-9.
"""
TINY = 1e-20
"""The least a scale stands for: rows that are all 0 need one, too."""


def int8_rows(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as int8 multiples of one scale for every `group` of them.

    Args:
        x: ``(..., n, D)``, fp32 or fp64.
        group: Rows that share a scale; the last ones may be fewer.

    Returns:
        codes: int8 ``(..., groups * group, D)``; rows from n on are 0.
        scales: ``(..., groups)``; not finite where a row of the group is not.
    """
    groups = -(-x.shape[-2] // group)
    blocks = F.pad(x, (0, 0, 0, -x.shape[-2] % group)).unflatten(-2, (groups, group))
    most = blocks.abs().amax((-2, -1)).clamp(min=TINY)
    limit = torch.full_like(most, INT8_MOST)  # a GPU makes of x / 127 x * (1 / 127), and of 127 / x 127 * (1 / x)
    factor = limit.float() / most.float()
    codes = (blocks.float() * factor[..., None, None]).nan_to_num(0.0, 0.0, 0.0).round()
    return codes.to(torch.int8).flatten(-3, -2), most / limit


def rounded_rows(x: torch.Tensor, group: int) -> torch.Tensor:
    """What `int8_rows` stands for: ``(..., n, D)``."""
    codes, scales = int8_rows(x, group)
    blocks = codes.unflatten(-2, (scales.shape[-1], group)) * scales[..., None, None]
    return blocks.flatten(-3, -2)[..., : x.shape[-2], :]


def mean_of(x: torch.Tensor) -> torch.Tensor:
    """What ``(..., n, D)`` loses: its mean over n in bf16, ``(..., 1, D)`` in the dtype of x."""
    return x.mean(-2, keepdim=True).bfloat16().to(x.dtype)


def e4m3_channels(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values less their mean in e4m3: codes ``(..., n, D)``; scales and means, one a channel, ``(..., 1, D)``."""
    mean = mean_of(v)
    most = (v - mean).abs().amax(-2, keepdim=True).clamp(min=TINY)
    scales = most / torch.full_like(most, E4M3_MOST)  # as in `int8_rows`
    codes = as_e4m3((v - mean).float() * scales.float().reciprocal())
    return codes.to(v.dtype), scales, mean


def as_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of e4m3, in the dtype of x; beyond its end the last one."""
    return x.clamp(-E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn).to(x.dtype)


@dataclass(frozen=True, eq=False)
class EightBit:
    """What the heads of one precision multiply for the queries of the video, of one element of the batch.

    Args:
        q: ``(H, V, D)``, fp32 (fp64 for fp64 input), and so all others. A query that anchors stand for is not rounded.
        k: ``(H, n, D)``, less the mean over its keys.
        v: ``(H, n, D)``; where `INT8_FP8`, less its mean.
        lse_shift: ``(H, V)``, what the mean of the keys adds to the lse.
        out_shift: ``(H, 1, D)``, what is added to the output.
        rounds: Whether probabilities are rounded to e4m3.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lse_shift: torch.Tensor
    out_shift: torch.Tensor
    rounds: bool


def eight_bit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    core: LayerSchedule,
    heads: Sequence[int],
    precision: int,
    scale: float,
    video_start: int,
) -> EightBit:
    """Rounds q, k and v ``(H, n, D)`` of these heads of a schedule, one element of a batch without its padding of keys.

    Args:
        q: ``(H, V, D)``, of the video alone.
        k: All keys that count.
        v: As k.
        core: The schedule, which says which queries of a head are packed.
        heads: Their numbers in the schedule.
        precision: `INT8` or `INT8_FP8`.
        scale: Of the scores.
        video_start: Keys before those of the video.
    """
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    mean = mean_of(k)
    queries = q.clone()
    for at, head in enumerate(heads):
        packed = torch.from_numpy(core.packed_queries(head).astype(np.int64)).to(q.device)
        queries[at, packed] = rounded_rows(q[at, packed], QUERY_GROUP)
    stop = video_start + core.grid.tokens
    parts = [part - mean for part in k.tensor_split((video_start, stop), -2)]
    keys = torch.cat([rounded_rows(part, core.blocks.block_k) for part in parts], -2)
    lse_shift = (q @ mean.mT)[..., 0] * scale
    if precision != INT8_FP8:
        return EightBit(queries, keys, v, lse_shift, torch.zeros_like(mean), False)
    codes, scales, out_shift = e4m3_channels(v)
    return EightBit(queries, keys, codes * scales, lse_shift, out_shift, True)


def rounded_weights(scores: torch.Tensor, rounds: bool) -> torch.Tensor:
    """Softmax over the last axis, with e4m3 above the sum where `rounds`."""
    if not rounds:
        return scores.softmax(-1)
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    return as_e4m3(p * 2**SHIFT) / 2**SHIFT / p.sum(-1, keepdim=True)
