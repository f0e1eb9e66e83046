"""Calibration, compiling, evaluation and attaching on diffusers' own Wan pipelines, with tiny random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from support import batched, text_after, wan

from calibatt.compiler.cli import command as compile_command
from calibatt.compiler.stats import Store, StoreError
from calibatt.plans import TokenGrid
from calibatt.runtime import attach, load_plan
from calibatt.tools.calibrate.__main__ import main as calibrate
from calibatt.tools.calibrate.__main__ import make_manifest, plan_work
from calibatt.tools.calibrate.listen import ListenError
from calibatt.tools.calibrate.models import default_prompts, make_sampler
from calibatt.tools.calibrate.pipeline import PipelineError, PipelineSampler
from calibatt.tools.calibrate.recorder import sample_name
from calibatt.tools.calibrate.recording import recording
from calibatt.tools.evaluate.__main__ import main as evaluate
from calibatt.tools.evaluate.harness import head_errors

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_both_experts_are_calibrated_compiled_evaluated_and_attached(tmp_path: Path):
    """Wan 2.2: a plan for each, both at work in one pipeline, on a few-step schedule."""
    plans, held_out = {}, tmp_path / "held_out.txt"
    held_out.write_text("a dog runs across a field\n")
    for name, function in (("transformer", "first_expert"), ("transformer_2", "second_expert")):
        stats, plan = tmp_path / f"{name}.stats", tmp_path / f"{name}.plan"
        common = ("--model", f"support.wan:{function}", "--steps", 8, "--device", "cpu")
        invoke(calibrate, *common, "--samples", 2, "--block-size", 32, "--probes", 2, "--probe-samples", 1, "-o", stats)
        invoke(compile_command, stats, "-o", plan, "--target-density", 0.6)
        invoke(evaluate, *common, "--plan", plan, "--prompts", held_out, "-o", tmp_path / name, "--head-prompts", 1)
        plans[name] = load_plan(plan)
    pipe = wan.pipeline(experts=2)
    arguments = {"height": 128, "width": 192, "num_frames": 17, "num_inference_steps": 8, "output_type": "latent"}

    def generate() -> torch.Tensor:
        return pipe(**wan.embedded("a dog"), **arguments, generator=torch.Generator().manual_seed(0)).frames

    dense = generate()
    with attach(pipe, plans) as attachment:
        planned = generate()
        assert list(attachment.attachments) == ["transformer", "transformer_2"]
    assert 0 < (planned - dense).square().mean() < 0.1 * dense.square().mean()
    assert torch.equal(generate(), dense)


def both_branches(sampler: PipelineSampler, path: Path) -> None:
    """Records a generation of the pipeline, called as its users call it; the result is the stock one."""
    arguments = {**sampler.arguments, **sampler._prompt_arguments("a cat"), "output_type": "latent"}
    stock = sampler.pipe(**arguments, generator=torch.Generator().manual_seed(3)).frames
    with recording(sampler, path, "a cat", 3, times=2, block_size=16):
        found = sampler.pipe(**arguments, generator=torch.Generator().manual_seed(3)).frames
    assert torch.equal(found, stock)


@pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported")
@pytest.mark.parametrize("name", ["wan", "ltx", "cogvideox", "mochi"])
def test_both_branches_of_guidance_are_recorded_around_any_call(name: str, tmp_path: Path):
    """In two forwards or in one batch; a branch is what it is alone."""
    made = (lambda guidance: wan.sampler(guidance_scale=guidance)) if name == "wan" else getattr(batched, name)
    sampler = made(4.0)
    assert sampler.branches == 2
    both_branches(sampler, tmp_path / "both")
    store = Store.open(tmp_path / "both")
    first, second = sample_name("a cat", 3), sample_name("a cat", 3, 1)
    assert set(store.samples) == {first, second}
    assert {store.meta[each]["branch"] for each in store.samples} == {0, 1}
    plain = made(1.0)
    assert plain.branches == 1
    both_branches(plain, tmp_path / "one")
    alone = Store.open(tmp_path / "one")
    noisiest = len(alone.manifest.times) - 1  # there guidance has not changed the latents yet
    prompt = first if name == "wan" else second
    for layer in range(2):
        expected, found, other = (
            of.unit(each, noisiest, layer)
            for of, each in ((alone, first), (store, prompt), (store, second if prompt == first else first))
        )
        np.testing.assert_allclose(found.output_size, expected.output_size, rtol=1e-4)
        assert (found.planes != expected.planes).mean() < 0.02
    assert not np.allclose(other.output_size, expected.output_size, rtol=1e-3), "the text has come in"


def test_recording_refuses(tmp_path: Path):
    sampler = wan.sampler()
    arguments = {**sampler.arguments, **wan.embedded("a cat"), "output_type": "latent"}
    with pytest.raises(ListenError, match="a forward's time must be one of the sampler's 4, got"):
        with recording(sampler, tmp_path, "a cat", block_size=32):
            sampler.pipe(**{**arguments, "num_inference_steps": 7})
    with recording(sampler, tmp_path, "a cat", block_size=32):
        sampler.pipe(**arguments)
    with pytest.raises(StoreError, match=sample_name("a cat", 0)):
        with recording(sampler, tmp_path, "a cat", block_size=32):
            raise AssertionError("the sample is there already")
    with pytest.raises(ListenError, match="at most the 1 that a step has, got 2"):
        with recording(sampler, tmp_path, "a dog", block_size=32, branches=2):
            raise AssertionError("there is one branch")


def test_every_so_many_steps():
    sampler = wan.sampler(8)
    assert make_manifest(sampler, every=3).times == tuple(sorted(sampler.times[::3]))
    assert make_manifest(sampler, every=8).times == (sampler.times[0],)
    with pytest.raises(ListenError, match="by times or by every, got times 2 and every 2"):
        make_manifest(sampler, times=2, every=2)


def test_the_command_records_branches_and_every_second_step(tmp_path: Path):
    common = ("--model", "support.wan:guided", "--steps", 4, "--device", "cpu", "--samples", 1, "--block-size", 32)
    options = (*common, "--every", 2, "--probes", 0, "-o", tmp_path)
    invoke(calibrate, *options, "--branches", 1)
    assert len(Store.open(tmp_path).samples) == 1
    invoke(calibrate, *options)
    store = Store.open(tmp_path)
    assert sorted(store.meta[name]["branch"] for name in store.samples) == [0, 1]
    assert len(store.manifest.times) == 2
    assert "1 of 1 samples are done" in invoke(calibrate, *options).output


@pytest.mark.parametrize("name", ["ltx", "cogvideox"])
def test_probes_count_both_branches_of_a_batch(name: str, tmp_path: Path):
    common = ("--model", f"support.batched:{name}_guided", "--device", "cpu", "--samples", 1, "--block-size", 16)
    invoke(calibrate, *common, "--probes", 2, "-o", tmp_path)
    store = Store.open(tmp_path)
    assert len(store.samples) == 2
    assert len(store.probes) == 2
    assert all(np.isfinite(probe.weight) and probe.weight > 0 for probe in store.probes)
