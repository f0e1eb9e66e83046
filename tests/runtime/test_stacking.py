"""What people stack on a model with a plan: guidance, LoRA, casting, offloading, quantisation, step caches, compiling.

Tiny Wan, random weights.
The truth is always the stock code with explicit masks (`support.masked`), with the same things stacked on it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import accelerate
import diffusers
import numpy as np
import peft
import pytest
import torch
from support import quantised, wan
from support.masked import masked
from support.schedules import random_schedule

from calibatt.plans import Blocks, PlanFile, Segment, StoredLayers, TokenGrid
from calibatt.runtime import Plan, ops
from calibatt.runtime.adapters import adapter_for

pytestmark = pytest.mark.slow

GRID = TokenGrid(frames=5, height=8, width=12)
BLOCKS = Blocks(32, 32)
STEPS, LAYERS = 8, 2
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(autouse=True)
def setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` is the oracle."""
    monkeypatch.setattr(ops, "AUTO", ("reference",))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch size of every planned attention call."""
    seen: list[int] = []
    attend = ops.attend

    def spy(q: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(q))
        return attend(q, *args, **kwargs)

    monkeypatch.setattr(ops, "attend", spy)
    return seen


def plan_for(model: Any) -> Plan:
    rng = np.random.default_rng(0)
    segments = (Segment(0.0, 0.6, 0.3), Segment(0.6, 1.0, 0.8))
    layers = [[random_schedule(rng, GRID, BLOCKS, 2, 0.3, anchored_heads=[1]) for _ in range(LAYERS)] for _ in segments]
    return Plan(PlanFile(adapter_for(model).signature(model), GRID, BLOCKS, segments, StoredLayers.of(layers)))


def generate(pipe: Any, guidance: float = 5.0, steps: int = STEPS) -> torch.Tensor:
    return pipe(
        **wan.embedded("a boat"), height=128, width=192, num_frames=17, num_inference_steps=steps,
        guidance_scale=guidance, output_type="latent", generator=torch.Generator().manual_seed(1),
    ).frames  # fmt: skip


def forward(model: Any, seeds: tuple[int, ...] = (1,)) -> torch.Tensor:
    def draw(*shape: int) -> torch.Tensor:
        return torch.cat([torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    with torch.no_grad():
        return model(draw(16, 5, 16, 24), torch.tensor([700] * len(seeds)), draw(8, 16), return_dict=False)[0]


@pytest.mark.parametrize(("guidance", "forwards"), [(5.0, 2), (1.0, 1)])
def test_guidance_in_two_forwards_or_none(guidance: float, forwards: int, calls: list[int]) -> None:
    pipe = wan.pipeline()
    plan = plan_for(pipe.transformer)
    stock = generate(pipe, guidance)
    with masked(pipe.transformer, plan):
        expected = generate(pipe, guidance)
    with plan.attach(pipe.transformer):
        torch.testing.assert_close(generate(pipe, guidance), expected, **CLOSE)
    assert calls == [1] * (STEPS * LAYERS * forwards)
    assert (expected - stock).abs().max() > 0.01, "the plan matters"
    assert torch.equal(generate(pipe, guidance), stock)


@pytest.mark.parametrize("euler", [False, True], ids=["unipc", "euler"])
@pytest.mark.parametrize("steps", [4, 8])
def test_few_steps(steps: int, euler: bool, calls: list[int]) -> None:
    """Distilled models take few steps, without guidance, at times of their own: one plan serves them all."""
    pipe = wan.pipeline(euler=euler)
    plan = plan_for(pipe.transformer)
    with masked(pipe.transformer, plan):
        expected = generate(pipe, 1.0, steps)
    with plan.attach(pipe.transformer):
        torch.testing.assert_close(generate(pipe, 1.0, steps), expected, **CLOSE)
    assert calls == [1] * (steps * LAYERS)


def test_guidance_in_one_batch(calls: list[int]) -> None:
    model = wan.transformer(1)
    with plan_for(model).attach(model):
        alone = [forward(model, (seed,)) for seed in (1, 2)]
        calls.clear()
        torch.testing.assert_close(forward(model, (1, 2)), torch.cat(alone), **CLOSE)
    assert calls == [2] * LAYERS


def test_lora_added_after_attach() -> None:
    """Added, scaled, fused into the weights, unfused and taken away, all under the plan."""
    model = wan.transformer(1)
    plan = plan_for(model)
    with plan.attach(model):
        plain = forward(model)
        torch.manual_seed(2)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        model.add_adapter(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        steps: dict[str, Callable[[], Any]] = {
            "added": lambda: None,
            "scaled": lambda: model.set_adapters("default", 0.5),
            "fused": lambda: model.fuse_lora(),
            "unfused": lambda: model.unfuse_lora(),
        }
        for name, change in steps.items():
            change()
            found = forward(model)
            twin = copy_without_plan(model)
            with masked(twin, plan):
                torch.testing.assert_close(found, forward(twin), **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
            assert (found - plain).abs().max() > 1e-3, name
        model.delete_adapters("default")
        torch.testing.assert_close(forward(model), plain, **CLOSE)


def copy_without_plan(model: Any) -> Any:
    """The same weights under stock processors."""
    memo: dict[int, Any] = {}
    for site in adapter_for(model).sites(model):
        processor = site.attention.processor
        memo[id(processor)] = type(processor.beneath)()
    hooks, model._forward_pre_hooks = model._forward_pre_hooks, type(model._forward_pre_hooks)()
    try:
        return copy.deepcopy(model, memo)
    finally:
        model._forward_pre_hooks = hooks


@pytest.mark.parametrize("attach_first", [False, True])
def test_fused_projections_and_back(attach_first: bool) -> None:
    model = wan.transformer(1)
    plan = plan_for(model)
    with masked(model, plan):
        expected = forward(model)
    if not attach_first:
        model.fuse_qkv_projections()
    with plan.attach(model):
        if attach_first:
            model.fuse_qkv_projections()
        torch.testing.assert_close(forward(model), expected, **CLOSE)
        model.unfuse_qkv_projections()
        torch.testing.assert_close(forward(model), expected, **CLOSE)


def cast(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def offload_leaves(model: Any) -> None:
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


def offload_blocks(model: Any) -> None:
    model.enable_group_offload(
        torch.device("cpu"), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


def offload_sequentially(model: Any) -> None:
    """What `enable_sequential_cpu_offload` does to a transformer; weights are on the meta device meanwhile."""
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def offload_whole(model: Any) -> None:
    """What `enable_model_cpu_offload` does to a transformer."""
    accelerate.cpu_offload_with_hook(model, torch.device("cpu"))


@pytest.mark.parametrize("attach_first", [False, True])
@pytest.mark.parametrize("change", [cast, offload_leaves, offload_blocks, offload_sequentially, offload_whole])
def test_casting_and_offloading(change: Callable[[Any], None], attach_first: bool, calls: list[int]) -> None:
    """Without CUDA: everything is offloaded from the CPU to the CPU, by the same hooks."""
    model, twin = wan.transformer(1), wan.transformer(1)
    plan = plan_for(model)
    change(twin)
    with masked(twin, plan):
        expected = forward(twin)
    stock = forward(twin)
    if not attach_first:
        change(model)
    with plan.attach(model) as attachment:
        if attach_first:
            change(model)
        for _ in range(2):
            torch.testing.assert_close(forward(model), expected, **CLOSE)
        met = [line for line in attachment.explain().splitlines() if line.startswith("backend on")]
        assert met == ["backend on cpu, float32: reference (4 schedules)"], "never where weights only wait"
    assert calls == [1] * 2 * LAYERS
    assert torch.equal(forward(model), stock)


@pytest.mark.parametrize("attach_first", [False, True])
@pytest.mark.parametrize("kind", quantised.KINDS)
def test_quantised_linears(kind: str, attach_first: bool) -> None:
    quantised.require(kind)
    model = quantised.model(None if attach_first else kind)
    twin = quantised.model(kind)
    plan = plan_for(twin)
    stock = forward(twin)
    with masked(twin, plan):
        expected = forward(twin)
    with plan.attach(model):
        if attach_first:
            quantised.quantise(model, kind)
        torch.testing.assert_close(forward(model), expected, **CLOSE)
    assert (expected - stock).abs().max() > 0.01, "the plan matters"


def first_block(pipe: Any) -> Any:
    return diffusers.FirstBlockCacheConfig(threshold=0.5)


def pyramid(pipe: Any) -> Any:
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def faster(pipe: Any) -> Any:
    """The first forward must be outside of the range: it fills the cache."""
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        spatial_attention_block_identifiers=("blocks",),
        attention_weight_callback=lambda _: 0.5,
        is_guidance_distilled=True,
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def mag(pipe: Any) -> Any:
    return diffusers.MagCacheConfig(num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS, retention_ratio=0.25)


def taylor_seer(pipe: Any) -> Any:
    return diffusers.TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, cache_identifiers=[r"blocks\.\d+\.attn1"]
    )


def taylor_seer_lite(pipe: Any) -> Any:
    return diffusers.TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, use_lite_mode=True)


def sea(pipe: Any) -> Any:
    return diffusers.SeaCacheConfig(threshold=10.0)


CACHES = [first_block, pyramid, faster, mag, taylor_seer, taylor_seer_lite, sea]


@pytest.mark.parametrize("attach_first", [False, True])
@pytest.mark.parametrize("make", CACHES)
def test_step_caches(make: Callable[[Any], Any], attach_first: bool, calls: list[int]) -> None:
    """They leave out calls, and the plan follows the times of those that remain."""
    pipe, twin = wan.pipeline(), wan.pipeline()
    plan = plan_for(pipe.transformer)
    twin.transformer.enable_cache(make(twin))
    with masked(twin.transformer, plan):
        expected = generate(twin)
    if not attach_first:
        pipe.transformer.enable_cache(make(pipe))
    with plan.attach(pipe.transformer):
        if attach_first:
            pipe.transformer.enable_cache(make(pipe))
        torch.testing.assert_close(generate(pipe), expected, **CLOSE)
        assert 0 < len(calls) < STEPS * LAYERS * 2
        pipe.transformer.disable_cache()
        calls.clear()
        generate(pipe)
        assert len(calls) == STEPS * LAYERS * 2


def compile_blocks(model: Any) -> None:
    """As diffusers does; the code breaks where a cache decides."""
    model.compile_repeated_blocks(backend="eager", dynamic=False)


def compile_forwards(model: Any) -> None:
    """Before a cache wraps them: nothing in them breaks."""
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="eager", dynamic=False, fullgraph=True)


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")  # such a LoRA cannot be fused
@pytest.mark.parametrize(("compile_model", "attach_first"), [(compile_blocks, True), (compile_forwards, False)])
def test_everything_at_once(
    compile_model: Callable[[Any], None], attach_first: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP8 linears of torchao, a LoRA, compiled blocks, a step cache and guidance in one batch."""
    quantised.require("torchao")
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)
    model, twin, cache = stacked(), stacked(), diffusers.FirstBlockCacheConfig(threshold=0.5)
    plan = plan_for(twin)
    twin.enable_cache(cache)
    with masked(twin, plan):
        expected = followed(twin)
    twin.disable_cache()
    twin.enable_cache(cache)
    stock = followed(twin)
    compile_model(model)
    with ExitStack() as stack:
        if attach_first:
            stack.enter_context(plan.attach(model))
        model.enable_cache(cache)
        if not attach_first:
            stack.enter_context(plan.attach(model))
        found = followed(model)
    assert (found - expected).norm() < 0.002 * expected.norm()
    assert (stock - expected).norm() > 0.1 * expected.norm(), "the plan matters"
    assert set(calls) == {2}
    assert len(calls) < STEPS * LAYERS, "the cache skips"


def stacked() -> Any:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

    model = wan.transformer(1, wide=True).requires_grad_(False)
    quantize_(model.blocks, Float8DynamicActivationFloat8WeightConfig(set_inductor_config=False))
    torch.manual_seed(2)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return model


def followed(model: Any) -> torch.Tensor:
    """Every step's forward, of the prompt and the negative one together, on a given way from noise to a video.

    A sampling of its own would not do: the smallest difference rounds some values to the other neighbour in 8 bits.
    """
    generator = torch.Generator().manual_seed(1)
    noise, video = torch.randn(2, 1, 16, 5, 16, 24, generator=generator)
    prompts, found = torch.randn(2, 8, wan.TEXT_DIM, generator=generator), []
    for time in torch.linspace(1, 0.1, STEPS):
        latents = (time * noise + (1 - time) * video).expand(2, -1, -1, -1, -1)
        with torch.no_grad(), model.cache_context("both"):
            found.append(model(latents, (1000 * time).expand(2).long(), prompts, return_dict=False)[0])
    return torch.stack(found)
