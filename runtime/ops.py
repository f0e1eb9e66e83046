"""Planned attention as a function: validate, choose who executes, execute."""

from __future__ import annotations

import torch

from calibatt.plans.precision import BF16
from calibatt.runtime.backends import AUTO, UnsupportedBackendError, backend_reasons, load_backend
from calibatt.runtime.schedule import AttentionSchedule

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
AUTOCAST_DEVICES = [kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)]
"""Asked once: `torch.compile` of PyTorch 2.11 does not trace the question."""


def planned_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: AttentionSchedule,
    *,
    backend: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
    video_start: int = 0,
    lengths: torch.Tensor | None = None,
) -> Result:
    """Self-attention over the key blocks that a schedule keeps; anchors computed once and copied to their groups.

    The sequence is a prefix of P tokens, the V tokens of the schedule's video, and a suffix. For every backend, with
    ``source, keep = schedule.dense(h)`` and i and j counted from the first video token: out[b, h, i] = softmax over the
    keys of the prefix, of the blocks keep[i] and of the suffix of (q[b, h, source[i]] . k) * scale, times v. Queries of
    the prefix and the suffix attend to all keys. Forward only.

        >>> schedule = load_plan("plans/demo.plan").schedule(time=0.9, layer=0)  # of 4 heads and 4608 tokens
        >>> q, k, v = torch.randn(3, 1, 4, 4608, 64)
        >>> planned_attention(q, k, v, schedule).shape
        torch.Size([1, 4, 4608, 64])

    Args:
        q: ``(B, H, N, D)``, floating point; any strides, but D contiguous. Under autocast q, k and v are cast to its
            dtype, as by `scaled_dot_product_attention`.
        k: As q, same shape, dtype and device.
        v: As q, same shape, dtype and device.
        schedule: The schedule; H is its number of heads, and N is at least P + V.
        backend: ``auto``, or the name of the backend that must execute.
        scale: Factor of the scores, positive; ``D ** -0.5`` if absent.
        return_lse: Also return the natural log of the sum of exponentials of the kept, scaled scores.
        video_start: P, the tokens before those of the video. Where P is no multiple of a kernel's tile, what is not
            finite in the video's first values spreads in `triton` and `hopper` also to queries that drop their block.
        lengths: int32 ``(B,)`` on q's device, P + V to N (what is beyond counts as the nearest of these): keys of a
            sample from there on are padding, which no query attends to. Values of padding must be finite, and its
            queries are computed as all of the suffix. All keys count if absent.

    Returns:
        out ``(B, H, N, D)``, dtype of q; with `return_lse` also lse ``(B, H, N)``, fp32 (fp64 for fp64 input).

    Raises:
        ValueError: An argument contradicts the schedule or another argument.
        UnsupportedBackendError: The named backend cannot execute this schedule here.
    """
    q, k, v = as_attention_takes(q, k, v)
    _validate(q, k, v, schedule, video_start, lengths)
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if backend == "auto":
        backend = choose_backend(schedule, q.device, q.dtype, q.shape[-1])
    elif reasons := supports(schedule, q.device, q.dtype, q.shape[-1], backend):
        raise UnsupportedBackendError(f"backend {backend!r} cannot execute this schedule: {'; '.join(reasons)}")
    more = {"scale": scale, "return_lse": return_lse, "video_start": video_start, "lengths": lengths}
    return attend(q, k, v, schedule, backend, **more)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: AttentionSchedule,
    backend: str,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    video_start: int = 0,
    lengths: torch.Tensor | None = None,
) -> Result:
    """`planned_attention` without its checks, for callers that have made them once (shapes, devices, `supports`)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if len(q) == 0:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        return (out, lse) if return_lse else out
    if lengths is not None:  # kernels trust them; reading them would wait for the device
        lengths = lengths.clamp(video_start + schedule.grid.tokens, q.shape[2])
    with schedule.bind(q.device).lowered() as bound:
        out, lse = load_backend(backend).run(q, k, v, bound, scale, return_lse, video_start, lengths)
    return (out, lse) if return_lse else out


def as_attention_takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v as `scaled_dot_product_attention` would compute with them: under autocast in its dtype.

    Raises:
        ValueError: One of them requires gradients.
    """
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.requires_grad:
                raise ValueError(
                    f"{name} must not require grad: planned attention has no backward (use torch.no_grad())"
                )
    kind = q.device.type
    if kind not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))


def check_alike(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor | None = None) -> None:
    """Proves that k and v have the shape, dtype and device of q, and that lengths are of its batch (its first axis).

    Raises:
        ValueError: Shape, dtype or device differ; names the tensor.
    """
    if lengths is not None and (lengths.dtype, lengths.device, lengths.shape) != (torch.int32, q.device, q.shape[:1]):
        given = f"{lengths.dtype} {tuple(lengths.shape)} on {lengths.device}"
        raise ValueError(f"lengths must be int32 of ({q.shape[0]},) on {q.device}, got {given}")
    if q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype and q.device == k.device == v.device:
        return
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} must have the shape of q, {tuple(q.shape)}, got {tuple(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must have q's dtype and device, {q.dtype} on {q.device}, got {x.dtype} on {x.device}"
            )


def supports(
    schedule: AttentionSchedule, device: torch.device | str, dtype: torch.dtype, head_dim: int, backend: str
) -> list[str]:
    """Why `backend` cannot execute `schedule` on `device` for this dtype and head size; empty if it can.

    Raises:
        ValueError: No backend has this name.
    """
    return backend_reasons(backend, schedule, torch.device(device), dtype, head_dim)


def choose_backend(schedule: AttentionSchedule, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """The backend that ``auto`` stands for: the first of `AUTO` that can execute the schedule.

    On a GPU `torch` only emulates heads of 8 bits, far slower than 16 bits are, and is taken by its name alone.

    Raises:
        UnsupportedBackendError: None can; says why for each.
    """
    refused = []
    for name in AUTO:
        reasons = supports(schedule, device, dtype, head_dim, name)
        if not reasons and name == "torch" and torch.device(device).type == "cuda" and schedule.precisions - {BF16}:
            reasons = ["on a GPU it only emulates heads of 8 bits, slowly, and must be asked for by name"]
        if not reasons:
            return name
        refused.append(f"{name}: {'; '.join(reasons)}")
    raise UnsupportedBackendError(f"no backend can execute this schedule ({' | '.join(refused)})")


def _validate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: AttentionSchedule,
    video_start: int,
    lengths: torch.Tensor | None,
) -> None:
    if q.ndim != 4:
        raise ValueError(f"q must have shape (batch, heads, tokens, head_dim), got {tuple(q.shape)}")
    if q.shape[1] != schedule.heads:
        raise ValueError(f"q must have the schedule's {schedule.heads} heads, got {q.shape[1]} in {tuple(q.shape)}")
    if not 0 <= video_start <= q.shape[2] - schedule.grid.tokens:
        raise ValueError(
            f"q must have the schedule's {schedule.grid.tokens} tokens from video_start on, got {q.shape[2]} tokens, "
            f"video_start {video_start} and {schedule.grid}"
        )
    if not q.is_floating_point():
        raise ValueError(f"q must be floating point, got {q.dtype}")
    check_alike(q, k, v, lengths)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} must have contiguous channels (last stride 1), got strides {x.stride()}")
