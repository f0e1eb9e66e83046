"""Calibration, compiling, evaluation and attaching on diffusers' own Wan pipelines, with tiny random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

pytest.importorskip("diffusers")

from support import text_after, wan

from calibatt.compiler.cli import command as compile_command
from calibatt.compiler.stats import Store
from calibatt.plans import TokenGrid
from calibatt.runtime import load_plan
from calibatt.tools.calibrate.__main__ import main as calibrate
from calibatt.tools.calibrate.__main__ import plan_work
from calibatt.tools.calibrate.models import default_prompts, make_sampler
from calibatt.tools.calibrate.pipeline import PipelineError, PipelineSampler
from calibatt.tools.evaluate.__main__ import main as evaluate
from calibatt.tools.evaluate.harness import head_errors


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def invoke(command, *arguments: object) -> Result:
    result = CliRunner().invoke(command, [str(each) for each in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def test_grid_and_times_are_learnt_without_computing():
    pipe = wan.pipeline()
    calls = []
    handle = pipe.transformer.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    sampler = wan.sampler(pipe=pipe, guidance_scale=5.0)
    handle.remove()
    assert not calls
    assert sampler.grid == TokenGrid(5, 8, 12)
    assert sampler.times == [0.999, 0.9, 0.75, 0.5]
    assert "forward" not in vars(pipe.transformer)
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("euler", [False, True], ids=["unipc", "euler"])
def test_a_run_is_the_pipelines_own_and_shows_every_latent(euler: bool):
    pipe = wan.pipeline(euler=euler)
    sampler = wan.sampler(pipe=pipe)
    seen = {}
    found = sampler.run("a cat", 3, on_step=lambda step, latent: seen.setdefault(step, latent.clone()))
    assert sorted(seen) == [0, 1, 2, 3]
    arguments = {**sampler.arguments, **wan.embedded("a cat")}
    expected = pipe(**arguments, generator=torch.Generator("cpu").manual_seed(3), output_type="latent").frames
    assert torch.equal(found, expected)
    noise = torch.randn(seen[0].shape, generator=torch.Generator("cpu").manual_seed(3))
    assert torch.equal(seen[0], noise)
    assert torch.equal(sampler.run("a cat", 3, start_step=2, start=seen[2]), found)
    video = sampler.decode(found)
    assert video.shape == (1, 3, 17, 128, 192)
    assert video.abs().max() <= 1


def test_each_expert_has_times_of_its_own():
    pipe = wan.pipeline(experts=2)
    first, second = (wan.sampler(8, pipe=pipe, transformer=name) for name in ("transformer", "transformer_2"))
    assert len(first.times) + len(second.times) == 8
    assert min(first.times) >= 0.6 > max(second.times)
    seen = []
    second.run("a cat", 0, on_step=lambda step, _: seen.append(step))
    assert seen == list(range(len(second.times)))


def test_what_cannot_be_sampled_is_refused():
    pipe = wan.pipeline()
    with pytest.raises(PipelineError, match="must have a transformer_2, got WanPipeline without"):
        PipelineSampler(pipe, transformer="transformer_2")
    with pytest.raises(PipelineError, match="must call the transformer, got a run without"):
        wan.sampler(pipe=wan.pipeline(experts=2), steps=1, transformer="transformer_2")
    sampler = wan.sampler(pipe=pipe)
    with pytest.raises(ValueError, match="prompt 1 must not be empty"):
        sampler.check(["a cat", " "])
    with pytest.raises(PipelineError, match="run one by one"):
        sampler.run_batch(["a"], [0], on_step=lambda *_: None)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nothing", "must be one of demo, or MODULE:FUNCTION, got 'nothing'"),
        ("no_such_module:f", "must be a function that can be imported, got No module named 'no_such_module'"),
        ("support.wan:nothing", "must be a function that can be imported, got module 'support.wan' has no attribute"),
        ("support.wan:no_sampler", "must return a Sampler, got WanTransformer3DModel without transformer, grid"),
    ],
)
def test_a_model_that_is_none_is_refused(model: str, message: str):
    with pytest.raises(ValueError, match=message):
        make_sampler(model, 1, "cpu")


def test_our_prompts():
    prompts = default_prompts()
    assert len(prompts) == len(set(prompts)) == 24
    assert [prompt for prompt, _ in plan_work("support.wan:sampler", None, 3, 0)] == prompts[:3]
    with pytest.raises(ValueError, match="at most our 24 prompts, or come with --prompts, got 25"):
        plan_work("support.wan:sampler", None, 25, 0)


@pytest.mark.parametrize(("function", "steps"), [("sampler", 4), ("second_expert", 8)])
def test_the_whole_chain_on_a_pipeline(function: str, steps: int, tmp_path: Path):
    """Calibrate, compile, evaluate and attach on a 4-step schedule, and on the second of two experts."""
    stats, plan = tmp_path / "stats", tmp_path / "wan.plan"
    common = ("--model", f"support.wan:{function}", "--steps", steps, "--device", "cpu")
    invoke(calibrate, *common, "--samples", 2, "--block-size", 32, "--probe-samples", 1, "-o", stats)
    store = Store.open(stats)
    assert len(store.samples) == 2
    assert len(store.probes) == len(store.manifest.times)
    assert all(len(probe.layer_factors) == 2 for probe in store.probes)
    invoke(compile_command, stats, "-o", plan, "--target-density", 0.6)
    held_out, report = tmp_path / "held_out.txt", tmp_path / "report"
    held_out.write_text("a dog runs across a field\n")
    invoke(evaluate, *common, "--plan", plan, "--prompts", held_out, "-o", report, "--head-prompts", 1)
    assert list(report.glob("*.json"))
    sampler = getattr(wan, function)(steps, "cpu")
    dense = sampler.run("a dog", 0)
    with load_plan(plan).attach(sampler.transformer):
        planned = sampler.run("a dog", 0)
    assert not torch.equal(planned, dense)
    assert (planned - dense).square().mean() < 0.1 * dense.square().mean()
    assert torch.equal(sampler.run("a dog", 0), dense)


@pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported")
@pytest.mark.parametrize("name", ["mochi", "hunyuan"])
def test_prompts_of_different_lengths_make_a_plan_for_all_lengths(name: str, tmp_path: Path):
    """Calibrated, compiled, attached: prompts are padded, and what is padding is nowhere."""
    (tmp_path / "prompts.txt").write_text("a cat\na boat on a lake\n", encoding="utf-8")
    sizes = ("--block-size", 16, "--times", 3, "--probes", 2, "--probe-samples", 1)
    invoke(
        calibrate, "--model", f"support.text_after:{name}", "--prompts", tmp_path / "prompts.txt", *sizes,
        "-o", tmp_path / "stats",
    )  # fmt: skip
    invoke(compile_command, tmp_path / "stats", "-o", tmp_path / "a.plan")
    plan = load_plan(tmp_path / "a.plan")
    assert plan.grid == TokenGrid(5, 8, 12, text_after=text_after.TEXT)
    sampler = make_sampler(f"support.text_after:{name}", None, "cpu")
    dense = sampler.run("a dog", 0)
    with plan.attach(sampler.transformer):
        planned = sampler.run("a dog", 0)
    error = float((planned - dense).norm() / dense.norm())
    assert 0 < error < 0.1
    errors = head_errors(sampler, plan, "a dog", 0, queries=plan.grid.tokens)
    assert np.isfinite(errors.relative).all()
    assert torch.equal(sampler.run("a dog", 0), dense)
