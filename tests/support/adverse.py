"""Queries, keys and values that are hard on 8 bits, on a GPU."""

from __future__ import annotations

import torch

from calibatt.runtime.schedule import AttentionSchedule

KINDS = ("normal", "means", "outliers", "peaky", "huge", "rising", "constant", "drifting")


def inputs(
    schedule: AttentionSchedule,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    batch: int = 1,
    others: int = 0,
    kind: str = "normal",
    rising: tuple[float, float] = (0.02, 1.0),
) -> list[torch.Tensor]:
    """q, k and v, ``(batch, H, N, head_dim)`` as a model makes them.

    Args:
        schedule: What they are for.
        dtype: Of all three.
        head_dim: Channels of a head.
        batch: Samples.
        others: Tokens beside the video.
        kind: One of `KINDS`.
        rising: Factors of the first and the last key where scores rise; kernels take blocks in an order of their own.
    """
    torch.manual_seed(0)
    tokens = schedule.grid.tokens + others
    shape = (batch, tokens, schedule.heads, head_dim)
    q, k, v = (torch.randn(shape, device="cuda").transpose(1, 2) for _ in range(3))
    if kind == "means":  # what an accumulator of few bits loses most of
        k, v = k + 3, v + 2
    elif kind == "outliers":
        k[..., 5] += 12
        k[..., 77 % head_dim] *= 8
    elif kind == "peaky":
        shared = torch.randn(1, 1, 1 + tokens // 40, head_dim, device="cuda")
        of = torch.randint(shared.shape[2], (tokens,), device="cuda")
        q, k = shared[:, :, of] + 0.7 * q, shared[:, :, of.flip(0)] + 0.7 * k
    elif kind == "huge":
        q = q * 40
    elif kind == "rising":  # every block overshoots the one before
        q, k = q * 20, k * torch.linspace(*rising, tokens, device="cuda")[:, None]
    elif kind == "constant":
        k = torch.ones_like(k) * 0.7
    elif kind == "drifting":  # rows keep some blocks: their values lie far from the mean of all
        v = v + torch.linspace(-3, 3, tokens, device="cuda")[:, None]
    return [x.to(dtype) for x in (q, k, v)]
