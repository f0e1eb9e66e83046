"""Plans at run time: load one, ask it, attach it to a model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from os import PathLike
from types import TracebackType
from typing import Literal

import torch
from torch import nn

from calibatt.plans import Blocks, ModelSignature, PlanError, PlanFile, Segment, StoredLayers, TokenGrid
from calibatt.runtime import custom_op, ops
from calibatt.runtime.adapters import Adapter, Arguments, adapter_for
from calibatt.runtime.backends import UnsupportedBackendError
from calibatt.runtime.intercept import InterceptedSite, Interception
from calibatt.runtime.schedule import LayerSchedule, StoredSchedule

STOCK = -1
"""In place of a segment: the model's own attention."""
RESIDENT_BYTES = 1 << 30
"""Index arrays of a plan stay on devices up to so many bytes, and always those of the segment at work and the next one.
A small plan is put there once; a segment of a large one each time that it comes."""


class PlanMismatchError(PlanError):
    """A plan is not for this model or this resolution; says everything that differs."""


class Plan:
    """A plan that is ready to run; immutable.

    A schedule is decoded when it is put on a device, and the last used ones stay there, up to `RESIDENT_BYTES`.

    Args:
        file: The plan's contents.
    """

    def __init__(self, file: PlanFile) -> None:
        self.file = file
        layers, stored = range(file.signature.layers), file.schedules
        self._schedules: tuple[tuple[LayerSchedule, ...], ...] = tuple(
            tuple(StoredSchedule(stored, segment, layer) for layer in layers)
            if isinstance(stored, StoredLayers)
            else tuple(map(LayerSchedule, stored[segment]))
            for segment in range(len(file.segments))
        )
        self._last_used: list[int] = []

    @property
    def signature(self) -> ModelSignature:
        return self.file.signature

    @property
    def grid(self) -> TokenGrid:
        return self.file.grid

    @property
    def blocks(self) -> Blocks:
        return self.file.blocks

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.file.segments

    def schedule(self, time: float, layer: int) -> LayerSchedule:
        """What a layer executes at a denoising time; the same object for all times of a segment.

        Raises:
            ValueError: `time` is not in [0, 1], or the model has no such layer.
        """
        if not 0 <= layer < self.signature.layers:
            raise ValueError(f"layer must be 0 to {self.signature.layers - 1}, got {layer}")
        return self._schedules[self.file.segment_index(time)][layer]

    def layers(self, segment: int) -> Sequence[LayerSchedule]:
        """The schedules of all layers in one segment."""
        return self._schedules[segment]

    def make_room(self, *segments: int) -> None:
        """Lets go of the arrays of the segments used longest ago, beyond `RESIDENT_BYTES`; never of those named."""
        others = [each for each in self._last_used if each not in segments]
        self._last_used = [*segments, *others]
        total = sum(self._bound_bytes(each) for each in segments)
        for each in others:
            total += self._bound_bytes(each)
            if total > RESIDENT_BYTES:
                for schedule in self._schedules[each]:
                    schedule.unbind()

    def _bound_bytes(self, segment: int) -> int:
        return sum(schedule.bound_bytes for schedule in self._schedules[segment])

    def attach(
        self,
        model: nn.Module,
        *,
        backend: str = "auto",
        on_mismatch: Literal["error", "dense"] = "error",
        adapter: Adapter | None = None,
    ) -> Attachment:
        """Runs the model's self-attention by this plan, from now until `Attachment.detach` or the end of a ``with``.

        Inference only. Attach after whatever replaces attention processors. The model's device and dtype may change
        later: the backend is then chosen, and an explicit one checked, anew.

        Args:
            model: The transformer, compiled or not.
            backend: ``auto``, or the name of the backend that must execute.
            on_mismatch: What a forward at another resolution does: ``error`` raises before any work, ``dense`` runs
                the model's own attention, with one warning. A model of another signature is always an error.
            adapter: The model's row, for a family that `adapters.ADAPTERS` lacks.

        Raises:
            PlanMismatchError: The plan is for another model; lists all differences.
            UnknownModelError: The model's family is not known.
            UnsupportedBackendError: The backend cannot execute the plan where the model is now.
            ValueError: An option has an unknown value.
        """
        return Attachment(self, model, backend, on_mismatch, adapter)


def load_plan(path: str | PathLike[str], *, prove: bool = True) -> Plan:
    """Maps a plan file and proves all of it; masks stay in the file until they are needed.

    Args:
        path: The file.
        prove: Prove every layer now, all cores at work. Else only header and checksums are: a layer is proved when it
            is first used, and a plan that was written wrongly fails in the middle of a video.

    Raises:
        PlanError: The first broken promise of FORMAT.md; the message names file, rule and value.
        OSError: The file cannot be read.
    """
    file = PlanFile.read(path)
    if prove:
        file.prove()
    return Plan(file)


class Attachment:
    """A plan at work in a model; made by `Plan.attach`. Also a context manager, which detaches at its end."""

    def __init__(self, plan: Plan, model: nn.Module, backend: str, on_mismatch: str, adapter: Adapter | None) -> None:
        if on_mismatch not in ("error", "dense"):
            raise ValueError(f"on_mismatch must be 'error' or 'dense', got {on_mismatch!r}")
        adapter = adapter_for(model) if adapter is None else adapter
        _check_signature(plan.signature, adapter.signature(model))
        self.plan = plan
        self._session = _Session(plan, backend, on_mismatch == "dense")
        weight = adapter.output_weight(adapter.sites(model)[0].attention)
        self._session.prepare(weight.device, weight.dtype)
        self._session.interception = _intercept(model, adapter, self._session)

    def detach(self) -> None:
        """Gives the model back its own attention, the very processors it had; a second call does nothing."""
        self._session.interception.detach()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def explain(self) -> str:
        """Who executes what, as text: the backends, and the density of every layer in every segment."""
        plan = self.plan
        lines = [f"{plan.signature.architecture}, {plan.grid}, blocks {plan.blocks.block_q}x{plan.blocks.block_k}"]
        for (device, dtype), chosen in self._session.backends.items():
            counts = Counter(name for layers in chosen for name in layers)
            named = ", ".join(f"{name} ({count} schedules)" for name, count in sorted(counts.items()))
            lines.append(f"backend on {device}, {str(dtype).removeprefix('torch.')}: {named}")
        lines.append("density (share of dense work) by segment, layers 0 to last:")
        every = {(segment, layer): packed.density for segment, layer, packed in plan.file.walk()}
        for index in reversed(range(len(plan.segments))):
            segment = plan.segments[index]
            densities = [every[index, layer] for layer in range(plan.signature.layers)]
            row = " ".join(f"{density:.3f}" for density in densities)
            lines.append(
                f"  time {segment.start:.4f} to {segment.stop:.4f}: mean {sum(densities) / len(densities):.3f}; {row}"
            )
        return "\n".join(lines)


class _Session:
    """Executes one plan in one model. Knows the model only through its interception, so that models can be freed.

    Args:
        plan: What to execute.
        backend: ``auto`` or a name.
        dense: Whether another grid means the model's own attention instead of an error.
    """

    interception: Interception

    def __init__(self, plan: Plan, backend: str, dense: bool) -> None:
        self.plan = plan
        self.backend = backend
        self.dense = dense
        self.warned = False
        self.number = custom_op.open_session(self)
        self.device = torch.device("cpu")
        self.segment = len(plan.segments) - 1
        self.after: dict[int, int] = {}
        """The segment that came after one, the last time."""
        self.backends: dict[tuple[torch.device, torch.dtype], list[list[str]]] = {}
        """Who executes each segment and layer, for every device and dtype met so far."""

    def prepare(self, device: torch.device, dtype: torch.dtype) -> list[list[str]]:
        """Chooses who executes every schedule of the plan on a device; the times' first segment is put there.

        Raises:
            UnsupportedBackendError: Nobody can, or the one asked for cannot; says why for each.
        """
        chosen = self.backends.get((device, dtype))
        if chosen is None:
            layers = range(self.plan.signature.layers)
            chosen = [
                [self._choose(segment, layer, device, dtype) for layer in layers]
                for segment in range(len(self.plan.segments))
            ]
            self.backends[device, dtype] = chosen
            self.plan.make_room(self.segment, self._following(self.segment))
            for schedule in self.plan.layers(self.segment):
                schedule.bind(device)
        self.device = device
        return chosen

    def _choose(self, segment: int, layer: int, device: torch.device, dtype: torch.dtype) -> str:
        schedule, head_dim = self.plan.layers(segment)[layer], self.plan.signature.head_dim
        if self.backend == "auto":
            return ops.choose_backend(schedule, device, dtype, head_dim)
        if reasons := ops.supports(schedule, device, dtype, head_dim, self.backend):
            raise UnsupportedBackendError(
                f"backend {self.backend!r} cannot execute segment {segment}, layer {layer}: {'; '.join(reasons)}"
            )
        return self.backend

    def resolve(self, time: float, grid: tuple[int, ...]) -> int:
        self.interception.verify()
        found = TokenGrid(*grid)
        if found != self.plan.grid:
            message = f"forward does not fit the plan: grid must be {self.plan.grid}, got {found}"
            if not self.dense:
                raise PlanMismatchError(message)
            if not self.warned:
                self.warned = True
                warnings.warn(f"{message}; such forwards run the model's own attention", stacklevel=2)
            return STOCK
        segment = self.plan.file.segment_index(time)
        if segment != self.segment:
            self.after[self.segment] = segment
            self.segment = segment
            self.plan.make_room(segment, self._following(segment))
        self.plan.layers(segment)[0].bind(self.device)
        return segment

    def _following(self, segment: int) -> int:
        """The segment that should be next: time falls, and after the last video comes another."""
        return self.after.get(segment, (segment or len(self.plan.segments)) - 1)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segment: int, layer: int) -> torch.Tensor:
        if segment == STOCK:
            return self.interception.sites[layer].stock(q, k, v)
        schedule = self.plan.layers(segment)[layer]
        backend = self.prepare(q.device, q.dtype)[segment][layer]
        out = ops.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), schedule, backend)
        # While the device computes, arrays get there: the next layer's, if need be, and this layer's of what follows.
        if layer + 1 < self.plan.signature.layers:
            self.plan.layers(segment)[layer + 1].bind(q.device)
        self.plan.layers(self._following(segment))[layer].bind(q.device)
        return out.transpose(1, 2)


def _intercept(model: nn.Module, adapter: Adapter, session: _Session) -> Interception:
    """The seam that `torch.compile` traces: arguments in, ops out. It keeps the session alive."""
    config = model.config

    def begin(arguments: Arguments) -> torch.Tensor:
        grid = adapter.grid(config, arguments)
        return torch.ops.calibatt.resolve_segment(adapter.time(arguments), grid, session.number)

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: InterceptedSite, segment: torch.Tensor
    ) -> torch.Tensor:
        return torch.ops.calibatt.attend(q, k, v, segment, site.index, session.number)

    return Interception(model, adapter, attend, begin=begin)


def _check_signature(plan: ModelSignature, model: ModelSignature) -> None:
    wrong = [
        f"{name} must be {expected!r}, got {found!r}"
        for name in ("architecture", "layers", "heads", "head_dim")
        if (expected := getattr(plan, name)) != (found := getattr(model, name))
    ]
    if plan.weights_digest and model.weights_digest and plan.weights_digest != model.weights_digest:
        wrong.append(f"weights_digest must be {plan.weights_digest!r}, got {model.weights_digest!r}")
    if wrong:
        raise PlanMismatchError(f"model does not fit the plan: {'; '.join(wrong)}")
