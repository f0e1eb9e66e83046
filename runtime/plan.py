"""Plans at run time: load one, ask it, attach it to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from calibatt.plans import (
    Blocks,
    ModelSignature,
    PlanFile,
    Segment,
    StoredLayers,
    TokenGrid,
    told_precisions,
    write_plan,
)
from calibatt.runtime.adapters import Adapter, PlanMismatchError, adapter_for
from calibatt.runtime.attachment import Attachment
from calibatt.runtime.resident import ResidentSchedules
from calibatt.runtime.schedule import LayerSchedule, StoredSchedule
from calibatt.runtime.session import check_signature

OnMismatch = Literal["error", "dense"]


class Attachable:
    """What can be attached to a model: a plan, or a set of them."""

    def fitting(self, signature: ModelSignature) -> Sequence[Plan]:
        """The plans that are for a model, each at a resolution of its own.

        Raises:
            PlanMismatchError: There is none; says what differs.
        """
        raise NotImplementedError

    def attach(
        self,
        model: nn.Module,
        *,
        backend: str = "auto",
        on_mismatch: OnMismatch = "error",
        adapter: Adapter | None = None,
    ) -> Attachment:
        """Runs the model's self-attention by this plan, from now until `Attachment.detach` or the end of a ``with``.

        Of a set of plans, each call follows the one of its resolution. Inference only. Attach after whatever replaces
        attention processors. The model's device and dtype may change later: the backend is then chosen, and an explicit
        one checked, anew. So may `enable_parallelism` of diffusers be called later, with a ulysses_degree: every rank
        then executes some of the heads, and must attach the same plan. Threads may call the model at the same time; it
        must be called as ``model(...)``: ``model.forward(...)`` is an `OutsideForwardError`.

        Args:
            model: The transformer, compiled or not.
            backend: ``auto``, or the name of the backend that must execute.
            on_mismatch: What a forward at a resolution that no plan is for does: ``error`` raises before any work,
                ``dense`` runs the model's own attention, with one warning a resolution. A model of another signature
                is always an error.
            adapter: The model's row, for a family that `adapters.ADAPTERS` lacks.

        Raises:
            ParallelismError: The model is spread over ranks by more than Ulysses, or heads or tokens do not divide.
            PlanMismatchError: As of `fitting`.
            UnknownModelError: The model's family is not known.
            UnsupportedBackendError: The backend cannot execute the plan where the model is now.
            ValueError: An option has an unknown value.
        """
        row = adapter_for(model) if adapter is None else adapter
        return Attachment(self.fitting(row.signature(model)), model, backend, on_mismatch, row)


class Plan(Attachable, ResidentSchedules):
    """A plan that is ready to run; immutable.

    A schedule is decoded when it is put on a device, as lists or as bits; how much stays there says
    `resident.RESIDENT_BYTES`.

    Args:
        file: The plan's contents.
    """

    def __init__(self, file: PlanFile) -> None:
        self.file = file
        layers, stored = range(file.signature.layers), file.schedules
        super().__init__(
            [
                [StoredSchedule(stored, segment, layer) for layer in layers]
                if isinstance(stored, StoredLayers)
                else [LayerSchedule(core) for core in stored[segment]]
                for segment in range(len(file.segments))
            ]
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan, (self.file,)  # what is on devices stays there

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

    def explain(self) -> list[str]:
        """Lines of text: what the plan is for, the density of every layer in every segment, and precisions of heads."""
        lines = [f"{self.signature.architecture}, {self.grid}, blocks {self.blocks.block_q}x{self.blocks.block_k}"]
        lines.append("density (share of the blocks of dense attention) by segment, layers 0 to last:")
        every, layers = {}, range(self.signature.layers)
        precisions = np.zeros((len(self.segments), len(layers), self.signature.heads), np.uint8)
        for segment, layer, packed in self.file.walk():
            every[segment, layer], precisions[segment, layer] = packed.density, packed.head_precision
        for index in reversed(range(len(self.segments))):
            times = f"time {self.segments[index].start:.4f} to {self.segments[index].stop:.4f}"
            densities = [every[index, layer] for layer in layers]
            row = " ".join(f"{density:.3f}" for density in densities)
            lines.append(f"  {times}: mean {sum(densities) / len(densities):.3f}; {row}")
        lines.append(f"precision, over all segments: {told_precisions(precisions)}")
        if precisions.any():
            lines += [f"  layer {layer}: {told_precisions(precisions[:, layer])}" for layer in layers]
        return lines

    def fitting(self, signature: ModelSignature) -> Sequence[Plan]:
        """This plan alone.

        Raises:
            PlanMismatchError: It is for another model; lists all differences.
        """
        check_signature(self.signature, signature)
        return [self]

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the plan to a file that `load_plan` reads: whole or not at all, the same plan as the same bytes.

        Raises:
            OSError: The file cannot be written.
        """
        write_plan(path, self.file)


class PlanSet(Attachable):
    """Plans of several models and resolutions, of which every forward gets its own.

    Args:
        plans: By name, such as the names of their files.
    """

    def __init__(self, plans: Mapping[str, Plan]) -> None:
        self.plans = dict(plans)

    def fitting(self, signature: ModelSignature) -> Sequence[Plan]:
        """The plans that are for a model, each at a resolution of its own.

        Raises:
            PlanMismatchError: None is, says what differs from each; or several are, at one resolution.
        """
        names: dict[TokenGrid, str] = {}
        refused = []
        for name, plan in self.plans.items():
            try:
                check_signature(plan.signature, signature)
            except PlanMismatchError as error:
                refused.append(f"{name}: {error}")
                continue
            if plan.grid in names:
                raise PlanMismatchError(
                    f"one plan at most must be for {signature.architecture} at {plan.grid}, got {names[plan.grid]} and "
                    f"{name}; load the one that is meant with load_plan"
                )
            names[plan.grid] = name
        if not names:
            raise PlanMismatchError(f"a plan must be for this model, got none: {' | '.join(refused)}")
        return [self.plans[name] for name in names.values()]


def load_plan(path: str | PathLike[str], *, prove: bool = True) -> Plan:
    """Maps a plan file and proves all of it; masks stay in the file until they are needed.

        >>> plan = load_plan("plans/demo.plan")
        >>> plan.signature.architecture, plan.grid.tokens, len(plan.segments)
        ('WanTransformer3DModel', 4608, 8)
        >>> 0 < plan.schedule(time=0.9, layer=0).density < 1  # share of the blocks of dense attention
        True

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


def load_plans(folder: str | PathLike[str], *, prove: bool = True) -> PlanSet:
    """Loads every ``.plan`` file of a folder, not of the folders in it.

        >>> plans = load_plans("plans/")
        >>> {name: plan.grid.tokens for name, plan in plans.plans.items()}
        {'demo.plan': 4608}

    Args:
        folder: Where the files are.
        prove: As of `load_plan`.

    Raises:
        FileNotFoundError: The folder has none, or is none.
        PlanError: As of `load_plan`, of the first file that breaks a promise.
    """
    paths = sorted(Path(folder).glob("*.plan"))
    if not paths:
        raise FileNotFoundError(f"{folder} must be a folder with .plan files, got none")
    return PlanSet({path.name: load_plan(path, prove=prove) for path in paths})
