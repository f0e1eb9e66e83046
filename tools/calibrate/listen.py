"""Every self-attention call of a model as plain arrays of one sample, with what prices its errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibatt.plans import TokenGrid
from calibatt.runtime.adapters import Adapter, Arguments, adapter_for
from calibatt.runtime.intercept import InterceptedSite, Interception


class ListenError(ValueError):
    """A forward is not of the kind that was to be measured."""


@dataclass(frozen=True)
class Call:
    """One self-attention call of one sample.

    Args:
        layer: Its number, 0 first.
        q: ``(H, N, D)`` as attention receives it; N is that of the grid less the padding of the text at its end.
        k: ``(H, N, D)``.
        v: ``(H, N, D)``.
        out: ``(H, N, D)``, what the model's own attention returns for them.
        projection: float32 ``(dim, H * D)``, the output projection with the gate folded into its rows, and where the
            block normalises what is projected, divided by its norm (of a small change, what does not turn the output
            is then counted too).
        residual_square: Mean over tokens of the squared norm of the residual stream that enters the block.
        sample: Which sample of the forward's batch, 0 first.
        samples: How many the batch has.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    projection: Tensor
    residual_square: float
    sample: int = 0
    samples: int = 1

    def branch(self, forward: int) -> int:
        """The branch of guidance that this is in a step's forward of that number: samples are numbered through."""
        return forward * self.samples + self.sample


OnForward = Callable[[float], bool]
OnCall = Callable[[Call], Tensor | None]


@contextmanager
def listening(
    model: nn.Module,
    grid: TokenGrid,
    on_forward: OnForward,
    on_call: OnCall,
    adapter: Adapter | None = None,
    *,
    batches: bool = False,
) -> Iterator[None]:
    """Sends self-attention calls to `on_call` while the context lasts.

    Args:
        model: The transformer, not compiled.
        grid: The token sequence that every forward listened to must have.
        on_forward: Called with the denoising time of every forward; true to listen to its calls.
        on_call: Called with every call of such a forward, for each of its samples alone. Returns None to leave it as
            it is, so that the model computes what it always does, bit for bit, or ``(H, N, D)`` to stand in for its
            output.
        adapter: The model's row; found by its class if absent.
        batches: Whether `on_call` knows what to do with forwards of several samples, such as both branches of guidance.

    Raises:
        ListenError: A forward that is listened to has several samples unasked, another grid, or a residual stream of
            zeros; or the model's row is for attaching only.
        UnknownModelError: No row fits the model.
    """
    adapter = adapter or adapter_for(model)
    if missing := [name for name in ("output_weight", "residual", "gate") if getattr(adapter, name) is None]:
        raise ListenError(f"to record, the row of {adapter.architecture} must have {', '.join(missing)}, got none")
    prices: dict[int, list[tuple[Tensor, float]]] = {}
    """Of each layer entered, the samples whose calls are still to come."""
    sizes: dict[int, int] = {}
    listen = False

    def begin(arguments: Arguments) -> None:
        nonlocal listen
        prices.clear()
        listen = on_forward(float(adapter.time(arguments)))
        if listen and (found := adapter.token_grid(model, arguments)) != grid:
            raise ListenError(f"a forward must have {grid}, got {found}")

    def enter_block(site: InterceptedSite, arguments: Arguments) -> None:
        if not listen:
            return
        residual, gate = adapter.residual(arguments), adapter.gate(site.block, arguments)
        if len(residual) != 1 and not batches:
            raise ListenError(f"a forward must have one sample, got a batch of {len(residual)}")
        weight = adapter.output_weight(site).float()
        prices[site.layer] = [
            _price(site, one, gate[sample % len(gate)], weight) for sample, one in enumerate(residual)
        ]
        prices[site.layer].reverse()
        sizes[site.layer] = len(residual)

    def attend(q: Tensor, k: Tensor, v: Tensor, site: InterceptedSite, context: Any) -> Tensor:
        out = site.stock(q, k, v)
        if not listen:
            return out
        changed = None
        for at in range(len(out)):  # some families call attention for each sample, in their order
            one = slice(at, at + 1)
            other = attend_one(q[one], k[one], v[one], out[one], site)
            if other is not None:
                changed = out.clone() if changed is None else changed
                changed[one] = other
        return out if changed is None else changed

    def attend_one(q: Tensor, k: Tensor, v: Tensor, out: Tensor, site: InterceptedSite) -> Tensor | None:
        left = prices[site.layer]
        projection, square = left.pop()
        if adapter.output_norm is not None:
            video = out[:, grid.text_before :][:, : grid.video_tokens].flatten(2)
            projection = projection / adapter.output_norm(site, video).square().reciprocal().mean().rsqrt()
        q, k, v, plain = (x[0].transpose(0, 1) for x in (q, k, v, out))
        if not q.is_cuda:  # there a copy saves a third of the statistics' time; on a GPU nothing but memory is at stake
            q, k, v, plain = (x.contiguous() for x in (q, k, v, plain))
        samples = sizes[site.layer]
        call = Call(site.layer, q, k, v, plain, projection, square, samples - len(left) - 1, samples)
        other = on_call(call)
        return None if other is None else other.transpose(0, 1)[None].to(out.dtype)

    with torch.no_grad():
        interception = Interception(model, adapter, attend, begin=begin, enter_block=enter_block)
        try:
            yield
        finally:
            interception.detach()


def _price(site: InterceptedSite, residual: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, float]:
    """Projection and residual square of one sample: residual ``(N, dim)``, gate ``(dim,)`` or ``(N, dim)``."""
    # With a gate for each token, its mean square over tokens is what the mean squared error sees.
    gate = gate.float() if gate.ndim == 1 else gate.float().square().mean(0).sqrt()
    square = float(residual.float().square().sum(-1).mean())
    if not 0 < square < float("inf"):
        raise ListenError(f"the residual stream of {site.name} must be finite and not zero, got {square}")
    return gate[:, None] * weight, square
