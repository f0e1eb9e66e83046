"""Tiny Wan pipelines with random weights, and prompts embedded without a text encoder."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from calibatt.tools.calibrate.pipeline import PipelineSampler

TEXT_DIM = 16


def transformer(seed: int, wide: bool = False) -> WanTransformer3DModel:
    """Two layers of two heads of 16 channels, wide ones of 32, in which attention matters."""
    torch.manual_seed(seed)
    channels = 32 if wide else 16
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=channels, in_channels=16, out_channels=16,
        text_dim=TEXT_DIM, freq_dim=16, ffn_dim=2 * channels, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "scale_shift_table" in name:
                parameter.normal_(std=0.5)
    return model.eval()


def pipeline(experts: int = 1, euler: bool = False) -> WanPipeline:
    """Wan 2.1, or with two experts 2.2: the second one takes over below time 0.6."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    if euler:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        )
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        scheduler=scheduler,
        transformer=transformer(1),
        transformer_2=transformer(2) if experts == 2 else None,
        boundary_ratio=0.6 if experts == 2 else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embedded(prompt: str) -> dict[str, Any]:
    """Embeddings that stand for a prompt, and those of the negative one."""
    seed = int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=4).digest(), "little")
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(1, 8, TEXT_DIM, generator=generator),
        "negative_prompt_embeds": torch.zeros(1, 8, TEXT_DIM),
    }


def sampler(
    steps: int | None = None, device: str = "cpu", pipe: WanPipeline | None = None, **options: Any
) -> PipelineSampler:
    """Five latent frames of 8 x 12 tokens."""
    options = {"guidance_scale": 1.0, **options}
    return PipelineSampler(
        pipe or pipeline(), prompt_arguments=embedded, num_inference_steps=steps or 4, height=128, width=192,
        num_frames=17, **options,
    )  # fmt: skip


def guided(steps: int | None, device: str) -> PipelineSampler:
    """With guidance, in two forwards."""
    return sampler(steps, device, guidance_scale=5.0)


def first_expert(steps: int | None, device: str) -> PipelineSampler:
    """The first of two experts."""
    return sampler(steps, device, pipeline(experts=2))


def second_expert(steps: int | None, device: str) -> PipelineSampler:
    """The second of two experts."""
    return sampler(steps, device, pipeline(experts=2), transformer="transformer_2")


def no_sampler(steps: int | None, device: str) -> WanTransformer3DModel:
    """What ``--model`` must not name."""
    return transformer(0)
