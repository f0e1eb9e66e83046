"""How wrong an attention output may be: derived from the oracle, never from experience."""

from __future__ import annotations

import torch

from calibatt.runtime.reference import reference_attention
from calibatt.runtime.schedule import LayerSchedule


def check_against_oracle(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: LayerSchedule,
    *,
    lse: torch.Tensor | None = None,
    scale: float | None = None,
    queries: torch.Tensor | None = None,
) -> None:
    """Asserts that `out` and `lse` are as good as plain torch operators in the same precision, up to a factor of 2.

    The truth is the oracle in fp64; the yardstick is the oracle in the dtype of q (for lse, which is fp32, in at least
    fp32). Per head, the largest error and the root mean square error stay below twice the yardstick's, plus what
    rounding the truth alone may cost: for out one unit roundoff of the largest value; for lse one for each of the
    scaled score, the change of base, the logarithm and the sum.

    Args:
        out: ``(B, H, N, D)``; with `queries` only these tokens, ``(B, H, M, D)``.
        q: The arguments of the attention, and k, v, schedule and scale likewise.
        lse: ``(B, H, N)``, or ``(B, H, M)``.
        queries: int64 ``(M,)``; the tokens that are compared (default: all).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    truth, true_lse = _oracle(q, k, v, schedule, scale, queries, torch.float64)
    yardstick, yardstick_lse = _oracle(q, k, v, schedule, scale, queries, q.dtype)
    assert out.dtype == q.dtype
    _check("out", out, truth, yardstick, torch.finfo(q.dtype).eps)
    if lse is not None:
        if wide != q.dtype:
            yardstick_lse = _oracle(q, k, v, schedule, scale, queries, wide)[1]
        assert lse.dtype == wide
        _check("lse", lse[..., None], true_lse[..., None], yardstick_lse[..., None], 4 * torch.finfo(wide).eps)


def _oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: LayerSchedule,
    scale: float | None,
    queries: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    return reference_attention(q.to(dtype), k.to(dtype), v.to(dtype), schedule, scale=scale, queries=queries)


def _check(
    name: str, actual: torch.Tensor, truth: torch.Tensor, yardstick: torch.Tensor, relative_floor: float
) -> None:
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(truth.shape)}"
    floor = relative_floor * truth.abs().amax((2, 3))
    for kind in ("largest", "root mean square"):
        error, allowed = (_error(kind, x.double() - truth) for x in (actual, yardstick))
        excess = error - (2 * allowed + floor)
        worst = int(excess.argmax())
        assert excess.max() <= 0 and error.isfinite().all(), (
            f"{name}: {kind} error {error.flatten()[worst]:.3g} of (batch, head) number {worst} exceeds twice the "
            f"yardstick's {allowed.flatten()[worst]:.3g} plus {floor.flatten()[worst]:.3g}"
        )


def _error(kind: str, difference: torch.Tensor) -> torch.Tensor:
    """``(B, H, M, D)`` -> ``(B, H)``."""
    return difference.abs().amax((2, 3)) if kind == "largest" else difference.square().mean((2, 3)).sqrt()
