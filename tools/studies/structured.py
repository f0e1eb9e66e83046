"""Wan and Mochi of any size whose attention has structure without training: for cost, disk, memory, the whole journey.

``--model calibatt.tools.studies.structured:NAME`` of calibatt-calibrate and calibatt-evaluate takes any name of
`SETTINGS`; the environment variable LAYERS makes fewer layers. Weights are random, prompts are random embeddings of the
published size, and there is no VAE: results are latents, and say nothing of real videos.

A query or key is a constant plus a share of content, so that a score follows from RoPE and the distance of two tokens.
How fast attention falls with distance is drawn for every head and each of the axes t, y and x.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline, UniPCMultistepScheduler, WanPipeline
from torch import Tensor, nn

from calibatt.tools.bench.published import MODELS, Published
from calibatt.tools.calibrate.pipeline import PipelineSampler

CONTENT = 0.35
"""Standard deviation of the content of a query or key before its normalisation; its constants are 1 and 0 by turns."""
FALLS = (0.05, 0.4, 1.0, 2.0, 4.0)
"""Wan: attention falls with about this power of the distance along an axis."""
REACHES = (0.7, 2.0, 6.0, 200.0)
"""Mochi: attention falls as a normal distribution of so many tokens along an axis, down to a floor."""
GATE = 0.5
"""Standard deviation of the gates of self-attention, so that it matters."""


def structure_wan(model: Any, seed: int = 0) -> None:
    """Makes scores of self-attention fall with distance.

    The frequencies of RoPE are fixed: those of one axis have a mean cosine that falls with the logarithm of the
    distance. The norms of queries and keys have a weight for every channel of every head, which says how steeply.
    """
    heads, width = model.config.num_attention_heads, model.config.attention_head_dim
    kinds = torch.Generator().manual_seed(seed)
    space = 2 * (width // 6)  # channels of y, and of x
    channels = torch.tensor([width - 2 * space, space, space])
    square = 0.5 + CONTENT**2  # of a query's channel, on average
    for block in model.blocks:
        attention = block.attn1
        drawn = _draw(FALLS, heads, kinds).T * math.log(10_000) / (channels / 2)
        weight = (drawn * square * math.sqrt(width)).sqrt().repeat_interleave(channels, 1).flatten()
        for linear, norm in ((attention.to_q, attention.norm_q), (attention.to_k, attention.norm_k)):
            nn.init.normal_(linear.weight, std=CONTENT / math.sqrt(linear.in_features))
            linear.bias.copy_(_ones_and_zeros(len(weight)))
            norm.weight.copy_(weight)
        nn.init.normal_(block.scale_shift_table[:, 2], std=GATE)


def structure_mochi(model: Any, height: int, width: int, seed: int = 0) -> None:
    """Makes scores of self-attention fall with distance.

    RoPE's frequencies are weights, and cosines of normally distributed ones have a mean that falls as a normal
    distribution does. They are shared by all layers, as in the published model. Projections have no bias, so channel 0
    of video and of text is a constant instead, which only queries and keys read.

    Args:
        model: The model.
        height: Of the video, in tokens.
        width: Of the video, in tokens.
        seed: Of what is drawn.
    """
    shape = model.pos_frequencies.shape
    kinds = torch.Generator().manual_seed(seed)
    spacing = torch.tensor([1.0, *[math.sqrt(model.rope.target_area / (height * width))] * 2])  # of tokens on the axes
    reaches = _draw(REACHES, shape[1], kinds) * spacing[:, None]
    model.pos_frequencies.copy_(torch.randn(shape, generator=kinds) / reaches[..., None])
    for embed in (model.patch_embed.proj, model.time_embed.caption_proj):
        nn.init.normal_(embed.weight, std=1 / math.sqrt(embed.weight[0].numel()))
        embed.weight[0] = 0
        embed.bias[0] = math.sqrt(len(embed.weight))  # as much as all other channels together
    for block in model.transformer_blocks:
        for name, linear in block.named_modules():
            if not isinstance(linear, nn.Linear) or name.startswith("norm"):
                continue
            if name.endswith(("to_q", "to_k", "add_q_proj", "add_k_proj")):
                share = math.sqrt(linear.in_features / 2)  # what normalisation leaves of channel 0
                nn.init.normal_(linear.weight, std=CONTENT / share / math.sqrt(2))
                linear.weight[:, 0] = _ones_and_zeros(linear.out_features) / share
            elif name.endswith(("to_v", "add_v_proj", "net.0.proj")):
                linear.weight[:, 0] = 0
            else:  # what is added to the stream
                linear.weight[0] = 0
                if linear.bias is not None:
                    linear.bias[0] = 0
        nn.init.normal_(block.norm1.linear.bias.chunk(4)[1], std=GATE)


def _draw(values: tuple[float, ...], heads: int, generator: torch.Generator) -> Tensor:
    """One of the values for each axis and head, ``(3, heads)``; an axis has each equally often, as far as it goes."""
    return torch.stack(
        [torch.tensor(values)[torch.randperm(heads, generator=generator) % len(values)] for _ in range(3)]
    )


def _ones_and_zeros(count: int) -> Tensor:
    """The constant of queries and keys: RoPE turns each pair of channels by the position."""
    return torch.tensor([1.0, 0.0]).repeat(count // 2)


@dataclass(frozen=True)
class Setting:
    """A model at one size, as its pipeline samples it.

    Args:
        row: The architecture.
        height: Pixels.
        width: Pixels.
        frames: Of the video.
        steps: Unless others are asked for.
        guidance: 1 is without.
        shift: Of Wan's scheduler.
    """

    row: Published
    height: int
    width: int
    frames: int
    steps: int
    guidance: float
    shift: float = 3.0

    @property
    def is_mochi(self) -> bool:
        return self.row.architecture.startswith("Mochi")

    def transformer(self, device: torch.device, layers: int | None = None) -> Any:
        """The model, made on its device: no other memory holds weights; layers are as many as LAYERS says if absent."""
        model = self.row.make(layers or int(os.environ.get("LAYERS", self.row.layers)), device)
        with torch.no_grad():
            if self.is_mochi:
                structure_mochi(model, self.height // 16, self.width // 16)
            else:
                structure_wan(model)
        return model

    def embedded(self, prompt: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random numbers that stand for a prompt, padded with zeros: embeddings ``(1, tokens, dim)`` and their mask."""
        seed = int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=4).digest(), "little")
        generator = torch.Generator().manual_seed(seed)
        tokens, config = self.row.text_tokens, self.row.config
        size = int(torch.randint(tokens // 8, tokens // 2, (), generator=generator)) + 1 if prompt else 1
        mask = torch.arange(tokens)[None] < size
        found = torch.randn(1, tokens, config.get("text_embed_dim") or config["text_dim"], generator=generator)
        return (found * mask[..., None]).to(device, self.row.dtype), mask.to(device)

    def sampler(self, steps: int | None, device: str, layers: int | None = None) -> PipelineSampler:
        """What ``--model`` names; `steps` and `layers` are those of setting and `transformer` if absent."""
        where = torch.device(device)
        parts = {"vae": None, "text_encoder": None, "tokenizer": None, "transformer": self.transformer(where, layers)}
        if self.is_mochi:
            pipe = MochiPipeline(FlowMatchEulerDiscreteScheduler(invert_sigmas=True), **parts)
        else:
            options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": self.shift}
            pipe = WanPipeline(scheduler=UniPCMultistepScheduler(**options), **parts)
        pipe.set_progress_bar_config(disable=True)

        def arguments(prompt: str) -> dict[str, Tensor]:
            found = {}
            for kind, text in (("prompt", prompt), ("negative_prompt", "")):
                embeds, mask = self.embedded(text, where)
                found |= {f"{kind}_embeds": embeds} | ({f"{kind}_attention_mask": mask} if self.is_mochi else {})
            return found

        return PipelineSampler(
            pipe, prompt_arguments=arguments, num_inference_steps=steps or self.steps, height=self.height,
            width=self.width, num_frames=self.frames, guidance_scale=self.guidance,
        )  # fmt: skip


def _tiny(name: str, **more: Any) -> Published:
    config = {**MODELS[name].config, "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 2, **more}
    return replace(MODELS[name], config=config)


SETTINGS = {
    "wan_1_3b_480p": Setting(MODELS["wan-1.3b"], 480, 832, 81, 50, 5.0),
    "wan_14b_480p": Setting(MODELS["wan-14b"], 480, 832, 81, 50, 5.0),
    "wan_14b_720p": Setting(MODELS["wan-14b"], 720, 1280, 81, 50, 5.0, shift=5.0),
    "wan_14b_480p_4steps": Setting(MODELS["wan-14b"], 480, 832, 81, 4, 1.0),
    "mochi_480p": Setting(MODELS["mochi"], 480, 848, 163, 64, 4.5),
    "tiny": Setting(_tiny("tiny"), 64, 96, 33, 6, 5.0),
    "mochi_tiny": Setting(_tiny("tiny-mochi"), 64, 96, 49, 6, 4.5),
}
"""By the names of the functions."""

wan_1_3b_480p = SETTINGS["wan_1_3b_480p"].sampler
wan_14b_480p = SETTINGS["wan_14b_480p"].sampler
wan_14b_720p = SETTINGS["wan_14b_720p"].sampler
wan_14b_480p_4steps = SETTINGS["wan_14b_480p_4steps"].sampler
mochi_480p = SETTINGS["mochi_480p"].sampler
tiny = SETTINGS["tiny"].sampler
mochi_tiny = SETTINGS["mochi_tiny"].sampler
