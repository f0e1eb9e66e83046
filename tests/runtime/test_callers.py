"""One model with a plan, many callers: threads, calls that no hook sees, copies, autocast, gradients."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from support import wan
from support.masked import masked
from support.schedules import random_schedule

from calibatt.plans import Blocks, PlanFile, Segment, StoredLayers, TokenGrid, write_plan
from calibatt.runtime import OutsideForwardError, Plan, PlanSet, load_plan, ops
from calibatt.runtime.adapters import adapter_for

GRID = TokenGrid(frames=2, height=4, width=6)
THREADS, ROUNDS = 8, 12
TIMES = tuple(range(60, 1000, 940 // THREADS))[:THREADS]


def make_plan(model: Any, segments: int = THREADS, grid: TokenGrid = GRID) -> Plan:
    rng = np.random.default_rng(0)
    ends = np.linspace(0, 1, segments + 1)
    parts = tuple(Segment(low, high, (low + high) / 2) for low, high in pairwise(ends))
    layers = [
        tuple(random_schedule(rng, grid, Blocks(16, 16), 2, 0.3, anchored_heads=[1]) for _ in range(2)) for _ in parts
    ]
    return Plan(PlanFile(adapter_for(model).signature(model), grid, Blocks(16, 16), parts, StoredLayers.of(layers)))


def arguments(time: int, rows: int = GRID.height) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, text = torch.randn(1, 16, 2, 2 * rows, 12, generator=generator), torch.randn(1, 8, 16, generator=generator)
    return hidden, torch.tensor([time]), text


@torch.no_grad()
def forward(model: Any, time: int = 700, rows: int = GRID.height) -> torch.Tensor:
    return model(*arguments(time, rows), return_dict=False)[0]


def in_threads(work: Callable[[int], Any], rounds: int = ROUNDS) -> list[Exception]:
    """Calls ``work(time)`` for all times at once, many times; what was raised."""
    raised: list[Exception] = []
    ready = threading.Barrier(len(TIMES))

    def run(time: int) -> None:
        try:
            ready.wait()
            for _ in range(rounds):
                work(time)
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(time,)) for time in TIMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def differences(model: Any, expected: dict[int, torch.Tensor]) -> list[float]:
    """How far what threads compute is from what was expected, where it is not equal."""
    found: list[float] = []

    def work(time: int) -> None:
        if (far := float((forward(model, time) - expected[time]).abs().max())) > 0:
            found.append(far)

    assert in_threads(work) == []
    return found


@pytest.mark.slow
@pytest.mark.parametrize("large", [False, True], ids=["lists", "bits"])
@pytest.mark.parametrize("compiled", ["not", "blocks", "whole"])
def test_threads_share_a_model(large: bool, compiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each follows its own time, whatever the others do; of a large plan, segments are let go of again and again."""
    torch._dynamo.reset()
    if large:
        monkeypatch.setattr("calibatt.runtime.resident.RESIDENT_BYTES", 0)
    model = wan.transformer(1)
    with make_plan(model).attach(model):
        if compiled == "blocks":
            model.compile_repeated_blocks(fullgraph=True, backend="eager")
        call = torch.compile(model, fullgraph=True, backend="eager") if compiled == "whole" else model
        alone = {time: forward(call, time) for time in TIMES}
        assert len({float(out.sum()) for out in alone.values()}) == THREADS, "times matter"
        assert differences(call, alone) == []


def test_arrays_at_work_are_not_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that another stream is about to read them with would read what came in their place."""
    monkeypatch.setattr("calibatt.runtime.resident.RESIDENT_BYTES", 0)
    model = wan.transformer(1)
    plan, attend = make_plan(model), ops.attend
    others: list[threading.Thread] = []
    bound: list[int] = []

    def spy(q: Any, k: Any, v: Any, schedule: Any, *args: Any, **options: Any) -> Any:
        if not others:
            schedule.bind(q.device)
            others.append(threading.Thread(target=forward, args=(model, TIMES[3])))
            others[0].start()
            others[0].join(timeout=0.5)  # as far as it comes: it wants two other segments
            bound.append(schedule.bound_bytes)
        return attend(q, k, v, schedule, *args, **options)

    monkeypatch.setattr(ops, "attend", spy)
    with plan.attach(model):
        forward(model, TIMES[-1])
        others[0].join()
    assert bound[0] > 0
    assert plan.schedule(TIMES[-1] / 1000, 0).bound_bytes == 0, "the other thread's turn came"


def test_threads_share_the_plans_of_two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread goes from one plan of a set to the other and back, in another order than the next one."""
    monkeypatch.setattr("calibatt.runtime.resident.RESIDENT_BYTES", 0)
    models = [wan.transformer(seed) for seed in (1, 2)]
    plans = PlanSet({grid: make_plan(models[0], grid=TokenGrid(2, grid, 6)) for grid in (4, 3)})
    with plans.attach(models[0]), plans.attach(models[1]):

        def forwards(time: int) -> list[torch.Tensor]:
            return [forward(model, at, rows) for model in models for at in (time, 500) for rows in (4, 3)]

        alone = {time: forwards(time) for time in TIMES}
        wrong: list[int] = []

        def work(time: int) -> None:
            wrong.extend(not torch.equal(*both) for both in zip(forwards(time), alone[time], strict=True))

        assert in_threads(work, rounds=3) == []
        assert not any(wrong)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_forward_that_no_hook_sees_is_refused(compiled: bool) -> None:
    """Not run by the segment of the forward before."""
    torch._dynamo.reset()
    model = wan.transformer(1)
    with make_plan(model).attach(model), torch.no_grad():
        call = torch.compile(model, backend="eager") if compiled else model
        expected = forward(call)
        with pytest.raises(OutsideForwardError, match=r"blocks\.0\.attn1 must be called in a forward of the model"):
            model.forward(*arguments(100))
        assert torch.equal(forward(call), expected)


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model = wan.transformer(1)
    with make_plan(model).attach(model), torch.no_grad():
        with pytest.raises(TypeError):
            model(*arguments(700), nonsense=1)
        with pytest.raises(OutsideForwardError):
            model.forward(*arguments(700))


def by_torch(model: Any) -> Any:
    torch.save(model, written := io.BytesIO())
    written.seek(0)
    return torch.load(written, weights_only=False)


@pytest.mark.parametrize("plans", [1, 2])
@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), by_torch])
def test_copies_of_a_model_are_stock(twin_of: Callable[[Any], Any], plans: int) -> None:
    model = wan.transformer(1)
    stock, plan = forward(model), make_plan(model)
    for _ in range(plans):
        plan.attach(model)
    planned = forward(model)
    twin = twin_of(model)
    assert type(twin.blocks[0].attn1.processor) is type(model.blocks[0].attn2.processor)
    assert torch.equal(forward(twin), stock)
    assert torch.equal(forward(model), planned)
    with plan.attach(twin):
        assert torch.equal(forward(twin), planned)
    assert torch.equal(twin.forward(*arguments(700))[0], stock)


def test_attachments_are_not_copied() -> None:
    model = wan.transformer(1)
    with make_plan(model).attach(model) as attachment:
        for store in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="attachment must not be copied or stored: copy the model, and attach"):
                store(attachment)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan)), by_torch])
@pytest.mark.parametrize("loaded", [False, True])
def test_copies_of_a_plan_are_plans(twin_of: Callable[[Any], Any], loaded: bool, tmp_path: Any) -> None:
    """Also while it is at work; what is on devices stays behind."""
    model = wan.transformer(1)
    plan = make_plan(model)
    if loaded:
        write_plan(tmp_path / "a.plan", plan.file)
        plan = load_plan(tmp_path / "a.plan")
    with plan.attach(model):
        expected = forward(model)
        twin = twin_of(plan)
    (tmp_path / "a.plan").unlink(missing_ok=True)
    assert twin.bound_bytes == 0
    assert twin.schedule(0.3, 1).density == plan.schedule(0.3, 1).density
    with twin.attach(model):
        assert torch.equal(forward(model), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of layer norms
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_mixes_types_as_in_the_models_own_attention(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under it, Wan's rotation gives float32 queries and keys, its projection bfloat16 values."""
    torch._dynamo.reset()
    model = wan.transformer(1)
    plan = make_plan(model)
    types = []
    attend = ops.attend

    def spy(q: Any, k: Any, v: Any, *args: Any, **options: Any) -> Any:
        types.append({q.dtype, k.dtype, v.dtype})
        return attend(q, k, v, *args, **options)

    monkeypatch.setattr(ops, "attend", spy)
    call = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    with torch.autocast("cpu", torch.bfloat16):
        with masked(model, plan):
            expected = forward(model)
        stock = forward(model)
        with plan.attach(model):
            found = forward(call)
        with plan.attach(model, on_mismatch="dense") as attachment:
            attachment._session.plans.clear()
            with pytest.warns(UserWarning, match="own attention"):
                assert torch.equal(forward(model), stock)
    assert types == [{torch.bfloat16}] * 2
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() < 0.02 < 0.1 < (stock - expected).abs().max()
    with plan.attach(model):
        forward(call)
    assert types[2:] == [{torch.float32}] * 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo's own
@pytest.mark.parametrize("compiled", [False, True])
def test_a_forward_for_gradients_is_refused(compiled: bool) -> None:
    torch._dynamo.reset()
    model = wan.transformer(1)
    expected = forward(model)
    call = torch.compile(model, backend="eager") if compiled else model
    with make_plan(model).attach(model):
        planned = forward(call)
        with pytest.raises(ValueError, match=r"q must not require grad: planned attention has no backward"):
            call(*arguments(700))
        with torch.inference_mode():
            assert torch.equal(call(*arguments(700))[0], planned)
        model.requires_grad_(False)
        assert torch.equal(call(*arguments(700))[0], planned)
    assert torch.equal(forward(model), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :-1], r"k must have the shape of q, \(1, 48, 2, 16\), got \(1, 47, 2, 16\)"),
        (lambda x: x[:, :, :1], "k must have the shape of q"),
        (lambda x: x.half(), "k must have q's dtype and device, torch.float32 on cpu, got torch.float16"),
    ],
)
def test_keys_that_do_not_fit_are_refused(change: Callable[[Any], Any], message: str) -> None:
    model = wan.transformer(1)
    with make_plan(model).attach(model) as attachment:
        site = attachment._session.interception.sites[0]
        interception = attachment._session.interception
        model.blocks[0].register_forward_pre_hook(
            lambda *_: interception._attend(q, change(q), q, site, interception._forwards.here.context)
        )
        q = torch.zeros(1, 48, 2, 16)
        with pytest.raises(ValueError, match=message):
            forward(model)
