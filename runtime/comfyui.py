"""Plans in ComfyUI: two nodes, and an override of ComfyUI's attention.

ComfyUI calls ``transformer_options["optimized_attention_override"]`` for every attention of a model, and passes
layer, grid and time of the call beside it. Nothing of ComfyUI is imported or changed. `docs/comfyui.md` shows how to
install it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibatt.plans import ModelSignature, TokenGrid
from calibatt.runtime import ops
from calibatt.runtime.adapters import PlanMismatchError, UnknownModelError, unwrap
from calibatt.runtime.attachment import OnMismatch
from calibatt.runtime.plan import Plan, PlanSet, load_plan, load_plans

Options = Mapping[str, Any]
"""ComfyUI's ``transformer_options`` of one call."""
Attention = Callable[..., torch.Tensor]
OVERRIDE = "optimized_attention_override"


@dataclass(frozen=True)
class Family:
    """A model class of ComfyUI, and how to read the grid of its calls of attention.

    Args:
        architecture: The class of the same model in diffusers, which plans name.
        heads: (heads, channels of a head) of the model; its layers are `blocks`.
        grid: The video tokens of a call and how many others stand before them, from its options and its number of
            tokens; None where so many tokens are those of another attention of the model.
    """

    architecture: str
    heads: Callable[[Any], tuple[int, int]]
    grid: Callable[[Options, int], tuple[TokenGrid, int] | None]

    def signature(self, model: Any) -> ModelSignature:
        """What the model is, in the words of a plan; weights are not digested."""
        return ModelSignature(self.architecture, len(model.blocks), *self.heads(model))


def _h3_grid(options: Options, tokens: int) -> tuple[TokenGrid, int] | None:
    layout = options["minimax_h3_layout"]  # text, conditions and audio, then the video
    _, frames, height, width, _ = layout.signature  # of latents, of which a token is 1 x 2 x 2
    grid = TokenGrid(frames, height // 2, width // 2)
    return (grid, tokens - grid.tokens) if tokens == layout.seq_len else None


FAMILIES = {
    "WanModel": Family(
        architecture="WanTransformer3DModel",
        heads=lambda model: (model.num_heads, model.dim // model.num_heads),
        grid=lambda options, tokens: (TokenGrid(*options["grid_sizes"]), 0),
    ),
    "MiniMaxH3Model": Family(
        architecture="MiniMaxH3Transformer3DModel",
        heads=lambda model: (model.blocks[0].attn.heads, model.blocks[0].attn.head_dim),
        grid=_h3_grid,
    ),
}
"""By the exact name of ComfyUI's class: classes that inherit from one of them often have other tokens or attention."""


def family_of(model: nn.Module) -> Family:
    """The row of a model of ComfyUI.

    Raises:
        UnknownModelError: There is none; lists the classes that have one.
    """
    name = type(model).__name__
    if name not in FAMILIES:
        raise UnknownModelError(f"model must be one of {', '.join(FAMILIES)} (ComfyUI's classes), got {name}")
    return FAMILIES[name]


class PlannedOverride:
    """An ``optimized_attention_override``: the video's self-attention by a plan, every other call as without it.

    Args:
        plans: Of one model, each for a grid of its own.
        family: The model's row.
        beneath: The override that was there before, if any: it gets the other calls.
        on_mismatch: What a forward does that no plan is for: ``error`` raises at its first attention, ``dense`` warns
            once of each reason and leaves its calls to ComfyUI.
    """

    def __init__(
        self, plans: Sequence[Plan], family: Family, beneath: Attention | None, on_mismatch: OnMismatch
    ) -> None:
        self.plans = {plan.grid: plan for plan in plans}
        self._signature = plans[0].signature
        self._family = family
        self._beneath = beneath
        self._dense = on_mismatch == "dense"
        self._told: set[str] = set()
        self._running = _Running()

    def __deepcopy__(self, memo: dict[int, Any]) -> PlannedOverride:
        return self  # ComfyUI copies options with every copy of a model, and plans are large

    @torch.compiler.disable  # ComfyUI drops guards on options: if traced, the first values stay
    def __call__(self, func: Attention, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The attention of one call; `func` is ComfyUI's own, the rest are its arguments."""
        out = self._planned(*args, **kwargs)
        if out is not None:
            return out
        return func(*args, **kwargs) if self._beneath is None else self._beneath(func, *args, **kwargs)

    def _planned(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask: torch.Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        *,
        transformer_options: Options,
        scale: float | None = None,
        **_: Any,
    ) -> torch.Tensor | None:
        """The attention of a call by its plan; None where it is another kind of attention or no plan is for it.

        q, k and v are ``(B, N, H * D)``, or ``(B, H, N, D)`` with `skip_reshape`; so is the result, with
        `skip_output_reshape`.
        """
        if mask is not None or not q.shape == k.shape == v.shape:
            return None
        if not skip_reshape:
            q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        if (q.shape[1], q.shape[3]) != (self._signature.heads, self._signature.head_dim):
            return None
        try:
            place = self._family.grid(transformer_options, q.shape[2])
            if place is None:
                return None
            grid, start = place
            layer, sigmas = transformer_options["block_index"], transformer_options["sigmas"]
        except KeyError as error:
            return self._refuse(f"this ComfyUI is too old for plans: transformer_options must have {error}, got none")
        plan = self.plans.get(grid)
        if plan is None:
            return self._refuse(f"grid must be {' or '.join(map(str, self.plans))}, got {grid}")
        if q.shape[2] != start + grid.tokens:
            return self._refuse(
                f"self-attention must be of the {grid.tokens} tokens of {grid}, got {q.shape[2]}: a reference stands "
                f"beside the video"
            )
        running = self._running
        if layer < running.layer or sigmas is not running.sigmas:  # another forward; reading waits for the device
            # Rounding, and samplers that add noise, go beyond 1: there is no noisier segment.
            running.sigmas, running.time = sigmas, min(float(sigmas.max()), 1.0)
        elif layer == running.layer:
            return None  # cross-attention with a text as long as the video
        running.layer = layer
        segment = plan.file.segment_index(running.time)
        following = (segment - 1) % len(plan.segments)  # time falls, and after the last video comes another
        layers = plan.layers(segment)
        with plan.lock:  # threads take turns with its arrays
            if running.entry != (plan, segment):
                running.entry = plan, segment
                plan.make_room(segment, following)
            out = ops.planned_attention(q, k, v, layers[layer], scale=scale, video_start=start)
        assert isinstance(out, torch.Tensor)
        # While the device computes, arrays get there: the next layer's, if need be, and this layer's of what follows.
        for coming in (*layers[layer + 1 : layer + 2], plan.layers(following)[layer]):
            coming.prefetch(q.device, plan.lock)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    def _refuse(self, reason: str) -> None:
        message = f"forward does not fit the plan: {reason}"
        if not self._dense:
            raise PlanMismatchError(message)
        if message not in self._told:
            self._told.add(message)
            warnings.warn(f"{message}; such forwards run ComfyUI's own attention", stacklevel=2)

    def explain(self, device: torch.device | str, dtype: torch.dtype) -> str:
        """Who executes what, as text: the backends, and the density of every layer in every segment."""
        lines = []
        for plan in self.plans.values():
            first, *densities = plan.explain()
            every = [schedule for segment in range(len(plan.segments)) for schedule in plan.layers(segment)]
            chosen = {ops.choose_backend(schedule, device, dtype, plan.signature.head_dim) for schedule in every}
            backend = f"backend on {device}, {str(dtype).removeprefix('torch.')}: {', '.join(sorted(chosen))}"
            lines += [first, backend, *densities]
        return "\n".join([*lines, *(f"met: {message}" for message in sorted(self._told))])


class _Running(threading.local):
    """The forward of a thread; ComfyUI runs one at a time on each device."""

    sigmas: torch.Tensor | None = None
    time = 0.0
    layer = -1
    """The last layer whose self-attention was computed."""
    entry: tuple[Plan, int] | None = None


class ApplyPlan:
    """The node "CalibAtt plan"."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"
    CATEGORY = "model/attention"
    DESCRIPTION = "Runs the self-attention of a video model by a plan that was calibrated for it."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        plan = {"default": "", "tooltip": "A .plan file, or a folder with one for each resolution."}
        mismatch = {"tooltip": "Where no plan fits: dense warns and leaves the model as it is, error stops."}
        return {
            "required": {"model": ("MODEL",), "plan": ("STRING", plan), "on_mismatch": (["dense", "error"], mismatch)}
        }

    @classmethod
    def IS_CHANGED(cls, plan: str, **_: Any) -> list[tuple[str, int]]:
        """A value that changes with the plan's files; ComfyUI compares it to run the node again."""
        return [(str(path), path.stat().st_mtime_ns) for path in _files(plan)]

    def apply(self, model: Any, plan: str, on_mismatch: OnMismatch) -> tuple[Any]:
        """A copy of a ComfyUI model that follows the plan; the model itself where none is for it and that is allowed.

        Raises:
            PlanError: A file is no valid plan.
            FileNotFoundError: There is no such file, or no plan in the folder.
            PlanMismatchError: With ``error``: no plan is for this model; says what differs. Always: several are, at one
                resolution.
            UnknownModelError: With ``error``: plans cannot run in this class of models.
        """
        path = Path(plan).expanduser()
        plans = load_plans(path) if path.is_dir() else PlanSet({path.name: load_plan(path)})
        diffusion_model = unwrap(model.get_model_object("diffusion_model"))
        try:
            family = family_of(diffusion_model)
            fitting = plans.fitting(family.signature(diffusion_model))
        except (UnknownModelError, PlanMismatchError) as error:
            if on_mismatch == "error":
                raise
            warnings.warn(f"{error}; the model runs ComfyUI's own attention", stacklevel=2)
            return (model,)
        planned = model.clone()
        options = planned.model_options["transformer_options"]
        options[OVERRIDE] = PlannedOverride(fitting, family, options.get(OVERRIDE), on_mismatch)
        return (planned,)


class ExplainPlan:
    """The node "CalibAtt explain"."""

    RETURN_TYPES = ("STRING",)
    FUNCTION = "explain"
    CATEGORY = "model/attention"
    DESCRIPTION = "Says which plans a model follows, who executes them, and how dense every layer is."
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def explain(self, model: Any) -> dict[str, Any]:
        """The text for the node's output, and for the interface to show."""
        override = model.model_options["transformer_options"].get(OVERRIDE)
        if isinstance(override, PlannedOverride):
            dtype = model.model.manual_cast_dtype or model.model_dtype()
            text = override.explain(model.load_device, dtype)
        else:
            text = "this model follows no plan"
        return {"ui": {"text": [text]}, "result": (text,)}


def _files(plan: str) -> list[Path]:
    path = Path(plan).expanduser()
    return sorted(path.glob("*.plan")) if path.is_dir() else [path]


NODE_CLASS_MAPPINGS = {"CalibAttPlan": ApplyPlan, "CalibAttExplain": ExplainPlan}
NODE_DISPLAY_NAME_MAPPINGS = {"CalibAttPlan": "CalibAtt plan", "CalibAttExplain": "CalibAtt explain"}
