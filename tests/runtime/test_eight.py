"""Heads of 8 bits: what is multiplied, and by whom."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.budget import check_against_oracle
from support.guards import adversarial, run_guarded
from support.schedules import OTHERS, layer_schedules, random_schedule

from calibatt.plans import BF16, INT8, INT8_FP8, Blocks, LayerSchedule, TokenGrid
from calibatt.runtime.ops import planned_attention
from calibatt.runtime.quantise import E4M3_MOST, INT8_MOST, as_e4m3, e4m3_channels, int8_rows, rounded_rows
from calibatt.runtime.schedule import AttentionSchedule, ListedSchedule

GRID = TokenGrid(2, 4, 26)
ALL = (BF16, INT8, INT8_FP8)
EXTREMES = adversarial(128)


def made(precisions: tuple[int, ...] = ALL, **options: object) -> AttentionSchedule:
    core = random_schedule(
        np.random.default_rng(0), GRID, Blocks(64, 64), len(precisions), precisions=precisions, **options
    )
    core.check()
    return ListedSchedule(core)


def inputs(
    core: LayerSchedule, dtype: torch.dtype, others: int = 0, batch: int = 1, dim: int = 16
) -> list[torch.Tensor]:
    """Normal, with what 8 bits are bad at: keys and values far from 0, and a channel of keys far larger than others."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, core.heads, core.grid.tokens + others, dim, generator=generator)
    k[..., 3] = 8 * k[..., 3] + 12
    return [x.to(dtype) for x in (q, k, v + 2)]


@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 128])
def test_rows_are_within_half_a_step(rows: int) -> None:
    x = torch.randn(2, rows, 8, generator=torch.Generator().manual_seed(rows)) * torch.logspace(-3, 3, 8)
    codes, scales = int8_rows(x, 64)
    assert (codes.shape, scales.shape) == ((2, -(-rows // 64) * 64, 8), (2, -(-rows // 64)))
    assert codes.dtype == torch.int8
    assert not codes[:, rows:].any()
    step = scales.repeat_interleave(64, -1)[:, :rows, None]
    assert ((rounded_rows(x, 64) - x).abs() <= step * 0.5001).all()
    assert rows == 0 or codes.abs().amax() == INT8_MOST


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    x = torch.zeros(3, 64, 8)
    x[1, 5, 2], x[2, 5, 2] = torch.nan, torch.inf
    found = rounded_rows(x, 64)
    assert torch.equal(found[0], x[0])
    assert not found[1:].isfinite().any()


def test_values_lose_their_mean_and_keep_their_range() -> None:
    v = torch.randn(2, 300, 8, generator=torch.Generator().manual_seed(0)).double() * torch.logspace(-3, 3, 8) + 100
    codes, scales, mean = e4m3_channels(v)
    torch.testing.assert_close(mean, v.mean(1, keepdim=True), rtol=2**-8, atol=0)
    assert (codes.abs().amax(1) == E4M3_MOST).all()
    error = (codes * scales + mean - v).abs()
    assert (error <= (v - mean).abs() * 0.0626 + scales * 2**-9).all()


def test_e4m3_saturates() -> None:
    assert as_e4m3(torch.tensor([1e9, -1e9, 17.0, 0.0])).tolist() == [448, -448, 16, 0]


@settings(max_examples=40)
@given(
    layer_schedules(precisions=ALL),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    st.integers(1, 2),
    st.sampled_from(OTHERS),
    st.sampled_from(OTHERS),
    st.booleans(),
)
def test_torch_is_as_the_reference(
    core: LayerSchedule, dtype: torch.dtype, batch: int, prefix: int, suffix: int, padded: bool
) -> None:
    core.check()
    q, k, v = inputs(core, dtype, prefix + suffix, batch)
    lengths = None
    if padded:
        padding = [(5 * sample + 3) % (suffix + 1) for sample in range(batch)]
        lengths = q.shape[2] - torch.tensor(padding, dtype=torch.int32)
    more = {"video_start": prefix, "lengths": lengths}
    out, lse = planned_attention(q, k, v, ListedSchedule(core), backend="torch", return_lse=True, **more)
    if dtype == torch.float64:
        truth, true_lse = planned_attention(q, k, v, ListedSchedule(core), backend="reference", return_lse=True, **more)
        torch.testing.assert_close(lse, true_lse)
        torch.testing.assert_close(out, truth)
    else:
        check_against_oracle(out, q, k, v, ListedSchedule(core), lse=lse, **more)


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_are_computed_inside_their_tensors(name: str) -> None:
    core, before, after = EXTREMES[name]
    precisions = ((np.arange(core.heads) + 1) % len(ALL)).astype(np.uint8)
    run_guarded(replace(core, head_precision=precisions), before, after, "torch", "cpu")


@pytest.mark.parametrize("precision", [INT8, INT8_FP8])
def test_eight_bits_are_near_sixteen(precision: int) -> None:
    """An oracle that rounds nothing, or all to nothing, would agree with itself."""
    eight, sixteen = made((precision,) * 2, anchored_heads=[1]), made((BF16,) * 2, anchored_heads=[1])
    q, k, v = inputs(eight.core, torch.float64, others=40, dim=64)
    more = {"backend": "reference", "return_lse": True, "video_start": 7}
    out, lse = planned_attention(q, k, v, eight, **more)
    truth, true_lse = planned_attention(q, k, v, sixteen, **more)
    video = slice(7, 7 + GRID.tokens)
    assert torch.equal(out[:, :, :7], truth[:, :, :7])
    assert torch.equal(out[:, :, video.stop :], truth[:, :, video.stop :])
    centred = truth - v.mean(2, keepdim=True)
    error = ((out - truth)[:, :, video].norm() / centred[:, :, video].norm()).item()
    assert 1e-3 < error < 0.3
    assert 1e-4 < (lse - true_lse).abs().max() < 0.5


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_padding_has_no_say(backend: str) -> None:
    schedule = made(anchored_heads=[1])
    q, k, v = inputs(schedule.core, torch.float32, others=50, batch=2)
    more = {"video_start": 7, "lengths": torch.tensor([GRID.tokens + 57, GRID.tokens + 20], dtype=torch.int32)}
    expected = planned_attention(q, k, v, schedule, backend=backend, **more)
    k[1, :, GRID.tokens + 20 :], v[1, :, GRID.tokens + 20 :] = 1e4, -1e4
    assert torch.equal(planned_attention(q, k, v, schedule, backend=backend, **more), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_what_is_not_finite_is_never_rounded_away(backend: str, which: str, value: float) -> None:
    """In keys or values of a head of 8 bits it reaches every query of the video, since it is in their mean."""
    schedule = made((INT8_FP8, INT8_FP8))
    q, k, v = inputs(schedule.core, torch.float32)
    broken = {"k": k, "v": v}
    broken[which][0, 0, 70, 3] = value
    out = planned_attention(q, k, v, schedule, backend=backend)
    assert not out[0, 0].isfinite().all(-1).any()
    assert out[0, 1].isfinite().all()


def test_half_of_the_largest_is_one_code_everywhere() -> None:
    """63.5 steps: in whatever dtype and order, it becomes the same number of steps."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[:, ::2] = x.abs().max() / 2
    codes = [int8_rows(x.to(dtype), 64)[0] for dtype in (torch.float32, torch.float64)]
    assert torch.equal(*codes)
