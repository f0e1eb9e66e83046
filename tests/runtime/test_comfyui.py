"""The nodes against a stand-in of what they use of ComfyUI: models, their options, attention that can be overridden."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from support.masked import masked_attention
from support.schedules import random_schedule

from calibatt.plans import Blocks, ModelSignature, PlanFile, Segment, StoredLayers, TokenGrid, write_plan
from calibatt.runtime import Plan, PlanMismatchError, UnknownModelError, ops, resident
from calibatt.runtime.comfyui import FAMILIES, OVERRIDE, ApplyPlan, ExplainPlan, PlannedOverride
from calibatt.tools import comfyui

GRID = TokenGrid(frames=2, height=3, width=6)
LAYERS, HEADS, HEAD_DIM = 2, 2, 8
SEGMENTS = (Segment(0.0, 0.5, 0.25), Segment(0.5, 0.9, 0.75), Segment(0.9, 1.0, 1.0))


@pytest.fixture(autouse=True)
def oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "AUTO", ("reference",))


def plan_file(grid: TokenGrid = GRID, layers: int = LAYERS, head_dim: int = HEAD_DIM) -> PlanFile:
    rng, blocks = np.random.default_rng(0), Blocks(16, 16)
    schedules = tuple(
        tuple(random_schedule(rng, grid, blocks, HEADS, 0.4, anchored_heads=(1,)) for _ in range(layers))
        for _ in SEGMENTS
    )
    signature = ModelSignature("WanTransformer3DModel", layers, HEADS, head_dim)
    return PlanFile(signature, grid, blocks, SEGMENTS, StoredLayers.of(schedules))


def stock(q: Any, k: Any, v: Any, heads: int, mask: Any = None, **kwargs: Any) -> torch.Tensor:
    """ComfyUI's own attention, and what its functions know besides."""
    if not kwargs.get("skip_reshape"):
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=kwargs.get("scale"))
    return out if kwargs.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
    """How ComfyUI lets a node override it."""
    override = kwargs["transformer_options"].get(OVERRIDE)
    kwargs["_inside_attn_wrapper"] = True
    return stock(*args, **kwargs) if override is None else override(stock, *args, **kwargs)


def qkv(tokens: int = GRID.tokens, batch: int = 1, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(3, batch, tokens, HEADS * HEAD_DIM, generator=generator))


def options(override: Any = None, layer: int = 0, time: float = 0.7, grid: TokenGrid = GRID) -> dict[str, Any]:
    sizes = torch.Size((grid.frames, grid.height, grid.width))
    found = {"block_index": layer, "grid_sizes": sizes, "sigmas": torch.tensor([time])}
    return found if override is None else found | {OVERRIDE: override}


def planned(plan: Any = None, on_mismatch: Any = "error", beneath: Any = None) -> PlannedOverride:
    return PlannedOverride([plan or Plan(plan_file())], FAMILIES["WanModel"], beneath, on_mismatch)


def masked(plan: Plan, parts: list[torch.Tensor], layer: int = 0, time: float = 0.7) -> torch.Tensor:
    parts = [x.unflatten(2, (HEADS, -1)) for x in parts]
    start = parts[0].shape[1] - plan.grid.tokens  # the video is the end of a sequence
    return masked_attention(*parts, plan.schedule(min(time, 1.0), layer), start).flatten(2)


@pytest.mark.parametrize("time", [1.0 + 2**-23, 1.0, 0.89, 0.5, 0.49, 0.0])
@pytest.mark.parametrize("batch", [1, 2])
def test_self_attention_follows_layer_and_time(time: float, batch: int) -> None:
    plan, parts = Plan(plan_file()), qkv(batch=batch)
    for layer in range(LAYERS):
        got = attention(*parts, heads=HEADS, transformer_options=options(planned(plan), layer, time))
        torch.testing.assert_close(got, masked(plan, parts, layer, time), rtol=0, atol=2e-6)


@pytest.mark.parametrize("skip_reshape", [True, False])
@pytest.mark.parametrize("skip_output_reshape", [True, False])
def test_every_layout(skip_reshape: bool, skip_output_reshape: bool) -> None:
    plan, parts = Plan(plan_file()), qkv()
    expected = masked(plan, parts)
    if skip_output_reshape:
        expected = expected.unflatten(2, (HEADS, -1)).transpose(1, 2)
    if skip_reshape:
        parts = [x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in parts]
    kwargs = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    got = attention(*parts, HEADS, None, transformer_options=options(planned(plan)), **kwargs)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


@pytest.mark.gpu
def test_kernels_execute_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, as a part of a larger tensor, by the backend that auto stands for."""
    monkeypatch.undo()
    plan = Plan(plan_file(head_dim=64))
    generator = torch.Generator("cuda").manual_seed(0)
    fused = torch.randn(2, GRID.tokens, 3 * HEADS * 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    parts = fused.chunk(3, dim=2)
    got = attention(*parts, heads=HEADS, transformer_options=options(planned(plan)))
    assert "reference" not in planned(plan).explain("cuda", torch.bfloat16)
    torch.testing.assert_close(got.float(), masked(plan, [x.float() for x in parts]), rtol=0, atol=2e-2)


def test_a_scale_is_the_callers() -> None:
    plan, parts = Plan(plan_file()), qkv()
    got = attention(*parts, heads=HEADS, transformer_options=options(planned(plan)), scale=0.1)
    expected = masked(plan, [parts[0] * 0.1 * HEAD_DIM**0.5, *parts[1:]])
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("beneath", [True, False])
def test_other_calls_go_beneath(beneath: bool) -> None:
    """Cross-attention, attention with a mask, another number of heads: to an earlier override, or to ComfyUI."""
    seen = []

    def earlier(func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(func)
        return func(*args, **kwargs)

    q, k, v = qkv()
    text = qkv(5)
    chosen = options(planned(beneath=earlier if beneath else None))
    calls = [((q, text[1], text[2]), HEADS, None), ((q, k, v), HEADS, torch.zeros(36, 36)), ((q, k, v), 4, None)]
    for parts, heads, mask in calls:
        got = attention(*parts, heads=heads, mask=mask, transformer_options=chosen)
        assert torch.equal(got, attention(*parts, heads=heads, mask=mask, transformer_options=options()))
    assert seen == [stock] * (3 if beneath else 0)


def test_a_text_as_long_as_the_video_is_no_video() -> None:
    """The first attention of a block is the video's own, the second is not; so again in the next forward."""
    plan, parts, other = Plan(plan_file()), qkv(), qkv(seed=1)
    chosen = options(planned(plan))
    for _ in range(2):
        for chosen["block_index"] in range(LAYERS):
            got = attention(*parts, heads=HEADS, transformer_options=chosen)
            torch.testing.assert_close(got, masked(plan, parts, chosen["block_index"]), rtol=0, atol=2e-6)
            got = attention(*other, heads=HEADS, transformer_options=chosen)
            assert torch.equal(got, attention(*other, heads=HEADS, transformer_options=options()))


def test_a_time_changed_in_place_is_read_again() -> None:
    plan, parts = Plan(plan_file()), qkv()
    chosen = options(planned(plan))
    for time in (0.7, 0.3):
        chosen["sigmas"].fill_(time)
        for chosen["block_index"] in range(LAYERS):
            got = attention(*parts, heads=HEADS, transformer_options=chosen)
            torch.testing.assert_close(got, masked(plan, parts, chosen["block_index"], time), rtol=0, atol=2e-6)


def test_compiled_blocks_are_compiled_once() -> None:
    """Without guards on what options hold, as ComfyUI's node compiles: every layer and time are right all the same."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    def block(x: list[torch.Tensor], transformer_options: Any) -> torch.Tensor:
        return attention(*(each + 0 for each in x), heads=HEADS, transformer_options=transformer_options) * 1

    def guards(entries: Any) -> list[bool]:
        return ["transformer_options" not in entry.name for entry in entries]

    compiled = torch.compile(block, backend=counter, options={"guard_filter_fn": guards})
    plan, parts = Plan(plan_file()), qkv()
    override, counts = planned(plan), []
    for time in (0.7, 0.3, 0.8):
        chosen = options(override, time=time)
        for chosen["block_index"] in range(LAYERS):
            expected = masked(plan, parts, chosen["block_index"], time)
            torch.testing.assert_close(compiled(parts, chosen), expected, rtol=0, atol=2e-6)
            counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


def test_segments_that_are_over_leave_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those at work and coming next stay."""
    monkeypatch.setattr(resident, "RESIDENT_BYTES", 1 << 20)
    plan, parts = Plan(plan_file()), qkv()
    monkeypatch.setattr(resident, "RESIDENT_BYTES", 0)
    override = planned(plan)

    def on_device() -> list[list[bool]]:
        return [[schedule.bound_bytes > 0 for schedule in plan.layers(segment)] for segment in range(3)]

    no, yes = [False] * LAYERS, [True] * LAYERS
    for time, found in ((1.0, [no, yes, yes]), (0.7, [yes, yes, no]), (0.3, [yes, no, yes])):
        chosen = options(override, time=time)
        for chosen["block_index"] in range(LAYERS):
            attention(*parts, heads=HEADS, transformer_options=chosen)
        assert on_device() == found


OTHER = TokenGrid(2, 6, 3)
MISMATCHES = {
    "grid must be TokenGrid": (GRID.tokens, {"grid_sizes": torch.Size((2, 6, 3))}),
    "got 42: a reference stands beside the video": (GRID.tokens + 6, {}),
    "transformer_options must have 'block_index'": (GRID.tokens, {"block_index": None}),
    "transformer_options must have 'grid_sizes'": (GRID.tokens, {"grid_sizes": None}),
}


@pytest.mark.parametrize("rule", MISMATCHES)
def test_a_forward_that_no_plan_is_for(rule: str) -> None:
    """Dense: one warning, and what ComfyUI itself computes. Error: before any work."""
    tokens, changes = MISMATCHES[rule]

    def chosen(override: Any, layer: int) -> dict[str, Any]:
        found = options(override, layer) | changes
        return {name: value for name, value in found.items() if value is not None}

    parts, dense = qkv(tokens), planned(on_mismatch="dense")
    with pytest.warns(UserWarning, match=rule):
        got = attention(*parts, heads=HEADS, transformer_options=chosen(dense, 0))
    assert torch.equal(got, stock(*parts, HEADS))
    assert torch.equal(attention(*parts, heads=HEADS, transformer_options=chosen(dense, 1)), got)
    assert rule in dense.explain("cpu", torch.float32)
    with pytest.raises(PlanMismatchError, match=rule):
        attention(*parts, heads=HEADS, transformer_options=chosen(planned(), 0))


def test_threads_of_different_times() -> None:
    """As where ComfyUI spreads the two halves of guidance over devices."""
    plan = Plan(plan_file())
    override, wrong = planned(plan), []

    def forwards(time: float) -> None:
        for seed in range(20):
            parts, chosen = qkv(seed=seed), options(override, time=time)
            for chosen["block_index"] in range(LAYERS):
                got = attention(*parts, heads=HEADS, transformer_options=chosen)
                if not torch.allclose(got, masked(plan, parts, chosen["block_index"], time), rtol=0, atol=2e-6):
                    wrong.append(time)

    threads = [threading.Thread(target=forwards, args=(time,)) for time in np.linspace(0.1, 0.9, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_h3_has_text_and_audio_before_the_video() -> None:
    """The refiner of the text, which is no block, is left alone without a warning."""
    before, grid = 9, TokenGrid(2, 3, 6)
    plan = Plan(plan_file(grid))
    override = PlannedOverride([plan], FAMILIES["MiniMaxH3Model"], None, "error")
    layout = SimpleNamespace(signature=(4, 2, 6, 12, 2), seq_len=before + grid.tokens)
    chosen = {"minimax_h3_layout": layout, "sigmas": torch.tensor([0.7]), OVERRIDE: override}
    text, parts = qkv(4), qkv(before + grid.tokens)
    assert torch.equal(attention(*text, HEADS, transformer_options=chosen), stock(*text, HEADS))
    chosen["block_index"] = 1
    got = attention(*parts, HEADS, transformer_options=chosen)
    torch.testing.assert_close(got, masked(plan, parts, 1), rtol=0, atol=2e-6)


class Model:
    """What the nodes use of ComfyUI's MODEL."""

    load_device = torch.device("cpu")

    def __init__(self, transformer: Any, model_options: Any = None) -> None:
        self.transformer = transformer
        self.model_options = model_options or {"transformer_options": {}}
        self.model = SimpleNamespace(manual_cast_dtype=None)

    def clone(self) -> Model:
        return Model(self.transformer, copy.deepcopy(self.model_options))

    def get_model_object(self, name: str) -> Any:
        assert name == "diffusion_model"
        return self.transformer

    def model_dtype(self) -> torch.dtype:
        return torch.float32


class WanModel(torch.nn.Module):
    """What a row reads of ComfyUI's class of this name."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.num_heads, self.dim = HEADS, HEADS * HEAD_DIM
        self.blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in range(layers))


class CausalWanModel(WanModel):
    """A descendant whose attention is another."""


def apply(model: Model, path: Path, on_mismatch: Any = "error") -> Model:
    return ApplyPlan().apply(model, str(path), on_mismatch)[0]


def test_the_nodes(tmp_path: Path) -> None:
    """A file, or a folder with a plan for each resolution; copies of a model share the plan."""
    write_plan(tmp_path / "a.plan", plan_file())
    write_plan(tmp_path / "b.plan", plan_file(OTHER))
    write_plan(tmp_path / "c.plan", plan_file(layers=3))
    model = Model(torch.compile(WanModel(), backend="eager"))
    one, both = apply(model, tmp_path / "a.plan"), apply(model, tmp_path)
    assert model.model_options == {"transformer_options": {}}
    override = both.clone().model_options["transformer_options"][OVERRIDE]
    assert override is both.model_options["transformer_options"][OVERRIDE]
    assert set(override.plans) == {GRID, OTHER}
    parts = qkv()
    for grid, plan in override.plans.items():
        got = attention(*parts, heads=HEADS, transformer_options=options(override, grid=grid))
        torch.testing.assert_close(got, masked(plan, parts), rtol=0, atol=2e-6)
    told = ExplainPlan().explain(one)
    assert told["ui"]["text"] == list(told["result"])
    assert "backend on cpu, float32: reference" in told["result"][0]
    assert ExplainPlan().explain(model)["result"] == ("this model follows no plan",)


@pytest.mark.parametrize(
    ("model", "error", "rule"),
    [
        (WanModel(3), PlanMismatchError, "layers must be 2, got 3"),
        (CausalWanModel(), UnknownModelError, "model must be one of WanModel, .* got CausalWanModel"),
    ],
)
def test_a_model_that_no_plan_is_for(tmp_path: Path, model: Any, error: type, rule: str) -> None:
    write_plan(tmp_path / "a.plan", plan_file())
    with pytest.raises(error, match=rule):
        apply(Model(model), tmp_path)
    given = Model(model)
    with pytest.warns(UserWarning, match=rule):
        assert apply(given, tmp_path, "dense") is given


def test_a_plan_that_was_compiled_again_is_loaded_again(tmp_path: Path) -> None:
    path = tmp_path / "a.plan"
    write_plan(path, plan_file())
    before = ApplyPlan.IS_CHANGED(plan=str(tmp_path), on_mismatch="error")
    assert ApplyPlan.IS_CHANGED(plan=str(tmp_path), on_mismatch="error") == before
    write_plan(path, plan_file(layers=3))
    assert ApplyPlan.IS_CHANGED(plan=str(tmp_path), on_mismatch="error") != before
    assert [name for name, _ in ApplyPlan.IS_CHANGED(plan=str(path))] == [str(path)]


def test_the_folder_for_custom_nodes() -> None:
    """It is two lines, and what they name is what ComfyUI looks for."""
    assert len([line for line in Path(comfyui.__file__).read_text("utf-8").splitlines() if line]) == 2
    nodes = {"CalibAttPlan", "CalibAttExplain"}
    assert {*comfyui.NODE_CLASS_MAPPINGS} == {*comfyui.NODE_DISPLAY_NAME_MAPPINGS} == nodes
    for node in comfyui.NODE_CLASS_MAPPINGS.values():
        assert {*node.INPUT_TYPES()["required"]} <= {*getattr(node, node.FUNCTION).__code__.co_varnames}
        assert all(kind.isupper() for kind in node.RETURN_TYPES)
