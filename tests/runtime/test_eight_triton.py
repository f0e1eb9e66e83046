"""Heads of 8 bits by the triton backend, in triton's interpreter or on a GPU; where they are switched on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from support.budget import check_against_oracle
from support.guards import adversarial, run_guarded
from support.interpreter import round_e4m3_rightly
from support.schedules import random_schedule

from calibatt.plans import BF16, INT8, INT8_FP8, Blocks, ModelSignature, PlanFile, Segment, StoredLayers, TokenGrid
from calibatt.runtime import eight_bits, prepass, quantise
from calibatt.runtime.attachment import Attachment
from calibatt.runtime.backends import UnsupportedBackendError
from calibatt.runtime.backends import triton as triton_backend
from calibatt.runtime.eight_bits import Timing
from calibatt.runtime.kernels import block_sparse
from calibatt.runtime.kernels import quantise as quantise_kernels
from calibatt.runtime.ops import attend, choose_backend, planned_attention, supports
from calibatt.runtime.resident import LoadedPlan
from calibatt.runtime.schedule import ListedSchedule
from calibatt.runtime.session import Session

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRID = TokenGrid(2, 4, 26)
SQUARE = Blocks(64, 64)
MIXED = (INT8_FP8, INT8, BF16, INT8_FP8)
EIGHT = pytest.mark.parametrize("precision", [INT8, INT8_FP8], ids=["int8", "int8_fp8"])
EXTREMES = adversarial(64)


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU whatever was measured; the interpreter as a GPU rounds, and with fewer keys at a time."""
    if DEVICE == "cpu":
        round_e4m3_rightly(monkeypatch)
        monkeypatch.setitem(prepass.SURVEY, "CHUNK", 64)
    else:
        monkeypatch.setattr(eight_bits, "verdict", lambda *_: (True, ""))


def made(precisions: tuple[int, ...] = MIXED, blocks: Blocks = SQUARE, **options: object) -> ListedSchedule:
    """Listed heads and the first one dense."""
    core = random_schedule(
        np.random.default_rng(0), GRID, blocks, len(precisions), 0.4, dense_heads=[0], precisions=precisions, **options
    )
    core.check()
    return ListedSchedule(core)


def inputs(
    heads: int, others: int = 0, batch: int = 1, head_dim: int = 64, dtype: torch.dtype = torch.float16
) -> list[torch.Tensor]:
    """Normal, with what 8 bits are bad at: keys and values far from 0, and a channel of keys far larger than others."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, batch, GRID.tokens + others, heads, head_dim)
    q, k, v = torch.randn(shape, generator=generator).transpose(2, 3).to(DEVICE)
    k[..., 3] = 8 * k[..., 3] + 12
    return [x.to(dtype) for x in (q, k, v + 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sm", "blocks", "head_dim", "around", "anchors"),
    [
        (90, Blocks(64, 64), 64, (0, 0), "random"),
        (90, Blocks(128, 128), 128, (7, 33), "frames"),
        (89, Blocks(128, 128), 128, (7, 33), "frames"),
        (90, Blocks(256, 32), 64, (130, 140), "every"),
        (89, Blocks(16, 256), 64, (1, 0), "frame"),
    ],
    ids=str,
)
def test_mixed_heads_are_as_the_oracle(
    monkeypatch: pytest.MonkeyPatch, sm: int, blocks: Blocks, head_dim: int, around: tuple[int, int], anchors: str
) -> None:
    """By addresses and by TMA; padded where there is a suffix."""
    monkeypatch.setattr(triton_backend, "device_sm", lambda _: sm)
    schedule = made(blocks=blocks, anchored_heads=[2, 3], anchors=anchors)
    q, k, v = inputs(4, sum(around), 2, head_dim)
    lengths = None
    if around[1]:
        lengths = torch.tensor([q.shape[2], q.shape[2] - around[1] + 3], dtype=torch.int32, device=DEVICE)
    more = {"video_start": around[0], "lengths": lengths}
    out, lse = planned_attention(q, k, v, schedule, backend="triton", return_lse=True, **more)
    check_against_oracle(out, q, k, v, schedule, lse=lse, **more)
    assert torch.equal(planned_attention(q, k, v, schedule, backend="triton", **more), out)


@EIGHT
def test_heads_of_one_precision_without_others(precision: int) -> None:
    """No launch of 16 bits is left."""
    schedule = made((precision,) * 2, Blocks(128, 64))
    q, k, v = inputs(2)
    out, lse = planned_attention(q, k, v, schedule, backend="triton", return_lse=True)
    check_against_oracle(out, q, k, v, schedule, lse=lse)
    sixteen = planned_attention(q, k, v, made((BF16, BF16), Blocks(128, 64)), backend="triton")
    assert 1e-4 < ((out - sixteen).float().norm() / (sixteen - v.mean(2, keepdim=True)).float().norm()).item() < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EXTREMES][::4])
def test_extremes_are_computed_inside_their_tensors(name: str) -> None:
    core, before, after = EXTREMES[name]
    precisions = ((np.arange(core.heads) + 2) % 3).astype(np.uint8)
    run_guarded(
        replace(core, head_precision=precisions), before, after, "triton", DEVICE, dtype=torch.float16, head_dim=64
    )


@EIGHT
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of triton's interpreter
def test_empty_lists_are_zeros(precision: int) -> None:
    """No plan has any; kernels must not hang or invent."""
    schedule = made((precision,) * 2)
    tiles = schedule.bind(DEVICE).derived(triton_backend.prepare).tiles
    tiles[::3, 2] = tiles[::3, 3]
    q, k, v = inputs(2)
    out, lse = attend(q, k, v, schedule, "triton", return_lse=True)
    assert out.isfinite().all()
    for head, tile in tiles[::3, :2].tolist():
        rows = slice(tile * 64, tile * 64 + 64)
        assert not out[0, head, rows].any()
        assert (lse[0, head, rows] == -torch.inf).all()


@EIGHT
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_is_never_rounded_away(which: str, precision: int) -> None:
    schedule = made((precision,) * 2)
    q, k, v = inputs(2)
    broken = {"q": q, "k": k, "v": v}
    broken[which][0, 1, 70, 3] = torch.nan
    out = planned_attention(q, k, v, schedule, backend="triton")
    wrong = schedule.dense(1)[1][:, 70 // 64]
    if which == "q":
        wrong = torch.arange(GRID.tokens) == 70
    elif which == "k" or precision == INT8_FP8:  # it is in the mean
        wrong = torch.ones(GRID.tokens, dtype=torch.bool)
    assert not out[0, 1, wrong.to(DEVICE)].isfinite().all(-1).any()
    assert out[0, 0].isfinite().all()


@EIGHT
@pytest.mark.parametrize("around", [(0, 0), (7, 33)], ids=str)
def test_zeros_attend_to_all_alike(precision: int, around: tuple[int, int]) -> None:
    """The product of both scales is then 0, also where keys that do not exist are masked."""
    schedule = made((precision,) * 2)
    q, _, v = inputs(2, sum(around))
    q = torch.zeros_like(q)
    more = {"scale": 0.01, "video_start": around[0]}
    out, lse = planned_attention(q, q, v, schedule, backend="triton", return_lse=True, **more)
    check_against_oracle(out, q, q, v, schedule, lse=lse, **more)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[torch.device]:
    """A GPU of sm86, of which nothing is known."""
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU (24 GB)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    triton_backend.device_sm.cache_clear()
    eight_bits._remembered.cache_clear()
    yield torch.device("cuda:0")
    triton_backend.device_sm.cache_clear()
    eight_bits._remembered.cache_clear()


def reasons(card: torch.device, precision: int, head_dim: int = 128, block_k: int = 64) -> list[str]:
    return supports(made((precision,), Blocks(64, block_k)), card, torch.bfloat16, head_dim, "triton")


def test_a_card_that_was_not_measured_is_refused_with_what_to_do(card: torch.device) -> None:
    (reason,) = reasons(card, INT8)
    assert reason.startswith("int8 QK is off: it was not measured on Some GPU (24 GB) with head_dim 128 and triton ")
    assert reason.endswith("run `calibatt-bench precision` to measure it, or compile the plan with --precision bf16")
    assert reasons(card, BF16) == []
    with pytest.raises(UnsupportedBackendError, match="run `calibatt-bench precision`") as refused:
        choose_backend(made((INT8,)), card, torch.bfloat16, 128)
    assert "\n" not in str(refused.value)


def test_what_a_card_cannot_do_is_not_a_question_of_speed(card: torch.device) -> None:
    (reason,) = reasons(card, INT8_FP8)
    assert reason == "heads in int8 QK with fp8 PV need a device of sm89 or later, got sm86"
    assert reasons(card, INT8, head_dim=32) == ["heads in int8 QK must have head_dim 64 or 128, got 32"]
    assert reasons(card, INT8, block_k=16) == ["block_k must be at least 32 for heads in int8 QK, got 16"]


def test_the_nearest_measurement_decides(card: torch.device) -> None:
    found = [Timing(INT8, 128, 1000, 0.93), Timing(INT8, 128, 100, 1.2), Timing(INT8, 64, 100, 0.0, "it is wrong: x")]
    path = eight_bits.remember(card, found, {"date": "now"})
    assert path.name.startswith("Some-GPU-24-GB-triton-")
    assert json.loads(path.read_text())["date"] == "now"
    assert reasons(card, INT8) == []  # of 208 tokens
    on, told = eight_bits.verdict(INT8, card, 128, 208)
    assert (on, told) == (True, f"int8 QK is on: 1.20 times as fast as 16 bit at 100 tokens ({path})")
    on, told = eight_bits.verdict(INT8, card, 128, 900)
    assert not on
    assert "int8 QK is off: 0.93 times as fast as 16 bit at 1000 tokens" in told
    assert reasons(card, INT8, head_dim=64) == [
        f"int8 QK is off: it is wrong: x ({path}); compile the plan with --precision bf16"
    ]


BROKEN = (
    "{}",
    "[]",
    "[" * 100_000,
    "\xff",
    '{"timings": [{"precision": 1, "head_dim": 128, "tokens": 5, "speed_up": "2"}]}',
)


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_is_no_measurement(card: torch.device, text: str) -> None:
    path = eight_bits.remember(card, [], {})
    path.write_bytes(text.encode("latin1"))
    (reason,) = reasons(card, INT8)
    assert reason.startswith("int8 QK is off: it was not measured on Some GPU (24 GB) with ")
    assert f" ({path} must be what calibatt-bench precision writes: delete it (" in reason


def test_a_file_that_cannot_be_read_is_no_measurement(card: torch.device) -> None:
    path = eight_bits.remember(card, [], {})
    path.unlink()
    path.mkdir()  # also for root, who may read every file
    (reason,) = reasons(card, INT8)
    assert "it was not measured on Some GPU" in reason
    assert f"Is a directory: '{path}'" in reason


def test_without_a_home_folder_nothing_is_measured(card: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    (reason,) = reasons(card, INT8)
    assert "(XDG_CACHE_HOME must be set where there is no home folder: Could not determine home directory.)" in reason


@pytest.mark.parametrize("module", [block_sparse, quantise_kernels, triton_backend, prepass, quantise])
def test_what_changes_the_kernel_asks_for_a_measurement(module: ModuleType) -> None:
    assert Path(module.__file__) in [Path(eight_bits.__file__).parent / name for name in eight_bits.KERNEL]


def test_what_is_shipped_counts_until_the_card_is_measured(card: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bits, "SHIPPED", {86: (Timing(INT8, 128, 1000, 1.1),)})
    assert reasons(card, INT8) == []
    assert eight_bits.verdict(INT8, card, 128, 5)[1].endswith("at 1000 tokens (another card of sm86)")
    eight_bits.remember(card, [Timing(INT8, 128, 1000, 0.9)], {})
    assert reasons(card, INT8) != []


@pytest.mark.parametrize(
    ("precisions", "sm", "dtype", "count"),
    [
        ((INT8, INT8_FP8), (8, 9), torch.bfloat16, 2),
        ((INT8, INT8_FP8), (8, 6), torch.bfloat16, 1),  # which cannot multiply e4m3
        ((INT8, INT8_FP8), (8, 9), torch.float32, 0),
        ((BF16,), (8, 9), torch.bfloat16, 0),
    ],
    ids=str,
)
def test_explain_says_on_or_off_for_precisions_of_the_plan(
    card: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    precisions: tuple[int, ...],
    sm: tuple[int, int],
    dtype: torch.dtype,
    count: int,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: sm)
    signature = ModelSignature("Model", 1, len(precisions), 64)
    layers = ((made(precisions).core,),)
    plan = LoadedPlan(PlanFile(signature, GRID, SQUARE, (Segment(0.0, 1.0, 0.5),), StoredLayers.of(layers)))
    session = Session((plan,), None, "auto", False)
    session.backends[card, dtype] = [["torch"]]
    attachment = object.__new__(Attachment)
    attachment.plans, attachment._session = session.plans.values(), session
    eight_bits.remember(card, [Timing(INT8, 64, 1000, 1.1)], {})
    told = [line for line in attachment.explain().splitlines() if line.startswith("triton on cuda:0: ")]
    expected = (
        "triton on cuda:0: int8 QK is on: 1.10 times as fast as 16 bit at 1000 tokens (",
        "triton on cuda:0: int8 QK with fp8 PV is off: it was not measured on Some GPU (24 GB)",
    )
    assert [line.startswith(start) for line, start in zip(told, expected, strict=False)] == [True] * count
