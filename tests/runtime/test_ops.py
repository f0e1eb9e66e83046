"""What planned_attention refuses, and whom it chooses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.schedules import random_schedule

from calibatt.plans import BF16, INT8, INT8_FP8, Blocks, TokenGrid
from calibatt.runtime import ops
from calibatt.runtime.backends import BACKENDS, UnsupportedBackendError, load_backend
from calibatt.runtime.schedule import AttentionSchedule, ListedSchedule

SHAPE = (1, 2, 24, 16)


@pytest.fixture
def schedule() -> AttentionSchedule:
    return ListedSchedule(random_schedule(np.random.default_rng(0), TokenGrid(2, 3, 4), Blocks(16, 16), 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 24, 16)}, r"q must have shape \(batch, heads, tokens, head_dim\), got \(2, 24, 16\)"),
        ({"q": torch.zeros(1, 3, 24, 16)}, "q must have the schedule's 2 heads, got 3"),
        (
            {"q": torch.zeros(1, 2, 23, 16)},
            "q must have the schedule's 24 tokens from video_start on, got 23 tokens, vid",
        ),
        ({"video_start": 1}, "q must have the schedule's 24 tokens from video_start on, got 24 tokens, video_start 1"),
        ({"video_start": -1}, "got 24 tokens, video_start -1 and"),
        ({"lengths": torch.tensor([24])}, r"lengths must be int32 of \(1,\) on cpu, got torch.int64 \(1,\) on cpu"),
        ({"lengths": torch.tensor([24] * 2).int()}, r"lengths must be int32 of \(1,\) on cpu, got torch.int32 \(2,\)"),
        ({"q": torch.zeros(SHAPE, dtype=torch.int32)}, "q must be floating point, got torch.int32"),
        ({"k": torch.zeros(2, 2, 24, 16)}, r"k must have the shape of q, \(1, 2, 24, 16\), got \(2, 2, 24, 16\)"),
        ({"v": torch.zeros(1, 2, 24, 8)}, r"v must have the shape of q, \(1, 2, 24, 16\), got \(1, 2, 24, 8\)"),
        ({"v": torch.zeros(SHAPE).half()}, "v must have q's dtype and device, torch.float32 on cpu, got torch.float16"),
        (
            {"k": torch.zeros(SHAPE, device="meta")},
            "k must have q's dtype and device, torch.float32 on cpu, .* on meta",
        ),
        ({"k": torch.zeros(1, 2, 16, 24).mT}, "k must have contiguous channels"),
        ({"v": torch.zeros(SHAPE, requires_grad=True)}, "v must not require grad"),
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
        ({"backend": "cuda"}, r"backend must be 'auto' or one of \['hopper', .*, 'triton'\], got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(schedule: AttentionSchedule, change: dict[str, object], message: str) -> None:
    good = {"q": torch.zeros(SHAPE), "k": torch.zeros(SHAPE), "v": torch.zeros(SHAPE)}
    with pytest.raises(ValueError, match=message):
        ops.planned_attention(**{**good, "schedule": schedule, **change})


def test_an_explicit_backend_never_falls_back(schedule: AttentionSchedule) -> None:
    x = torch.zeros(1, 2, 24, 20)
    with pytest.raises(UnsupportedBackendError, match=r"'triton' cannot execute .*float32; head_dim must be .* got 20"):
        ops.planned_attention(x, x, x, schedule, backend="triton")


def test_auto_on_a_cpu_is_torch(schedule: AttentionSchedule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    assert ops.supports(schedule, "cpu", torch.float16, 64, "triton") != []
    assert ops.choose_backend(schedule, "cpu", torch.float16, 64) == "torch"


def test_heads_of_8_bits_are_emulated_on_a_gpu_by_name_alone(
    schedule: AttentionSchedule, monkeypatch: pytest.MonkeyPatch
):
    eight = ListedSchedule(replace(schedule.core, head_precision=np.array([INT8_FP8, BF16], np.uint8)))
    monkeypatch.setattr(ops, "backend_reasons", lambda name, *_: [] if name == "torch" else ["no"])
    with pytest.raises(UnsupportedBackendError, match=r"torch: on a GPU it only emulates .* must be asked for by name"):
        ops.choose_backend(eight, "cuda", torch.bfloat16, 16)
    assert ops.choose_backend(eight, "cpu", torch.bfloat16, 16) == "torch"
    assert ops.choose_backend(schedule, "cuda", torch.bfloat16, 16) == "torch"


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_a_precision_that_a_backend_has_not_is_refused(
    schedule: AttentionSchedule, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is computed, from the outline alone; and so is `auto` if nobody has it."""
    eight = ListedSchedule(replace(schedule.core, head_precision=np.array([INT8_FP8, BF16], np.uint8)))
    module = load_backend(name)
    reason = "it cannot execute heads of precision 2 (int8 QK with fp8 PV)"
    for has, count in (({BF16}, 1), ({BF16, INT8}, 1), ({BF16, INT8_FP8}, 0)):
        monkeypatch.setattr(module, "PRECISIONS", has, raising=False)
        assert ops.supports(eight, "cpu", torch.float32, 16, name).count(reason) == count
        assert reason not in ops.supports(schedule, "cpu", torch.float32, 16, name)
    monkeypatch.setattr(load_backend("torch"), "PRECISIONS", {BF16}, raising=False)
    with pytest.raises(UnsupportedBackendError, match=r"torch: it cannot execute heads of precision 2"):
        ops.choose_backend(eight, "cpu", torch.float32, 16)


def test_auto_names_every_refusal(schedule: AttentionSchedule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "AUTO", ("triton",))
    with pytest.raises(UnsupportedBackendError, match=r"no backend .*triton: .*float64"):
        ops.choose_backend(schedule, "cpu", torch.float64, 64)


def test_a_backend_that_cannot_be_imported_has_a_reason(
    schedule: AttentionSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "triton", "calibatt.runtime.backends.missing")
    (reason,) = ops.supports(schedule, "cpu", torch.float16, 64, "triton")
    assert "cannot be imported" in reason


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_has_the_two_functions(name: str) -> None:
    module = load_backend(name)
    assert callable(module.supports)
    assert callable(module.run)


def test_attend_is_planned_attention_without_checks(schedule: AttentionSchedule) -> None:
    q, k, v = torch.randn(3, *SHAPE)
    expected = ops.planned_attention(q, k, v, schedule, backend="torch", return_lse=True)
    for got, want in zip(ops.attend(q, k, v, schedule, "torch", return_lse=True), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_the_default_device_is_of_no_concern(schedule: AttentionSchedule, name: str) -> None:
    """`torch.set_default_device` is for what users make, not for index arrays."""
    q, k, v = torch.randn(3, *SHAPE).to(torch.float16 if name == "triton" else torch.float32)
    fresh = ListedSchedule(schedule.core)
    with torch.device("meta"):
        found = ops.planned_attention(q, k, v, schedule=fresh, backend=name)
    torch.testing.assert_close(found, ops.planned_attention(q, k, v, schedule=schedule, backend=name))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_lengths_that_are_none_count_as_the_nearest(schedule: AttentionSchedule, backend: str) -> None:
    """Kernels cannot be made to read beyond the arrays, or to compute over nothing."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 30, 16, dtype=torch.float16, device=device).unbind()

    def found(*lengths: int) -> torch.Tensor:
        chosen = torch.tensor(lengths, dtype=torch.int32, device=device)
        return ops.planned_attention(q, k, v, schedule, backend=backend, video_start=2, lengths=chosen)

    torch.testing.assert_close(found(1000, -5), found(30, 26), rtol=0, atol=0)
