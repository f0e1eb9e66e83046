"""The oracle: what planned attention means, in plain torch. Slow on purpose: it skips nothing and masks everything."""

from __future__ import annotations

import torch

from calibatt.runtime.schedule import DeviceSchedule, LayerSchedule, Outline

CHUNK_SCORES = 1 << 24
"""Scores held at a time: 64 MiB in fp32."""


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: LayerSchedule,
    *,
    scale: float | None = None,
    queries: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out[b, h, i] = softmax over keys j in blocks keep[i] of (q[b, h, source[i]] . k[b, h, j]) * scale, times v.

    Args:
        q: ``(B, H, N, D)``, any floating dtype; the computation is in this dtype.
        k: As q.
        v: As q.
        schedule: Gives source and keep of each head.
        scale: Factor of the scores; ``D ** -0.5`` if absent.
        queries: int64 ``(M,)``; compute these tokens only (default: all N).

    Returns:
        out: ``(B, H, M, D)``, dtype of q.
        lse: ``(B, H, M)``; natural log of the sum of exponentials of the scaled scores that were kept.
    """
    batch, heads, tokens, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    queries = torch.arange(tokens, device="cpu") if queries is None else queries.cpu()
    out = q.new_empty(batch, heads, len(queries), head_dim)
    lse = q.new_empty(batch, heads, len(queries))
    block_of_key = torch.arange(tokens, device="cpu") // schedule.blocks.block_k
    chunk = max(1, CHUNK_SCORES // max(1, batch * tokens))
    for head in range(heads):
        source, keep = schedule.dense(head)
        for start in range(0, len(queries), chunk):
            part = slice(start, start + chunk)
            rows = queries[part]
            dropped = ~keep[rows][:, block_of_key].to(q.device)
            scores = q[:, head, source[rows].to(q.device)] @ k[:, head].transpose(-1, -2) * scale
            scores.masked_fill_(dropped, -torch.inf)
            out[:, head, part] = _weighted(scores.softmax(-1), v[:, head], dropped)
            lse[:, head, part] = scores.logsumexp(-1)
    return out, lse


def _weighted(weights: torch.Tensor, v: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """``weights @ v``, in which dropped keys take no part, not even those whose values are not finite.

    Args:
        weights: ``(B, M, N)``, 0 where dropped.
        v: ``(B, N, D)``.
        dropped: bool, ``(M, N)`` or ``(B, M, N)``.
    """
    if v.isfinite().all():
        return weights @ v
    kept = ~dropped.expand_as(weights)
    rows = [
        (w[..., None] * v).where(k[..., None], 0).sum(1) for w, k in zip(weights.unbind(1), kept.unbind(1), strict=True)
    ]
    return torch.stack(rows, 1)


def supports(outline: Outline, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """As a backend, the oracle executes every schedule everywhere."""
    return []


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bound: DeviceSchedule, scale: float, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `runtime.backends`."""
    out, lse = reference_attention(q, k, v, LayerSchedule(bound.core), scale=scale)
    return out, lse.to(torch.promote_types(lse.dtype, torch.float32)) if return_lse else None
