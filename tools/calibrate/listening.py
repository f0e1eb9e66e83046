"""Intercepts every forward of a sampling's transformers, and keeps other networks out of what is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn

from calibatt.tools.calibrate.chain import ChainError, Traced, floating, plain, replaced, with_attributes
from calibatt.tools.calibrate.gradients import Transformer


class _NoGradient(torch.autograd.Function):
    """Marks what another network made of latents, so that its gradient raises an error.

    Its inputs are the name of the network, how many tensors it made, these, and the latents.
    """

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ChainError(
            f"a final latent must come from the transformers of its sampler alone, got {ctx.name} on the way; a "
            "further denoiser belongs into other_transformers of the sampler"
        )


@contextmanager
def listening(transformers: Sequence[Transformer], hear: Callable[..., Any]) -> Iterator[None]:
    """While the context lasts, calls of transformers become calls of ``hear(transformer, forward, *args, **kwargs)``.

    Networks that hold none of them, such as a VAE, compute without the graph of the sampling; what they return has no
    gradient, and says so if one is asked for.
    """
    links = {each.model for each in transformers}
    left: dict[int, list[Tensor]] = {}

    def leave(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        traced = [x for x in args if isinstance(x, Traced) and x.requires_grad]
        if not traced or not links.isdisjoint(module.modules()):
            return None
        left[id(module)] = traced
        return tuple(map(plain, args))

    def come_back(module: nn.Module, args: Any, output: Any) -> Any:
        if (traced := left.pop(id(module), None)) is None or not (made := floating(output)):
            return None
        with torch.enable_grad():
            ends = _NoGradient.apply(type(module).__name__, len(made), *map(plain, made), *traced)
            return replaced(output, [x.as_subclass(Traced) for x in ends])

    hooks = nn.modules.module
    with ExitStack() as stack:
        for each in transformers:
            run = each.model.forward
            heard = update_wrapper(partial(hear, each, run), run)
            stack.enter_context(with_attributes(each.model, forward=heard))
        for handle in hooks.register_module_forward_pre_hook(leave), hooks.register_module_forward_hook(come_back):
            stack.callback(handle.remove)
        yield
