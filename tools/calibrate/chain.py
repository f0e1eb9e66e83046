"""A computation as a chain of links, each of which is differentiated by itself; autograd does the arithmetic between.

A sampling is such a chain: its links are the forwards of the transformer, and between them are guidance, scheduler and
whatever else the pipeline does to latents. A forward of the transformer is a chain as well: its links are the blocks.
The outputs of a link are leaves of autograd's graph, so that graph holds only what happens between links.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Cotangents = list[list[Tensor]]
"""``[vector][tensor]``: a gradient of each tensor, for each of several vectors."""
Place = tuple[int, int]
"""A tensor's origin: number of the link, and which of its outputs."""


class ChainError(RuntimeError):
    """What was computed cannot be differentiated."""


class Traced(Tensor):
    """A tensor whose arithmetic is recorded for differentiation under `torch.no_grad` too, where pipelines run."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled():
            raise ChainError("a recorded sampling must run without torch.inference_mode (torch.no_grad is fine)")
        if func is Tensor.__setitem__ and type(args[0]) is Tensor and not args[0].requires_grad and _is_shared(args[0]):
            raise ChainError(
                "a tensor into which latents are written in place must have no view that something else kept, such as "
                "the last sample of a scheduler: how that changes has no gradient"
            )
        if func in (Tensor.numpy, Tensor.__array__):
            args = (args[0].detach(), *args[1:])
        # Derivatives need copies, since latents may be written over; those of scaling and adding need no tensor at all.
        kept = torch.autograd.graph.saved_tensors_hooks(lambda x: plain(x).clone(), lambda x: x)
        with torch.enable_grad(), kept:
            result = super().__torch_function__(func, types, args, kwargs or {})
        # A traced tensor was written into an ordinary one, whose arithmetic must be recorded from here on.
        if args and type(args[0]) is Tensor and args[0].requires_grad and not args[0].is_leaf:
            args[0].__class__ = cls
        return result


def _is_shared(x: Tensor) -> bool:
    """Whether other tensors share the memory of this one."""
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata) > 2  # type: ignore[attr-defined]


def plain(x: Any) -> Any:
    """A traced tensor as an ordinary one without gradient; anything else as it is."""
    return x.detach().as_subclass(Tensor) if isinstance(x, Traced) else x


@dataclass(frozen=True, eq=False)
class Given:
    """The arguments of a function, ready to call it again.

    Args:
        flat: All values, tensors without gradient.
        structure: How positional and keyword arguments are put together from them.
        wanted: Indices of those that need a gradient.
    """

    flat: list[Any]
    structure: TreeSpec
    wanted: list[int]

    @classmethod
    def of(cls, args: Any, kwargs: Any) -> tuple[Given, list[Tensor]]:
        """Arguments of a call, and the tensors among them that need a gradient, with the graph that made them."""
        flat, structure = tree_flatten((args, kwargs))
        wanted = [index for index, x in enumerate(flat) if isinstance(x, Tensor) and x.requires_grad]
        inputs = [flat[index] for index in wanted]
        for index in wanted:
            flat[index] = flat[index].detach()
        flat = [plain(x) for x in flat]
        # Tensors made in torch.inference_mode, such as embeddings of a prompt, cannot enter a graph; their copies can.
        flat = [x.clone() if isinstance(x, Tensor) and x.is_inference() else x for x in flat]
        return cls(flat, structure, wanted), inputs

    def call(self, run: Callable[..., Any], flat: list[Any] | None = None) -> Any:
        """Calls a function with these arguments, or with `flat` in place of their values."""
        args, kwargs = tree_unflatten(self.flat if flat is None else flat, self.structure)
        return run(*args, **kwargs)


def floating(value: Any) -> list[Tensor]:
    """The floating-point tensors of a result, at any depth."""
    return [x for x in tree_flatten(value)[0] if isinstance(x, Tensor) and x.is_floating_point()]


def replaced(value: Any, tensors: Iterable[Tensor]) -> Any:
    """A result with other tensors in place of its floating-point ones."""
    flat, structure = tree_flatten(value)
    others = iter(tensors)
    return tree_unflatten(
        [next(others) if isinstance(x, Tensor) and x.is_floating_point() else x for x in flat], structure
    )


Pull = Callable[[Cotangents], Cotangents]
"""Turns gradients of a link's outputs into gradients of its inputs."""


@dataclass(frozen=True, eq=False)
class Link:
    """One step of a chain; see `Chain.add`."""

    name: str
    inputs: list[Tensor | Place]
    outputs: list[weakref.ref[Tensor]]
    like: list[tuple[torch.Size, torch.dtype, torch.device]]
    pull: Pull


class Chain:
    """The links of a computation, in the order in which they were computed.

    Outputs are held weakly: one that goes straight into another link, as hidden states go from block to block, needs no
    memory here.
    """

    def __init__(self) -> None:
        self.links: list[Link] = []

    def add(self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], pull: Pull) -> list[Tensor]:
        """Adds a link.

        Args:
            name: What it is, for messages.
            inputs: Those of its inputs that need a gradient.
            outputs: The tensors that it returned, without gradient.
            pull: Turns gradients of the outputs into gradients of the inputs.

        Returns:
            The outputs as leaves that need a gradient.
        """
        leaves = [x.detach().requires_grad_() for x in outputs]
        for position, leaf in enumerate(leaves):
            leaf._place = (len(self.links), position)  # type: ignore[attr-defined]
        direct = [getattr(x, "_place", x) for x in inputs]
        like = [(x.shape, x.dtype, x.device) for x in leaves]
        self.links.append(Link(name, direct, [weakref.ref(x) for x in leaves], like, pull))
        return leaves

    def pull(
        self, ends: Sequence[Tensor], cotangents: Cotangents, sources: Sequence[Tensor] = (), first: int = 0
    ) -> Cotangents:
        """Gradients with respect to the sources of the chain; links are pulled last one first.

        Args:
            ends: The tensors in which the chain ends.
            cotangents: Gradients of the ends.
            sources: The leaves with which the chain begins.
            first: Number of the link that is pulled last; 0 if gradients of the sources are wanted.

        Returns:
            Gradients of the sources, zeros where nothing depends on one.

        Raises:
            ChainError: The ends do not depend on a link, which is named: something between has no gradient.
        """
        total: dict[tuple[int, Place], Tensor] = {}
        before = {(-1, index): source for index, source in enumerate(sources)}
        for link, each in enumerate(self.links):
            alive = {(link, index): output() for index, output in enumerate(each.outputs)}
            before |= {place: leaf for place, leaf in alive.items() if leaf is not None}

        def add(vector: int, place: Place, grad: Tensor) -> None:
            held = total.get((vector, place))
            total[vector, place] = grad if held is None else held + grad

        def spread(tensors: Sequence[Tensor | Place], given: Cotangents) -> None:
            """Passes gradients of tensors on to the outputs and sources that they were computed from."""
            made = [index for index, x in enumerate(tensors) if isinstance(x, Tensor) and x.requires_grad]
            for vector, grads in enumerate(given):
                for x, grad in zip(tensors, grads, strict=True):
                    if not isinstance(x, Tensor):
                        add(vector, x, grad)
                if not made or not before:
                    continue
                grads = torch.autograd.grad(
                    [tensors[index] for index in made],  # type: ignore[misc]
                    list(before.values()),
                    [grads[index].to(tensors[index].dtype) for index in made],  # type: ignore[union-attr]
                    retain_graph=True,
                    allow_unused=True,
                )
                for place, grad in zip(before, grads, strict=True):
                    if grad is not None:
                        add(vector, place, plain(grad))

        def taken(vector: int, place: Place, like: tuple[torch.Size, torch.dtype, torch.device]) -> Tensor:
            grad = total.pop((vector, place), None)
            return torch.zeros(like[0], dtype=like[1], device=like[2]) if grad is None else grad

        spread([getattr(x, "_place", x) for x in ends], cotangents)
        for number in reversed(range(first, len(self.links))):
            link = self.links[number]
            places = [(number, index) for index in range(len(link.outputs))]
            if not any((0, place) in total for place in places):
                raise ChainError(
                    f"what comes after {link.name} must depend on it by differentiation, got nothing that does"
                )
            given = [
                [taken(vector, place, like) for place, like in zip(places, link.like, strict=True)]
                for vector in range(len(cotangents))
            ]
            for place in places:
                before.pop(place, None)
            spread(link.inputs, link.pull(given))
        return [
            [taken(vector, (-1, index), (x.shape, x.dtype, x.device)) for index, x in enumerate(sources)]
            for vector in range(len(cotangents))
        ]


@contextmanager
def with_attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Gives something other attributes for a while, among them what offloading and compiling have put there."""
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    vars(owner).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(owner)[name]
        vars(owner).update(before)
