"""Sol-Attn's rule, which chooses blocks from every input, written from its publication.

Li et al., *Sol-Attn: Accelerating Video Generation Inference via On-the-Fly Attention Sparsification* (2026, arXiv
2607.24027). A block of queries attends exactly to the key blocks whose score of mean query and mean key stands more
than a given number of standard deviations above the mean of its row. Every other block counts by its mean key, for each
query token, with the weight of all its tokens, and by its mean value. The authors keep the first fifth of the steps and
the first layer dense; here steps are the caller's choice and no layer is dense, since one of six would be more than one
of their forty.

Exact blocks run in the kernel of all other rules and the rest in PyTorch, so that its milliseconds overstate what a
fused kernel takes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from calibatt.plans import Blocks
from calibatt.tools.studies import masks
from calibatt.tools.studies.bench import Bench, PerInput


def means(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Means over blocks of tokens, float32 ``(B, H, blocks, D)`` of x ``(B, H, N, D)``; tokens of each."""
    tokens = x.shape[2]
    sums = F.pad(x.float(), (0, 0, 0, -tokens % block)).unflatten(2, (-1, block)).sum(3)
    count = torch.full((sums.shape[2],), block, device=x.device, dtype=torch.float32)
    count[-1] -= -tokens % block
    return sums / count[:, None], count


def standing(q: Tensor, k: Tensor, blocks: Blocks) -> Tensor:
    """Standard deviations by which the score of mean query and mean key is above its row's mean, ``(B, H, Q, K)``."""
    score = means(q, blocks.block_q)[0] @ means(k, blocks.block_k)[0].mT
    return (score - score.mean(-1, keepdim=True)) / score.std(-1, keepdim=True, correction=0).clamp(min=1e-12)


def rest(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Attention to the mean keys of the blocks that are not kept, each weighted as its tokens.

    Returns:
        Output float32 ``(B, H, N, D)``, and log of the sum of exponentials ``(B, H, N)``, -inf where all are kept.
    """
    keys, count = means(k, blocks.block_k)
    values, _ = means(v, blocks.block_k)
    out, lse = torch.empty_like(q, dtype=torch.float32), q.new_empty(q.shape[:3], dtype=torch.float32)
    for sample in range(len(q)):
        kept = keep[sample].repeat_interleave(blocks.block_q, 1)[:, : q.shape[2]]
        scores = q[sample].float() @ keys[sample].mT * q.shape[-1] ** -0.5 + count.log()
        scores.masked_fill_(kept, -torch.inf)
        lse[sample] = scores.logsumexp(-1)
        weights = (scores - lse[sample].nan_to_num(neginf=0.0)[..., None]).exp()
        out[sample] = weights @ values[sample]
    return out, lse


class SolAttn(PerInput):
    """See this file.

    Args:
        bench: The bench.
        threshold: ``(T, L, H)``, in standard deviations; -inf: dense.
    """

    def __init__(self, bench: Bench, threshold: Tensor) -> None:
        super().__init__(bench, lambda q, k, v, step, layer: standing(q, k, bench.blocks), threshold)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, time: float) -> Tensor:
        keep = self.keep(q, k, v, layer, time)
        exact, lse = masks.masked_with_lse(q, k, v, keep, self.bench.sampler.grid, self.bench.blocks)
        other, other_lse = rest(q, k, v, keep, self.bench.blocks)
        share = torch.sigmoid(other_lse - lse)[..., None]
        return torch.lerp(exact.float(), other, share).to(q.dtype)
