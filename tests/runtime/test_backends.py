"""Every backend against the oracle, on schedules of any kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.budget import check_against_oracle
from support.schedules import ANCHORS, OTHERS, grids, layer_schedules, random_schedule

from calibatt.plans import Blocks, LayerSchedule, TokenGrid
from calibatt.runtime.backends import triton as triton_backend
from calibatt.runtime.backends.triton import TABLE
from calibatt.runtime.ops import attend, planned_attention
from calibatt.runtime.reference import reference_attention
from calibatt.runtime.schedule import ListedSchedule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_DTYPES = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,)
LAYOUTS = ("BHND", "BNHD", "packed qkv", "broadcast batch", "odd strides")


def inputs(
    core: LayerSchedule,
    dtype: torch.dtype,
    *,
    head_dim: int = 32,
    batch: int = 1,
    layout: str = "BHND",
    device: str = "cpu",
    others: int = 0,
) -> list[torch.Tensor]:
    """q, k and v, normally distributed, ``(batch, H, N, head_dim)`` with the strides that the layout implies."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, batch, core.grid.tokens + others, core.heads, head_dim)
    x = torch.randn(shape, generator=generator).to(device, dtype)
    if layout == "packed qkv":
        x = x.permute(1, 2, 0, 3, 4).contiguous().permute(2, 0, 1, 3, 4)
    if layout == "broadcast batch":
        x = x[:, :1].expand(shape)
    if layout == "odd strides":
        x = torch.nn.functional.pad(x, (1, 2))[..., 1:-2]
    x = x.transpose(2, 3)
    return list(x.contiguous() if layout == "BHND" else x)


def check(
    core: LayerSchedule,
    backend: str,
    dtype: torch.dtype,
    *,
    scale: float | None = None,
    prefix: int = 0,
    suffix: int = 0,
    padded: bool = False,
    **options: object,
) -> None:
    """Executes the schedule and holds out and lse against the oracle; padded: some of the suffix is padding."""
    core.check()
    schedule = ListedSchedule(core)
    q, k, v = inputs(core, dtype, device=DEVICE if backend == "triton" else "cpu", others=prefix + suffix, **options)
    lengths = None
    if padded:
        padding = [(5 * sample + 3) % (suffix + 1) for sample in range(len(q))]
        lengths = q.shape[2] - torch.tensor(padding, dtype=torch.int32, device=q.device)
    more = {"scale": scale, "video_start": prefix, "lengths": lengths}
    out, lse = planned_attention(q, k, v, schedule, backend=backend, return_lse=True, **more)
    check_against_oracle(out, q, k, v, schedule, lse=lse, **more)
    assert torch.equal(planned_attention(q, k, v, schedule, backend=backend, **more), out)


SURROUNDED = st.fixed_dictionaries(
    {"prefix": st.sampled_from(OTHERS), "suffix": st.sampled_from(OTHERS), "padded": st.booleans()}
)


@settings(max_examples=40)
@given(
    layer_schedules(),
    st.sampled_from(TORCH_DTYPES),
    st.sampled_from(LAYOUTS),
    st.integers(1, 2),
    st.sampled_from((8, 32)),
    SURROUNDED,
)
def test_torch(core: LayerSchedule, dtype: torch.dtype, layout: str, batch: int, head_dim: int, around: dict) -> None:
    check(core, "torch", dtype, layout=layout, batch=batch, head_dim=head_dim, **around)


@pytest.mark.slow
@settings(max_examples=20)
@given(
    layer_schedules(grid=grids(max_frames=2, max_height=3), heads=st.integers(1, 3)),
    st.sampled_from(TRITON_DTYPES),
    st.sampled_from(LAYOUTS),
    st.integers(1, 2),
    st.sampled_from((16, 64)),
    SURROUNDED,
)
def test_triton(core: LayerSchedule, dtype: torch.dtype, layout: str, batch: int, head_dim: int, around: dict) -> None:
    check(core, "triton", dtype, layout=layout, batch=batch, head_dim=head_dim, **around)


BACKENDS = pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float32), ("triton", torch.float16)])
SLOW_TRITON = pytest.param("triton", torch.float16, marks=pytest.mark.slow)
NARROW = TokenGrid(frames=1, height=2, width=3)
"""Six tokens: shorter than any block."""
WIDE = TokenGrid(frames=2, height=4, width=26)
"""208 tokens; rows straddle blocks."""
AROUND = {"prefix": 7, "suffix": 33, "padded": True}


def schedule(grid: TokenGrid, blocks: Blocks, **options: object) -> LayerSchedule:
    return random_schedule(np.random.default_rng(5), grid, blocks, 3, **options)


@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float32), SLOW_TRITON])
@pytest.mark.parametrize("block", [16, 64, 128, 256])
@pytest.mark.parametrize("grid", [NARROW, WIDE], ids=["narrow", "wide"])
def test_every_block_size(backend: str, dtype: torch.dtype, grid: TokenGrid, block: int) -> None:
    check(schedule(grid, Blocks(block, block), dense_heads=[1], anchored_heads=[2]), backend, dtype, **AROUND)


@BACKENDS
def test_one_block_a_tile(backend: str, dtype: torch.dtype) -> None:
    check(schedule(WIDE, Blocks(32, 16), density=0.0), backend, dtype)


@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float32), SLOW_TRITON])
@pytest.mark.parametrize("anchors", ANCHORS)
def test_only_anchored_heads(backend: str, dtype: torch.dtype, anchors: str) -> None:
    check(
        schedule(WIDE, Blocks(16, 32), anchored_heads=[0, 1, 2], dense_heads=[1], anchors=anchors),
        backend,
        dtype,
        **AROUND,
    )


@BACKENDS
def test_only_dense_heads(backend: str, dtype: torch.dtype) -> None:
    check(schedule(WIDE, Blocks(64, 64), dense_heads=[0, 1, 2]), backend, dtype, batch=2, layout="BNHD")


@BACKENDS
@pytest.mark.parametrize("scale", [1e-3, 1.0, 4.0])
def test_scale(backend: str, dtype: torch.dtype, scale: float) -> None:
    """At 4 the softmax is almost an argmax: the running maximum matters."""
    check(schedule(WIDE, Blocks(64, 32), density=0.5), backend, dtype, scale=scale)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_triton_head_sizes_of_real_models(head_dim: int) -> None:
    check(schedule(WIDE, Blocks(128, 128), density=0.5), "triton", torch.float16, head_dim=head_dim)


def different_programs(head_dim: int) -> list[tuple[int, int]]:
    """(sm, head_dim) of every row of `TABLE` that makes another program; the interpreter knows no warps or stages."""
    found = {}
    for sm, row in TABLE.items():
        config = row[head_dim].fit(128, 64)
        cut = config if DEVICE == "cuda" else (config.block_m, config.block_n)
        found.setdefault((cut, sm >= triton_backend.TMA_SINCE), (sm, head_dim))
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize(("sm", "head_dim"), different_programs(64) + different_programs(256))
def test_triton_as_on_every_device(monkeypatch: pytest.MonkeyPatch, sm: int, head_dim: int) -> None:
    """By addresses and by TMA."""
    monkeypatch.setattr(triton_backend, "device_sm", lambda _: sm)
    core = schedule(WIDE, Blocks(128, 64), dense_heads=[1], anchored_heads=[2])
    for around in ({}, AROUND):
        check(core, "triton", torch.float16, head_dim=head_dim, layout="packed qkv", batch=2, **around)


@pytest.mark.slow
@pytest.mark.parametrize("block_k", [16, 32, 256])
def test_triton_by_addresses(monkeypatch: pytest.MonkeyPatch, block_k: int) -> None:
    monkeypatch.setattr(triton_backend, "device_sm", lambda _: 80)
    for grid in (NARROW, WIDE):
        check(schedule(grid, Blocks(64, block_k), anchored_heads=[2]), "triton", torch.float16, **AROUND)


@BACKENDS
def test_channels_need_not_be_side_by_side_in_a_model(backend: str, dtype: torch.dtype) -> None:
    core = schedule(WIDE, Blocks(64, 64), anchored_heads=[2])
    q, k, v = inputs(core, dtype, device=DEVICE if backend == "triton" else "cpu")
    expected = attend(q, k, v, ListedSchedule(core), backend)
    apart = [x.mT.contiguous().mT for x in (q, k, v)]
    for parts in (apart, (q, apart[1], v)):
        torch.testing.assert_close(attend(*parts, ListedSchedule(core), backend), expected)


@BACKENDS
def test_output_is_laid_out_as_q(backend: str, dtype: torch.dtype) -> None:
    """So that a model's view of (B, N, H * D) needs no copy."""
    core = schedule(WIDE, Blocks(64, 64))
    q, k, v = inputs(core, dtype, layout="BNHD", device=DEVICE if backend == "triton" else "cpu")
    assert planned_attention(q, k, v, ListedSchedule(core), backend=backend).stride() == q.stride()


@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("which", "value", "start"),
    [(which, value, 0) for which in "kv" for value in (torch.nan, torch.inf, -torch.inf)] + [("v", torch.nan, 5)],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of triton's interpreter
def test_what_is_not_finite_stays_with_those_who_keep_it(which: str, value: float, start: int, backend: str) -> None:
    """In every key block in turn: rows that drop it are as they were, in the others NaN or infinity comes out."""
    if start and backend == "triton":
        pytest.skip("by TMA, the end of a partial prefix is read with the first values of the video")
    core = schedule(WIDE, Blocks(64, 64), dense_heads=[1], anchored_heads=[2], density=0.3)
    runtime, dtype = ListedSchedule(core), torch.float16 if backend == "triton" else torch.float32
    q, k, v = inputs(core, dtype, batch=2, device=DEVICE if backend == "triton" else "cpu")
    q, k, v = (torch.cat([x[:, :, :start], x], 2) for x in (q, k, v))

    def video(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return planned_attention(q, k, v, runtime, backend=backend, video_start=start)[:, :, start:]

    clean = video(k, v)
    kept = torch.stack([runtime.dense(head)[1] for head in range(core.heads)]).to(q.device)
    for block in range(core.k_blocks):
        broken = {"k": k.clone(), "v": v.clone()}
        broken[which][0, :, start + block * 64 + 3] = value
        found = video(**broken)
        torch.testing.assert_close(found[1], clean[1])
        torch.testing.assert_close(found[0][~kept[:, :, block]], clean[0][~kept[:, :, block]])
        if which == "v" or value != value:  # a score of minus infinity is a weight of 0
            assert not found[0][kept[:, :, block]].isfinite().any()


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_an_empty_batch_is_an_empty_result(backend: str) -> None:
    core = schedule(WIDE, Blocks(64, 64), anchored_heads=[2])
    nothing = torch.zeros(0, 3, WIDE.tokens, 16, dtype=torch.float16, device=DEVICE if backend == "triton" else "cpu")
    out, lse = planned_attention(nothing, nothing, nothing, ListedSchedule(core), backend=backend, return_lse=True)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (nothing.shape, torch.float16, out.shape[:3], torch.float32)
    assert reference_attention(nothing, nothing, nothing, ListedSchedule(core))[0].shape == nothing.shape


def test_torch_in_double_precision() -> None:
    core = schedule(WIDE, Blocks(16, 16), anchored_heads=[1])
    q, k, v = inputs(core, torch.float64)
    out, lse = planned_attention(q, k, v, ListedSchedule(core), backend="torch", return_lse=True)
    truth, true_lse = planned_attention(q, k, v, ListedSchedule(core), backend="reference", return_lse=True)
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(lse, true_lse)


def test_torch_backend_leaves_torch_as_it_was() -> None:
    core = schedule(WIDE, Blocks(16, 16))
    threads = torch.get_num_threads()
    with torch.inference_mode():
        q, k, v = inputs(core, torch.float32)
        assert planned_attention(q, k, v, ListedSchedule(core), backend="torch").is_inference()
    assert torch.get_num_threads() == threads
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.scaled_dot_product_attention", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            planned_attention(q, k, v, ListedSchedule(core), backend="torch")
    assert torch.get_num_threads() == threads


def test_one_thread_gives_the_same_bits() -> None:
    core = schedule(WIDE, Blocks(16, 16), dense_heads=[0], anchored_heads=[1])
    q, k, v = inputs(core, torch.float32)
    threads = torch.get_num_threads()
    many = planned_attention(q, k, v, ListedSchedule(core), backend="torch")
    torch.set_num_threads(1)
    try:
        assert torch.equal(planned_attention(q, k, v, ListedSchedule(core), backend="torch"), many)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autocast_casts_as_for_scaled_dot_product_attention(backend: str) -> None:
    """Before anything else, in all threads alike; float64 stays as it is."""
    core = schedule(WIDE, Blocks(16, 16), dense_heads=[0])
    q, k, v = inputs(core, torch.float32)
    low = [x.bfloat16() for x in (q, k, v)]
    plain = planned_attention(*low, ListedSchedule(core), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        for mixed in ((q, k, v), (q, k, low[2]), (low[0], k, v)):
            found = planned_attention(*mixed, ListedSchedule(core), backend=backend)
            assert found.dtype == torch.nn.functional.scaled_dot_product_attention(*mixed).dtype
            torch.testing.assert_close(found, plain)
        assert planned_attention(*inputs(core, torch.float64), ListedSchedule(core)).dtype == torch.float64
    with pytest.raises(ValueError, match=r"v must have q's dtype and device, torch.float32 on cpu, got torch.bfloat16"):
        planned_attention(q, k, low[2], ListedSchedule(core), backend=backend)
