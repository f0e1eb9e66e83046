"""How wrong an attention output may be: derived from the oracle, never from experience."""

from __future__ import annotations

import torch

from calibatt.plans.precision import BF16, INT8_FP8
from calibatt.runtime.reference import reference_attention
from calibatt.runtime.schedule import AttentionSchedule

EXP_ULPS = 20
"""torch's CPU kernel of scaled_dot_product_attention takes exponentials to 20 units in the last place of fp32."""

E4M3_CUT = 33 * 2.0**-13 / 2 * 8.5
"""What tensor cores may cut of a sum in e4m3, relative to it: of each of 16 products of 32 keys (four blocks) into one
accumulator half of 2^-13 of the largest term a term; the accumulator, which grows evenly, is one (measured: 0.0055).
"""


def check_against_oracle(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: AttentionSchedule,
    *,
    lse: torch.Tensor | None = None,
    scale: float | None = None,
    queries: torch.Tensor | None = None,
    video_start: int = 0,
    lengths: torch.Tensor | None = None,
) -> None:
    """Asserts that `out` and `lse` are as good as plain torch operators in the same precision, up to a factor of 2.

    The truth is the oracle in fp64; the yardstick is the oracle in the dtype of q, which is narrower (for lse, which is
    fp32, in fp32). Per head, the largest error and the root mean square error stay below twice the yardstick's, plus
    what no implementation can avoid or torch's own dense attention takes as well. For out: rounding its largest value,
    and weights `EXP_ULPS` off. For lse: rounding the scaled score, the change of base, the logarithm and the sum.

    What heads of 8 bits multiply is rounded in the truth as well, but for probabilities. Their sums in e4m3 may also be
    `E4M3_CUT` off, of the output less the mean of the values; and what the lse gets back for the mean of the keys is a
    sum of rounded products.

    Args:
        out: ``(B, H, N, D)``; with `queries` only these tokens, ``(B, H, M, D)``.
        q: The arguments of the attention, and k, v, schedule and scale likewise.
        lse: ``(B, H, N)``, or ``(B, H, M)``.
        queries: int64 ``(M,)``; the tokens that are compared (default: all).
        video_start: As of the attention, and lengths likewise.
    """
    options = {"scale": scale, "queries": queries, "video_start": video_start, "lengths": lengths}

    def oracle(dtype: torch.dtype, **more: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return reference_attention(q.to(dtype), k.to(dtype), v.to(dtype), schedule, **options, **more)

    truth, true_lse = oracle(torch.float64, exact_weights=True)
    yardstick, _ = oracle(q.dtype)
    fp32_eps = torch.finfo(torch.float32).eps
    assert out.dtype == q.dtype
    rounding = torch.finfo(q.dtype).eps * truth.abs().amax((2, 3)) + EXP_ULPS * fp32_eps * v.abs().amax((2, 3))
    in_e4m3 = torch.from_numpy(schedule.core.head_precision == INT8_FP8).to(q.device)
    rounding += in_e4m3 * E4M3_CUT * (truth - v.double().mean(2, keepdim=True)).abs().amax((2, 3))
    _check("out", out, truth, yardstick, rounding)
    if lse is not None:
        assert lse.dtype == torch.float32
        _, yardstick_lse = oracle(torch.float32)
        products = q.double().abs() @ k.double().mean(2).abs()[..., None] * (scale or q.shape[-1] ** -0.5)
        in_eight = torch.from_numpy(schedule.core.head_precision != BF16).to(q.device)
        floor = 4 * fp32_eps * true_lse.abs().amax(2) + in_eight * fp32_eps * products.amax((2, 3))
        _check("lse", lse[..., None], true_lse[..., None], yardstick_lse[..., None], floor)


def _check(name: str, actual: torch.Tensor, truth: torch.Tensor, yardstick: torch.Tensor, floor: torch.Tensor) -> None:
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(truth.shape)}"
    for kind in ("largest", "root mean square"):
        error, allowed = (_error(kind, x.double() - truth) for x in (actual, yardstick))
        excess = error - (2 * allowed + floor)
        worst = int(excess.argmax())
        assert excess.max() <= 0, (  # false for NaN, too
            f"{name}: {kind} error {error.flatten()[worst]:.3g} of (batch, head) number {worst} exceeds twice the "
            f"yardstick's {allowed.flatten()[worst]:.3g} plus {floor.flatten()[worst]:.3g}"
        )


def _error(kind: str, difference: torch.Tensor) -> torch.Tensor:
    """``(B, H, M, D)`` -> ``(B, H)``."""
    return difference.abs().amax((2, 3)) if kind == "largest" else difference.square().mean((2, 3)).sqrt()
