"""Decides which plan and segment each forward of a model follows and which backend executes it, and executes it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from calibatt.plans import ModelSignature, TokenGrid
from calibatt.runtime import custom_op, ops
from calibatt.runtime.adapters import (
    Adapter,
    Arguments,
    PlanMismatchError,
    Site,
    naming_the_missing,
)
from calibatt.runtime.backends import UnsupportedBackendError
from calibatt.runtime.intercept import InterceptedSite, Interception, each_sample
from calibatt.runtime.parallel import Share, Ulysses, ulysses_of
from calibatt.runtime.resident import LoadedPlan, ResidentSchedules
from calibatt.runtime.schedule import AttentionSchedule
from calibatt.runtime.timesteps import Timesteps

STOCK = -1
"""Takes the place of an entry where the model's own attention runs."""


class Here(threading.local):
    """The entry of the calling thread's forward."""

    entry: int | None = None


class Session:
    """Executes plans in one model, for any number of threads. Knows the model only through its interception, so that
    models can be freed.

    Args:
        plans: The plans, each for a grid of its own.
        adapter: The model's row.
        backend: ``auto`` or a name.
        dense: Whether a forward with another grid runs the model's own attention instead of raising an error.
    """

    interception: Interception

    def __init__(self, plans: Sequence[LoadedPlan], adapter: Adapter, backend: str, dense: bool) -> None:
        self.entries = [(plan, segment) for plan in plans for segment in range(len(plan.segments))]
        """The entries: all segments of all plans. Ops name a segment by its index here."""
        self.plans = {plan.grid: plan for plan in plans}
        self.first_entry = {plan.grid: self.entries.index((plan, 0)) for plan in plans}
        self.adapter = adapter
        self.timesteps = Timesteps()
        self.backend = backend
        self.dense = dense
        self.warned: set[str] = set()
        self.number = custom_op.open_session(self)
        self.device = torch.device("cpu")
        self.here = Here()
        self.after: dict[int, int] = {}
        """For each entry, the one that followed it last time."""
        self.backends: dict[tuple[torch.device, torch.dtype], list[list[str]]] = {}
        """The backend of each entry and layer, by device and dtype."""
        self.ulysses: Ulysses | None = None
        """The ranks that run each forward together, if there are several."""
        self.shares: dict[LoadedPlan, ResidentSchedules] = {}
        """This rank's share of each plan, if there are several ranks."""

    def join(self, model: nn.Module, places: Sequence[Site]) -> None:
        """Notes how the model is spread over ranks now.

        Raises:
            ParallelismError: In a way that plans cannot follow.
        """
        ulysses = ulysses_of(model, places)
        if ulysses != self.ulysses:
            self.ulysses = ulysses
            self.shares = {plan: share_plan(plan, ulysses) for plan in self.plans.values()} if ulysses else {}

    def check_parallel(self, plan: LoadedPlan) -> None:
        """Proves that a plan can be spread over the ranks.

        Raises:
            ParallelismError: It cannot.
        """
        if self.ulysses:
            self.ulysses.check(plan.signature.heads, plan.grid.tokens)

    def prepare(self, device: torch.device, dtype: torch.dtype) -> list[list[str]]:
        """Chooses the backend of every schedule on a device, and puts the noisiest segment of a single plan there.

        Raises:
            UnsupportedBackendError: No backend can execute one, or the chosen one cannot; says why for each.
        """
        chosen = self.backends.get((device, dtype))
        if chosen is None:
            chosen = [
                [self._choose(plan, segment, layer, device, dtype) for layer in range(plan.signature.layers)]
                for plan, segment in self.entries
            ]
            self.backends[device, dtype] = chosen
            if len(self.plans) == 1:
                noisiest = len(self.entries) - 1
                with self.entries[noisiest][0].lock:
                    self._enter(noisiest)
                    for schedule in self._layers(noisiest):
                        schedule.bind(device)
        self.device = device
        return chosen

    def _choose(self, plan: LoadedPlan, segment: int, layer: int, device: torch.device, dtype: torch.dtype) -> str:
        schedule, head_dim = plan.layers(segment)[layer], plan.signature.head_dim
        if self.backend == "auto":
            return ops.choose_backend(schedule, device, dtype, head_dim)
        if reasons := ops.supports(schedule, device, dtype, head_dim, self.backend):
            raise UnsupportedBackendError(
                f"backend {self.backend!r} cannot execute segment {segment}, layer {layer}: {'; '.join(reasons)}"
            )
        return self.backend

    def device_bytes(self, plan: LoadedPlan) -> int:
        """Bytes of index arrays on all devices: of the plan, and of this rank's shares."""
        return plan.bound_bytes + (self.shares[plan].bound_bytes if plan in self.shares else 0)

    def _layers(self, entry: int) -> Sequence[AttentionSchedule]:
        """The schedules that are executed here: the plan's, or this rank's shares of them."""
        plan, segment = self.entries[entry]
        return self.shares.get(plan, plan).layers(segment)

    def _enter(self, entry: int) -> None:
        plan, segment = self.entries[entry]
        owner, following = self.entries[self._following(entry)]
        resident = self.shares.get(plan, plan)
        resident.make_room(segment, *([following] if owner is plan and following != segment else []))

    def _following(self, entry: int) -> int:
        """The entry that is expected next: time falls, and after a video comes another."""
        plan, segment = self.entries[entry]
        return self.after.get(entry, entry - 1 if segment else entry + len(plan.segments) - 1)

    def read_time(self, time: torch.Tensor) -> float:
        """The denoising time, from the adapter's value or from the timestep itself on any device."""
        if self.adapter.timestep is not None:
            time = self.adapter.time({self.adapter.timestep: self.timesteps.read(time)})
        return float(time)

    def resolve(self, time: torch.Tensor, grid: tuple[int, ...], coordinates: torch.Tensor | None) -> tuple[int, int]:
        """Prepares a forward; returns its entry, and where the video starts.

        Args:
            time: The adapter's time, or the timestep.
            grid: The result of `Adapter.grid`.
            coordinates: Of the tokens, from which the grid is then read.

        Raises:
            PlanMismatchError: The forward must not run.
        """
        if time.numel() == 0:  # an empty batch
            return STOCK, 0
        self.interception.verify()
        self.join(self.interception.model, self.interception.sites)
        try:
            if coordinates is not None:
                grid = self.adapter.grid(self.interception.model.config, {self.adapter.coordinates: coordinates})
            *video, start = grid
            plan = self.plans.get(grid := TokenGrid(*video))
            if plan is None:
                raise PlanMismatchError(f"grid must be {' or '.join(map(str, self.plans))}, got {grid}")
        except PlanMismatchError as error:
            message = f"forward does not fit the plan: {error}"
            if not self.dense:
                raise PlanMismatchError(message) from None
            if message not in self.warned:
                self.warned.add(message)
                warnings.warn(f"{message}; such forwards run the model's own attention", stacklevel=2)
            return STOCK, 0
        self.check_parallel(plan)
        if self.ulysses and start:  # checked where every rank comes: a rank that waits for one that raised would hang
            raise PlanMismatchError(f"a sequence over ranks must begin with the video, got {start} tokens before it")
        entry, before = self.first_entry[grid] + plan.file.segment_index(self.read_time(time)), self.here.entry
        with plan.lock:
            if entry != before:
                if before is not None:
                    self.after[before] = entry
                self.here.entry = entry
                self._enter(entry)
            self._layers(entry)[0].bind(self.device)
        return entry, start

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: torch.Tensor | None,
        video_start: int,
        entry: int,
        layer: int,
    ) -> torch.Tensor:
        """Attention of one layer; all ``(B, N, H, D)``. The video's tokens follow each other from `video_start` on.
        With lengths, int32 ``(B,)`` on the device, what follows them in a sample is padding.
        """
        if entry == STOCK:
            stock = self.interception.sites[layer].stock
            return stock(q, k, v) if lengths is None else each_sample(stock, q, k, v, lengths.tolist())
        ops.check_alike(q, k, v, lengths)
        plan, _ = self.entries[entry]
        with plan.lock:
            backend = self.prepare(q.device, q.dtype)[entry][layer]
            self._check_tokens(q, video_start, entry, layer)
            schedules = self._layers(entry)
            schedule = schedules[layer]
            if isinstance(schedule, Share):
                q, k, v = schedule.tokens_to_heads(q, k, v)
            parts = (x.transpose(1, 2) for x in (q, k, v))
            out = ops.attend(*parts, schedule, backend, video_start=video_start, lengths=lengths).transpose(1, 2)
            if isinstance(schedule, Share):
                out = schedule.heads_to_tokens(out)
        # While the device computes, copy arrays to it: the next layer's, and this layer's of the next segment.
        following = self._following(entry)
        owner, _ = self.entries[following]
        for coming in schedules[layer + 1 : layer + 2]:
            coming.prefetch(q.device, plan.lock)
        self._layers(following)[layer].prefetch(q.device, owner.lock)
        return out

    def _check_tokens(self, q: torch.Tensor, video_start: int, entry: int, layer: int) -> None:
        """Proves that ``(B, N, H, D)`` queries are of all heads and hold the video.

        Raises:
            PlanMismatchError: Heads or tokens were split before attention.
        """
        plan, _ = self.entries[entry]
        least, heads, tokens = video_start + plan.grid.tokens, plan.signature.heads, q.shape[1]
        if self.ulysses:
            least = self.ulysses.lengths(plan.grid.tokens)[self.ulysses.rank]
        if q.shape[2] != heads or tokens < least or (self.ulysses and tokens > least):
            rule = str(least) if self.ulysses else f"at least {least}"
            raise PlanMismatchError(
                f"attention of layer {layer} must get {rule} tokens of {heads} heads, got {tokens} of {q.shape[2]}"
            )


def where_it_runs(model: nn.Module, weight: torch.Tensor) -> tuple[torch.device, torch.dtype]:
    """Device and dtype in which a model's attention computes, even if its weights are stored elsewhere or otherwise."""
    # diffusers' properties take its group offloading and layerwise casting into account.
    device, dtype = getattr(model, "device", weight.device), getattr(model, "dtype", weight.dtype)
    for module in model.modules():  # accelerate's offloading
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if (execution := getattr(each, "execution_device", None)) is not None:
                return torch.device(execution), dtype
    return device, dtype


def share_plan(plan: LoadedPlan, ulysses: Ulysses) -> ResidentSchedules:
    """This rank's shares of all schedules of a plan."""
    segments = range(len(plan.segments))
    return ResidentSchedules([[Share(schedule, ulysses) for schedule in plan.layers(each)] for each in segments])


def intercepted(model: nn.Module, adapter: Adapter, session: Session) -> Interception:
    """The seam that `torch.compile` traces: arguments in, ops out. It keeps the session alive."""
    config, name = model.config, adapter.timestep
    said = adapter.time if name is None else naming_the_missing(lambda arguments: arguments[name], adapter.architecture)

    def begin(arguments: Arguments) -> tuple[torch.Tensor, torch.Tensor | None]:
        coordinates = arguments.get(adapter.coordinates) if adapter.coordinates else None
        grid = adapter.grid(config, arguments) if coordinates is None else ()
        segment = torch.ops.calibatt.resolve_segment(said(arguments), grid, coordinates, session.number)
        return segment, adapter.lengths(config, arguments)

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        site: InterceptedSite,
        context: tuple[torch.Tensor, torch.Tensor | None],
    ) -> torch.Tensor:
        segment, lengths = context
        q, k, v = ops.as_attention_takes(q, k, v)
        return torch.ops.calibatt.attend(q, k, v, lengths, segment, site.index, session.number)

    return Interception(model, adapter, attend, begin=begin, parallel=True, padded=True)


def check_signature(plan: ModelSignature, model: ModelSignature) -> None:
    """Raises `PlanMismatchError` if a plan is for another model; the message lists all differences."""
    wrong = [
        f"{name} must be {expected!r}, got {actual!r}"
        for name in ("architecture", "layers", "heads", "head_dim")
        if (expected := getattr(plan, name)) != (actual := getattr(model, name))
    ]
    if plan.weights_digest and model.weights_digest and plan.weights_digest != model.weights_digest:
        wrong.append(f"weights_digest must be {plan.weights_digest!r}, got {model.weights_digest!r}")
    if wrong:
        raise PlanMismatchError(f"model does not fit the plan: {'; '.join(wrong)}")
