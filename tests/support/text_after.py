"""Tiny pipelines of the families whose text follows the video and is padded, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
)

from calibatt.tools.calibrate.pipeline import PipelineSampler

TEXT, TEXT_DIM = 20, 16


def embedded(prompt: str) -> dict[str, torch.Tensor]:
    """Embeddings and mask that stand for a prompt; one of another length has other padding."""
    generator = torch.Generator().manual_seed(len(prompt))
    mask = torch.arange(TEXT)[None] < 3 + len(prompt) % 11
    return {"prompt_embeds": torch.randn(1, TEXT, TEXT_DIM, generator=generator), "prompt_attention_mask": mask}


def mochi(steps: int | None, device: str) -> PipelineSampler:
    """Five latent frames of 8 x 12 tokens."""
    torch.manual_seed(0)
    model = MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, pooled_projection_dim=16, in_channels=12,
        text_embed_dim=TEXT_DIM, time_embed_dim=8, max_sequence_length=TEXT,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipe = MochiPipeline(scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=model.eval())

    def arguments(prompt: str) -> dict[str, torch.Tensor]:
        found = embedded(prompt)
        return {**found, **{f"negative_{name}": value for name, value in found.items()}}

    return _sampler(pipe, steps, arguments, num_frames=25, guidance_scale=1.0)


def hunyuan(steps: int | None, device: str) -> PipelineSampler:
    """Five latent frames of 8 x 12 tokens."""
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=TEXT_DIM, pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    pipe = HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, transformer=model.eval(), vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    pooled = {"pooled_prompt_embeds": torch.ones(1, 8)}
    return _sampler(pipe, steps, lambda prompt: {**embedded(prompt), **pooled}, num_frames=17)


def _sampler(pipe: Any, steps: int | None, prompt_arguments: Any, **arguments: Any) -> PipelineSampler:
    pipe.set_progress_bar_config(disable=True)
    return PipelineSampler(
        pipe, prompt_arguments=prompt_arguments, num_inference_steps=steps or 4, height=128, width=192, **arguments
    )
