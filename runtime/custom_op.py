"""A plan's execution as torch ops: opaque to `torch.compile`, so one graph serves every time, layer and plan.

Everything that changes from call to call reaches the ops as tensors on the CPU, including the number of the session:
Python numbers would be compiled in. A CUDA graph of the ops would repeat one segment for ever, so they are excluded
from graphs: ``torch.compile(mode="reduce-overhead")`` makes its graphs of the code between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch

OUTSIDE_GRAPHS = tuple(filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))
"""Tags of the ops. torch 2.8 lacks this one, and makes no graphs of ops with tensors on the CPU anyway."""


_sessions: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""Sessions by number; each is a `session.Session`: plans attached to one model."""
_numbers = itertools.count()


def open_session(session: Any) -> torch.Tensor:
    """The number of a session, int64 ``()`` on the CPU, by which the ops find it as long as it lives."""
    number = next(_numbers)
    _sessions[number] = session
    return torch.tensor(number, device="cpu")


@torch.library.custom_op("calibatt::resolve_segment", mutates_args=(), tags=OUTSIDE_GRAPHS)
def resolve_segment(
    time: torch.Tensor, grid: Sequence[int], coordinates: torch.Tensor | None, session: torch.Tensor
) -> torch.Tensor:
    """`Session.resolve` as an op: int64 ``(2,)`` on the CPU."""
    return torch.tensor(_sessions[int(session)].resolve(time, tuple(grid), coordinates), device="cpu")


@resolve_segment.register_fake
def _(time: torch.Tensor, grid: Sequence[int], coordinates: torch.Tensor | None, session: torch.Tensor) -> torch.Tensor:
    return torch.empty(2, dtype=torch.int64, device="cpu")


@torch.library.custom_op("calibatt::attend", mutates_args=(), tags=OUTSIDE_GRAPHS)
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor | None,
    segment: torch.Tensor,
    layer: torch.Tensor,
    session: torch.Tensor,
) -> torch.Tensor:
    """`Session.attend` of q, k, v ``(B, N, H, D)``, int32 ``(B,)`` lengths, what `resolve_segment` returned and int64
    ``()`` layer on the CPU; the result is contiguous.
    """
    entry, start = segment.tolist()
    return _sessions[int(session)].attend(q, k, v, lengths, start, entry, int(layer)).contiguous()


@attend.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor | None,
    segment: torch.Tensor,
    layer: torch.Tensor,
    session: torch.Tensor,
) -> torch.Tensor:
    return q.new_empty(q.shape)
