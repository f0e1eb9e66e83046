"""The second measurement: exact errors of every mask, on a model small enough to write everything out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("diffusers")

from support.sampler import GRID, TinyVideoSampler, tiny_refined, tiny_store

from calibatt.compiler.gather import StatisticsSource
from calibatt.compiler.stats import Ladders, Store, StoreWriter, window_keep
from calibatt.compiler.stats.refinement import read_errors
from calibatt.plans import Blocks
from calibatt.tools.calibrate import __main__ as command
from calibatt.tools.calibrate import models, refining
from calibatt.tools.calibrate.listen import Call, listening
from calibatt.tools.calibrate.refining import Refiner, mask_errors

pytestmark = pytest.mark.usefixtures("one_thread")


def brute_force(q: Any, k: Any, v: Any, keep: Any, blocks: Blocks, queries: Any) -> Any:
    """Mean over queries of ||O_kept - O||^2, float64, of one head; keep ``(Q, K)``."""
    q, k, v = (x.double() for x in (q, k, v))
    scores = q @ k.T * q.shape[-1] ** -0.5
    tokens = len(q)
    mask = keep.repeat_interleave(blocks.block_q, 0)[:tokens].repeat_interleave(blocks.block_k, 1)[:, :tokens]
    change = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ v - torch.softmax(scores, -1) @ v
    return change[queries].square().sum(-1).mean()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(17, 90),
    st.sampled_from([(16, 16), (32, 16), (16, 32)]),
    st.integers(1, 5),
    st.integers(0, 10**6),
    st.sampled_from([1, 200, 1 << 20]),
)
def test_errors_are_those_of_masked_attention(tokens: int, sizes: Any, stride: int, seed: int, at_once: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks, heads, shares = Blocks(*sizes), 3, 4
    q_blocks, k_blocks = blocks.q_blocks(tokens), blocks.k_blocks(tokens)
    q, k, v = torch.randn(3, heads, tokens, 8, generator=generator).unbind()
    levels = torch.randint(0, shares + 1, (2, heads, q_blocks, k_blocks), generator=generator).byte()
    levels[..., 0] = 0
    windows = torch.rand(3, q_blocks, k_blocks, generator=generator) < 0.5
    windows[..., -1] = True
    count = int(torch.randint(1, q_blocks + 1, (), generator=generator))
    picked = sorted(torch.randperm(q_blocks, generator=generator)[:count].tolist())
    offset = int(torch.randint(stride, (), generator=generator))
    before = refining.SCORES_AT_ONCE["cpu"]
    refining.SCORES_AT_ONCE["cpu"] = at_once * tokens
    try:
        found = mask_errors(q, k, v, levels, windows, shares, blocks, picked, stride, offset)
    finally:
        refining.SCORES_AT_ONCE["cpu"] = before
    queries = []
    for block in picked:
        here = list(range(block * blocks.block_q, min(tokens, (block + 1) * blocks.block_q)))
        queries += here[offset if offset < len(here) else 0 :: stride]
    for head in range(heads):
        masks = [levels[kind, head] <= level for kind in range(2) for level in range(shares)] + list(windows)
        wanted = [brute_force(q[head], k[head], v[head], keep, blocks, queries) for keep in masks]
        torch.testing.assert_close(found[:, head], torch.stack(wanted).float(), rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The tiny store, refined with all query blocks."""
    return tiny_refined(
        tmp_path_factory.mktemp("refined") / "stats", lambda names: Ladders(names, shares=(0.1, 0.3, 0.6))
    )


def test_what_is_stored_is_the_error_of_the_compilers_masks(refined: Store) -> None:
    """Against every call of the model written out: the residual stream, the projection and the time are right."""
    name, ladders, of = refined.samples[0], refined.ladders, refined.manifest
    assert ladders is not None
    calls: list[Call] = []
    times: list[float] = []

    def on_forward(now: float) -> bool:
        times.append(now)
        return True

    sampler = TinyVideoSampler()
    with listening(sampler.transformer, GRID, on_forward, lambda call: calls.append(call)):
        sampler.run(refined.meta[name]["prompt"], refined.meta[name]["seed"])
    windows = [torch.from_numpy(window_keep(window, of.grid, of.blocks)) for window in of.windows]
    for number, call in enumerate(calls):
        time_index = of.times.index(min(of.times, key=lambda time: abs(time - times[number // 2])))
        found = read_errors(refined.refined[name], name, time_index, ladders, of)[call.layer]
        levels = torch.from_numpy(StatisticsSource(refined).levels(ladders, time_index, call.layer))
        for head, piece in enumerate(call.projection.split(of.model.head_dim, 1)):
            masks = [levels[kind, head] <= level for kind in range(len(ladders.kinds)) for level in range(3)] + windows
            behind = call.v[head] @ piece.T
            wanted = [
                float(brute_force(call.q[head], call.k[head], behind, keep, of.blocks, slice(None))) for keep in masks
            ]
            np.testing.assert_allclose(found[:, head] * call.residual_square, wanted, rtol=2e-3, atol=1e-6)


def test_refining_again_says_the_same(refined: Store, tmp_path: Path) -> None:
    """Some query blocks, drawn for each call, the same each time; they estimate what all of them say."""
    ladders = refined.ladders
    assert ladders is not None
    path = tmp_path / "stats"
    store = tiny_store(path)
    with StoreWriter.open(path, store.manifest) as writer:
        writer.refine(ladders)
        for name in store.samples:
            Refiner(TinyVideoSampler(), store, ladders, query_blocks=12).refine(writer, name)
    some = np.stack([Store.open(path).refined_error(t, layer) for t in range(3) for layer in range(2)])
    whole = np.stack([refined.refined_error(t, layer) for t in range(3) for layer in range(2)])
    assert 0.8 < some.sum() / whole.sum() < 1.25
    again = tmp_path / "again"
    store = tiny_store(again)
    with StoreWriter.open(again, store.manifest) as writer:
        writer.refine(ladders)
        for name in reversed(store.samples):
            Refiner(TinyVideoSampler(), store, ladders, query_blocks=12).refine(writer, name)
    for name in store.samples:
        for index in range(3):
            a, b = (
                read_errors(p / "refinement" / f"{name}.refined", name, index, ladders, store.manifest)
                for p in (path, again)
            )
            np.testing.assert_array_equal(a, b)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.SAMPLERS, "demo", lambda steps, device: TinyVideoSampler())
    monkeypatch.setitem(models.PROMPTS, "demo", lambda count, seed: [f"prompt {index}" for index in range(count)])


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(command.main, [str(argument) for argument in arguments])


def test_command_refines_and_goes_on_after_an_interruption(tmp_path: Path, tiny: None, monkeypatch: Any) -> None:
    common = ("-o", tmp_path / "s", "--block-size", 16, "--samples", 2, "--probes", 0, "--device", "cpu")
    measured, calls = refining.mask_errors, []

    def stop(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(refining, "mask_errors", stop)
    assert invoke(*common, "--refine").exit_code == 1
    assert len(Store.open(tmp_path / "s").refined) == 1
    result = invoke(*common, "--refine")
    assert result.exit_code == 0, result.output
    assert "2 of 2 samples are done: skipped" in result.output
    assert "0 recorded now, 1 refined" in result.output
    assert "2 of 2 samples" in result.output
    assert len(calls) == 9 + 6
    result = invoke(*common, "--refine", "--refine-shares", "0.5,0.7")
    assert result.exit_code == 2
    assert "must be deleted before other kinds or shares are refined" in result.output
    result = invoke(*common, "--samples", 3)
    assert result.exit_code == 0, result.output
    assert "made before other samples came: of no use" in result.output
    for arguments, message in (
        (("--refine",), "must be deleted before other samples are refined, got 2 samples"),
        (("--refine", "--ladders", "size"), "ladders.kinds must be some of"),
        (("--refine", "--ladders", "mass"), "must do without 'mass' in a store without block mass"),
        (("--refine", "--refine-shares", "0.7,0.5"), "ladders.shares must be"),
        (("--refine", "--refine-shares", "x"), "--refine-shares must be numbers"),
    ):
        result = invoke(*common, "--samples", 3, *arguments)
        assert result.exit_code == 2, result.output
        assert message in result.output.strip().splitlines()[-1]
