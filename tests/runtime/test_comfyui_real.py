"""The nodes in ComfyUI's own code, where `COMFYUI_PATH` names a checkout: `support.comfyui`."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.schedules import random_schedule

from calibatt.plans import Blocks, ModelSignature, PlanFile, Segment, StoredLayers, TokenGrid, write_plan
from calibatt.runtime import Plan, load_plan, ops
from calibatt.runtime.comfyui import FAMILIES, ApplyPlan, ExplainPlan, PlannedOverride

comfyui = pytest.importorskip("support.comfyui", reason="needs diffusers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
GRID = TokenGrid(frames=3, height=4, width=6)
SEGMENTS = (Segment(0.0, 0.5, 0.25), Segment(0.5, 0.937, 0.75), Segment(0.937, 1.0, 1.0))


@pytest.fixture(scope="module")
def comfy() -> Any:
    return comfyui.load()


@pytest.fixture
def wan(comfy: Any) -> Any:
    comfyui.demand("comfy.ldm.wan.model", "WanModel")
    return comfyui.wan(comfy)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of q of every planned attention call; the oracle executes them."""
    seen: list[tuple[int, ...]] = []
    attend = ops.attend

    def spy(q: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(q.shape))
        return attend(q, *args, **kwargs)

    monkeypatch.setattr(ops, "attend", spy)
    monkeypatch.setattr(ops, "AUTO", ("reference",))
    return seen


def plan_file(family: str = "WanModel", grid: TokenGrid = GRID, layers: int = comfyui.LAYERS) -> PlanFile:
    rng = np.random.default_rng(0)
    blocks, heads = Blocks(16, 16), comfyui.HEADS
    schedules = tuple(
        tuple(random_schedule(rng, grid, blocks, heads, 0.4, anchored_heads=(1,)) for _ in range(layers))
        for _ in SEGMENTS
    )
    signature = ModelSignature(FAMILIES[family].architecture, layers, heads, comfyui.HEAD_DIM)
    return PlanFile(signature, grid, blocks, SEGMENTS, StoredLayers.of(schedules))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A plan as a file."""
    write_plan(tmp_path / "wan.plan", plan_file())
    return tmp_path / "wan.plan"


def planned(model: Any, path: Path, on_mismatch: Any = "error") -> Any:
    """What the node makes of a MODEL."""
    return ApplyPlan().apply(model, str(path), on_mismatch)[0]


def sample(comfy: Any, model: Any, height: int = 8) -> torch.Tensor:
    """A sampling with guidance, of prompts that are not as long as the video."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 4, 3, height, 12, generator=generator)
    text, negative = torch.randn(2, 1, 7, comfyui.TEXT_DIM, generator=generator)
    return comfyui.sample(comfy, model, noise, text, negative)


def test_heads_and_tokens_lie_as_in_diffusers(comfy: Any, wan: Any, path: Path) -> None:
    """A plan made with diffusers is the same plan here: one model, two classes."""
    model = comfyui.diffusers_wan(wan)
    generator = torch.Generator().manual_seed(2)
    x, text = torch.randn(2, 4, 3, 8, 12, generator=generator), torch.randn(2, 7, 16, generator=generator)
    timestep = torch.tensor([700.0, 700.0])

    def difference() -> float:
        options = planned(wan, path).model_options["transformer_options"] if attached else {}
        mine = wan.model.diffusion_model(x, timestep, text, transformer_options=options | {"sigmas": timestep / 1000})
        theirs = model(x, timestep, text, return_dict=False)[0]
        return float((mine - theirs).abs().max() / theirs.abs().max())

    with torch.no_grad():
        attached = False
        assert difference() < 1e-5
        with load_plan(path).attach(model):
            assert difference() > 1e-3
            attached = True
            assert difference() < 1e-5


@pytest.mark.parametrize("batched", [True, False])
def test_a_plan_is_masked_attention(
    comfy: Any, wan: Any, path: Path, calls: Any, monkeypatch: pytest.MonkeyPatch, batched: bool
) -> None:
    """With guidance in one batch, and in two forwards."""
    monkeypatch.setattr(wan.model, "memory_required", lambda *args, **kwargs: 0 if batched else 1 << 60)
    expected = sample(comfy, comfyui.overridden(wan, comfyui.masked_override(load_plan(path))))
    assert (expected - sample(comfy, wan)).abs().max() > 1e-2
    assert not calls
    torch.testing.assert_close(sample(comfy, planned(wan, path)), expected, rtol=0, atol=2e-5)
    batch, forwards = (2, 4) if batched else (1, 8)
    assert calls == [(batch, comfyui.HEADS, GRID.tokens, comfyui.HEAD_DIM)] * comfyui.LAYERS * forwards


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_lora_is_followed(comfy: Any, wan: Any, path: Path, monkeypatch: pytest.MonkeyPatch, offloaded: bool) -> None:
    """Also one that comes after the plan; also where weights wait elsewhere until their layer computes."""
    if offloaded:

        def load(models: Any, *args: Any, **kwargs: Any) -> None:
            for each in models:
                each.detach()
                each.load(each.load_device, lowvram_model_memory=1)
                assert each.model.model_lowvram

        monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
    change = torch.randn(32, 32, generator=torch.Generator().manual_seed(3)) / 6
    patch = {"diffusion_model.blocks.1.self_attn.q.weight": ("diff", (change,))}
    with_lora, truth = planned(wan, path).clone(), comfyui.overridden(wan, comfyui.masked_override(load_plan(path)))
    without = sample(comfy, with_lora)
    for model in (with_lora, truth):
        assert model.add_patches(patch, 1.0)
    got, expected = (sample(comfy, model) for model in (with_lora, truth))
    assert (got - without).abs().max() > 1e-2
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("first", ["plan", "compile"])
def test_compiled_models(comfy: Any, wan: Any, path: Path, calls: Any, first: str) -> None:
    """By the function of ComfyUI's node TorchCompileModel, before the plan or after it, once without a plan before."""
    torch._dynamo.reset()
    node = importlib.import_module("comfy_api.torch_helpers")

    def compiled(model: Any) -> Any:
        copy = model.clone()
        guards = {"guard_filter_fn": lambda entries: ["transformer_options" not in entry.name for entry in entries]}
        node.set_torch_compile_wrapper(model=copy, backend="aot_eager", options=guards)
        return copy

    stock, expected = sample(comfy, wan), sample(comfy, planned(wan, path))
    assert torch.equal(sample(comfy, compiled(wan)), stock)
    count = len(calls)
    model = compiled(planned(wan, path)) if first == "plan" else planned(compiled(wan), path)
    torch.testing.assert_close(sample(comfy, model), expected, rtol=0, atol=2e-5)
    assert len(calls) == 2 * count
    assert torch.equal(sample(comfy, compiled(wan)), stock)


def test_without_a_fitting_plan_nothing_changes(comfy: Any, path: Path, calls: Any) -> None:
    """Bit-equal to ComfyUI without the node, with one warning: another resolution, or a ComfyUI that is too old."""
    wan = comfyui.wan(comfy)
    stock = sample(comfy, wan, height=12)
    model = planned(wan, path, "dense")
    with pytest.warns(UserWarning, match="forward does not fit the plan") as met:
        assert torch.equal(sample(comfy, model, height=12), stock)
    assert len(met) == 1
    assert not calls


def test_a_plan_of_another_model_leaves_the_model(comfy: Any, tmp_path: Path) -> None:
    wan = comfyui.wan(comfy)
    write_plan(tmp_path / "other.plan", plan_file(layers=2))
    with pytest.warns(UserWarning, match="layers must be 2, got 3"):
        assert planned(wan, tmp_path, "dense") is wan


def test_explain(wan: Any, path: Path, calls: Any) -> None:
    told = ExplainPlan().explain(planned(wan, path))
    assert "WanTransformer3DModel" in told["result"][0]
    assert "backend on cpu, float32: reference" in told["result"][0]


def test_h3(comfy: Any, calls: Any) -> None:
    """Text and audio stand before the video; the refiner of the text is another attention."""
    model = comfyui.h3(comfy)
    text, audio = 7, 5
    grid = TokenGrid(3, 4, 6)
    plan = Plan(plan_file("MiniMaxH3Model", grid))
    generator = torch.Generator().manual_seed(4)
    x = [torch.randn(1, 4, 3, 8, 12, generator=generator), torch.randn(1, 4, 2, audio, generator=generator)]
    context = torch.randn(1, text, comfyui.TEXT_DIM, generator=generator)
    family = FAMILIES["MiniMaxH3Model"]
    assert family.signature(model) == plan.signature

    def run(override: Any) -> torch.Tensor:
        options = {"sigmas": torch.tensor([0.7]), "optimized_attention_override": override}
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("error")
            video, sound = model(x, torch.tensor([700.0]), context, transformer_options=options)
        return torch.cat([video.flatten(), sound.flatten()])

    def masked(func: Any, q: Any, *args: Any, **kwargs: Any) -> Any:
        if q.shape[2] != text + 2 * audio + grid.tokens:
            return func(q, *args, **kwargs)
        return comfyui.masked_override(plan)(func, q, *args, **kwargs)

    expected = run(masked)
    assert (expected - run(lambda func, *args, **kwargs: func(*args, **kwargs))).abs().max() > 1e-3
    torch.testing.assert_close(run(PlannedOverride([plan], family, None, "error")), expected, rtol=0, atol=2e-5)
    assert len(calls) == comfyui.LAYERS
