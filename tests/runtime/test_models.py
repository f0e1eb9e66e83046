"""Every family of the adapter table: tiny random models of diffusers, dense, sparse, compiled and put back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from support.schedules import random_schedule

from calibatt.plans import Blocks, PlanFile, Segment, TokenGrid
from calibatt.runtime import Plan, ops
from calibatt.runtime.adapters import ADAPTERS, adapter_for
from calibatt.runtime.intercept import Interception
from calibatt.tools.calibrate.listen import listening

diffusers = pytest.importorskip("diffusers")

GRID = TokenGrid(frames=3, height=4, width=6)
BLOCKS = Blocks(16, 16)
SEGMENTS = (Segment(0.0, 0.5, 0.25), Segment(0.5, 1.0, 0.75))
LAYERS, HEADS, HEAD_DIM = 2, 2, 16


@dataclass(frozen=True)
class Family:
    """How a model is made, and the arguments of a forward at a time."""

    make: Callable[[], Any]
    arguments: Callable[[float, int], dict[str, Any]]


def wan(**config: Any) -> Any:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=LAYERS, rope_max_seq_len=32, **{"in_channels": 4, **config},
    )  # fmt: skip


def wan_arguments(time: float, batch: int, channels: int = 4) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, channels, 3, 8, 12),
        "timestep": torch.tensor([round(time * 1000)] * batch),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
    }


def wan_i2v_arguments(time: float, batch: int) -> dict[str, Any]:
    found = wan_arguments(time, batch, 9)
    return {**found, "encoder_hidden_states_image": torch.randn(batch, 5, 24)}


def wan_ti2v_arguments(time: float, batch: int) -> dict[str, Any]:
    """A time for each token; those of the first frame are clean."""
    found = wan_arguments(time, batch)
    times = torch.full((batch, GRID.tokens), time * 1000)
    times[:, : GRID.height * GRID.width] = 0
    return {**found, "timestep": times}


def ltx() -> Any:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, cross_attention_dim=32,
        num_layers=LAYERS, caption_channels=16,
    )  # fmt: skip


def ltx_arguments(time: float, batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, 7)
    mask[0, 4:] = 0
    return {
        "hidden_states": torch.randn(batch, GRID.tokens, 4),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "timestep": torch.tensor([time * 1000.0] * batch),
        "encoder_attention_mask": mask,
        "num_frames": GRID.frames,
        "height": GRID.height,
        "width": GRID.width,
    }


FAMILIES = {
    "Wan T2V": Family(wan, wan_arguments),
    "Wan I2V": Family(lambda: wan(in_channels=9, image_dim=24, added_kv_proj_dim=32), wan_i2v_arguments),
    "Wan TI2V": Family(wan, wan_ti2v_arguments),
    "LTX": Family(ltx, ltx_arguments),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(autouse=True)
def setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` is the oracle; nothing is compiled yet."""
    monkeypatch.setattr(ops, "AUTO", ("reference",))
    torch._dynamo.reset()


def model_of(family: Family) -> Any:
    torch.manual_seed(0)
    return family.make().eval().requires_grad_(False)


def plan_for(model: Any, dense: bool) -> Plan:
    rng, every = np.random.default_rng(0), range(HEADS) if dense else ()
    schedules = tuple(
        tuple(
            random_schedule(
                rng, GRID, BLOCKS, HEADS, 0.4, dense_heads=every, anchored_heads=() if dense else (HEADS - 1,)
            )
            for _ in range(LAYERS)
        )
        for _ in SEGMENTS
    )
    return Plan(PlanFile(adapter_for(model).signature(model), GRID, BLOCKS, SEGMENTS, schedules))


def run(model: Any, family: Family, time: float = 0.9, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(**family.arguments(time, batch), return_dict=False)[0]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(queries, keys) of every planned attention call."""
    seen = []
    attend = ops.attend

    def spy(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((q.shape[2], k.shape[2]))
        return attend(q, k, v, *args, **kwargs)

    monkeypatch.setattr(ops, "attend", spy)
    return seen


def test_a_dense_plan_changes_nothing_and_detach_everything_back(family: Family, calls: list) -> None:
    model = model_of(family)
    plain = run(model, family)
    with plan_for(model, dense=True).attach(model):
        torch.testing.assert_close(run(model, family), plain, rtol=1e-4, atol=1e-5)
    assert calls == [(GRID.tokens, GRID.tokens)] * LAYERS, "every self-attention once, no cross-attention"
    assert torch.equal(run(model, family), plain)


@pytest.mark.parametrize("time", [0.9, 0.3])
def test_a_sparse_plan_is_the_stock_code_with_masks(family: Family, time: float) -> None:
    model = model_of(family)
    plan, adapter = plan_for(model, dense=False), adapter_for(model)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Any, now: torch.Tensor) -> torch.Tensor:
        assert float(now) == pytest.approx(time, abs=1e-3)
        schedule = plan.schedule(float(now), site.layer)
        block = torch.arange(GRID.tokens) // BLOCKS.block_k
        heads = []
        for head in range(HEADS):
            source, keep = schedule.dense(head)
            parts = q[:, source, head], k[:, :, head], v[:, :, head]
            heads.append(F.scaled_dot_product_attention(*parts, keep[:, block]))
        return torch.stack(heads, dim=2)

    interception = Interception(model, adapter, attend, begin=adapter.time)
    expected = run(model, family, time)
    interception.detach()
    with plan.attach(model):
        found = run(model, family, time)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, run(model, family, time), rtol=1e-4, atol=1e-5)


def test_compiled_once_for_all_times(family: Family, calls: list) -> None:
    model = model_of(family)
    with plan_for(model, dense=False).attach(model):
        expected = [run(model, family, time) for time in (0.9, 0.3)]
        calls.clear()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        found = [run(compiled, family, time) for time in (0.9, 0.3)]
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    assert calls == [(GRID.tokens, GRID.tokens)] * LAYERS * 2
    assert counter.frame_count <= 2, "the hook and the forward"


def test_projection_and_gate_say_how_an_output_moves_the_residual_stream() -> None:
    """Of LTX, whose cross-attention receives the stream itself (the gate of Wan: tests/calibrate)."""
    model = model_of(FAMILIES["LTX"])
    streams: list[torch.Tensor] = []
    model.transformer_blocks[0].attn2.register_forward_pre_hook(lambda _, arguments: streams.append(arguments[0][0]))
    first: list[Any] = []

    def more(call: Any) -> torch.Tensor | None:
        first.append(call)
        return 1.5 * call.out if call.layer == 0 else None

    for on_call in (lambda call: None, more):
        with listening(model, GRID, lambda now: True, on_call):
            run(model, FAMILIES["LTX"], batch=1)
    projection = first[0].projection.unflatten(1, (HEADS, HEAD_DIM))
    change = torch.einsum("hnd,xhd->nx", 0.5 * first[0].out, projection)
    torch.testing.assert_close(streams[1] - streams[0], change, rtol=1e-3, atol=1e-4)


def test_every_row_of_the_table_is_tested_here() -> None:
    made = {type(family.make()).__name__ for family in FAMILIES.values()}
    assert made == {row.architecture for row in ADAPTERS}
