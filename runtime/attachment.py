"""Attaches plans to a model or a pipeline, and undoes it exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any, Literal

from torch import nn

from calibatt.plans import ModelSignature
from calibatt.runtime.adapters import Adapter, PlanMismatchError, UnknownModelError, adapter_for, unwrap
from calibatt.runtime.parallel import slowest_rank
from calibatt.runtime.resident import LoadedPlan
from calibatt.runtime.schedule import Outline
from calibatt.runtime.session import Session, intercepted, where_it_runs

OnMismatch = Literal["error", "dense"]


class Attachable:
    """What can be attached to a model: a plan, or a set of them."""

    def fitting(self, signature: ModelSignature) -> Sequence[LoadedPlan]:
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


class Attachment:
    """Plans attached to one model; made by `Plan.attach` and `PlanSet.attach`. Also a context manager, which detaches
    at its end.
    """

    def __init__(
        self, plans: Sequence[LoadedPlan], model: nn.Module, backend: str, on_mismatch: str, adapter: Adapter
    ) -> None:
        if on_mismatch not in ("error", "dense"):
            raise ValueError(f"on_mismatch must be 'error' or 'dense', got {on_mismatch!r}")
        self.plans = tuple(plans)
        self._session = Session(self.plans, adapter, backend, on_mismatch == "dense")
        self._session.join(unwrap(model), adapter.sites(model))
        for plan in plans:
            self._session.check_parallel(plan)
        weight = next(adapter.sites(model)[0].attention.parameters())
        self._session.prepare(*where_it_runs(unwrap(model), weight))
        self._session.interception = intercepted(model, adapter, self._session)

    def __reduce__(self) -> Any:
        raise TypeError("an attachment must not be copied or stored: copy the model, and attach the plan to the copy")

    def detach(self) -> None:
        """Puts back the very attention processors that the model had; a second call does nothing."""
        self._session.interception.detach()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def explain(self) -> str:
        """Who executes what, as text: the backends, the density of every layer in every segment, and on CUDA devices
        whether the triton backend executes the plan's heads of 8 bits, and why.
        """
        return "\n".join(line for plan in self.plans for line in self._explained(plan))

    def _explained(self, plan: LoadedPlan) -> list[str]:
        first, *densities = plan.explain()
        lines = [first]
        segments = range(len(plan.segments))
        precisions = {each for segment in segments for layer in plan.layers(segment) for each in layer.precisions}
        entries = [index for index, (owner, _) in enumerate(self._session.entries) if owner is plan]
        for (device, dtype), chosen in self._session.backends.items():
            counts = Counter(name for index in entries for name in chosen[index])
            named = ", ".join(f"{name} ({count} schedules)" for name, count in sorted(counts.items()))
            lines.append(f"backend on {device}, {str(dtype).removeprefix('torch.')}: {named}")
            if device.type == "cuda" and find_spec("triton"):
                from calibatt.runtime.backends.triton import judged

                outline = Outline(plan.grid, plan.blocks, plan.signature.heads, precisions)
                _, verdicts = judged(outline, device, dtype, plan.signature.head_dim)
                lines += [f"triton on {device}: {sentence}" for _, sentence in verdicts]
        if ulysses := self._session.ulysses:
            heads = range(plan.signature.heads)
            works = ([packed.computed_blocks(head) for head in heads] for _, _, packed in plan.file.walk())
            divided, in_order = slowest_rank(works, ulysses.ranks)
            lines.append(
                f"rank {ulysses.rank} of {ulysses.ranks} (Ulysses), heads spread by work: the slowest rank has "
                f"{divided:.3f} times the mean, {in_order:.3f} if heads were in order"
            )
        used = self._session.device_bytes(plan)
        lines.append(f"index arrays on devices now: {used / 2**20:.1f} MiB")
        return lines + densities


class PipelineAttachment:
    """Plans attached to the transformers of a pipeline; made by `attach`. Also a context manager, which detaches at its
    end.

    Args:
        attachments: Attachments by the names of the pipeline's components.
    """

    def __init__(self, attachments: Mapping[str, Attachment]) -> None:
        self.attachments = dict(attachments)

    def detach(self) -> None:
        """Puts back the attention of every transformer; a second call does nothing."""
        for attachment in self.attachments.values():
            attachment.detach()

    def __enter__(self) -> PipelineAttachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def explain(self) -> str:
        """`Attachment.explain` of every transformer."""
        return "\n".join(f"{name}: {attachment.explain()}" for name, attachment in self.attachments.items())


def attach(
    model_or_pipeline: Any, plans: Attachable | Mapping[str, Attachable], **options: Any
) -> Attachment | PipelineAttachment:
    """Runs a model, or the transformers of a pipeline, by plans until `detach` or the end of a ``with``.

        >>> with attach(pipe, plan) as attachment:  # the same: plan.attach(pipe.transformer)
        ...     latents = pipe(**embed("a boat"), **size, output_type="latent").frames
        ...     print(attachment.explain())  # doctest: +ELLIPSIS
        transformer: WanTransformer3DModel, TokenGrid(frames=5, height=8, width=12), blocks 128x128
        backend on cpu, float32: torch (2 schedules)
        ...

    Args:
        model_or_pipeline: A transformer, or a diffusers pipeline, or whatever has `components`.
        plans: A plan or a set of plans. For a pipeline of several transformers, such as the two experts of Wan 2.2
            A14B, a plan or a set for each of them, by the name of its component.
        options: Options of `Plan.attach`, the same for all of them.

    Returns:
        The `Attachment` of a model; the `PipelineAttachment` of a pipeline.

    Raises:
        PlanMismatchError: Plans are missing for a transformer, or named for one that the pipeline lacks. And whatever
            `Plan.attach` raises; no plan is attached then.
        TypeError: The first argument is neither model nor pipeline, or several plans are named for a model.
    """
    if isinstance(model_or_pipeline, nn.Module) and not isinstance(plans, Mapping):
        return plans.attach(model_or_pipeline, **options)
    components = getattr(model_or_pipeline, "components", None)
    if not isinstance(components, Mapping):
        several = isinstance(plans, Mapping)
        rule = "a pipeline, whose transformers the plans name" if several else "a model or a pipeline"
        raise TypeError(f"plans must be attached to {rule}, got {type(model_or_pipeline).__name__}")
    modules = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
    present = {name for name, part in modules.items() if _is_known(part)}
    if not isinstance(plans, Mapping):
        if not present:
            raise PlanMismatchError("a pipeline must have a transformer of a known family (docs/models.md), got none")
        if len(present) != 1:
            rule = f"a plan for each of the transformers {sorted(present)}, by their names"
            raise PlanMismatchError(f"plans must be {rule}, got one for all")
        plans = dict.fromkeys(present, plans)
    present |= plans.keys() & modules.keys()
    if present != set(plans):
        raise PlanMismatchError(f"plans must be for the transformers {sorted(present)}, got them for {sorted(plans)}")
    with ExitStack() as undo:
        made = {name: undo.enter_context(plan.attach(modules[name], **options)) for name, plan in plans.items()}
        undo.pop_all()
    return PipelineAttachment(made)


def _is_known(model: nn.Module) -> bool:
    try:
        adapter_for(model)
    except UnknownModelError:
        return False
    return True
