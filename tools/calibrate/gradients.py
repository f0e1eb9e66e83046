"""Gradients through one forward of a transformer, block by block, including that of every self-attention.

The forward is computed again, and only the inputs of blocks are stored, on the CPU if asked for. Then every block is
computed once more, last one first, and differentiated. Weights, LoRA, quantised linears and offloading may be in use.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calibatt.runtime.adapters import Adapter
from calibatt.runtime.intercept import InterceptedSite, Interception
from calibatt.tools.calibrate.attention import attention
from calibatt.tools.calibrate.chain import Chain, ChainError, Cotangents, Given, floating, replaced, with_attributes

LARGE_BYTES = 1 << 20
"""Inputs of blocks of at least this size are moved to the CPU; smaller ones stay."""
HALF_EXPONENT, HALF_STEP, HALF_TRIES = 5, 6, 4
"""For fp16: gradients are scaled to at most 2 ** 5, after an overflow to 2 ** 6 less; so many times at most."""


LEAST_REST = 1e-3
"""The mass of a block for a query counts as at most 1 less this."""
LEAST_KEPT = 1e-20
"""A mask that keeps less of a query's mass than this counts as keeping none."""
EVERY = slice(None)
"""The video's tokens in a sequence without prefix and suffix."""


class OverflowInHalf(ArithmeticError):
    """A gradient in fp16 is not finite: it has to be scaled down."""


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One self-attention call of one sample, with its gradient.

    Args:
        layer: Number of the self-attention, from 0.
        q: ``(H, N, D)`` as attention receives it, without padding at its end.
        k: ``(H, N, D)``.
        v: ``(H, N, D)``.
        out: ``(H, N, D)``, its output.
        total: float32 ``(H, N)``, natural logarithm of the sum of each query's exponentials; None on a CPU.
        grads: V gradients of the output, ``(H, N, D)``.
        scale: The number by which all gradients must be divided.
        video: The video's tokens; the others are keys of every mask, and their queries are dense.
        input_grads: For each of V vectors the gradients of q, k and v; None where an input needs none.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    total: Tensor | None
    grads: list[Tensor]
    scale: float = 1.0
    video: slice = field(default_factory=lambda: EVERY)
    input_grads: list[tuple[Tensor | None, ...]] = field(default_factory=list)

    @property
    def span(self) -> tuple[int, int]:
        """The first token of the video, and the first one after it."""
        return self.video.indices(self.q.shape[1])[:2]


OnAttention = Callable[[AttentionCall], None]


class Transformer:
    """A transformer whose forwards can be differentiated.

    Args:
        model: The model, eager, with no step cache.
        adapter: Its row.
        inputs_on_cpu: Keep what enters a block on the CPU.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, *, inputs_on_cpu: bool = False) -> None:
        self.model, self.adapter = model, adapter
        self.inputs_on_cpu = inputs_on_cpu
        self._calls: list[tuple[int, tuple[Tensor, ...], Tensor | None, list[Tensor], list[list[Tensor]], slice]] = []

    def pull(self, given: Given, cotangents: Cotangents, on_attention: OnAttention | None = None) -> Cotangents:
        """Gradients of a forward's inputs.

        Args:
            given: The forward's arguments.
            cotangents: Gradients of its floating-point outputs.
            on_attention: Called with every self-attention call of every sample, last layer first.

        Returns:
            Gradients of the arguments that want one, in float32.

        Raises:
            ChainError: Nothing has a gradient.
        """
        device = next(iter(floating(given.flat))).device
        cotangents = [[x.to(device, torch.float32) for x in some] for some in cotangents]
        largest = max(float(x.abs().max()) for some in cotangents for x in some)
        half = any(x.dtype == torch.float16 for x in floating([*self.model.parameters(), given.flat]))
        exponent = HALF_EXPONENT - math.frexp(largest)[1] if half and largest else 0
        done: set[tuple[int, int]] = set()
        for _ in range(HALF_TRIES):
            scale = 2.0**exponent
            try:
                scaled = [[x * scale for x in some] for some in cotangents]
                gradients = self._pull(given, scaled, scale, half, on_attention, done)
            except OverflowInHalf:
                exponent -= HALF_STEP
                continue
            return [[x.float() / scale for x in some] for some in gradients]
        raise ChainError(f"gradients in fp16 must be finite, got an overflow at a scale of 2^{exponent}; use bfloat16")

    def _pull(
        self,
        given: Given,
        cotangents: Cotangents,
        scale: float,
        half: bool,
        on_attention: OnAttention | None,
        done: set[tuple[int, int]],
    ) -> Cotangents:
        chain = Chain()
        wanted = given.wanted or [_hidden_states(self.model, given)]
        flat = list(given.flat)
        sources = []
        for index in wanted:
            flat[index] = flat[index].detach().requires_grad_()
            sources.append(flat[index])

        def hand_on() -> None:
            """Gives `on_attention` the calls of the block that was just pulled."""
            for layer, (q, k, v, out), total, grads, inputs, video in self._calls:
                assert on_attention is not None
                if not all(bool(grad.isfinite().all()) for some in (grads, *inputs) for grad in some):
                    if half:
                        raise OverflowInHalf
                    raise ChainError(f"the gradient of self-attention {layer} must be finite, got NaN or infinity")
                for sample in range(len(q)):
                    at = layer, handed_on[layer]
                    handed_on[layer] += 1
                    if at in done:
                        continue
                    tensors = (x[sample] for x in (q, k, v, out))
                    sums = None if total is None else total[sample]
                    of_out = [grad[sample] for grad in grads]
                    of_inputs = [
                        tuple(some[vector][sample] if some else None for some in inputs) for vector in range(len(grads))
                    ]
                    on_attention(AttentionCall(layer, *tensors, sums, of_out, scale, video, of_inputs))
                    done.add(at)
            self._calls.clear()

        handed_on: Counter[int] = Counter()
        """By layer, how many calls have been given."""
        with (
            _frozen(self.model),
            self._blocks_as_links(chain, hand_on, given.call(self._video), listening=on_attention is not None),
        ):
            with torch.enable_grad(), _keeping_weights():
                out = floating(given.call(self.model, flat))
            gradients = chain.pull(
                out, [[x.to(y.dtype) for x, y in zip(some, out, strict=True)] for some in cotangents], sources
            )
        if not chain.links:
            raise ChainError(f"a forward of {type(self.model).__name__} must run its blocks, got none")
        if half and not all(bool(x.isfinite().all()) for some in gradients for x in some):
            raise OverflowInHalf
        return gradients if given.wanted else [[] for _ in cotangents]

    def _video(self, *args: Any, **kwargs: Any) -> slice:
        """Which tokens are the video's in a forward with these arguments."""
        arguments = inspect.signature(type(self.model).forward).bind(self.model, *args, **kwargs).arguments
        start = self.adapter.video_start(self.model, arguments)
        return slice(start, start + self.adapter.token_grid(self.model, arguments).tokens)

    @contextmanager
    def _blocks_as_links(
        self, chain: Chain, hand_on: Callable[[], None], video: slice, listening: bool
    ) -> Iterator[None]:
        """While the context lasts, every block of the model adds itself to the chain instead of being differentiated by
        autograd; with `listening`, calls of attention and their gradients are collected for `hand_on`.
        """

        def attend(q: Tensor, k: Tensor, v: Tensor, site: InterceptedSite, _: Any) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out, total = attention(q, k, v)
            if listening and torch.is_grad_enabled() and out.requires_grad:
                grads: list[Tensor] = []
                out.register_hook(grads.append)
                inputs: list[list[Tensor]] = [[], [], []]
                for x, collected in zip((q, k, v), inputs, strict=True):
                    if x.requires_grad:
                        x.register_hook(collected.append)
                detached = tuple(x.detach() for x in (q, k, v, out))
                self._calls.append((site.layer, detached, total, grads, inputs, video))
            return out.transpose(1, 2)

        self._calls.clear()
        interception = Interception(self.model, self.adapter, attend)
        blocks = {id(site.block): site.block for site in interception.sites}.values()
        names = {id(module): name for name, module in self.model.named_modules()}
        with ExitStack() as stack:
            stack.callback(self._calls.clear)
            stack.enter_context(interception)
            for block in blocks:
                forward = partial(self._block, block, block.forward, names[id(block)], chain, hand_on)
                stack.enter_context(with_attributes(block, forward=forward))
            yield

    def _block(
        self,
        block: nn.Module,
        run: Callable[..., Any],
        name: str,
        chain: Chain,
        hand_on: Callable[[], None],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        given, inputs = Given.of(args, kwargs)
        with torch.no_grad():
            output = given.call(run)
        if self.inputs_on_cpu:
            own = set(given.wanted)  # the rest, such as rotations, is shared by all blocks
            given = replace(given, flat=[_to_cpu(x) if index in own else x for index, x in enumerate(given.flat)])
        devices = [x.device for x in inputs]

        def pull(cotangents: Cotangents) -> Cotangents:
            grads = _pull_block(block, name, run, given, devices, cotangents)
            hand_on()
            return grads

        return replaced(output, chain.add(name, inputs, floating(output), pull))


def _pull_block(
    block: nn.Module,
    name: str,
    run: Callable[..., Any],
    given: Given,
    devices: Sequence[torch.device],
    cotangents: Cotangents,
) -> Cotangents:
    device = devices[0] if devices else None
    flat = [x.to(device) if isinstance(x, Tensor) and _moved(x) else x for x in given.flat]
    for index in given.wanted:
        flat[index] = flat[index].detach().requires_grad_()
    wanted = [flat[index] for index in given.wanted]
    with at_hand(block):
        with torch.enable_grad(), _keeping_weights():
            outputs = floating(given.call(run, flat))
        live = [index for index, x in enumerate(outputs) if x.requires_grad]
        if not live:
            raise ChainError(f"{name} must depend on its inputs by differentiation, got outputs without gradient")
        grads = []
        for vector, some in enumerate(cotangents):
            last = vector + 1 == len(cotangents)
            grads.append(
                torch.autograd.grad(
                    [outputs[index] for index in live],
                    wanted,
                    [some[index] for index in live],
                    retain_graph=not last,
                    allow_unused=True,
                )
            )
    return [
        [torch.zeros_like(x) if grad is None else grad for x, grad in zip(wanted, some, strict=True)] for some in grads
    ]


def _keeping_weights() -> torch.autograd.graph.saved_tensors_hooks:
    """Saves the data that a parameter has now for the backward, since offloading gives it other data afterwards."""
    return torch.autograd.graph.saved_tensors_hooks(
        lambda x: x.detach() if isinstance(x, nn.Parameter) else x, lambda x: x
    )


def _moved(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() * x.element_size() >= LARGE_BYTES


def _to_cpu(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_cuda or x.numel() * x.element_size() < LARGE_BYTES:
        return x
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)


def _hidden_states(model: nn.Module, given: Given) -> int:
    """Index of the argument `hidden_states`: in the first forward of a sampling nothing else would need a gradient."""
    marked = [object() for _ in given.flat]

    def find(*args: Any, **kwargs: Any) -> Any:
        return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    return marked.index(given.call(find, marked))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight of the model needs a gradient while the context lasts."""
    needed = [name for name, p in model.named_parameters() if p.requires_grad]
    for name in needed:
        model.get_parameter(name).requires_grad_(False)
    try:
        yield
    finally:
        for name in needed:  # offloading may have put another object there
            model.get_parameter(name).requires_grad_(True)


@contextmanager
def at_hand(block: nn.Module) -> Iterator[None]:
    """Puts the parts of a block that diffusers' group offloading has moved away on the device while the context lasts.

    Hooks expect forwards in the model's order: a block in the midst of a group would not load it, and a block that
    loads the next one ahead would leave it on the device.
    """
    hooks = [hook for module in block.modules() if (hook := _group_hook(module)) is not None]
    groups = {id(hook.group): hook.group for hook in hooks}.values()
    for group in groups:
        group.onload_()
        if group.stream is not None:
            group.stream.synchronize()
    try:
        yield
    finally:
        ahead = {id(hook.next_group): hook.next_group for hook in hooks if hook.next_group is not None}
        for group in (*groups, *ahead.values()):
            group.offload_()


def _group_hook(module: nn.Module) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook("group_offloading")
