"""The oracle: what planned attention means, in plain torch. Slow on purpose: it skips nothing and masks everything."""

from __future__ import annotations

import torch

from calibatt.plans.precision import BF16, INT8, INT8_FP8
from calibatt.runtime.device_schedule import DeviceSchedule
from calibatt.runtime.quantise import eight_bit, rounded_weights
from calibatt.runtime.schedule import AttentionSchedule, ListedSchedule, Outline

PRECISIONS = {BF16, INT8, INT8_FP8}
CHUNK_SCORES = 1 << 24
"""Scores held at a time: 64 MiB in fp32."""


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: AttentionSchedule,
    *,
    scale: float | None = None,
    queries: torch.Tensor | None = None,
    video_start: int = 0,
    lengths: torch.Tensor | None = None,
    exact_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out[b, h, i] = softmax over the keys that query i keeps of (q[b, h, source[i]] . k[b, h, j]) * scale, times v.

    A video query keeps the blocks keep[i] of the video, and all that is not video; another query keeps everything.
    What video queries of heads of 8 bits multiply is rounded as `runtime.quantise` says; sums are of this dtype.

    Args:
        q: ``(B, H, N, D)``, any floating dtype; the computation is in this dtype.
        k: As q.
        v: As q.
        schedule: Gives source and keep of each head.
        scale: Factor of the scores; ``D ** -0.5`` if absent.
        queries: int64 ``(M,)``; compute these tokens only (default: all N).
        video_start: Tokens before the video.
        lengths: int32 ``(B,)``; keys from there on do not exist.
        exact_weights: Do not round probabilities.

    Returns:
        out: ``(B, H, M, D)``, dtype of q.
        lse: ``(B, H, M)``; natural log of the sum of exponentials of the scaled scores that were kept.
    """
    batch, heads, tokens, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    queries = torch.arange(tokens, device="cpu") if queries is None else queries.cpu()
    out = q.new_empty(batch, heads, len(queries), head_dim)
    lse = q.new_empty(batch, heads, len(queries))
    video = slice(video_start, video_start + schedule.grid.tokens)
    block_of_key = torch.arange(schedule.grid.tokens, device="cpu") // schedule.blocks.block_k
    ends = torch.full((batch,), tokens, device=q.device) if lengths is None else lengths
    padding = torch.arange(tokens, device=q.device) >= ends[:, None]
    chunk = max(1, CHUNK_SCORES // max(1, batch * tokens))
    in_video = (queries >= video.start) & (queries < video.stop)
    for head in range(heads):
        source, keep = (
            torch.arange(tokens, device="cpu"),
            torch.ones(tokens, schedule.k_blocks, dtype=torch.bool, device="cpu"),
        )
        source[video], keep[video] = schedule.dense(head)
        source[video] += video_start
        plain = _Operands(q[:, head], k[:, head], v[:, head])
        precision = int(schedule.core.head_precision[head])
        kinds = [(torch.ones_like(in_video), plain)]
        if precision != BF16:
            rounded = _rounded(plain, schedule, head, precision, scale, video, ends.tolist(), exact_weights)
            kinds = [(~in_video, plain), (in_video, rounded)]
        for which, operands in kinds:
            for part in which.nonzero()[:, 0].split(chunk) if which.any() else ():
                rows = queries[part]
                at = source[rows].to(q.device)
                scores = operands.q[:, at] @ operands.k.transpose(-1, -2) * scale
                dropped = padding[:, None].repeat(1, len(rows), 1)
                dropped[..., video] |= ~keep[rows][:, block_of_key].to(q.device)
                scores.masked_fill_(dropped, -torch.inf)
                weights = rounded_weights(scores, operands.rounds)
                out[:, head, part] = _weighted(weights, operands.v, dropped) + operands.out_shift
                lse[:, head, part] = scores.logsumexp(-1) + operands.lse_shift[:, at]
    return out, lse


class _Operands:
    """What queries of one head multiply: ``(B, N, D)``, and what is added to their output and lse."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.q, self.k, self.v = q, k, v
        self.out_shift, self.lse_shift = q.new_zeros(len(q), 1, q.shape[-1]), q.new_zeros(q.shape[:2])
        self.rounds = False


def _rounded(
    plain: _Operands,
    schedule: AttentionSchedule,
    head: int,
    precision: int,
    scale: float,
    video: slice,
    ends: list[int],
    exact_weights: bool,
) -> _Operands:
    """What video queries of a head of 8 bits multiply, in the dtype of the plain ones."""
    made = _Operands(plain.q.clone(), torch.zeros_like(plain.k), torch.zeros_like(plain.v))
    for sample, end in enumerate(ends):
        each = slice(sample, sample + 1)
        rounded = eight_bit(
            plain.q[each, video], plain.k[each, :end], plain.v[each, :end], schedule.core, [head], precision, scale,
            video.start,
        )  # fmt: skip
        made.q[each, video], made.k[each, :end], made.v[each, :end] = rounded.q, rounded.k, rounded.v
        made.lse_shift[each, video], made.out_shift[each] = rounded.lse_shift, rounded.out_shift
        made.rounds = rounded.rounds and not exact_weights
    return made


def _weighted(weights: torch.Tensor, v: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """``weights @ v``, in which dropped keys take no part, not even those whose values are not finite.

    Args:
        weights: ``(B, M, N)``, 0 where dropped.
        v: ``(B, N, D)``.
        dropped: bool ``(B, M, N)``.
    """
    if v.isfinite().all():
        return weights @ v
    kept = ~dropped
    rows = [
        (w[..., None] * v).where(k[..., None], 0).sum(1) for w, k in zip(weights.unbind(1), kept.unbind(1), strict=True)
    ]
    return torch.stack(rows, 1)


def supports(outline: Outline, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """As a backend, the oracle executes every schedule everywhere."""
    return []


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bound: DeviceSchedule,
    scale: float,
    return_lse: bool,
    video_start: int = 0,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `runtime.backends`."""
    more = {"scale": scale, "video_start": video_start, "lengths": lengths}
    out, lse = reference_attention(q, k, v, ListedSchedule(bound.core), **more)
    return out, lse.to(torch.promote_types(lse.dtype, torch.float32)) if return_lse else None
