"""Effects of masks and copies against attention that is written out and masked, in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibatt.plans import INT8, INT8_FP8, Blocks, TokenGrid
from calibatt.tools.calibrate import effects
from calibatt.tools.calibrate.attention import attention, kernel_name
from calibatt.tools.calibrate.gradients import AttentionCall

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = 2
SIZES = st.sampled_from([Blocks(16, 16), Blocks(16, 32), Blocks(32, 16), Blocks(64, 16)])


AROUND = st.sampled_from([(0, 0), (0, 0), (5, 0), (0, 19), (17, 3)])
"""Tokens before the video, and after it."""


def make_call(
    tokens: int, channels: int, vectors: int, seed: int = 0, scale: float = 1.0, around: tuple[int, int] = (0, 0)
) -> AttentionCall:
    """A call with so many tokens of a video."""
    drawn, video = torch.Generator().manual_seed(seed), slice(around[0], around[0] + tokens)
    tokens += sum(around)
    q, k, v = (torch.randn(HEADS, tokens, channels, generator=drawn) for _ in range(3))
    q *= 2  # so that some blocks have much of the mass
    grads = [torch.randn(HEADS, tokens, channels, generator=drawn) * scale for _ in range(vectors)]
    return AttentionCall(0, q, k, v, attention(q[None], k[None], v[None])[0][0], None, grads, scale, video)


def by_token(keep: Tensor, blocks: Blocks, call: AttentionCall) -> Tensor:
    """A mask of blocks ``(..., Q, K)`` as one of all tokens."""
    found = keep.repeat_interleave(blocks.block_q, -2).repeat_interleave(blocks.block_k, -1)
    start, stop = call.span
    every = torch.ones(*keep.shape[:-2], *(call.q.shape[1],) * 2, dtype=torch.bool)
    every[..., start:stop, start:stop] = found[..., : stop - start, : stop - start]
    return every


def error_of(call: AttentionCall, keep: Tensor, blocks: Blocks) -> Tensor:
    """What a mask ``(H, Q, K)`` changes in the output, float64 ``(H, N, D)``."""
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    masked = scores.masked_fill(~by_token(keep, blocks, call), -torch.inf)
    return masked.softmax(-1) @ v - scores.softmax(-1) @ v


def dropped(call: AttentionCall, blocks: Blocks, query_block: int, key_block: int) -> Tensor:
    """The error of dropping one block in all heads, float64 ``(H, N, D)``; less where it has nearly all the mass."""
    start, stop = call.span
    tokens = stop - start
    keep = torch.ones(HEADS, blocks.q_blocks(tokens), blocks.k_blocks(tokens), dtype=torch.bool)
    keep[:, query_block, key_block] = False
    p = (call.q.double() @ call.k.double().mT * call.q.shape[-1] ** -0.5).softmax(-1)
    rest = (p * by_token(keep, blocks, call)).sum(-1, keepdim=True)
    return error_of(call, keep, blocks) * rest / rest.clamp(min=effects.LEAST_REST)


@settings(max_examples=25)
@given(
    tokens=st.integers(17, 100), channels=st.sampled_from([8, 24, 32]), vectors=st.integers(1, 3), blocks=SIZES,
    masks=st.integers(1, 31), seed=st.integers(0, 9), scale=st.sampled_from([1.0, 2.0**-7]), at_once=st.booleans(),
    around=AROUND,
)  # fmt: skip
def test_effects_are_those_of_masks_that_are_run(
    tokens: int, channels: int, vectors: int, blocks: Blocks, masks: int, seed: int, scale: float, at_once: bool,
    around: tuple[int, int],
):  # fmt: skip
    call = make_call(tokens, channels, vectors, seed, scale, around)
    shape = blocks.q_blocks(tokens), blocks.k_blocks(tokens)
    drawn = torch.Generator().manual_seed(seed)
    keeps = torch.rand(masks, HEADS, *shape, generator=drawn) < torch.linspace(0.2, 0.9, masks)[:, None, None, None]
    keeps.scatter_(-1, torch.randint(shape[1], (masks, HEADS, shape[0], 1), generator=drawn), True)
    keeps[0] = True  # a mask that drops nothing
    with pytest.MonkeyPatch.context() as context:
        if at_once:
            context.setattr(effects, "SCORES_AT_ONCE", 1)
        effect, kept, _ = effects.block_effects(call, effects.mask_words(keeps), masks, blocks)
    assert effect.shape == (vectors, HEADS, *shape)
    assert kept.shape == (vectors, masks, HEADS)
    grads = torch.stack(call.grads).double() / scale
    true = torch.stack([(grads * error_of(call, keep, blocks)).sum((2, 3)) for keep in keeps], 1)
    torch.testing.assert_close(kept, true, rtol=1e-4, atol=1e-4)
    for row, column in itertools.product(*map(range, shape)) if shape[1] > 1 else ():
        true = -(grads * dropped(call, blocks, row, column)).sum((2, 3))
        torch.testing.assert_close(effect[:, :, row, column].double(), true, rtol=2e-3, atol=2e-3)


def rows_of_int8(x: Tensor, group: int) -> Tensor:
    """One head's rows as the words say: the largest of a group is 127."""
    found = []
    for part in x.split(group):
        unit = part.abs().max() / 127
        found.append((part / unit).round() * unit)
    return torch.cat(found)


def attention_in_8bit(call: AttentionCall, head: int, blocks: Blocks, precision: int, inputs: bool = True) -> Tensor:
    """The video's output of a head by definition, float64 ``(V, D)``; with `inputs` False of exact queries and keys."""
    start, stop = call.span
    q, k, v = (x[head].double() for x in (call.q, call.k, call.v))
    q, k, mean = q[start:stop], k - k.mean(0), v.mean(0)
    if inputs:
        q = rows_of_int8(q, 64)
        parts = (part for part in (k[:start], k[start:stop], k[stop:]) if len(part))
        k = torch.cat([rows_of_int8(part, blocks.block_k) for part in parts])
    scores = q @ k.T * q.shape[1] ** -0.5
    if precision == INT8:
        return scores.softmax(-1) @ v
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    rounded, v = (p * 32).to(torch.float8_e4m3fn).double() / 32, v - mean
    if inputs:
        unit = v.abs().amax(0) / 448
        v = (v / unit).to(torch.float8_e4m3fn).double() * unit
    return rounded @ v / p.sum(-1, keepdim=True) + mean


def input_grads(call: AttentionCall) -> list[tuple[Tensor, ...]]:
    """Gradients of q, k and v by autograd, of the outputs of the video's queries alone."""
    inputs = tuple(x.double().requires_grad_() for x in (call.q, call.k, call.v))
    out = torch.nn.functional.scaled_dot_product_attention(*inputs)[:, call.video]
    return [torch.autograd.grad(out, inputs, grad[:, call.video].double(), retain_graph=True) for grad in call.grads]


@settings(max_examples=25)
@given(
    tokens=st.integers(17, 200), channels=st.sampled_from([8, 24, 32]), blocks=SIZES, seed=st.integers(0, 99),
    scale=st.sampled_from([1.0, 2.0**-7]), mean=st.sampled_from([0.0, 3.0]), around=AROUND,
)  # fmt: skip
def test_effects_of_precisions_are_those_of_heads_that_are_run_in_them(
    tokens: int, channels: int, blocks: Blocks, seed: int, scale: float, mean: float, around: tuple[int, int]
):
    """Probabilities are rounded as if nothing else were, so what all rounding does is of about the right size."""
    call = make_call(tokens, channels, 32, seed, scale, around)
    call = replace(call, k=call.k + mean, v=call.v + mean, out=call.out + mean)  # a mean of keys moves no weight
    call = replace(call, input_grads=input_grads(call))
    none = torch.ones(1, 1, blocks.q_blocks(tokens), blocks.k_blocks(tokens), dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effects, "ROUNDED_STRIDE", 1)
        *_, rounding = effects.block_effects(call, effects.mask_words(none), 1, blocks)
    found = effects.precision_effects(call, rounding, blocks)
    assert found.shape == (32, 2, HEADS)
    grads = torch.stack(call.grads)[:, :, call.video].double() / scale

    def run(head: int, precision: int, inputs: bool = True) -> tuple[Tensor, float]:
        """True effects, and their size: gradients are standard normal numbers."""
        change = attention_in_8bit(call, head, blocks, precision, inputs) - call.out[head, call.video].double()
        return (grads[:, head] * change).sum((1, 2)), float(change.norm())

    for head in range(HEADS):
        for ours, (true, size) in (
            (found[:, 0, head], run(head, INT8)),
            (rounding[:, head], run(head, INT8_FP8, inputs=False)),
        ):
            assert (ours - true).square().mean() ** 0.5 < 0.4 * size  # float32 rounds a number now and then otherwise
        _, size = run(head, INT8_FP8)
        assert 0.6 * size < found[:, 1, head].square().mean() ** 0.5 < 1.6 * size


def test_some_queries_stand_for_all_where_probabilities_are_rounded(monkeypatch: pytest.MonkeyPatch):
    call, blocks = make_call(160, 16, 256), Blocks(16, 16)
    monkeypatch.setattr(effects, "SCORES_AT_ONCE", 160 * 16)  # a run is one row of blocks
    words = effects.mask_words(torch.ones(1, 1, 10, 10, dtype=torch.bool))
    sizes = []
    for stride in (1, 4):
        monkeypatch.setattr(effects, "ROUNDED_STRIDE", stride)
        sizes.append(effects.block_effects(call, words, 1, blocks)[2].square().mean(0))
    torch.testing.assert_close(sizes[1], sizes[0], rtol=0.35, atol=0.0)
    assert not torch.equal(*sizes)


def test_one_mask_may_be_for_all_heads():
    blocks, call = Blocks(16, 32), make_call(70, 8, 1)
    one = torch.rand(3, 1, 5, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    one[..., 0] = True
    effect, kept, _ = effects.block_effects(call, effects.mask_words(one), 3, blocks)
    same, as_many, _ = effects.block_effects(call, effects.mask_words(one.expand(-1, HEADS, -1, -1)), 3, blocks)
    assert torch.equal(effect, same)
    assert torch.equal(kept, as_many)


def test_no_query_is_left_out():
    """What is summed and then squared must be of all queries: with every 8th one, squares are several times too large.

    Every single query's gradient has its effect, and effects of all of them add up to those of the whole.
    """
    blocks, call = Blocks(16, 16), make_call(40, 8, 1)
    words = effects.mask_words(torch.eye(3, dtype=torch.bool)[None, None])
    total, masks = 0.0, 0.0
    for query in range(40):
        alone = torch.zeros_like(call.grads[0])
        alone[:, query] = call.grads[0][:, query]
        one = AttentionCall(0, call.q, call.k, call.v, call.out, None, [alone])
        effect, kept, _ = effects.block_effects(one, words, 1, blocks)
        assert (effect[0, :, query // 16] != 0).all()
        assert (kept != 0).all()
        total, masks = total + effect, masks + kept
    effect, kept, _ = effects.block_effects(call, words, 1, blocks)
    torch.testing.assert_close(total, effect, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masks, kept, rtol=1e-4, atol=1e-5)


def test_a_block_with_all_the_mass_counts_as_if_it_had_a_little_less():
    call = make_call(32, 8, 1)
    sharp = AttentionCall(0, call.q * 1000, call.k, call.v, call.out, None, call.grads)
    effect, kept, _ = effects.block_effects(sharp, torch.zeros(1, 2, 2, dtype=torch.int32), 1, Blocks(16, 16))
    assert torch.isfinite(effect).all()
    assert torch.isfinite(kept).all()


@settings(max_examples=10)
@given(masks=st.integers(1, 31), seed=st.integers(0, 9))
def test_words_have_a_bit_for_each_mask(masks: int, seed: int):
    keeps = torch.rand(masks, 2, 3, 4, generator=torch.Generator().manual_seed(seed)) < 0.5
    words = effects.mask_words(keeps)
    assert words.dtype == torch.int32
    assert torch.equal(torch.stack([words >> bit & 1 for bit in range(masks)]).bool(), keeps)


def test_more_masks_than_bits_are_refused():
    with pytest.raises(ValueError, match="masks measured together must be at most 31, got 32"):
        effects.mask_words(torch.ones(32, 1, 1, dtype=torch.bool))


@settings(max_examples=15)
@given(
    tokens=st.integers(17, 100), channels=st.sampled_from([8, 24, 32]), vectors=st.integers(1, 3), blocks=SIZES,
    stride=st.sampled_from([1, 3, 8]), seed=st.integers(0, 9), around=AROUND,
)  # fmt: skip
def test_errors_are_sums_of_squares_in_the_gradients_metric(
    tokens: int, channels: int, vectors: int, blocks: Blocks, stride: int, seed: int, around: tuple[int, int]
):
    call = make_call(tokens, channels, vectors, seed, 0.5, around)
    start, stop = call.span
    found = effects.block_errors(call, blocks, stride)
    grads = torch.cat([grad[:, start:stop] for grad in call.grads], 1).double() / 0.5
    metric = grads.mT @ grads / grads.shape[1]
    size = metric.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    metric += effects.DIAGONAL_SHARE * size * torch.eye(channels)
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    p = (q @ k.mT * channels**-0.5).softmax(-1)
    out = p @ v
    for row, column in itertools.product(range(found.shape[1]), range(found.shape[2])):
        rows = slice(start + row * blocks.block_q, min(start + (row + 1) * blocks.block_q, stop))
        keys = slice(start + column * blocks.block_k, min(start + (column + 1) * blocks.block_k, stop))
        part = p[:, rows, keys]
        error = part @ v[:, keys] - part.sum(-1, keepdim=True) * out[:, rows]
        sizes = torch.einsum("hnc,hcd,hnd->hn", error, metric, error)
        expected = sizes[:, ::stride].mean(1) * sizes.shape[1]
        torch.testing.assert_close(found[:, row, column].double(), expected, rtol=1e-3, atol=1e-5)


def test_a_metric_of_low_rank_is_one_too():
    """Gradients of few directions, as where a projection after attention ignores some channels."""
    call = make_call(60, 24, 1)
    flat = call.grads[0].clone()
    flat[:, :, 3:] = 0
    one = AttentionCall(0, call.q, call.k, call.v, call.out, None, [flat])
    padded = [
        torch.cat([x, x.new_zeros(1, 60, 24)]) for x in (call.q[:1], call.k[:1], call.v[:1], call.out[:1], flat[:1])
    ]
    assert torch.isfinite(effects.block_errors(one, Blocks(16, 16))).all()
    silent = effects.block_errors(AttentionCall(0, *padded[:4], None, padded[4:]), Blocks(16, 16))
    assert torch.isfinite(silent).all()
    assert (silent[1] == 0).all()


@settings(max_examples=15)
@given(
    tokens=st.integers(5, 90), channels=st.sampled_from([8, 24]), blocks=SIZES, stride=st.sampled_from([1, 4]),
    many=st.booleans(), around=AROUND,
)  # fmt: skip
def test_masses_of_blocks(tokens: int, channels: int, blocks: Blocks, stride: int, many: bool, around: tuple[int, int]):
    call = make_call(tokens, channels, 1, around=around)
    start, stop = call.span
    with pytest.MonkeyPatch.context() as context:
        if many:
            context.setattr(effects, "SCORES_AT_ONCE", 1)
        mass, error = effects.block_statistics(call.q, call.k, call.v, blocks, stride, call.video)
    assert mass.shape == error.shape == (HEADS, blocks.q_blocks(tokens), blocks.k_blocks(tokens))
    if sum(around) == 0:
        torch.testing.assert_close(mass.sum(-1), torch.ones(HEADS, mass.shape[1]))
    p = (call.q.double() @ call.k.double().mT * channels**-0.5).softmax(-1)
    for row, column in itertools.product(*map(range, mass.shape[1:])):
        rows = torch.arange(start, stop)[row * blocks.block_q : (row + 1) * blocks.block_q][::stride]
        keys = torch.arange(start, stop)[column * blocks.block_k : (column + 1) * blocks.block_k]
        expected = p[:, rows[:, None], keys].sum(-1).mean(1)
        torch.testing.assert_close(mass[:, row, column].double(), expected, rtol=1e-4, atol=1e-6)


GRIDS = st.builds(TokenGrid, frames=st.integers(1, 4), height=st.integers(1, 5), width=st.integers(1, 6))


@settings(max_examples=25)
@given(grid=GRIDS, vectors=st.integers(1, 3), scale=st.sampled_from([1.0, 4.0]), around=AROUND, data=st.data())
def test_effects_of_copies(grid: TokenGrid, vectors: int, scale: float, around: tuple[int, int], data: st.DataObject):
    call = make_call(grid.tokens, 8, vectors, scale=scale, around=around)
    radii = data.draw(st.integers(0, grid.height - 1)), data.draw(st.integers(0, grid.frames - 1))
    found = effects.copy_effects(call, grid, *radii)
    video = slice(*call.span)
    differences = effects.row_differences(call.out[:, video], grid, radii[0])
    assert differences.shape == (HEADS, grid.height, 2 * radii[0])
    shape = (grid.frames, grid.height, grid.width)
    out = call.out[:, video].double().unflatten(1, shape)
    grads = torch.stack(call.grads)[:, :, video].double().unflatten(2, shape) / scale
    for kind, axis, members in ((0, 2, grid.height), (1, 1, grid.frames)):
        radius = radii[kind]
        assert found[kind].shape == (vectors, HEADS, members, 2 * radius)
        offsets = [*range(-radius, 0), *range(1, radius + 1)]
        for member, (column, offset) in itertools.product(range(members), enumerate(offsets)):
            got = found[kind][:, :, member, column]
            if not 0 <= member + offset < members:
                assert (got == 0).all()
                assert kind or differences[:, member, column].isnan().all()
                continue
            own, other = out.select(axis, member), out.select(axis, member + offset)
            expected = (grads.select(axis + 1, member) * (other - own)).sum((2, 3, 4))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            if kind == 0:
                expected = (other - own).square().sum((1, 2, 3)) / own.square().sum((1, 2, 3))
                torch.testing.assert_close(differences[:, member, column].double(), expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=20)
@given(
    rows=st.integers(1, 6), columns=st.integers(1, 7), seed=st.integers(0, 9),
    shares=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4, unique=True),
)  # fmt: skip
def test_a_ladder_has_the_first_blocks_and_the_first_of_every_row(
    rows: int, columns: int, seed: int, shares: list[float]
):
    order = torch.rand(HEADS, rows, columns, generator=torch.Generator().manual_seed(seed))
    shares = sorted(shares)
    found = effects.ladder(order, shares)
    for (share, masks), head in itertools.product(zip(shares, found, strict=True), range(HEADS)):
        count = min(round(share * rows * columns), rows * columns - 1)
        first = np.argsort(-order[head].numpy().ravel())[:count]
        expected = np.zeros(rows * columns, bool)
        expected[first] = True
        expected = expected.reshape(rows, columns)
        expected[np.arange(rows), order[head].argmax(-1).numpy()] = True
        np.testing.assert_array_equal(masks[head].numpy(), expected)
    assert all((a <= b).all() for a, b in itertools.pairwise(found))


@settings(max_examples=20)
@given(
    seed=st.integers(0, 9), thresholds=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=3, unique=True),
    others=st.sampled_from([0.0, 0.2]),
)  # fmt: skip
def test_planes_are_the_smallest_sets_that_hold_the_mass(seed: int, thresholds: list[float], others: float):
    mass = torch.randn(HEADS, 4, 6, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1) * (1 - others)
    thresholds = sorted(thresholds)
    for threshold, plane in zip(thresholds, effects.keep_planes(mass, thresholds, others > 0), strict=True):
        held, least = (mass * plane).sum(-1) + others, (mass * plane).masked_fill(~plane, 2).amin(-1)
        assert (held >= threshold - 1e-6).all()
        assert ((held - least < threshold + 1e-6) | ~plane.any(-1)).all()
        assert (least >= (mass * ~plane).amax(-1)).all()


@pytest.mark.parametrize("channels", [8, 24, 32])
def test_attention_is_exact_and_says_whose_it_is(channels: int):
    q, k, v = (torch.randn(2, 3, 20, channels, requires_grad=True) for _ in range(3))
    out, total = attention(q, k, v)
    assert total is None
    assert kernel_name(q) == "PyTorch on the CPU"
    torch.testing.assert_close(out, (q @ k.mT * channels**-0.5).softmax(-1) @ v, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "channels"), [(torch.float32, 128), (torch.float32, 64), (torch.bfloat16, 256), (torch.bfloat16, 128)]
)
def test_every_head_size_is_measured_on_a_gpu(dtype: torch.dtype, channels: int, monkeypatch: pytest.MonkeyPatch):
    """Also those whose tiles do not fit into shared memory, which PyTorch measures."""
    monkeypatch.setattr(effects, "ROUNDED_STRIDE", 1)
    drawn = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, 300, channels, generator=drawn).to("cuda", dtype) for _ in range(4))
    out, total = attention(q[None], k[None], v[None])
    call = AttentionCall(0, q, k, v, out[0], total[0], [grad], 1.0, slice(7, 290))
    exact = AttentionCall(0, *(x.cpu().float() for x in (q, k, v, out[0])), None, [grad.cpu().float()], 1.0, call.video)
    words = effects.mask_words(torch.rand(3, 2, 3, 3, generator=drawn) < 0.5)
    found = effects.block_effects(call, words.cuda(), 3, Blocks(128, 128))
    expected = effects.block_effects(exact, words, 3, Blocks(128, 128))
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        scale = float(theirs.double().square().mean() ** 0.5)
        torch.testing.assert_close(ours.cpu() / scale, theirs / scale, rtol=0, atol=0.02)
    ours, theirs = (effects.block_errors(each, Blocks(128, 128)) for each in (call, exact))
    scale = float(theirs.double().square().mean() ** 0.5)
    torch.testing.assert_close(ours.cpu() / scale, theirs / scale, rtol=0, atol=0.05)
