"""Gradients of one forward of a transformer: as calibration finds them, block by block, and by autograd of it whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibatt.runtime.adapters import adapter_for
from calibatt.runtime.intercept import Interception
from calibatt.tools.calibrate.chain import Given, floating
from calibatt.tools.calibrate.gradients import AttentionCall, Transformer


@dataclass(frozen=True)
class Found:
    """Gradients of a forward.

    Args:
        attention: Of every self-attention call's output, in the order of the calls, float32 ``(V, H, N, D)``.
        hidden: Of the model's ``hidden_states``, float32 ``(V, ...)``.
    """

    attention: list[Tensor]
    hidden: Tensor

    def error(self, other: Found) -> float:
        """The largest relative error of a tensor against another's."""
        pairs = [*zip(self.attention, other.attention, strict=True), (self.hidden, other.hidden)]
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def arguments_of(sampler: Any, forward: int = -1) -> dict[str, Any]:
    """The keyword arguments of one of a sampler's forwards."""
    seen: list[dict[str, Any]] = []
    hook = sampler.transformer.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    try:
        sampler.run("a boat", 1)
    finally:
        hook.remove()
    return seen[forward]


def cotangents_of(arguments: dict[str, Any], model: nn.Module, vectors: int = 2) -> list[list[Tensor]]:
    """Random gradients of a forward's output."""
    with torch.no_grad():
        out = floating(model(**arguments))
    drawn = torch.Generator().manual_seed(5)
    return [[torch.randn(x.shape, generator=drawn) for x in out] for _ in range(vectors)]


def by_block(
    model: nn.Module,
    arguments: dict[str, Any],
    cotangents: list[list[Tensor]],
    calls: list[AttentionCall] | None = None,
    **options: Any,
) -> Found:
    """Gradients as calibration finds them; the calls themselves are added to ``calls``, if it is given."""
    calls = [] if calls is None else calls
    hidden = arguments["hidden_states"].detach().requires_grad_()
    given, _ = Given.of((), {**arguments, "hidden_states": hidden})
    found = Transformer(model, adapter_for(model), **options).pull(given, cotangents, calls.append)
    layers = sorted({call.layer for call in calls})
    ordered = [call for layer in layers for call in calls if call.layer == layer]
    attention = [torch.stack([grad.float() for grad in call.grads]) / call.scale for call in ordered]
    return Found(attention, torch.stack([some[0] for some in found]))


def whole(model: nn.Module, arguments: dict[str, Any], cotangents: list[list[Tensor]]) -> Found:
    """The same by autograd, through the model as it is."""
    outputs: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, site: Any, _: Any) -> Tensor:
        found = site.stock(q, k, v)
        parts = [x.clone() for x in found]
        outputs.extend(parts)
        return torch.stack(parts)

    hidden = arguments["hidden_states"].detach().requires_grad_()
    interception = Interception(model, adapter_for(model), attend)
    try:
        with torch.enable_grad():
            out = floating(model(**{**arguments, "hidden_states": hidden}))
    finally:
        interception.detach()
    grads = [
        torch.autograd.grad(out, [hidden, *outputs], [x.to(y.dtype) for x, y in zip(some, out, strict=True)], True)
        for some in cotangents
    ]
    columns = [torch.stack([x.float() for x in column]) for column in zip(*grads, strict=True)]
    return Found([column.transpose(1, 2) for column in columns[1:]], columns[0])
