"""Models that cannot be calibrated are refused before any work, with the reason and the remedy in a line."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import accelerate
import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from support import batched, quantised, text_after, wan
from support.schedules import random_schedule
from torch import Tensor, nn

from calibatt.plans import Blocks, PlanFile, Segment, StoredLayers, TokenGrid
from calibatt.runtime import Plan
from calibatt.runtime.adapters import adapter_for
from calibatt.tools.calibrate.checks import CheckError, check_gradients, check_model
from calibatt.tools.calibrate.work import check_sampler

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {
    "wan": lambda: wan.transformer(1),
    "ltx": lambda: batched.ltx(1.0).transformer,
    "cogvideox": lambda: batched.cogvideox(1.0).transformer,
    "mochi": lambda: text_after.mochi(None, "cpu").transformer,
    "hunyuan": lambda: text_after.hunyuan(None, "cpu").transformer,
}


@pytest.mark.parametrize("family", MODELS)
def test_ordinary_models_pass(family: str):
    model = MODELS[family]()
    check_model(model)
    check_gradients(model, adapter_for(model))


def checked(model: nn.Module) -> None:
    check_model(model)
    check_gradients(model, adapter_for(model))


def test_a_compiled_model_is_refused():
    model = wan.transformer(1)
    with pytest.raises(CheckError, match=r"must not be compiled .* got WanTransformer3DModel compiled; calibrate"):
        check_model(torch.compile(model, backend="eager"))
    model.blocks[1].compile(backend="eager")
    with pytest.raises(CheckError, match=r"got blocks\.1 compiled"):
        check_model(model)


def test_an_attached_plan_is_refused():
    model, grid = wan.transformer(1), TokenGrid(3, 4, 6)
    signature = adapter_for(model).signature(model)
    rng = np.random.default_rng(0)
    schedules = tuple(random_schedule(rng, grid, Blocks(16, 16), signature.heads, 0.5) for _ in range(signature.layers))
    plan = Plan(PlanFile(signature, grid, Blocks(16, 16), (Segment(0.0, 1.0, 0.5),), StoredLayers.of([schedules])))
    with (
        plan.attach(model),
        pytest.raises(CheckError, match=r"without a plan, got one attached to blocks\.0\.attn1, bl"),
    ):
        check_model(model)
    check_model(model)


CACHES = {
    "first block": diffusers.FirstBlockCacheConfig(threshold=0.1),
    "faster": diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 601),
        current_timestep_callback=lambda: 500,
    ),
    "broadcast": diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
}


@pytest.mark.parametrize("cache", CACHES)
def test_a_step_cache_is_refused(cache: str):
    model = wan.transformer(1)
    model.enable_cache(CACHES[cache])
    with pytest.raises(CheckError, match=f"got the step cache {type(CACHES[cache]).__name__}; call disable_cache"):
        check_model(model)
    model._cache_config = None  # as where a hook was applied by hand
    with pytest.raises(CheckError, match=r"got the step cache .*; call disable_cache"):
        check_model(model)


def test_weights_made_under_inference_mode_are_refused():
    with torch.inference_mode():
        model = wan.transformer(1)
    with pytest.raises(CheckError, match=r"outside of torch.inference_mode, got scale_shift_table, .* and \d+ more ma"):
        check_model(model)


def test_dropout_is_refused():
    model = wan.transformer(1)
    model.blocks[0].attn1.to_out[1].p = 0.5
    check_model(model)
    with pytest.raises(CheckError, match=r"must not drop out values, got blocks\.0\.attn1\.to_out\.1 in training"):
        check_model(model.train())


def test_what_to_change_is_said_before_that_a_model_is_unknown():
    """Of any of the sampling's transformers."""
    unknown = nn.Linear(2, 2)
    unknown.compile(backend="eager")
    for models in ((unknown, ()), (nn.Linear(2, 2), (unknown,))):
        sampler = SimpleNamespace(transformer=models[0], other_transformers=models[1])
        with pytest.raises(CheckError, match="Linear must not be compiled"):
            check_sampler(sampler)


class Rounded(nn.Linear):
    """A layer whose inputs are rounded, as quantised ones are, with a gradient of several kinds."""

    backward = "right"

    def forward(self, x: Tensor) -> Tensor:
        step = x.detach().abs().amax(-1, keepdim=True) / 127
        rounded = (x.detach() / step).round() * step
        if self.backward == "none":
            return super().forward(rounded)
        if self.backward == "rounding's own":
            return super().forward((x / step).round() * step)
        factor = {"right": 1.0, "half": 0.5}[self.backward]
        return super().forward(rounded + factor * (x - x.detach()))


def with_layer(backward: str) -> nn.Module:
    model = wan.transformer(1)
    layer = Rounded(32, 32)
    layer.backward = backward
    model.blocks[1].attn2.to_k = layer
    return model


def test_a_layer_that_gives_the_right_gradient_passes():
    checked(with_layer("right"))


@pytest.mark.parametrize("backward", ["none", "rounding's own", "half"])
def test_a_layer_that_gives_no_or_a_wrong_gradient_is_named(backward: str):
    model = with_layer(backward)
    number = r"\d+\.?\d*" if backward == "half" else "0"
    told = rf"blocks\.1\.attn2\.to_k \(Rounded, float32 Parameter\) must have the gradient .*> = {number} by its .* \d"
    with pytest.raises(CheckError, match=told):
        check_gradients(model, adapter_for(model))


def test_a_layer_that_cannot_be_differentiated_is_named():
    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise NotImplementedError("no backward")
            return super().forward(x)

    model = wan.transformer(1)
    model.blocks[0].ffn.net[2] = Broken(32, 32)
    with pytest.raises(CheckError, match=r"blocks\.0\.ffn\.net\.2 \(Broken.*by itself, got NotImplementedError: no ba"):
        check_gradients(model, adapter_for(model))


def test_one_layer_of_a_kind_is_tried():
    model = wan.transformer(1)
    calls = []
    for block in model.blocks:
        for name in ("to_q", "to_k"):
            layer = Rounded(32, 32)
            layer.register_forward_pre_hook(lambda *_, of=(block, name): calls.append(of))
            setattr(block.attn1, name, layer)
    check_gradients(model, adapter_for(model))
    assert set(calls) == {(model.blocks[0], "to_q")}


def sequential(model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def grouped(model: nn.Module) -> None:
    apply_group_offloading(model, torch.device("cpu"), offload_type="block_level", num_blocks_per_group=2)


def cast(model: nn.Module) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)


def low_rank(model: nn.Module) -> None:
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_out.0"], init_lora_weights=False))


@pytest.mark.parametrize("change", [sequential, grouped, cast, low_rank])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_changed_by_libraries_pass(change: Callable[[nn.Module], None], dtype: torch.dtype):
    model = wan.transformer(1).to(dtype)
    change(model)
    checked(model)


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_quantised_models_pass(kind: str):
    quantised.require(kind)
    checked(quantised.model(kind))
