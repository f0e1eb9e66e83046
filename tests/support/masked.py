"""The truth of a plan at work: the model's own code, with explicit masks and gathered queries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from calibatt.runtime import AttentionSchedule, Plan
from calibatt.runtime.adapters import Adapter, adapter_for
from calibatt.runtime.intercept import Interception

AT_ONCE = 8192
"""Queries of a call: a mask of all of a large model's would be several gigabytes."""


@contextmanager
def masked(model: Any, plan: Plan, adapter: Adapter | None = None) -> Iterator[None]:
    """Every self-attention of the model follows the plan, by `scaled_dot_product_attention` with a mask."""
    adapter = adapter or adapter_for(model)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Any, context: Any) -> torch.Tensor:
        time, start = context
        return masked_attention(q, k, v, plan.schedule(float(time), site.layer), start)

    interception = Interception(
        model, adapter, attend, begin=lambda arguments: (adapter.time(arguments), adapter.video_start(model, arguments))
    )
    try:
        yield
    finally:
        interception.detach()


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, schedule: AttentionSchedule, start: int = 0
) -> torch.Tensor:
    """What a schedule means of q, k and v, all ``(B, N, H, D)``, by `scaled_dot_product_attention` with a mask."""
    video = torch.arange(schedule.grid.tokens, device=q.device)
    block = video // schedule.blocks.block_k
    out = torch.empty_like(q)
    for head in range(schedule.heads):
        source, keep = (part.to(q.device) for part in schedule.dense(head))
        for rows in torch.arange(q.shape[1], device=q.device).split(AT_ONCE):
            own, seen = rows.clone(), torch.ones(len(rows), q.shape[1], dtype=torch.bool, device=q.device)
            here = (rows >= start) & (rows < start + len(video))
            own[here] = start + source[rows[here] - start]
            seen[here.nonzero(), start + video] = keep[rows[here] - start][:, block]
            parts = [q[:, own, head], k[:, :, head], v[:, :, head]]
            if q.is_cuda:  # whose kernels with masks want an axis of heads; a CPU's round otherwise with one
                parts = [x[:, None] for x in parts]
            attended = F.scaled_dot_product_attention(*parts, seen)
            out[:, rows, head] = attended.flatten(0, -3)
    return out
