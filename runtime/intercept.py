"""Routes a model's self-attention through a function of ours: on the model object alone, and undone exactly.

The code of the stock processor runs (projections, normalisation, rotation). Only one of its global names is replaced:
the function that computes attention from q, k and v, or the module that holds it.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from calibatt.runtime.adapters import Adapter, Arguments, Site, unwrap

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "InterceptedSite", Any], torch.Tensor]


def each_sample(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
) -> torch.Tensor:
    """Attention of every sample without the padding at its end, whose outputs are zeros.

    Args:
        attend: ``attend(q, k, v) -> out``, all ``(B, n, H, D)``.
        q: ``(B, N, H, D)``.
        k: As q.
        v: As q.
        lengths: Tokens of each sample; what follows them is padding.
    """
    if all(length == q.shape[1] for length in lengths):
        return attend(q, k, v)
    out = v.new_zeros(v.shape)
    for sample, length in enumerate(lengths):
        part = slice(sample, sample + 1), slice(length)
        out[part] = attend(q[part], k[part], v[part])
    return out


class InterceptionLostError(RuntimeError):
    """Attention processors were replaced under an interception, so that plans would be ignored."""


class OutsideForwardError(RuntimeError):
    """Self-attention was called in a thread in which no forward of the model has begun, so its time is not known."""


class _Forward:
    """The forward that a thread is in."""

    context: Any = None


class _Forwards(threading.local):
    """The state of the calling thread, in an object of its own: `torch.compile` cannot write to a thread-local one."""

    def __init__(self) -> None:
        self.here = _Forward()


@dataclass(frozen=True, eq=False)
class InterceptedSite(Site):
    """The place of a call, as `attend` gets it.

    Eager code reads `layer`. Code that `torch.compile` traces reads `index` instead: a Python number would be compiled
    in, one graph a layer.

    Args:
        index: `layer` as an int64 ``()`` tensor on the CPU.
        original: The function that the model itself calls.
        heads_first: Whether it takes ``(B, H, N, D)``.
    """

    index: torch.Tensor
    original: Callable[..., torch.Tensor]
    heads_first: bool

    def stock(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """What the model itself would have computed from q, k, v; all ``(B, N, H, D)``."""
        if self.heads_first:
            return self.original(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        processor = self.attention.processor
        options = {"backend": getattr(processor, "_attention_backend", None)}
        if (config := getattr(processor, "_parallel_config", None)) is not None:
            options["parallel_config"] = config
        return self.original(q, k, v, **options)


class Interception:
    """Sends every self-attention call of a model through `attend`, from now until `detach` or the end of a ``with``.

    Interceptions of one model stack: the newest is called, the others wait, and they may be detached in any order.
    Threads may share the model: each forward has its own context. Compiled forwards do not `verify`: let `begin` do it
    in an op of its own. Copies of the model, pickled ones too, have the processors found when this began.

    Args:
        model: The transformer, compiled or not.
        adapter: Its row.
        attend: ``attend(q, k, v, site, context) -> out``, all ``(B, N, H, D)``; scores are scaled by ``D ** -0.5``.
        begin: Called with the model's arguments before a forward does anything; what it returns, never None, is
            `context`. Attention outside of a forward, as after ``model.forward(...)``, which no hook sees, is then an
            `OutsideForwardError`.
        parallel: Whether `attend` takes part in context parallelism: it then gets this rank's part of the sequence.
            Otherwise such calls are refused.
        padded: Whether `attend` handles padded text by the lengths of `Adapter.lengths`. Otherwise it is called for
            each sample without its padding, whose outputs are zeros.

    Raises:
        ValueError: A processor's code does not call the function that the adapter names.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        attend: Attend,
        *,
        begin: Callable[[Arguments], Any] | None = None,
        parallel: bool = False,
        padded: bool = False,
    ) -> None:
        self.model = unwrap(model)
        self.adapter = adapter
        self._attend = attend
        self._begin = begin
        self._parallel = parallel
        self._padded = padded
        self._forwards = _Forwards()
        self._above = 0
        sites = adapter.sites(self.model)
        self._processors = [self._processor(site) for site in sites]
        for processor in self._processors:
            processor.site.attention.processor = processor
        for interception in self._beneath():
            interception._above += 1
        self._parameters = _parameters(self.model)
        self._hooks = [self.model.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)]
        if begin is not None:
            self._hooks.append(self.model.register_forward_hook(self._after_forward, always_call=True))

    @property
    def sites(self) -> tuple[InterceptedSite, ...]:
        return tuple(processor.site for processor in self._processors)

    def verify(self) -> None:
        """Proves that calls still come to this interception, or to newer ones.

        Raises:
            InterceptionLostError: They do not; names every site.
        """
        lost = [mine.site.name for mine in self._processors if mine not in _stack(mine.site.attention)]
        if lost:
            raise InterceptionLostError(
                f"attention processors must stay as attached (detach, change them, attach again), got others at "
                f"{', '.join(lost)}"
            )

    def __enter__(self) -> Interception:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Puts back the processors found when this began, the same objects; a second call does nothing.

        They take over what was set on ours since, such as a parallel config. A processor that someone else put there
        since stays.
        """
        for hook in self._hooks:
            hook.remove()
        for interception in self._beneath():
            interception._above -= 1
        for mine in self._processors:
            above = None
            for processor in _stack(mine.site.attention):
                if processor is mine:
                    mine.beneath.__dict__.update(_state(mine))
                    if above is None:
                        mine.site.attention.processor = mine.beneath
                    else:
                        above.beneath = mine.beneath
                above = processor
        self._hooks = []
        self._processors = []

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing_intercepted, ()

    def _call(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: InterceptedSite, options: dict[str, Any]
    ) -> torch.Tensor:
        mask = None
        if self.adapter.valid_text is not None:
            mask = options.pop("attn_mask", None)
        _reject(options, self._parallel)
        context = self._forwards.here.context
        if context is None and self._begin is not None:
            raise OutsideForwardError(
                f"self-attention {site.name} must be called in a forward of the model: call model(...), which runs "
                "hooks, not model.forward(...), and run its blocks in the same thread"
            )
        if mask is None or self._padded:
            return self._attend(q, k, v, site, context)
        lengths = mask[:, 0, 0].sum(1, dtype=torch.int64).tolist()  # (B, 1, 1 or N, N): a query of the video
        return each_sample(lambda q, k, v: self._attend(q, k, v, site, context), q, k, v, lengths)

    def _processor(self, site: Site) -> Any:
        """A copy of the site's processor whose attention comes here."""
        beneath = site.attention.processor
        stack = _stack(site.attention)
        stock = stack[-1].beneath if stack else beneath
        processor = object.__new__(_intercepted(type(stock), self.adapter.dispatch))
        processor.__dict__.update(beneath.__dict__)
        processor.interception = self
        module, _, name = self.adapter.dispatch.rpartition(".")
        names = type(stock).__call__.__globals__
        original = getattr(names[module], name) if module else names[name]
        index = torch.tensor(site.layer, device="cpu")
        processor.site = InterceptedSite(**vars(site), index=index, original=original, heads_first=bool(module))
        processor.beneath = beneath
        return processor

    def _beneath(self) -> list[Interception]:
        """The interceptions that wait until this one is detached."""
        stack = _stack(self._processors[0].site.attention) if self._processors else []
        interceptions = [processor.interception for processor in stack]
        return interceptions[interceptions.index(self) + 1 :] if self in interceptions else []

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self.verify()
        if self._begin is not None and not self._above:
            self._forwards.here.context = self._begin(dict(zip(self._parameters, args, strict=False)) | kwargs)

    def _after_forward(self, *_: Any) -> None:
        self._forwards.here.context = None


def _nothing_intercepted() -> Interception:
    """Takes the place of the interception in copies of a model: its hooks do nothing."""
    interception = object.__new__(Interception)
    interception._processors, interception._begin, interception._forwards = [], None, _Forwards()
    return interception


_OURS = ("interception", "site", "beneath")
"""Attributes of an intercepting processor that its stock processor has not."""


class _Running(threading.local):
    """The intercepting processor whose code runs now, for the function that it calls."""

    processor: Any = None


_running = _Running()


@functools.cache
def _intercepted(stock: type, dispatch: str) -> type:
    """The processor class `stock`, its calls of the function `dispatch` sent to the processor's interception.

    One class for all layers, models and interceptions, so that what is compiled for one serves all.
    """
    original = stock.__call__
    module, _, name = dispatch.rpartition(".")
    if missing := {*filter(None, (module, name))} - set(original.__code__.co_names):
        raise ValueError(f"{stock.__name__} must call {dispatch}, got code without {', '.join(sorted(missing))}")

    def attend(query: Any, key: Any, value: Any, **options: Any) -> Any:
        processor = _running.processor
        return processor.interception._call(query, key, value, processor.site, options)

    def attend_heads_first(query: Any, key: Any, value: Any, **options: Any) -> Any:
        parts = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return attend(*parts, **options).transpose(1, 2)

    # Compiled code looks globals up through the module that __name__ names: there it would find the stock function.
    names = {key: value for key, value in original.__globals__.items() if key != "__name__"}
    if module:
        stand_in = {key: value for key, value in vars(names[module]).items() if key in original.__code__.co_names}
        names[module] = types.SimpleNamespace(**stand_in | {name: attend_heads_first})
    else:
        names[name] = attend
    rebound = types.FunctionType(
        original.__code__, names, original.__name__, original.__defaults__, original.__closure__
    )
    rebound.__kwdefaults__ = original.__kwdefaults__

    def call(processor: Any, *args: Any, **kwargs: Any) -> Any:
        _running.processor = processor
        try:
            return rebound(processor, *args, **kwargs)
        finally:
            _running.processor = None

    def as_stock(processor: Any, _: Any) -> Any:
        """The stock processor, which is copied or pickled instead."""
        plain = object.__new__(stock)
        plain.__dict__.update(_state(processor))
        return plain.__reduce_ex__(1)  # later protocols name the class of what is pickled

    call.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return type(f"Intercepted{stock.__name__}", (stock,), {"__call__": call, "__reduce_ex__": as_stock})


def _state(processor: Any) -> dict[str, Any]:
    """What the stock processor of an intercepting one would have as attributes."""
    return {name: value for name, value in vars(processor).items() if name not in _OURS}


def _reject(options: dict[str, Any], parallel: bool) -> None:
    """Options of attention that no known family uses, and that must not be ignored."""
    for option, value in options.items():
        if value is None or value is False or option == "backend" or (parallel and option == "parallel_config"):
            continue
        if isinstance(value, torch.Tensor) or value:
            raise NotImplementedError(f"self-attention must be called without {option}, got {type(value).__name__}")


def _parameters(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _stack(attention: nn.Module) -> list[Any]:
    """The intercepting processors of a module, newest first."""
    processors = []
    processor = attention.processor
    while hasattr(processor, "beneath"):
        processors.append(processor)
        processor = processor.beneath
    return processors
