"""The statistics against the definition, computed with every score in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibatt.compiler.stats import Manifest, default_windows, quantise, window_keep
from calibatt.plans import Blocks, ModelSignature, TokenGrid
from calibatt.tools.calibrate import statistics

HEADS, HEAD_DIM, DIM = 2, 16, 24


def call(grid: TokenGrid, seed: int):
    """q, k, v, out ``(H, N, D)`` and a projection ``(dim, H * D)``."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(HEADS, grid.tokens, HEAD_DIM, generator=generator) for _ in range(3))
    projection = torch.randn(DIM, HEADS * HEAD_DIM, generator=generator)
    weight = torch.softmax(2 * q.double() @ k.double().mT * HEAD_DIM**-0.5, -1)
    return 2 * q, k, v, (weight @ v.double()).float(), weight, projection


def behind(projection: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``(H, ..., D)`` head outputs to what they add to the residual stream, ``(H, ..., dim)``, in float64."""
    slices = projection.double().view(DIM, HEADS, HEAD_DIM).transpose(0, 1)
    return torch.einsum("hcd,h...d->h...c", slices, x.double())


def definition(weight, v, out, projection, blocks: Blocks, stride: int):
    """Block mass and block error straight from their definitions, float64 ``(H, Q, K)``."""
    tokens = v.shape[1]
    shape = (HEADS, blocks.q_blocks(tokens), blocks.k_blocks(tokens))
    mass, error = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for i in range(shape[1]):
        rows = torch.arange(i * blocks.block_q, min(tokens, (i + 1) * blocks.block_q), stride)
        for j in range(shape[2]):
            keys = slice(j * blocks.block_k, (j + 1) * blocks.block_k)
            part = weight[:, rows][..., keys]
            change = part @ v.double()[:, keys] - part.sum(-1, keepdim=True) * out.double()[:, rows]
            mass[:, i, j] = part.sum(-1).mean(1)
            error[:, i, j] = behind(projection, change).square().sum(-1).mean(1)
    return mass, error


def manifest(grid: TokenGrid, blocks: Blocks, **changes) -> Manifest:
    model = ModelSignature("Tiny", 1, HEADS, HEAD_DIM)
    return Manifest(
        model, grid, blocks, times=(0.5,), windows=default_windows(grid), row_radius=2, has_mass=True, **changes
    )


@pytest.mark.parametrize("text", [0, 1, 13, 20])
def test_padded_text_has_no_mass(text: int) -> None:
    """A sample whose text is shorter is measured without its padding."""
    grid, blocks = TokenGrid(2, 4, 5, text_after=20), Blocks(16, 16)
    short = TokenGrid(2, 4, 5, text_after=text)
    *parts, _, projection = call(short, 1)
    given = {"projection": projection, "residual_square": 3.0, "seed": 0}
    wanted, alone = manifest(grid, blocks, query_stride=1), manifest(short, blocks, query_stride=1)
    unit = statistics.unit_statistics(*parts, manifest=wanted, **given)
    unit.check(wanted)
    expected = statistics.unit_statistics(*parts, manifest=alone, **given)
    q, k = alone.q_blocks, alone.k_blocks
    assert np.array_equal(unit.block_mass[:, :q, :k], expected.block_mass)
    assert (unit.block_mass[:, q:] == 255).all(), "the code of zero"
    assert (unit.block_mass[:, :, k:] == 255).all()
    planes, fewer = (
        np.unpackbits(each.planes, axis=-1, bitorder="little", count=blocks)
        for each, blocks in ((unit, wanted.k_blocks), (expected, k))
    )
    assert np.array_equal(planes[:, :, :q, :k], fewer)
    assert not planes[:, :, :q, k:].any()
    assert planes[:, :, q:].all()
    menu = len(wanted.thresholds)  # the windows keep text, and what shares a block with it
    assert np.array_equal(unit.menu_residual_error[:menu], expected.menu_residual_error[:menu])
    for name in ("output_size", "row_error"):
        assert np.array_equal(getattr(unit, name), getattr(expected, name), equal_nan=True), name


grids = st.builds(
    TokenGrid,
    frames=st.integers(1, 3),
    height=st.integers(3, 6),
    width=st.integers(1, 7),
    text_before=st.integers(0, 5),
    text_after=st.integers(0, 5),
)


@given(grid=grids, q=st.sampled_from((16, 32)), k=st.sampled_from((16, 32)), stride=st.sampled_from((1, 3, 4)))
@settings(max_examples=25)
def test_a_unit_agrees_with_the_definitions(grid, q, k, stride):
    blocks = Blocks(q, k)
    qs, ks, vs, out, weight, projection = call(grid, 1)
    wanted = manifest(grid, blocks, query_stride=stride)
    unit = statistics.unit_statistics(
        qs, ks, vs, out, manifest=wanted, projection=projection, residual_square=3.0, seed=0
    )
    unit.check(wanted)
    mass, error = definition(weight, vs, out, projection, blocks, stride)
    error /= 3.0
    step = 2 ** (1 / 16) - 1
    np.testing.assert_allclose(unit.mass(), mass, rtol=step + 1e-3, atol=1e-8)
    floor = 1e-5 * float(behind(projection, out).square().sum(-1).mean()) / 3.0  # rounding of what cancels
    np.testing.assert_allclose(unit.error(), error, rtol=step + 1e-3, atol=floor)
    size = behind(projection, out).square().sum(-1).mean(1) / 3.0
    np.testing.assert_allclose(unit.output_size, size, rtol=1e-3)


@given(grid=grids, q=st.sampled_from((16, 32)))
@settings(max_examples=15)
def test_menu_errors_are_those_of_masked_attention(grid, q):
    blocks = Blocks(q, 16)
    qs, ks, vs, out, weight, projection = call(grid, 2)
    wanted = manifest(grid, blocks)
    factor = statistics.projection_factor(projection, HEADS, HEAD_DIM)
    keeps = torch.stack([torch.tensor(window_keep(w, grid, blocks)) for w in wanted.windows])
    menu = keeps[:, None].expand(-1, HEADS, -1, -1)
    relative, residual = statistics.menu_errors(qs, ks, vs, menu, factor, blocks, 1, seed=5)
    chosen = torch.randperm(blocks.q_blocks(grid.tokens), generator=torch.Generator().manual_seed(5))
    chosen = chosen[: statistics.MENU_QUERY_BLOCKS]
    rows = torch.cat([torch.arange(b * q, min(grid.tokens, (b + 1) * q)) for b in chosen.tolist()])
    for entry, keep in enumerate(keeps):
        tokens = keep.repeat_interleave(q, 0).repeat_interleave(16, 1)[: grid.tokens, : grid.tokens]
        masked = weight * tokens
        change = (masked / masked.sum(-1, keepdim=True)) @ vs.double() - out.double()
        size = out.double()[:, rows].square().sum((1, 2))
        expected = change[:, rows].square().sum((1, 2)) / size
        np.testing.assert_allclose(relative[entry], expected, rtol=1e-3, atol=1e-9)
        expected = behind(projection, change[:, rows]).square().sum(-1).mean(1)
        np.testing.assert_allclose(residual[entry], expected, rtol=1e-3, atol=1e-7)


def test_planes_are_the_smallest_sets_that_hold_their_mass():
    mass = torch.rand(2, 5, 9, generator=torch.Generator().manual_seed(0))
    mass /= mass.sum(-1, keepdim=True)
    thresholds = (0.3, 0.8, 0.95)
    planes = statistics.keep_planes(mass, thresholds)
    for plane, threshold in zip(planes, thresholds, strict=True):
        held = (mass * plane).sum(-1)
        assert (held >= threshold - 1e-6).all()
        least = torch.where(plane, mass, torch.inf).amin(-1)
        assert (held - least < threshold).all()
        assert (torch.where(plane, torch.inf, -mass).amin(-1) >= -least).all()
    assert (planes[:-1] <= planes[1:]).all()


def test_copy_errors_compare_rows_of_one_frame_and_frames():
    grid = TokenGrid(2, 4, 3, text_before=2, text_after=1)
    *_, out, _, projection = call(grid, 3)
    factor = statistics.projection_factor(projection, HEADS, HEAD_DIM)
    (relative, residual), frames, size = statistics.copy_errors(out, factor, grid, 2, 1)
    np.testing.assert_allclose(size, behind(projection, out).square().sum(-1).mean(1), rtol=1e-4)
    video = out[:, 2:-1].double().view(HEADS, 2, 4, 3, HEAD_DIM)
    for row in range(4):
        for at, offset in enumerate((-2, -1, 1, 2)):
            if not 0 <= row + offset < 4:
                assert relative[:, row, at].isnan().all()
                assert residual[:, row, at].isnan().all()
                continue
            change = video[:, :, row + offset] - video[:, :, row]
            expected = change.square().sum((1, 2, 3)) / video[:, :, row].square().sum((1, 2, 3))
            np.testing.assert_allclose(relative[:, row, at], expected, rtol=1e-4)
            expected = behind(projection, change).square().sum(-1).mean((1, 2))
            np.testing.assert_allclose(residual[:, row, at], expected, rtol=1e-4)
    change = video[:, 1] - video[:, 0]
    for frame, (there, beyond) in enumerate(((1, 0), (0, 1))):
        relative, residual = (each[:, frame] for each in frames)
        assert relative[:, beyond].isnan().all()
        assert residual[:, beyond].isnan().all()
        expected = change.square().sum((1, 2, 3)) / video[:, frame].square().sum((1, 2, 3))
        np.testing.assert_allclose(relative[:, there], expected, rtol=1e-4)
        expected = behind(projection, change).square().sum(-1).mean((1, 2))
        np.testing.assert_allclose(residual[:, there], expected, rtol=1e-4)


@given(st.lists(st.floats(0, 1, width=32), min_size=1), st.floats(0, 1e3, width=32))
def test_codes_are_those_of_the_store(shares, peak):
    values = torch.tensor(shares, dtype=torch.float32) * peak
    found = statistics.log_codes(values, torch.tensor(peak)).numpy().astype(int)
    wanted = quantise(values.numpy(), peak).astype(int)
    assert np.abs(found - wanted).max() <= 1, "a rounding apart"
    assert ((found == 255) == (wanted == 255))[values.numpy() == 0].all()


@given(st.integers(1, 40), st.integers(0, 3))
def test_packed_planes_are_little_endian_bits(width, seed):
    planes = torch.rand(2, 3, width, generator=torch.Generator().manual_seed(seed)) > 0.5
    assert np.array_equal(statistics.pack(planes), np.packbits(planes, axis=-1, bitorder="little"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("blocks", "stride", "head_dim"),
    [((128, 128), 1, 128), ((128, 128), 8, 128), ((64, 64), 2, 64), ((128, 64), 4, 64)],
)
def test_triton_agrees_with_pytorch_on_a_gpu(dtype, blocks, stride, head_dim):
    from calibatt.tools.calibrate import kernels

    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(3, 1111, head_dim, generator=generator, device="cuda").to(dtype) for _ in range(3))
    exact = statistics.block_statistics(q, k, v.float(), Blocks(*blocks), stride)
    found = kernels.block_statistics(q, k, v.float(), Blocks(*blocks), stride)
    rounding = 4 * torch.finfo(dtype).eps
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours - theirs).norm() <= rounding * theirs.norm()
