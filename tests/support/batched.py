"""Tiny pipelines that compute both branches of guidance in one batch, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from calibatt.tools.calibrate.pipeline import PipelineSampler
from support import text_after

TEXT, TEXT_DIM = 7, 16


def embedded(prompt: str) -> dict[str, torch.Tensor]:
    """Embeddings that stand for a prompt, and those of the negative one."""
    generator = torch.Generator().manual_seed(len(prompt))
    embeds = torch.randn(1, TEXT, TEXT_DIM, generator=generator)
    return {"prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds)}


def ltx(guidance: float) -> PipelineSampler:
    """Three latent frames of 4 x 6 tokens."""
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=TEXT_DIM,
    )  # fmt: skip
    pipe = LTXPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False), vae=None, text_encoder=None, tokenizer=None,
        transformer=model.eval(),
    )  # fmt: skip
    masks = {f"{which}prompt_attention_mask": torch.ones(1, TEXT) for which in ("", "negative_")}
    return _sampler(pipe, lambda prompt: {**embedded(prompt), **masks}, 128, 192, 17, guidance)


def cogvideox(guidance: float) -> PipelineSampler:
    """Three latent frames of 4 x 6 tokens, after the text."""
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=TEXT_DIM, num_layers=2, sample_width=12, sample_height=8, sample_frames=9,
        max_text_seq_length=TEXT,
    )  # fmt: skip
    pipe = CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=model.eval(), scheduler=CogVideoXDDIMScheduler()
    )
    return _sampler(pipe, embedded, 64, 96, 9, guidance)


def mochi(guidance: float) -> PipelineSampler:
    """Prompts and their negatives are of different lengths."""
    made = text_after.mochi(None, "cpu")

    def arguments(prompt: str) -> dict[str, torch.Tensor]:
        negative = {f"negative_{name}": value for name, value in text_after.embedded("").items()}
        return {**text_after.embedded(prompt), **negative}

    return _sampler(made.pipe, arguments, 128, 192, 25, guidance)


def ltx_guided(steps: int | None, device: str) -> PipelineSampler:
    """What ``--model`` may name."""
    return ltx(4.0)


def cogvideox_guided(steps: int | None, device: str) -> PipelineSampler:
    """What ``--model`` may name."""
    return cogvideox(4.0)


def _sampler(
    pipe: Any, prompt_arguments: Any, height: int, width: int, frames: int, guidance: float
) -> PipelineSampler:
    pipe.set_progress_bar_config(disable=True)
    return PipelineSampler(
        pipe, prompt_arguments=prompt_arguments, num_inference_steps=3, height=height, width=width, num_frames=frames,
        guidance_scale=guidance,
    )  # fmt: skip
