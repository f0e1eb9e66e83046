"""Tiny pipelines of every family with their VAEs, text to video and image to video, with random weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import PIL.Image
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMiniMaxH3,
    AutoencoderKLMiniMaxH3Audio,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    Kandinsky6TI2VAPipeline,
    Kandinsky6Transformer3DModel,
    LTX2ConditionPipeline,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MiniMaxH3Blocks,
    MiniMaxH3Scheduler,
    MiniMaxH3Transformer3DModel,
    MMAudioVAE,
    MMAudioVocoder,
    MochiPipeline,
    MochiTransformer3DModel,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from diffusers.modular_pipelines.minimax_h3.references import MiniMaxH3ImageReference
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from calibatt.plans import TokenGrid

TEXT, TEXT_DIM = 7, 16
PICTURE = PIL.Image.linear_gradient("L").convert("RGB")
NO_TEXT: dict[str, Any] = {"tokenizer": None, "text_encoder": None}


def embeds(prompt: str) -> dict[str, torch.Tensor]:
    """Embeddings that stand for a prompt, and those of the negative one."""
    generator = torch.Generator().manual_seed(len(prompt))
    found = torch.randn(1, TEXT, TEXT_DIM, generator=generator)
    return {"prompt_embeds": found, "negative_prompt_embeds": torch.zeros_like(found)}


def full(prompt: str) -> dict[str, torch.Tensor]:
    """The same at the length that models count on which get an image's embeddings with it."""
    return {name: torch.nn.functional.pad(x, (0, 0, 0, 512 - TEXT)) for name, x in embeds(prompt).items()}


def masked(prompt: str) -> dict[str, torch.Tensor]:
    """The same with masks."""
    masks = {f"{which}prompt_attention_mask": torch.ones(1, TEXT) for which in ("", "negative_")}
    return {**embeds(prompt), **masks}


def pooled(prompt: str) -> dict[str, torch.Tensor]:
    """Embeddings for HunyuanVideo."""
    mask = torch.ones(1, TEXT)
    return {
        "prompt_embeds": embeds(prompt)["prompt_embeds"], "prompt_attention_mask": mask,
        "pooled_prompt_embeds": torch.ones(1, 8),
    }  # fmt: skip


def wan(
    kind: type = WanPipeline, channels: int = 4, experts: int = 1, model: type = WanTransformer3DModel,
    config: dict[str, Any] | None = None, **options: Any,
) -> Any:  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 1.5, 2.0, 2.5],
    )  # fmt: skip
    models = [
        model(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=4,
            text_dim=TEXT_DIM, freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32, **(config or {}),
        ).eval()
        for _ in range(experts)
    ]  # fmt: skip
    more = {"transformer_2": models[1], "boundary_ratio": 0.6} if experts == 2 else {}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return kind(**NO_TEXT, vae=vae.eval(), transformer=models[0], scheduler=scheduler, **more, **options)


def seeing() -> dict[str, Any]:
    """What a model of the Wan kind needs that gets embeddings of an image."""
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=16, patch_size=8
    )
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return {
        "config": {"image_dim": 24, "added_kv_proj_dim": 32}, "image_processor": CLIPImageProcessor(**sizes),
        "image_encoder": CLIPVisionModelWithProjection(vision).eval(),
    }  # fmt: skip


def animate() -> Any:
    config = {
        "latent_channels": 4, "image_dim": 24, "motion_encoder_channel_sizes": {"4": 8, "8": 8},
        "motion_encoder_size": 8, "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8,
        "face_encoder_hidden_dim": 8, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 1,
    }  # fmt: skip
    parts = {**seeing(), "config": config}
    return wan(WanAnimatePipeline, 12, model=WanAnimateTransformer3DModel, **parts)


def skyreels(kind: type = SkyReelsV2Pipeline, channels: int = 4, **options: Any) -> Any:
    pipe = wan(kind, channels, model=SkyReelsV2Transformer3DModel, **options)
    if kind is SkyReelsV2DiffusionForcingPipeline:  # which needs whole numbers for times
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        pipe.scheduler = UniPCMultistepScheduler(**flow)
    return pipe


def vace() -> Any:
    config = {"vace_layers": [0], "vace_in_channels": 8 + 64}
    return wan(WanVACEPipeline, model=WanVACETransformer3DModel, config=config)


def ltx(kind: type = LTXPipeline, timestep_conditioning: bool = True) -> Any:
    vae = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=timestep_conditioning,
    )  # fmt: skip
    model = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=1, caption_channels=TEXT_DIM,
    )  # fmt: skip
    return kind(FlowMatchEulerDiscreteScheduler(), vae=vae.eval(), **NO_TEXT, transformer=model.eval())


def ltx2(kind: type = LTX2Pipeline, **config: Any) -> Any:
    vae = AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 3, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4, upsample_residual=(False,) * 3, upsample_factor=(1,) * 3,
        spatial_compression_ratio=32, temporal_compression_ratio=8,
    )  # fmt: skip
    audio = AutoencoderKLLTX2Audio(base_channels=4, num_res_blocks=1, latent_channels=2, norm_type="pixel", mel_bins=8)
    model = LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, num_layers=2, caption_channels=TEXT_DIM, **config,
    )  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=TEXT_DIM, text_proj_in_factor=1, video_connector_num_layers=1, audio_connector_num_layers=1,
        video_connector_num_attention_heads=2, video_connector_attention_head_dim=8,
        video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8, audio_connector_num_learnable_registers=None,
    )  # fmt: skip
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=16, upsample_kernel_sizes=[4], upsample_factors=[2], resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
    )  # fmt: skip
    return kind(
        FlowMatchEulerDiscreteScheduler(), vae=vae.eval(), audio_vae=audio.eval(), **NO_TEXT, transformer=model.eval(),
        connectors=connectors.eval(), vocoder=vocoder.eval(),
    )  # fmt: skip


def cogvideox(kind: type = CogVideoXPipeline, channels: int = 4) -> Any:
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=4, time_embed_dim=8,
        text_embed_dim=TEXT_DIM, num_layers=1, sample_width=12, sample_height=8, sample_frames=9,
        max_text_seq_length=TEXT, use_rotary_positional_embeddings=channels > 4,
    )  # fmt: skip
    return kind(**NO_TEXT, vae=vae.eval(), transformer=model.eval(), scheduler=CogVideoXDDIMScheduler())


def mochi() -> Any:
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, latent_channels=12,
        layers_per_block=(1,) * 5,
    )  # fmt: skip
    model = MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, pooled_projection_dim=16, in_channels=12,
        text_embed_dim=TEXT_DIM, time_embed_dim=8, max_sequence_length=TEXT,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return MochiPipeline(scheduler, vae=vae.eval(), **NO_TEXT, transformer=model.eval())


def hunyuan_vae() -> Any:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2,
        mid_block_add_attention=False,
    ).eval()  # fmt: skip


def hunyuan(condition: str | None = None) -> Any:
    model = HunyuanVideoTransformer3DModel(
        in_channels=9 if condition == "latent_concat" else 4, out_channels=4, num_attention_heads=2,
        attention_head_dim=16, num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=TEXT_DIM,
        pooled_projection_dim=8, rope_axes_dim=(4, 6, 6), image_condition_type=condition,
    )  # fmt: skip
    parts = {**NO_TEXT, "vae": hunyuan_vae(), "transformer": model.eval(), "text_encoder_2": None, "tokenizer_2": None}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    if condition is None:
        return HunyuanVideoPipeline(scheduler=scheduler, **parts)
    return HunyuanVideoImageToVideoPipeline(scheduler=scheduler, image_processor=None, **parts)


def hunyuan15(image: bool = False) -> Any:
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, spatial_compression_ratio=8
    )
    model = HunyuanVideo15Transformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, num_refiner_layers=1, patch_size=2,
        text_embed_dim=TEXT_DIM, text_embed_2_dim=TEXT_DIM, image_embed_dim=8, rope_axes_dim=(4, 6, 6), in_channels=9,
        out_channels=4, target_size=64,
    )  # fmt: skip
    parts = {**NO_TEXT, "vae": vae.eval(), "transformer": model.eval(), "text_encoder_2": None, "tokenizer_2": None}
    if image:
        config = SiglipVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8
        )
        processor = SiglipImageProcessor(size={"height": 16, "width": 16})
        parts |= {"image_encoder": SiglipVisionModel(config).eval(), "feature_extractor": processor}
    kind = HunyuanVideo15ImageToVideoPipeline if image else HunyuanVideo15Pipeline
    pipe = kind(**parts, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), guider=ClassifierFreeGuidance(4.0))
    pipe.vision_num_semantic_tokens = 4
    return pipe


def twice(prompt: str) -> dict[str, torch.Tensor]:
    """Embeddings and masks of two encoders for HunyuanVideo 1.5, with padding."""
    found = {**embeds(prompt), **{f"{name}_2": 2 * x for name, x in embeds(prompt).items()}}
    masks = {name.replace("embeds", "embeds_mask"): torch.arange(TEXT)[None] < 2 + len(name) % 5 for name in found}
    return {**found, **masks}


def kandinsky(kind: type, model: type, parts: dict[str, Any] | None = None, **config: Any) -> Any:
    made = model(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=TEXT_DIM, in_text_dim2=8, time_dim=16, model_dim=32, ff_dim=32,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6), visual_cond=True, **config,
    )  # fmt: skip
    for name, weight in made.named_parameters():
        if "modulation" in name:  # zeros at first, so that blocks do nothing
            torch.nn.init.normal_(weight, std=0.2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    more = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None, "scheduler": scheduler, **(parts or {})}
    return kind(transformer=made.eval(), vae=hunyuan_vae(), **more)


def kandinsky6() -> Any:
    audio = MMAudioVAE(mel_bins=8, latent_channels=4, hidden_channels=8, channel_multipliers=(1, 1), layers_per_block=1)
    vocoder = MMAudioVocoder(8, 8, (2,), (4,), (3,), ((1, 3, 5),))
    config = {"in_audio_dim": 4, "out_audio_dim": 4, "visual_token_type_num_embeddings": 2}
    parts = {"audio_vae": audio.eval(), "vocoder": vocoder.eval()}
    return kandinsky(Kandinsky6TI2VAPipeline, Kandinsky6Transformer3DModel, parts, **config)


def lengths(prompt: str) -> dict[str, torch.Tensor]:
    """Embeddings for Kandinsky 5."""
    found = {}
    for name, x in embeds(prompt).items():
        found |= {f"{name}_qwen": x, f"{name}_clip": x[:, 0, :8]}
        found[name.replace("embeds", "cu_seqlens")] = torch.tensor([0, TEXT], dtype=torch.int32)
    return found


def pooled_twice(prompt: str) -> dict[str, torch.Tensor]:
    """Embeddings for Kandinsky 6."""
    pooled = {name.replace("prompt", "pooled_prompt"): x[:, 0, :8] for name, x in embeds(prompt).items()}
    return {**embeds(prompt), **pooled}


def h3(name: str = "transformer") -> Any:
    """A pipeline of modular blocks without its text encoder, which makes videos of less than its five seconds too."""
    vae = AutoencoderKLMiniMaxH3(
        latent_channels=4, block_out_channels=(4,) * 4, layers_per_block=1, spatial_downsample_factors=(2, 2, 2, 1),
        temporal_downsample_factors=(1, 2, 2, 1), norm_num_groups=2, decoder_num_layers=1,
        decoder_num_attention_heads=1, decoder_attention_head_dim=16, latents_mean=(0.1,) * 4, latents_std=(1.5,) * 4,
    )  # fmt: skip
    audio = AutoencoderKLMiniMaxH3Audio(
        encoder_dim=2, latent_dim=16, latent_channels=4, num_attention_heads=1, decoder_dim=128,
        resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 3, 5),), latents_mean=[0.1] * 4, latents_std=[1.5] * 4,
    )  # fmt: skip
    model = MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=16, hidden_size=32, num_layers=2, num_refiner_layers=1, ffn_dim=32,
        in_channels=4, audio_in_channels=4, text_dim=TEXT_DIM, freq_dim=16, time_embed_hidden_dim=16,
        time_embed_dim=16, rope_freq_dim=2,
    )  # fmt: skip
    blocks = MiniMaxH3Blocks()
    del blocks.sub_blocks["text_encoder"]
    pipe = blocks.init_pipeline()
    pipe.update_components(
        **{name: model.eval()}, vae=vae.eval(), audio_vae=audio.eval(), scheduler=MiniMaxH3Scheduler(12.0),
        audio_scheduler=MiniMaxH3Scheduler(3.0), reference_image_short_edge=64,
    )  # fmt: skip
    pipe.__class__ = type("ShortH3", (type(pipe),), {"min_duration": 0.0})
    return pipe


def tagged(prompt: str) -> dict[str, torch.Tensor]:
    """Embeddings for MiniMax-H3."""
    return {"prompt_embeds": embeds(prompt)["prompt_embeds"], "text_token_tags": torch.ones(TEXT)}


SMALL = {"height": 64, "width": 96, "num_frames": 9}
LARGE = {"height": 128, "width": 192, "num_frames": 17}
GUIDED = {"guidance_scale": 4.0}
IMAGE = {"image": PICTURE}
H3 = {**SMALL, "num_frames": 22, "num_inference_steps": 4}
MOVED = {
    "pose_video": [PICTURE] * 9, "face_video": [PICTURE] * 9, "segment_frame_length": 9, "height": 64, "width": 96
}  # fmt: skip
REFERENCE = {"references": [MiniMaxH3ImageReference(PICTURE)], "transformer": "transformer_ref"}
LAST = {"conditions": [LTXVideoCondition(image=PICTURE, frame_index=16)]}
LATER = {"conditions": [LTX2VideoCondition(frames=PICTURE, index=2, crf=0)]}
FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[str], Any], dict[str, Any]]] = {
    "wan": (wan, embeds, {**SMALL, **GUIDED}),
    "wan_experts": (lambda: wan(experts=2), embeds, {**SMALL, **GUIDED}),
    "wan_ti2v": (lambda: wan(expand_timesteps=True), embeds, SMALL),
    "wan_i2v": (lambda: wan(WanImageToVideoPipeline, 12), embeds, {**SMALL, **IMAGE}),
    "wan_ti2v_image": (lambda: wan(WanImageToVideoPipeline, expand_timesteps=True), embeds, {**SMALL, **IMAGE}),
    "wan_vace": (vace, embeds, {**SMALL, **GUIDED, "video": [PICTURE] * 9}),
    "wan_vace_reference": (vace, embeds, {**SMALL, "reference_images": [PICTURE]}),
    "wan_animate": (animate, embeds, {**IMAGE, **MOVED}),
    "skyreels": (skyreels, embeds, {**SMALL, **GUIDED}),
    "skyreels_i2v": (lambda: skyreels(SkyReelsV2ImageToVideoPipeline, 12, **seeing()), full, {**SMALL, **IMAGE}),
    "skyreels_forcing": (lambda: skyreels(SkyReelsV2DiffusionForcingPipeline), embeds, {**SMALL, "prompt": None}),
    "ltx": (ltx, masked, {**LARGE, **GUIDED, "decode_timestep": 0.05, "decode_noise_scale": 0.025}),
    "ltx_old": (lambda: ltx(timestep_conditioning=False), masked, LARGE),
    "ltx_i2v": (lambda: ltx(LTXImageToVideoPipeline), masked, {**LARGE, **IMAGE}),
    "ltx_condition": (lambda: ltx(LTXConditionPipeline), masked, LARGE),
    "ltx_first": (lambda: ltx(LTXConditionPipeline), masked, {**LARGE, **IMAGE, "image_cond_noise_scale": 0.2}),
    "ltx_last": (lambda: ltx(LTXConditionPipeline), masked, {**LARGE, **LAST}),
    "ltx2": (lambda: ltx2(perturbed_attn=True), masked, {**LARGE, **GUIDED, "spatio_temporal_guidance_blocks": [1]}),
    "ltx2_i2v": (lambda: ltx2(LTX2ImageToVideoPipeline), masked, {**LARGE, **IMAGE, "image_crf": 0}),
    "ltx2_last": (lambda: ltx2(LTX2ConditionPipeline), masked, {**LARGE, **LATER}),
    "cogvideox": (cogvideox, embeds, {**SMALL, **GUIDED}),
    "cogvideox_i2v": (lambda: cogvideox(CogVideoXImageToVideoPipeline, 8), embeds, {**SMALL, **IMAGE}),
    "mochi": (mochi, masked, {**SMALL, "num_frames": 13, **GUIDED}),
    "hunyuan": (hunyuan, pooled, SMALL),
    "hunyuan_i2v": (lambda: hunyuan("latent_concat"), pooled, {**SMALL, **IMAGE}),
    "hunyuan_i2v_replace": (lambda: hunyuan("token_replace"), pooled, {**SMALL, **IMAGE}),
    "hunyuan15": (hunyuan15, twice, SMALL),
    "hunyuan15_i2v": (lambda: hunyuan15(image=True), twice, {"num_frames": 9, **IMAGE}),
    "kandinsky5": (lambda: kandinsky(Kandinsky5T2VPipeline, Kandinsky5Transformer3DModel), lengths, SMALL),
    "kandinsky5_i2v": (
        lambda: kandinsky(Kandinsky5I2VPipeline, Kandinsky5Transformer3DModel),
        lengths,
        {**SMALL, **IMAGE, "num_frames": 21},
    ),
    "kandinsky6": (kandinsky6, pooled_twice, SMALL),
    "kandinsky6_i2v": (kandinsky6, pooled_twice, {**SMALL, **IMAGE}),
    "h3": (h3, tagged, H3),
    "h3_first_last": (h3, tagged, {**H3, **IMAGE, "last_image": PICTURE}),
    "h3_reference": (lambda: h3("transformer_ref"), tagged, {**H3, **REFERENCE}),
}
"""Of every kind: what makes the pipeline, what it is called with for a prompt, and always."""
GRIDS = {
    "wan_animate": TokenGrid(4, 4, 6),
    "wan_vace_reference": TokenGrid(4, 4, 6),
    "hunyuan15_i2v": TokenGrid(3, 4, 4),
    "kandinsky5_i2v": TokenGrid(6, 4, 6),
    **dict.fromkeys(("h3", "h3_first_last", "h3_reference"), TokenGrid(7, 4, 6)),
}
"""Of the video, where they are not 3 frames of 4 x 6 tokens."""


def pipeline(name: str) -> tuple[Any, Callable[[str], Any], dict[str, Any]]:
    """A pipeline, what it is called with for a prompt, and in every call: few steps at a small size."""
    torch.manual_seed(0)
    make, prompt_arguments, arguments = FAMILIES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' own, of weight_norm
        pipe = make()
    pipe.set_progress_bar_config(disable=True)
    return pipe, prompt_arguments, {"num_inference_steps": 3, **arguments}
