"""ComfyUI's own code, where `COMFYUI_PATH` names a checkout of it: tiny models of it, and its sampler."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from importlib.machinery import ModuleSpec
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import nn

from calibatt.runtime import Plan
from support.masked import masked_attention

OTHER_MODELS_NEED = ("torchvision", "torchaudio")
"""What ComfyUI imports for models that are not tested here, and releases of which belong to one build of torch."""
LAYERS, HEADS, HEAD_DIM, TEXT_DIM = 3, 2, 16, 16


class _Absent:
    """Finds packages that are not installed, and that nothing here calls."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.split(".")[0] in OTHER_MODELS_NEED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> Any:
        return MagicMock(__path__=[], __spec__=spec)

    def exec_module(self, module: Any) -> None:
        pass


@functools.cache
def _imported(path: str) -> Any:
    absent = _Absent()
    sys.path.append(path)
    sys.meta_path.append(absent)  # type: ignore[arg-type]
    before = {*sys.modules}
    try:
        importlib.import_module("comfy.cli_args").args.cpu = True
        for name in ("model_base", "model_patcher", "sample", "samplers", "supported_models"):
            importlib.import_module(f"comfy.{name}")
    finally:
        sys.meta_path.remove(absent)  # type: ignore[arg-type]
        for name in {*sys.modules} - before:  # diffusers must not believe in them
            if name.split(".")[0] in OTHER_MODELS_NEED and isinstance(sys.modules[name], MagicMock):
                del sys.modules[name]
    return sys.modules["comfy"]


def load() -> Any:
    """The package `comfy`, for a CPU; skips the test where there is no checkout."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("needs a checkout of ComfyUI: COMFYUI_PATH must name its folder")
    return _imported(path)


def demand(module: str, kind: str) -> Any:
    """A class of ComfyUI's transformers; skips the test where it is missing, or does not say which block attends."""
    try:
        found = getattr(importlib.import_module(module), kind)
    except ImportError:
        pytest.skip(f"this ComfyUI has no {kind}")
    if "block_index" not in inspect.getsource(found):
        pytest.skip(f"this ComfyUI does not say which block of {kind} attends")
    return found


def wan(comfy: Any) -> Any:
    """ComfyUI's MODEL of a tiny Wan with random weights, in which attention matters."""
    settings = comfy.supported_models.WAN21_T2V(
        {
            "image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "in_dim": 4, "out_dim": 4,
            "dim": HEADS * HEAD_DIM, "num_heads": HEADS, "num_layers": LAYERS, "ffn_dim": 32, "freq_dim": 32,
            "text_dim": TEXT_DIM,
        }
    )  # fmt: skip
    settings.set_inference_dtype(torch.float32, None)
    settings.latent_format.latent_channels = 4
    model = comfy.model_base.WAN21(settings, device="cpu")
    model.process_latent_in = model.process_latent_out = lambda latent: latent
    return _patcher(comfy, model)


def diffusers_wan(model: Any) -> WanTransformer3DModel:
    """The same model in diffusers, by diffusers' own conversion of weights."""
    found = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=4,
        text_dim=TEXT_DIM, freq_dim=32, ffn_dim=32, num_layers=LAYERS, rope_max_seq_len=32,
    )  # fmt: skip
    weights = model.model.diffusion_model.state_dict()
    found.load_state_dict(convert_wan_transformer_to_diffusers(dict(weights)))
    return found.eval()


def h3(comfy: Any) -> Any:
    """ComfyUI's tiny MiniMax-H3 with random weights; the transformer alone."""
    model = demand("comfy.ldm.minimax.model", "MiniMaxH3Model")(
        hidden_size=32, num_layers=LAYERS, token_refiner_num_layers=1, num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM, ffn_hidden_size=32, latents_dim=4, audio_latents_dim=4, text_dim=TEXT_DIM,
        timestep_input_dim=16, time_embed_hidden_size=16, time_embed_dim=16, rope_inv_freq_len=2, dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    _randomise(model)
    return model


def _patcher(comfy: Any, model: Any) -> Any:
    _randomise(model.diffusion_model)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)


def _randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (*model.parameters(), *model.buffers()):
            size = 0.3 if weight.ndim < 2 else weight[0].numel() ** -0.5
            weight.requires_grad_(False).normal_(std=size, generator=generator).add_(weight.ndim == 1)


def sample(comfy: Any, model: Any, noise: torch.Tensor, text: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Four steps of ComfyUI's sampler with guidance, as its node KSampler takes them."""
    with torch.inference_mode():  # as ComfyUI executes nodes
        return comfy.sample.sample(
            model, noise, steps=4, cfg=4.0, sampler_name="euler", scheduler="simple", positive=[[text, {}]],
            negative=[[negative, {}]], latent_image=torch.zeros_like(noise), disable_pbar=True, seed=1,
        )  # fmt: skip


def overridden(model: Any, override: Any) -> Any:
    """A copy of a MODEL with an override of attention."""
    copy = model.clone()
    copy.model_options["transformer_options"]["optimized_attention_override"] = override
    return copy


def masked_override(plan: Plan) -> Any:
    """The truth of a plan in ComfyUI: its own code, with explicit masks; the video is the end of a sequence."""

    def attend(func: Any, q: Any, k: Any, v: Any, heads: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        if k.shape != q.shape:
            return func(q, k, v, heads, *args, **kwargs)
        options = kwargs["transformer_options"]
        schedule = plan.schedule(float(options["sigmas"].max()), options["block_index"])
        if kwargs.get("skip_reshape"):
            parts = [x.transpose(1, 2) for x in (q, k, v)]
        else:
            parts = [x.unflatten(2, (heads, -1)) for x in (q, k, v)]
        start = q.shape[2 if kwargs.get("skip_reshape") else 1] - schedule.grid.tokens
        return masked_attention(*parts, schedule, start).flatten(2)

    return attend
