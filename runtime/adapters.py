"""Model families as data: where self-attention is, and how to read a forward's arguments.

A new family is a row of `ADAPTERS`, or one that a user passes to `attach`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from calibatt.plans import ModelSignature, PlanError, TokenGrid

Arguments = Mapping[str, Any]
"""Arguments of one forward call by parameter name."""


class UnknownModelError(ValueError):
    """No row of the table fits the model."""


class PlanMismatchError(PlanError):
    """A plan is not for this model or this forward; the message lists all differences, or what the row needs."""


@dataclass(frozen=True, eq=False)
class Site:
    """One self-attention of a model.

    Args:
        layer: Its number in execution order, from 0.
        name: Its module's name in the model, for example ``blocks.3.attn1``.
        attention: The module, whose ``processor`` is replaced.
        block: The transformer block around it.
    """

    layer: int
    name: str
    attention: nn.Module
    block: nn.Module


@dataclass(frozen=True)
class Adapter:
    """One model family. Functions of a forward's arguments are traced by `torch.compile`: tensors and sizes only.

    Args:
        architecture: Class name of the transformer.
        attentions: (list of blocks, name of the self-attention in a block), in execution order.
        dispatch: The function that the family's attention processors call with q, k and v after all normalisation and
            rotation: a global of their module, called with ``(B, N, H, D)``, or a member of such a global, called with
            ``(B, H, N, D)`` as ``F.scaled_dot_product_attention`` is.
        heads: (heads, channels of a head) from the model's configuration.
        grid: (frames, height, width) of the video in tokens, and how many other tokens stand before it in the sequence;
            from configuration and arguments of the model.
        time: Denoising time from the arguments of the model: float64 ``()`` on the CPU, 1 is pure noise. If samples or
            tokens of a batch differ, that of the noisiest.
        timestep: Name of the one argument that `time` looks at, if it is one: it is then read from its device without
            waiting where that is possible, and `time` gets it on the CPU, outside of what is traced.
        channel_axis: Axis of the channels in the model's ``hidden_states``, whose axis 0 is the batch; for calibration.
        coordinates: Name of the argument that has coordinates of every token, where `grid` looks at their values: in a
            call that has it, `grid` gets it alone, outside of what is traced.
        valid_text: int64 ``(B,)``; how many of the tokens after the video are no padding, which is at their end, for a
            family that tells its attention by a mask of the keys; from the arguments of the model.
        not_dense: From the configuration: what self-attention is if it is not dense, so that it can have no plan.
    """

    architecture: str
    attentions: tuple[tuple[str, str], ...]
    dispatch: str
    heads: Callable[[Any], tuple[int, int]]
    grid: Callable[[Any, Arguments], tuple[int, int, int, int]]
    time: Callable[[Arguments], torch.Tensor]
    timestep: str | None = None
    channel_axis: int = 1
    coordinates: str | None = None
    valid_text: Callable[[Arguments], torch.Tensor] | None = None
    not_dense: Callable[[Any], str | None] = lambda config: None

    def __post_init__(self) -> None:
        for name in ("grid", "time", "valid_text"):
            if (read := getattr(self, name)) is not None:
                object.__setattr__(self, name, naming_the_missing(read, self.architecture))

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        """Every self-attention of the model, in execution order.

        Raises:
            AttributeError: The model lacks a module that this row names.
        """
        places = [
            (f"{blocks}.{index}.{attention}", block.get_submodule(attention), block)
            for blocks, attention in self.attentions
            for index, block in enumerate(unwrap(model).get_submodule(blocks))
        ]
        return tuple(Site(layer, *values) for layer, values in enumerate(places))

    def signature(self, model: nn.Module) -> ModelSignature:
        """The signature of the model, as plans have it; weights are not digested."""
        model = unwrap(model)
        heads, head_dim = self.heads(model.config)
        return ModelSignature(self.architecture, len(self.sites(model)), heads, head_dim)

    def lengths(self, config: Any, arguments: Arguments) -> torch.Tensor | None:
        """Tokens of each sample without padding, int32 ``(B,)`` on the device; None if no mask of the call tells."""
        if self.valid_text is None:
            return None
        frames, height, width, start = self.grid(config, arguments)
        return (self.valid_text(arguments) + (start + frames * height * width)).to(torch.int32)

    def token_grid(self, model: nn.Module, arguments: Arguments) -> TokenGrid:
        """The video tokens of a forward."""
        return TokenGrid(*self.grid(unwrap(model).config, arguments)[:3])

    def video_start(self, model: nn.Module, arguments: Arguments) -> int:
        """How many tokens stand before those of the video."""
        return self.grid(unwrap(model).config, arguments)[3]


def naming_the_missing(read: Callable[..., Any], architecture: str) -> Callable[..., Any]:
    """The same function; if a call lacks an argument, a `PlanMismatchError` names the row and the argument."""

    def named(*args: Any) -> Any:
        try:
            return read(*args)
        except KeyError as error:
            raise PlanMismatchError(
                f"the row of {architecture} needs the argument {error} of a forward, got a call with "
                f"{', '.join(args[-1])}"
            ) from error

    return named


def _wan_grid(config: Any, arguments: Arguments) -> tuple[int, int, int, int]:
    frames, height, width = arguments["hidden_states"].shape[2:]
    patch = config.patch_size
    return frames // patch[0], height // patch[1], width // patch[2], 0


def _ltx_grid(config: Any, arguments: Arguments) -> tuple[int, int, int, int]:
    # The pipeline has already cut the latents into patches; the sizes come beside them, or coordinates of every token.
    if arguments.get("video_coords") is not None:
        return _grid_of_coordinates(arguments["video_coords"], lambda coordinates: coordinates[0].T)
    return arguments["num_frames"], arguments["height"], arguments["width"], 0


def _ltx2_grid(config: Any, arguments: Arguments) -> tuple[int, int, int, int]:
    # Images that are given for later frames stand after the video.
    return arguments["num_frames"], arguments["height"], arguments["width"], 0


_known_grids = WeakTensorKeyDictionary()
"""By living tensor of coordinates: its version and grid. It is read once a run, since reading waits for the device."""


def _grid_of_coordinates(
    coordinates: torch.Tensor, by_token: Callable[[torch.Tensor], torch.Tensor] = lambda coordinates: coordinates
) -> tuple[int, int, int, int]:
    """The grid of a sequence with the video in it, from coordinates of frame, row and column of every token.

    The sequence ends with a whole frame. The video is the longest run of whole frames of that size that rise in time,
    the last of the longest; the rest stands before or after it: text, audio, images and frames that are given.

    Args:
        coordinates: Of every token.
        by_token: The same as ``(N, 3)``.

    Raises:
        PlanMismatchError: The last frame is in another order than rows, then columns.
    """
    version = None if coordinates.is_inference() else coordinates._version
    known = _known_grids.get(coordinates)
    if known is None or version is None or known[0] != version:
        positions = by_token(coordinates).cpu()
        tokens, size = len(positions), int((positions[:, 0] == positions[-1, 0]).flip(0).cumprod(0).sum())
        last = positions[-size:, 1:]
        rows, columns = (axis.unique() for axis in last.T)
        if not torch.equal(torch.cartesian_prod(rows, columns), last):
            raise PlanMismatchError(
                f"tokens must end with a whole frame, row by row, got {tokens} whose last {size} are none"
            )
        frames = positions[tokens % size :].unflatten(0, (-1, size))
        are_frames = (frames[:, :, 1:] == last).all(2).all(1) & (frames[:, :, 0] == frames[:, :1, 0]).all(1)
        count, stop, run, before = 0, 0, 0, 0.0
        for index, (time, is_frame) in enumerate(zip(frames[:, 0, 0].tolist(), are_frames.tolist(), strict=True)):
            run = run * (time > before) + 1 if is_frame else 0
            before = time
            if run >= count:
                count, stop = run, index + 1
        known = version, (count, len(rows), len(columns), tokens % size + (stop - count) * size)
        _known_grids[coordinates] = known
    return known[1]


def _thousandths(arguments: Arguments) -> torch.Tensor:
    return arguments["timestep"].max().to("cpu", torch.float64) / 1000


def _cogvideox_grid(config: Any, arguments: Arguments) -> tuple[int, int, int, int]:
    frames, _, height, width = arguments["hidden_states"].shape[1:]
    patch, text = config.patch_size, arguments["encoder_hidden_states"].shape[1]
    return frames // (config.patch_size_t or 1), height // patch, width // patch, text


def _mochi_grid(config: Any, arguments: Arguments) -> tuple[int, int, int, int]:
    frames, height, width = arguments["hidden_states"].shape[2:]
    patch = config.patch_size
    return frames, height // patch, width // patch, 0


def _mochi_time(arguments: Arguments) -> torch.Tensor:
    # It rises from the noise, 0, to the video, 1000.
    return 1 - arguments["timestep"].min().to("cpu", torch.float64) / 1000


def _hunyuan_grid(config: Any, arguments: Arguments) -> tuple[int, int, int, int]:
    frames, height, width = arguments["hidden_states"].shape[2:]
    patch = config.patch_size
    return frames // config.patch_size_t, height // patch, width // patch, 0


def _hunyuan15_text(arguments: Arguments) -> torch.Tensor:
    # An image of zeros is none.
    image = arguments["image_embeds"]
    masks = arguments["encoder_attention_mask"], arguments["encoder_attention_mask_2"]
    return sum((mask.sum(1, dtype=torch.int64) for mask in masks), image.any() * image.shape[1])


def _kandinsky_grid(config: Any, arguments: Arguments) -> tuple[int, int, int, int]:
    # A picture that is given is one more frame, the last: then frames have types.
    sizes = [
        size // patch for size, patch in zip(arguments["hidden_states"].shape[1:4], config.patch_size, strict=True)
    ]
    given = arguments.get("visual_token_type_ids") is not None
    return sizes[0] - given, sizes[1], sizes[2], 0


def _kandinsky_heads(config: Any) -> tuple[int, int]:
    head_dim = sum(config.axes_dims)
    return config.model_dim // head_dim, head_dim


def _h3_time(arguments: Arguments) -> torch.Tensor:
    # It rises from the noise, 0, to the video, 1; the video is noisier than all else in its sequence.
    return 1 - arguments["timestep"].min().to("cpu", torch.float64)


_row = partial(
    Adapter,
    dispatch="dispatch_attention_fn",
    heads=lambda config: (config.num_attention_heads, config.attention_head_dim),
    time=_thousandths,
    timestep="timestep",
)
"""Fields that nearly all families have in common."""

ADAPTERS = (
    _row(
        "WanTransformer3DModel",
        attentions=(("blocks", "attn1"),),
        grid=_wan_grid,
    ),
    # The control's blocks run first; pictures that are given as references are frames before the video's.
    _row(
        "WanVACETransformer3DModel",
        attentions=(("vace_blocks", "attn1"), ("blocks", "attn1")),
        grid=_wan_grid,
    ),
    # The reference is the first frame; the face comes in by cross-attention between blocks.
    _row(
        "WanAnimateTransformer3DModel",
        attentions=(("blocks", "attn1"),),
        grid=_wan_grid,
    ),
    _row(
        "SkyReelsV2Transformer3DModel",
        attentions=(("blocks", "attn1"),),
        grid=_wan_grid,
        not_dense=lambda config: "causal, frame by frame" if config.num_frame_per_block > 1 else None,
    ),
    _row(
        "LTXVideoTransformer3DModel",
        attentions=(("transformer_blocks", "attn1"),),
        grid=_ltx_grid,
        channel_axis=2,
        coordinates="video_coords",
    ),
    # The audio has a stream of its own: of the video's it is seen in cross-attention alone.
    _row(
        "LTX2VideoTransformer3DModel",
        attentions=(("transformer_blocks", "attn1"),),
        grid=_ltx2_grid,
        channel_axis=2,
    ),
    _row(
        "CogVideoXTransformer3DModel",
        attentions=(("transformer_blocks", "attn1"),),
        dispatch="F.scaled_dot_product_attention",
        grid=_cogvideox_grid,
        channel_axis=2,
    ),
    # Its processor calls the function for each sample, with the text tokens that are no padding.
    _row(
        "MochiTransformer3DModel",
        attentions=(("transformer_blocks", "attn1"),),
        dispatch="F.scaled_dot_product_attention",
        grid=_mochi_grid,
        time=_mochi_time,
    ),
    _row(
        "HunyuanVideoTransformer3DModel",
        attentions=(("transformer_blocks", "attn"), ("single_transformer_blocks", "attn")),
        grid=_hunyuan_grid,
        valid_text=lambda arguments: arguments["encoder_attention_mask"].sum(1, dtype=torch.int64),
    ),
    _row(
        "HunyuanVideo15Transformer3DModel",
        attentions=(("transformer_blocks", "attn"),),
        grid=_hunyuan_grid,
        valid_text=_hunyuan15_text,
    ),
    _row(
        "Kandinsky5Transformer3DModel",
        attentions=(("visual_transformer_blocks", "self_attention"),),
        heads=_kandinsky_heads,
        grid=_kandinsky_grid,
        channel_axis=4,
        not_dense=lambda config: (
            "sparse already, by blocks chosen at each call" if config.attention_type == "nabla" else None
        ),
    ),
    _row(
        "Kandinsky6Transformer3DModel",
        attentions=(("visual_transformer_blocks", "video_dec_block.self_attention"),),
        heads=_kandinsky_heads,
        grid=_kandinsky_grid,
        channel_axis=4,
    ),
    # One packed sequence: text, given pictures and sounds, the audio, and last the video.
    _row(
        "MiniMaxH3Transformer3DModel",
        attentions=(("transformer_blocks", "attn"),),
        grid=lambda config, arguments: _grid_of_coordinates(arguments["position_ids"]),
        time=_h3_time,
        channel_axis=2,
        coordinates="position_ids",
    ),
)
"""The families that need no row from the user."""

NOT_DENSE = {
    "AnyFlowFARTransformer3DModel": "causal",
    "Kandinsky6SRTransformer3DModel": "sparse already, by blocks chosen at each call",
    "LatteTransformer3DModel": "apart in space and in time",
    "SanaVideoTransformer3DModel": "linear",
    "SanaWMTransformer3DModel": "linear",
    "WanAnimate2Transformer3DModel": "windowed: a frame sees the reference of its own time alone",
}
"""Video transformers that can have no plan, and what their self-attention is."""


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile` returned; any other model as it is."""
    return getattr(model, "_orig_mod", model)


def adapter_for(model: nn.Module) -> Adapter:
    """The row of a model, by the name of its class or of one it inherits from.

    Raises:
        UnknownModelError: No row fits, which lists the families that are known, or self-attention is not dense.
    """
    names = [kind.__name__ for kind in type(unwrap(model)).__mro__]
    row = next((row for row in ADAPTERS if row.architecture in names), None)
    other = next((NOT_DENSE[name] for name in names if name in NOT_DENSE), row and row.not_dense(model.config))
    if other:
        raise UnknownModelError(f"self-attention must be dense to follow a plan, that of {names[0]} is {other}")
    if row is not None:
        return row
    known = ", ".join(row.architecture for row in ADAPTERS)
    raise UnknownModelError(f"model must be one of {known}, or come with an adapter of its own, got {names[0]}")
