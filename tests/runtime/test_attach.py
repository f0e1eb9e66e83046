"""Plans attached to diffusers' own Wan transformer, tiny and random."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import support.masked
import torch
import torch._dynamo.testing
from support.plans import frames_plan
from support.schedules import random_schedule

from calibatt.plans import (
    Blocks,
    LayerSchedule,
    ModelSignature,
    PlanFile,
    ScheduleError,
    Segment,
    StoredLayers,
    TokenGrid,
    encode,
    write_plan,
)
from calibatt.runtime import (
    InterceptionLostError,
    Plan,
    PlanMismatchError,
    UnknownModelError,
    UnsupportedBackendError,
    load_plan,
    ops,
)
from calibatt.runtime import schedule as runtime_schedule
from calibatt.runtime.adapters import adapter_for

diffusers = pytest.importorskip("diffusers")

GRID = TokenGrid(frames=3, height=4, width=6)
BLOCKS = Blocks(16, 16)
HEADS, HEAD_DIM = 2, 16
SEGMENTS = (Segment(0.0, 0.5, 0.25), Segment(0.5, 0.937, 0.75), Segment(0.937, 1.0, 1.0))


def make_model(layers: int = 3, heads: int = HEADS, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=32,
    )
    return model.eval().requires_grad_(False)


def make_plan(layers: int = 3, heads: int = HEADS, seed: int = 0, dense: bool = False) -> Plan:
    rng = np.random.default_rng(seed)
    every = range(heads) if dense else ()
    schedules = tuple(
        tuple(
            random_schedule(
                rng, GRID, BLOCKS, heads, 0.4, dense_heads=every, anchored_heads=() if dense else (heads - 1,)
            )
            for _ in range(layers)
        )
        for _ in SEGMENTS
    )
    signature = ModelSignature("WanTransformer3DModel", layers, heads, HEAD_DIM)
    return Plan(PlanFile(signature, GRID, BLOCKS, SEGMENTS, StoredLayers.of(schedules)))


def inputs(timestep: Any = 900, batch: int = 2, height: int = 8, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 3, height, 12, generator=generator),
        "timestep": torch.tensor([timestep] * batch),
        "encoder_hidden_states": torch.randn(batch, 7, 16, generator=generator),
        "return_dict": False,
    }


def run(model: Any, **changes: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(**changes))[0]


def masked(model: Any, plan: Plan, **changes: Any) -> torch.Tensor:
    """The truth."""
    with support.masked.masked(model, plan):
        return run(model, **changes)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[int, ...], int]]:
    """(schedule, shape of q, keys) of every planned attention call."""
    seen = []
    attend = ops.attend

    def spy(q: Any, k: Any, v: Any, schedule: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((schedule, tuple(q.shape), k.shape[2]))
        return attend(q, k, v, schedule, *args, **kwargs)

    monkeypatch.setattr(ops, "attend", spy)
    return seen


@pytest.fixture(autouse=True)
def setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` is the oracle; nothing is compiled yet."""
    monkeypatch.setattr(ops, "AUTO", ("reference",))
    torch._dynamo.reset()


def test_a_dense_plan_changes_nothing() -> None:
    model, plan = make_model(), make_plan(dense=True)
    stock = run(model)
    with plan.attach(model):
        torch.testing.assert_close(run(model), stock, rtol=0, atol=2e-6)
    assert torch.equal(run(model), stock)


@pytest.mark.parametrize("timestep", [999, 937, 936.5, 500, 499, 0])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_sparse_plan_is_masked_attention(timestep: float, batch: int) -> None:
    model, plan = make_model(), make_plan()
    expected = masked(model, plan, timestep=timestep, batch=batch)
    assert (expected - run(model, timestep=timestep, batch=batch)).abs().max() > 1e-3
    with plan.attach(model):
        got = run(model, timestep=timestep, batch=batch)
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-6)


def test_backends_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model, plan = make_model(), make_plan()
    expected = masked(model, plan)
    for backend, chosen in (("auto", "torch"), ("torch", "torch"), ("reference", "reference")):
        with plan.attach(model, backend=backend) as attachment:
            torch.testing.assert_close(run(model), expected, rtol=0, atol=5e-6)
            assert f"backend on cpu, float32: {chosen} (9 schedules)" in attachment.explain()
    with pytest.raises(UnsupportedBackendError, match=r"'triton' cannot execute segment 0, layer 0: .*float32"):
        plan.attach(model, backend="triton")


def test_the_noisiest_token_decides(calls: list[Any]) -> None:
    model, plan = make_model(), make_plan()
    values = inputs(batch=1)
    values["timestep"] = torch.full((1, GRID.tokens), 600.0)
    values["timestep"][:, :24] = 0
    with plan.attach(model), torch.no_grad():
        model(**values)
    assert [call[0] for call in calls] == [plan.schedule(0.6, layer) for layer in range(3)]


def test_arguments_may_be_positional() -> None:
    model, plan = make_model(), make_plan()
    values = inputs()
    with plan.attach(model), torch.no_grad():
        expected = run(model)
        got = model(values["hidden_states"], values["timestep"], values["encoder_hidden_states"]).sample
    assert torch.equal(got, expected)


def test_only_self_attention_is_taken(calls: list[Any]) -> None:
    model, plan = make_model(), make_plan()
    with plan.attach(model):
        run(model, timestep=700)
    expected = [(plan.schedule(0.7, layer), (2, HEADS, GRID.tokens, HEAD_DIM), GRID.tokens) for layer in range(3)]
    assert calls == expected


@pytest.mark.slow
def test_compiled_model_takes_every_time_in_one_graph(calls: list[Any]) -> None:
    model, plan = make_model(), make_plan()
    timesteps = (999, 937, 700, 100)
    expected = [masked(model, plan, timestep=timestep) for timestep in timesteps]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    with plan.attach(model):
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        run(compiled)
        graphs = counter.frame_count
        calls.clear()
        for timestep, value in zip(timesteps, expected, strict=True):
            torch.testing.assert_close(run(compiled, timestep=timestep), value, rtol=0, atol=5e-6)
    assert counter.frame_count == graphs <= 2
    assert [call[0] for call in calls] == [plan.schedule(t / 1000, layer) for t in timesteps for layer in range(3)]
    assert {call[1:] for call in calls} == {((2, HEADS, GRID.tokens, HEAD_DIM), GRID.tokens)}


def test_cuda_graphs_leave_the_ops_out() -> None:
    """A graph would repeat the segment that it was captured in (what they then compute: test_attach_gpu.py)."""
    for op in (torch.ops.calibatt.attend.default, torch.ops.calibatt.resolve_segment.default):
        assert torch.Tag.cudagraph_unsafe in op.tags


def test_changing_plans_recompiles_nothing() -> None:
    model, plans = make_model(), [make_plan(seed=1), make_plan(seed=2)]
    expected = [masked(model, plan) for plan in plans]
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    graphs = []
    for index in (0, 1, 0, 1):
        with plans[index].attach(model):
            torch.testing.assert_close(run(compiled), expected[index], rtol=0, atol=5e-6)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 4


@pytest.mark.slow
def test_attach_after_compile_and_detach() -> None:
    model, plan = make_model(), make_plan()
    expected, stock = masked(model, plan), run(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled), stock)
    with plan.attach(compiled):
        torch.testing.assert_close(run(compiled), expected, rtol=0, atol=5e-6)
    assert torch.equal(run(compiled), stock)


def test_compiled_blocks_of_all_layers_are_one_graph(calls: list[Any]) -> None:
    layers = 9  # one more than dynamo compiles one function for
    model, plan = make_model(layers), make_plan(layers)
    with plan.attach(model):
        expected = run(model)
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        calls.clear()
        assert torch.equal(run(model), expected)
        run(model, timestep=100)
    assert counter.frame_count == 1
    assert [call[0] for call in calls] == [plan.schedule(t, layer) for t in (0.9, 0.1) for layer in range(layers)]


@pytest.mark.parametrize("first", [0, 1])
def test_two_models_with_two_plans(first: int) -> None:
    models = [make_model(seed=1), make_model(seed=2)]
    plans = [make_plan(seed=1), make_plan(seed=2)]
    stock = [run(model) for model in models]
    expected = [masked(model, plan) for model, plan in zip(models, plans, strict=True)]
    attachments = [plan.attach(model) for model, plan in zip(models, plans, strict=True)]
    for model, value in zip(models, expected, strict=True):
        torch.testing.assert_close(run(model), value, rtol=0, atol=5e-6)
    attachments[first].detach()
    assert torch.equal(run(models[first]), stock[first])
    torch.testing.assert_close(run(models[1 - first]), expected[1 - first], rtol=0, atol=5e-6)
    attachments[1 - first].detach()
    assert torch.equal(run(models[1 - first]), stock[1 - first])


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("compiled", [False, True])
def test_nested_plans_detach_in_any_order(first: int, compiled: bool) -> None:
    model, plans = make_model(), [make_plan(seed=1), make_plan(seed=2)]
    processors = dict(model.attn_processors)
    stock = run(model)
    expected = [masked(model, plan) for plan in plans]
    call = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    attachments = [plan.attach(model) for plan in plans]
    torch.testing.assert_close(run(call), expected[1], rtol=0, atol=5e-6)
    attachments[first].detach()
    torch.testing.assert_close(run(call), expected[1 - first], rtol=0, atol=5e-6)
    attachments[first].detach()
    attachments[1 - first].detach()
    assert torch.equal(run(call), stock)
    assert all(model.attn_processors[name] is processor for name, processor in processors.items())


def test_another_model_is_refused_with_every_difference() -> None:
    with pytest.raises(PlanMismatchError, match=r"layers must be 2, got 3; heads must be 4, got 2$"):
        make_plan(layers=2, heads=4).attach(make_model())
    with pytest.raises(UnknownModelError, match=r"must be one of WanTransformer3DModel, .* got Linear"):
        make_plan().attach(torch.nn.Linear(1, 1))


def test_a_user_may_bring_a_row() -> None:
    model = make_model()
    row = adapter_for(model)
    model.__class__ = type("MyTransformer", (type(model),), {})
    with make_plan().attach(model, adapter=row):
        run(model)


@pytest.mark.parametrize("compiled", [False, True])
def test_another_resolution_raises_before_any_work(compiled: bool) -> None:
    model = make_model()
    touched = []
    model.patch_embedding.register_forward_hook(lambda *_: touched.append(1))
    call = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    with make_plan().attach(model):
        with pytest.raises(PlanMismatchError, match=r"grid must be .*height=4.*, got .*height=5"):
            run(call, height=10)
        assert not touched
        run(call)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_another_resolution_may_run_the_models_own_attention(compiled: bool) -> None:
    model, plan = make_model(), make_plan()
    stock, expected = run(model, height=10), masked(model, plan)
    call = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    with plan.attach(model, on_mismatch="dense"):
        with pytest.warns(UserWarning, match=r"grid must be .*height=4.*, got .*height=5.* own attention"):
            assert torch.equal(run(call, height=10), stock)
        assert torch.equal(run(call, height=10), stock)
        torch.testing.assert_close(run(call), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_replaced_processors_are_noticed(compiled: bool) -> None:
    model = make_model()
    stock = run(model)
    call = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    attachment = make_plan().attach(model)
    run(call)
    stranger = type(model.blocks[2].attn2.processor)()
    model.blocks[1].attn1.set_processor(stranger)
    with pytest.raises(InterceptionLostError, match=r"got others at blocks\.1\.attn1$"):
        run(call)
    attachment.detach()
    assert model.blocks[1].attn1.processor is stranger
    assert torch.equal(run(model), stock)


@pytest.mark.parametrize("attach_first", [False, True])
def test_fused_projections(attach_first: bool) -> None:
    model, plan = make_model(), make_plan()
    expected = masked(model, plan)
    if not attach_first:
        model.fuse_qkv_projections()
    with plan.attach(model):
        if attach_first:
            model.fuse_qkv_projections()
        torch.testing.assert_close(run(model), expected, rtol=0, atol=5e-6)


def test_lora() -> None:
    import peft  # takes seconds

    model, plan = make_model(), make_plan()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
    model.add_adapter(config)
    model.requires_grad_(False)
    expected = masked(model, plan)
    with plan.attach(model):
        torch.testing.assert_close(run(model), expected, rtol=0, atol=5e-6)


def test_the_model_stays_what_it_was() -> None:
    model, plan = make_model(), make_plan()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with plan.attach(model):
        run(model)
        during = model.state_dict()
        assert list(during) == list(before)
        assert all(torch.equal(during[name], value) for name, value in before.items())


def binding(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The lists of every schedule that is put on a device, from now on."""
    made: list[bytes] = []
    bind = runtime_schedule.bound_to

    def spy(core: Any, *args: Any) -> Any:
        made.append(lists_of(core))
        return bind(core, *args)

    monkeypatch.setattr(runtime_schedule, "bound_to", spy)
    return made


def lists_of(core: Any) -> bytes:
    return core.row_ptr.tobytes() + core.col_idx.tobytes()


def test_index_arrays_are_made_once_and_before_their_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    made = binding(monkeypatch)
    model, plan = make_model(), make_plan()
    low, middle, high = ([*map(lists_of, layers)] for layers in plan.file.schedules)
    with plan.attach(model):
        assert made == [*high]
        for timestep, expected in ((999, middle), (998, ()), (700, low), (100, ()), (999, ())):
            made.clear()
            run(model, timestep=timestep)
            assert made == [*expected]


def test_a_loaded_plan_stays_packed_until_it_is_used(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = []
    lower = LayerSchedule.col_idx.fget
    monkeypatch.setattr(LayerSchedule, "col_idx", property(lambda core: lowered.append(core) or lower(core)))
    model, plan = make_model(), make_plan()
    expected = [masked(model, plan, timestep=at) for at in (999, 700, 100)]
    write_plan(tmp_path / "a.plan", plan.file)
    loaded = load_plan(tmp_path / "a.plan")
    assert repr(loaded.schedule(0.3, 2)).endswith(f"density {plan.schedule(0.3, 2).density:.3f})")
    assert lowered == []
    with loaded.attach(model):
        assert len(lowered) == 3, "the first segment's layers"
        for timestep, want in zip((999, 700, 100), expected, strict=True):
            torch.testing.assert_close(run(model, timestep=timestep), want, rtol=0, atol=5e-6)


def test_devices_keep_the_segments_last_used(monkeypatch: pytest.MonkeyPatch) -> None:
    made = binding(monkeypatch)
    monkeypatch.setattr("calibatt.runtime.resident.RESIDENT_BYTES", 0)
    model, plan = make_model(), make_plan()
    expected = masked(model, plan, timestep=700)
    low, middle, high = ([*map(lists_of, layers)] for layers in plan.file.schedules)
    with plan.attach(model):
        made.clear()
        for timestep, put_there, kept in (
            (999, middle, {1, 2}),
            (700, low, {0, 1}),
            (100, high, {0, 2}),
            (999, middle, {1, 2}),
            (100, low, {0, 2}),  # a step of the sampler over the middle segment: this once, nobody expected it
            (999, (), {0, 2}),  # now low is expected after high
            (100, (), {0, 2}),
        ):
            made.clear()
            run(model, timestep=timestep)
            assert made == [*put_there]
            bound = {segment for segment in range(3) if any(each.bound_bytes for each in plan.layers(segment))}
            assert bound == kept
        torch.testing.assert_close(run(model, timestep=700), expected, rtol=0, atol=5e-6)


def test_a_plan_is_proved_when_it_is_loaded(tmp_path: Any) -> None:
    stored = make_plan().file.schedules
    last = stored.layers[0][-1]
    none = LayerSchedule(GRID, BLOCKS, np.zeros((last.lists, 1), np.uint8), **last.small)
    broken = [[*layers] for layers in stored.layers]
    broken[0][-1] = encode(none, None)
    layers = StoredLayers("", GRID, BLOCKS, HEADS, (0, 2, 2), broken)
    write_plan(tmp_path / "a.plan", dataclasses.replace(make_plan().file, schedules=layers))
    with pytest.raises(ScheduleError, match=r"a\.plan: segment 0, layer 2: list_bits must hold a block in each list"):
        load_plan(tmp_path / "a.plan")
    later = load_plan(tmp_path / "a.plan", prove=False)
    assert later.schedule(0.6, 2).density > 0
    with pytest.raises(ScheduleError, match=r"a\.plan: segment 0, layer 2: list_bits must hold a block in each list"):
        later.schedule(0.1, 2).bind("cpu")


def test_a_deleted_model_is_freed_and_a_forgotten_attachment_works_on(calls: list[Any]) -> None:
    model, plan = make_model(), make_plan()
    plan.attach(model)
    gc.collect()
    run(model)
    assert len(calls) == 3
    freed = weakref.ref(model.blocks[0].attn1.to_q.weight)
    del model
    gc.collect()
    assert freed() is None


def test_bfloat16() -> None:
    model, plan = make_model(), make_plan(dense=True)
    values = {key: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in inputs().items()}
    attachment = plan.attach(model)
    model.to(torch.bfloat16)
    with torch.no_grad():
        got = model(**values)[0]
        attachment.detach()
        torch.testing.assert_close(got, model(**values)[0], rtol=0, atol=0.05)


def test_options_are_checked() -> None:
    model = make_model()
    row = dataclasses.replace(adapter_for(model), dispatch="sdpa")
    with pytest.raises(ValueError, match=r"WanAttnProcessor must call sdpa, got code without sdpa"):
        make_plan().attach(model, adapter=row)
    with pytest.raises(ValueError, match="on_mismatch must be 'error' or 'dense', got 'ignore'"):
        make_plan().attach(model, on_mismatch="ignore")
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*, got 'magic'"):
        make_plan().attach(model, backend="magic")
    assert not any(hasattr(processor, "beneath") for processor in model.attn_processors.values())


def test_load_and_explain(tmp_path: Any) -> None:
    plan = make_plan()
    write_plan(tmp_path / "a.plan", plan.file)
    loaded = load_plan(tmp_path / "a.plan")
    assert (loaded.signature, loaded.grid, loaded.blocks, loaded.segments) == (
        plan.signature,
        plan.grid,
        plan.blocks,
        plan.segments,
    )
    assert loaded.schedule(0.6, 1) is loaded.schedule(0.9, 1)
    with pytest.raises(ValueError, match=r"layer must be 0 to 2, got -1"):
        loaded.schedule(0.5, -1)
    model = make_model()
    with loaded.attach(model) as attachment:
        text = attachment.explain()
    assert f"index arrays on devices now: {loaded.bound_bytes / 2**20:.1f} MiB" in text
    assert f"time 0.9370 to 1.0000: mean {np.mean([s.density for s in loaded.layers(2)]):.3f}; " in text
    assert text.endswith("precision, over all segments: all heads in 16 bit")
    text = "\n".join(Plan(frames_plan()).explain())
    shares = "75.0% of heads in 16 bit, 12.5% of heads in int8 QK, 12.5% of heads in int8 QK with fp8 PV"
    assert text.endswith(f"precision, over all segments: {shares}\n  layer 0: {shares}\n  layer 1: {shares}")
