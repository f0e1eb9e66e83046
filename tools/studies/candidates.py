"""Masks that a head may have: thresholds of a score by density, what each mask costs on the calibration prompts, and
one of them for every head under one budget.

T steps, L layers, H heads, P calibration samples of a batch, Q and K query and key blocks, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calibatt.compiler.budget import choose
from calibatt.tools.studies import masks
from calibatt.tools.studies.bench import Bench, Moment


def quantile_threshold(scores: Tensor, share: float) -> Tensor:
    """The threshold above which `share` of the scores lie, ``()``; nothing is dropped at a share of 1."""
    return _below(scores.flatten().sort(descending=True).values, share)


def head_thresholds(scores: Tensor, shares: Sequence[float]) -> Tensor:
    """For each head the thresholds above which shares of its scores lie.

    Args:
        scores: ``(T, L, ..., H, Q, K)``; what stands between L and H counts as more scores of the head.
        shares: Ascending.

    Returns:
        ``(C, T, L, H)``.
    """
    falling = scores.movedim(-3, 2).flatten(3).sort(-1, descending=True).values
    return torch.stack([_below(falling, share) for share in shares])


def _below(falling: Tensor, share: float) -> Tensor:
    """What lies between the first `share` of falling scores ``(..., n)`` and the others, ``(...)``."""
    count = falling.shape[-1]
    at = max(1, round(share * count))
    return falling[..., -1] - 1 if share >= 1 else (falling[..., at - 1] + falling[..., min(at, count - 1)]) / 2


@dataclass(frozen=True, eq=False)
class Measured:
    """Candidates of every head on the calibration prompts: squared error of the output, summed over tokens, mean over
    prompts; and density; both ``(C, T, L, H)``."""

    error: Tensor
    density: Tensor

    @classmethod
    def joined(cls, several: Sequence[Measured]) -> Measured:
        return cls(torch.cat([one.error for one in several]), torch.cat([one.density for one in several]))


Candidates = Callable[[Moment], Tensor]
"""Masks at a moment: bool ``(C, H, Q, K)``, or ``(C, P, H, Q, K)`` where they depend on the input."""


def measure(bench: Bench, candidates: Candidates, count: int, order: Tensor | None = None) -> Measured:
    """Executes every candidate on dense trajectories of the calibration prompts: exact output errors."""
    error = torch.zeros(count, *bench.shape, device=bench.device)
    density = torch.zeros_like(error)

    def on_moment(moment: Moment) -> None:
        moment = moment.reordered(order)
        keep = candidates(moment)
        for index, one in enumerate(keep):
            inputs = moment.q, moment.k, moment.v
            if one.ndim == 3:
                out = masks.attend(*inputs, masks.bind_mask(one, bench.sampler.grid, bench.blocks))
            else:
                out = masks.masked_attention(*inputs, one, bench.sampler.grid, bench.blocks)
            at, prompts = (index, moment.step, moment.layer), len(bench.calibration)
            error[at] += (out - moment.out).float().square().sum((0, 2, 3)) / prompts
            kept = one.float().mean((-1, -2)).view(-1, one.shape[-3]).mean(0)
            density[at] += kept * len(moment.q) / prompts

    bench.calibrate(on_moment)
    return Measured(error, density)


def budgeted(found: Measured, price: Tensor, density: float) -> Tensor:
    """The compiler's own choice under one budget: candidates ``(T, L, H)`` of least error times price.

    Args:
        found: The candidates.
        price: ``(T, L, H)``, of a unit of error.
        density: Most blocks computed, as a share of dense attention.
    """
    loss, use = (x.flatten(1).T.double().cpu().numpy() for x in (found.error * price, found.density))
    choice = choose(np.ascontiguousarray(loss), np.ascontiguousarray(use), density * loss.shape[0])
    if choice is None:
        least = float(use.min(1).mean())
        raise ValueError(f"density must be at least what the candidates can keep, {least:.3f}, got {density}")
    return torch.from_numpy(choice.pick).view(found.error.shape[1:]).to(found.error.device)
