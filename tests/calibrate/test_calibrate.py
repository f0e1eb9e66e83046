"""Recording and probing on a tiny random Wan transformer, and the command line."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.stats import unit

from calibatt.compiler.stats import Manifest, MissingUnits, Store, StoreWriter
from calibatt.plans import Blocks, ModelSignature, TokenGrid
from calibatt.tools.calibrate import models

diffusers = pytest.importorskip("diffusers")

from calibatt.tools.calibrate import __main__ as command  # noqa: E402
from calibatt.tools.calibrate.listen import Call, ListenError, listening  # noqa: E402
from calibatt.tools.calibrate.probing import Trajectory, adapter_sites, masked_output, residual_error  # noqa: E402
from calibatt.tools.calibrate.recorder import Recorder, StepCounter, recorded_steps, sample_name  # noqa: E402

GRID = TokenGrid(2, 4, 5)
TIMES = [1.0, 0.9, 0.6, 0.3]
LAYERS, HEADS, HEAD_DIM = 2, 2, 16


pytestmark = pytest.mark.usefixtures("one_thread")


class TinySampler:
    """An Euler loop; `branches` forwards a step, as guidance makes them."""

    def __init__(self, branches: int = 1) -> None:
        torch.manual_seed(0)
        self.transformer = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=LAYERS,
            rope_max_seq_len=32,
        ).requires_grad_(False)
        for block in self.transformer.blocks:
            block.scale_shift_table.data *= 5
        self.branches = branches
        self.times = list(TIMES)
        self.grid = GRID
        self.versions = {"weights": "random"}

    def check(self, prompts: Any) -> None:
        if "bad" in prompts:
            raise ValueError("a prompt must be good,\ngot 'bad'")

    def run(self, prompt: str, seed: int, start_step: int = 0, start: Any = None, on_step: Any = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        latent = torch.randn(1, 4, 2, 8, 10, generator=generator) if start is None else start
        text = torch.randn(self.branches, 1, 3, 16, generator=torch.Generator().manual_seed(len(prompt)))
        schedule = [*self.times, 0.0]
        for step in range(start_step, len(self.times)):
            if on_step:
                on_step(step, latent)
            now, then = schedule[step], schedule[step + 1]
            with torch.no_grad():
                found = [self.transformer(latent, torch.tensor([now * 1000]), t, return_dict=False)[0] for t in text]
            latent = latent + (then - now) * sum(found) / self.branches
        return latent


def make_manifest(times: tuple[float, ...] = (0.3, 0.9), **changes: Any) -> Manifest:
    signature = ModelSignature("WanTransformer3DModel", LAYERS, HEADS, HEAD_DIM)
    return dataclasses.replace(Manifest(signature, GRID, Blocks(16, 16), times), **changes)


class Fake:
    """Statistics that tell calls apart, and keep what they were given."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, q: Any, k: Any, v: Any, out: Any, **rest: Any) -> Any:
        self.calls.append({"q": q, "k": k, "v": v, "out": out, **rest})
        size = np.full(HEADS, len(self.calls), np.float32)
        return dataclasses.replace(unit(rest["manifest"], len(self.calls)), output_size=size)


def test_recording_puts_units_in_their_place_and_changes_nothing(tmp_path):
    sampler, fake, manifest, ticks = TinySampler(), Fake(), make_manifest(), itertools.count()
    stock = sampler.run("hello", 3)
    processors = [block.attn1.processor for block in sampler.transformer.blocks]
    recorder = Recorder(sampler, manifest, fake, on_unit=lambda: next(ticks))
    assert recorder.steps == (3, 1)
    with StoreWriter.open(tmp_path, manifest) as writer:
        final = recorder.record(writer, "hello", 3, note="x")
    assert torch.equal(final, stock)
    assert [block.attn1.processor for block in sampler.transformer.blocks] == processors
    name = sample_name("hello", 3)
    store = Store.open(tmp_path)
    # Time 0.9 is sampled first: calls 1 and 2.
    placed = [[float(store.unit(name, time, layer).output_size[0]) for layer in range(2)] for time in range(2)]
    assert placed == [[3, 4], [1, 2]]
    assert next(ticks) == 4
    assert {key: store.meta[name][key] for key in ("prompt", "seed", "branch", "steps", "note")} == {
        "prompt": "hello",
        "seed": 3,
        "branch": 0,
        "steps": 4,
        "note": "x",
    }
    assert len({call["seed"] for call in fake.calls}) == 4
    for call in fake.calls:
        assert call["manifest"] == manifest
        assert call["q"].shape == call["out"].shape == (HEADS, GRID.tokens, HEAD_DIM)
        wanted = torch.nn.functional.scaled_dot_product_attention(*(call[x][None] for x in "qkv"))[0]
        torch.testing.assert_close(call["out"], wanted)


def test_projection_and_residual_are_what_the_block_adds(tmp_path):
    """Output plus projected change of attention is the block's own output for that change, cross-attention aside."""
    sampler, calls, streams = TinySampler(), [], []
    block = sampler.transformer.blocks[0]
    block.attn2.to_out[0].weight.data.zero_()
    block.attn2.to_out[0].bias.data.zero_()
    block.ffn.net[2].weight.data.zero_()
    block.ffn.net[2].bias.data.zero_()
    hook = block.register_forward_hook(lambda _, args, out: streams.append((args[0], out)))
    for scale in (1, 2):

        def on_call(call: Call, scale: int = scale) -> torch.Tensor:
            calls.append(call)
            return call.out * scale

        with listening(sampler.transformer, GRID, lambda time: time == 0.6, on_call):
            sampler.run("x", 0)
    hook.remove()
    (stream, one), (_, two), first = streams[2], streams[6], calls[0]
    assert first.residual_square == pytest.approx(float(stream[0].square().sum(-1).mean()), rel=1e-5)
    change = first.out.transpose(0, 1).flatten(1) @ first.projection.T
    torch.testing.assert_close((two - one)[0], change, rtol=1e-3, atol=1e-4)
    heads = [h @ w.T for h, w in zip(first.out, first.projection.split(HEAD_DIM, 1), strict=True)]
    wanted = sum(float(part.square().sum(-1).mean()) for part in heads) / first.residual_square
    assert residual_error(first, first.out * 2) == pytest.approx(wanted, rel=1e-4)


def test_branches_are_samples_of_their_own(tmp_path):
    sampler, manifest, fakes = TinySampler(branches=2), make_manifest(), [Fake(), Fake()]
    with StoreWriter.open(tmp_path, manifest) as writer:
        for branch, fake in enumerate(fakes):
            Recorder(sampler, manifest, fake).record(writer, "hello", 3, branch=branch)
        assert len(writer.done()) == 2
        with pytest.raises(ListenError, match=r"must have a forward 2, got none at times \[0.3, 0.9\]"):
            Recorder(sampler, manifest, Fake()).record(writer, "hello", 3, branch=2)
        assert writer.interrupted() == (sample_name("hello", 3, 2),)
    assert not torch.equal(fakes[0].calls[1]["q"], fakes[1].calls[1]["q"])


def test_recorder_refuses(tmp_path):
    sampler = TinySampler()
    with pytest.raises(ListenError, match=r"a step of its own, got 4 steps for times \(?\[0.85, 0.9\]"):
        recorded_steps(make_manifest((0.85, 0.9)), TIMES)
    other = ModelSignature("WanTransformer3DModel", LAYERS, HEADS, 32)
    with pytest.raises(ListenError, match="the manifest must be of ModelSignature"):
        Recorder(sampler, make_manifest(model=other), Fake())
    with pytest.raises(ListenError, match="the manifest must be of TokenGrid"):
        Recorder(sampler, make_manifest(grid=TokenGrid(2, 5, 4)), Fake())
    sampler.grid = TokenGrid(2, 5, 4)
    manifest = make_manifest(grid=sampler.grid)
    with StoreWriter.open(tmp_path, manifest) as writer:
        with pytest.raises(ListenError, match=r"a forward must have TokenGrid\(frames=2, height=5"):
            Recorder(sampler, manifest, Fake()).record(writer, "x", 0)
        assert not hasattr(sampler.transformer.blocks[0].attn1.processor, "beneath")
    with pytest.raises(ListenError, match=r"must be one of the sampler's 4, got 0\.7"):
        StepCounter(TIMES)(0.7)
    with (
        listening(sampler.transformer, GRID, lambda time: True, lambda call: None),
        pytest.raises(ListenError, match="one sample, got a batch of 2"),
    ):
        sampler.transformer(torch.randn(2, 4, 2, 8, 10), torch.tensor([900, 900]), torch.randn(2, 3, 16))


def test_masked_output_against_a_dense_mask():
    torch.manual_seed(1)
    q, k, v = torch.randn(3, HEADS, 40, HEAD_DIM).unbind()
    blocks = Blocks(16, 32)
    keep = torch.rand(HEADS, 3, 2) > 0.5
    keep[..., 0] |= ~keep.any(-1)
    mask = keep.repeat_interleave(16, 1).repeat_interleave(32, 2)[:, :40, :40]
    wanted = torch.softmax((q @ k.mT * HEAD_DIM**-0.5).masked_fill(~mask, -torch.inf), -1) @ v
    torch.testing.assert_close(masked_output(q, k, v, keep, blocks), wanted)


def masks(kept: int) -> Any:
    """Every query block keeps its first `kept` key blocks."""
    keep = torch.zeros(HEADS, 3, 3, dtype=torch.bool)
    keep[..., :kept] = True
    return lambda layer: keep


def test_probes():
    sampler = TinySampler()
    trajectory = Trajectory(sampler, "hello", 3, range(4))
    assert torch.equal(trajectory.final, sampler.run("hello", 3))
    for step in range(4):
        assert torch.equal(sampler.run("hello", 3, step, trajectory.latents[step]), trajectory.final)
    blocks = Blocks(16, 16)
    for step in range(4):
        weak, strong = (trajectory.probe("a", 0, step, masks(kept), blocks) for kept in (2, 1))
        assert strong.injected_error > weak.injected_error > 0
        assert strong.final_error > weak.final_error > 0
        assert 0.1 < strong.weight / weak.weight < 10
    assert torch.equal(sampler.run("hello", 3), trajectory.final)


def test_layers_are_probed_alone():
    sampler = TinySampler()
    trajectory = Trajectory(sampler, "hello", 3, range(4))
    for step in range(4):
        found = trajectory.probe("a", 0, step, masks(1), Blocks(16, 16), layers="step")
        assert len(found.layer_factors) == len(adapter_sites(sampler, None))
        assert min(found.layer_factors) < 1 < max(found.layer_factors)
        plain = trajectory.probe("a", 0, step, masks(1), Blocks(16, 16))
        assert (plain.layer_factors, plain.weight) == ((), found.weight)
    assert torch.equal(sampler.run("hello", 3), trajectory.final)


def test_layers_and_heads_are_followed_to_the_end():
    """What is disturbed alone is what a run with that head's masked output by hand says."""
    sampler, step, blocks = TinySampler(branches=2), 1, Blocks(16, 16)
    trajectory = Trajectory(sampler, "hello", 3, range(4))
    found = trajectory.probe("a", 0, step, masks(1), blocks, layers="final", heads="step")
    whole = trajectory.probe("a", 0, step, masks(1), blocks, layers="step", heads="final")
    assert (found.weight, found.layer_factors, found.head_weights) == (whole.weight, (), ())
    assert (whole.layer_factors, whole.layer_weights) == ((), ())  # heads followed to the end say it
    by_step: list[float] = []
    for layer, head in itertools.product(range(LAYERS), [None, *range(HEADS)]):
        made = []

        def on_call(call: Call, layer: int = layer, head: int | None = head, made: list = made) -> Any:
            if call.layer != layer:
                return None
            other = masked_output(call.q, call.k, call.v, masks(1)(layer), blocks)
            out = other if head is None else call.out.clone()
            if head is not None:
                out[head] = other[head]
            made.append(residual_error(call, out))
            return out

        latents = {}
        with listening(sampler.transformer, GRID, lambda time: time == TIMES[step], on_call):
            start = trajectory.latents[step]
            final = sampler.run("hello", 3, step, start, latents.__setitem__)
        assert len(made) == 2
        change = [
            float((a - b).square().mean() / b.square().mean())
            for a, b in ((final, trajectory.final), (latents[step + 1], trajectory.latents[step + 1]))
        ]
        weights = [each / (sum(made) / 2) for each in change]
        if head is None:
            assert found.layer_weights[layer] == pytest.approx(weights[0], rel=1e-3)
        else:
            assert whole.head_weights[layer][head] == pytest.approx(weights[0], rel=1e-3)
            ratio = found.head_factors[layer][head] / found.head_factors[0][0]
            by_step.append(weights[1])
            assert ratio == pytest.approx(weights[1] / by_step[0], rel=1e-3)
    assert torch.equal(sampler.run("hello", 3), trajectory.final)


def test_a_probe_that_drops_nothing_says_nothing():
    sampler = TinySampler()
    keep_all = torch.ones(HEADS, 3, 3, dtype=torch.bool)
    trajectory = Trajectory(sampler, "hello", 3, [1])

    def keep(layer: int) -> torch.Tensor:
        return keep_all

    found = trajectory.probe("a", 0, 1, keep, Blocks(16, 16))
    assert found is None or found.injected_error < 1e-10


@pytest.fixture
def tiny(monkeypatch):
    """The command on the tiny model, with fake statistics."""
    fake = Fake()
    monkeypatch.setitem(models.SAMPLERS, "demo", lambda steps, device: TinySampler())
    monkeypatch.setitem(models.PROMPTS, "demo", lambda count, seed: [f"prompt {index}" for index in range(count)])
    monkeypatch.setattr(command, "unit_statistics", fake)
    return fake


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(command.main, [str(argument) for argument in arguments])


def test_command_records_continues_and_probes(tmp_path, tiny):
    common = ("-o", tmp_path / "s", "--block-size", 16, "--device", "cpu")
    result = invoke(*common, "--samples", 2, "--probes", 2, "--probe-samples", 1)
    assert result.exit_code == 0, result.output
    assert "2 samples" in result.output
    assert "2 recorded now" in result.output
    assert "2 probes at 2 times of 1 samples" in result.output
    assert len(tiny.calls) == 2 * 4 * LAYERS
    result = invoke(*common, "--samples", 3, "--probes", 2, "--probe-samples", 2)
    assert result.exit_code == 0, result.output
    assert "2 of 3 samples are done: skipped" in result.output
    assert "4 probes at 2 times of 2 samples" in result.output
    assert len(tiny.calls) == 3 * 4 * LAYERS
    store = Store.open(tmp_path / "s")
    assert store.manifest.times == tuple(sorted(TIMES))
    assert store.manifest.versions["weights"] == "random"
    assert [store.meta[name]["seed"] for name in store.samples] in map(list, itertools.permutations(range(3)))


def test_command_probes_by_layer_and_head(tmp_path, tiny):
    common = ("--block-size", 16, "--samples", 1, "--probes", 2, "--device", "cpu", "-o")
    both = {"layer_weights", "head_factors"}
    for options, measured, told in (
        ((), {"layer_factors"}, "1 samples, "),
        (("--probe-layers", "final"), {"layer_weights"}, "every layer followed to the end: 2"),
        (("--probe-heads", "final"), {"head_weights"}, "every head followed to the end: 2"),
        (("--probe-heads", "step"), {"layer_factors", "head_factors"}, "heads by the next latent"),
        (("--probe-layers", "final", "--layer-probes", 1, "--probe-heads", "step"), both, "heads by the next latent"),
    ):
        path = tmp_path / "-".join(["s", *map(str, options)])
        result = invoke(*common, path, *options)
        assert result.exit_code == 0, result.output
        assert told in result.output
        store = Store.open(path)
        by_part = [probe for probe in store.probes if probe.layer_factors or probe.layer_weights or probe.head_weights]
        assert len(by_part) == (1 if "--layer-probes" in options else 2)
        for probe in by_part:
            names = "layer_factors", "head_factors", "layer_weights", "head_weights"
            assert {name for name in names if getattr(probe, name)} == measured
        weights = store.error_weights()
        assert (weights.head is not None) == bool({"head_factors", "head_weights"} & measured)
        assert weights.unit.shape == (4, LAYERS)


def test_command_killed_and_run_again(tmp_path, tiny, monkeypatch):
    def stop(*args: Any, **rest: Any) -> Any:
        if len(tiny.calls) == 11:
            raise KeyboardInterrupt
        return tiny(*args, **rest)

    monkeypatch.setattr(command, "unit_statistics", stop)
    common = ("-o", tmp_path / "s", "--block-size", 16, "--samples", 2, "--probes", 0, "--device", "cpu")
    assert invoke(*common).exit_code == 1
    assert len(Store.open(tmp_path / "s").samples) == 1
    monkeypatch.setattr(command, "unit_statistics", tiny)
    result = invoke(*common)
    assert result.exit_code == 0, result.output
    assert "was interrupted: discarded" in result.output.replace("\n", " ")
    assert len(Store.open(tmp_path / "s").samples) == 2
    assert "never probed" in result.output


def test_command_errors_are_one_line_and_exit_2(tmp_path, tiny):
    (tmp_path / "prompts").write_text("one\n\n two \n")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bad").write_text("bad\n")
    common = ("-o", tmp_path / "s", "--block-size", 16, "--device", "cpu", "--probes", 0)
    result = invoke(*common, "--prompts", tmp_path / "prompts")
    assert result.exit_code == 0, result.output
    for arguments, message in (
        (("--prompts", tmp_path / "prompts", "--samples", 3), "--samples must be at most the 2 prompts"),
        (("--prompts", tmp_path / "empty"), "must have at least one prompt"),
        (("--prompts", tmp_path / "bad"), "a prompt must be good, got 'bad'"),
        (("--prompts", tmp_path / "none"), "none: No such file"),
        (("-o", tmp_path / "bad"), "bad: File exists"),
        (("--mass",), "must be continued with its own manifest, got (its, new): has_mass: False, True"),
        (("--times", 9), "must be at most 4 steps, got 9"),
        (("--query-stride", 17), "query_stride must be an integer from 1 to 16, got 17"),
        (("--device", "tpu9"), "--device must be"),
    ):
        result = invoke(*common, *arguments)
        assert result.exit_code == 2, result.output
        last = result.output.strip().splitlines()[-1]
        assert last.startswith("calibatt-calibrate: ")
        assert message in last


def test_help_says_what_is_measured_and_what_it_costs():
    text = " ".join(invoke("--help").output.split())
    for words in ("which key blocks hold how much", "Cost: each prompt is sampled once", "Examples:", "Exit codes: 0"):
        assert words in text


def test_spread_and_missing_units(tmp_path):
    assert command.spread(8, 6) == [0, 1, 3, 4, 6, 7]
    assert command.spread(3, 6) == [0, 1, 2]
    assert command.spread(8, 1) == [0]
    with StoreWriter.open(tmp_path, make_manifest()) as writer, pytest.raises(MissingUnits):
        writer.begin("x").finish({})
