"""Calibration, compiling, evaluation and attaching on diffusers' own pipelines, with tiny random weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from support import batched, families, wan
from support.schedules import random_schedule

from calibatt.compiler.cli import command as compile_command
from calibatt.compiler.stats import Store, StoreError, StoreWriter
from calibatt.plans import Blocks, PlanFile, Segment, StoredLayers, TokenGrid, write_plan
from calibatt.runtime import attach, load_plan
from calibatt.runtime.adapters import adapter_for
from calibatt.tools.calibrate.__main__ import main as calibrate
from calibatt.tools.calibrate.calibration import CalibrationError, Calibrator, sampling_name
from calibatt.tools.calibrate.models import default_prompts, make_sampler
from calibatt.tools.calibrate.pipeline import PipelineError, PipelineSampler, with_images
from calibatt.tools.calibrate.recording import recording
from calibatt.tools.calibrate.sampler import Latent, parts
from calibatt.tools.calibrate.work import make_manifest, plan_work
from calibatt.tools.evaluate.__main__ import main as evaluate

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


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


def made(name: str, **options: Any) -> PipelineSampler:
    """A sampler of one of `families`."""
    pipe, prompt_arguments, arguments = families.pipeline(name)
    return PipelineSampler(pipe, **{"prompt_arguments": prompt_arguments, **arguments, **options})


def stock(sampler: PipelineSampler, prompt: str, seed: int, output_type: str = "latent") -> Latent:
    """What the pipeline's user gets; of a modular pipeline by all its blocks."""
    modular = isinstance(sampler.pipe, diffusers.ModularPipeline)
    arguments = {**sampler.arguments, **sampler._prompt_arguments(prompt)}
    arguments["output_type"] = "pt" if modular else output_type
    found = sampler.pipe(**arguments, generator=torch.Generator("cpu").manual_seed(seed))
    if output_type != "latent":
        return found.videos if modular else found.frames
    if modular:
        return found.latents, found.audio_latents[None]
    audio = getattr(found, "audio", None)
    return found.frames if audio is None else (found.frames, audio)


def equal(found: Latent, expected: Latent) -> bool:
    return all(map(torch.equal, parts(found), parts(expected)))


@pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported")
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # LTXConditionPipeline's
@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_runs_and_decodes_as_its_pipeline_does(name: str):
    sampler = made(name)
    sampler.check_decode()
    found, other = sampler.run("a cat", 3), sampler.run("a cat", 4)
    assert equal(found, stock(sampler, "a cat", 3))
    assert equal(sampler.run("a cat", 3), found)
    for latent, seed in ((found, 3), (other, 4)):  # whichever was sampled last
        video = sampler.decode(latent)
        assert video.shape[:2] == (1, 3)
        assert -1 <= video.min() < video.max() <= 1
        assert torch.equal(video, stock(sampler, "a cat", seed, "pt").transpose(1, 2) * 2 - 1)
    assert sampler.grid == families.GRIDS.get(name, TokenGrid(frames=3, height=4, width=6))


def test_decoding_needs_a_vae_and_the_samplers_own_latents():
    sampler = made("ltx")
    latent = sampler.run_batch(["a cat", "a boat"], [1, 2])
    each = [sampler.decode(sampler.run(prompt, seed)) for prompt, seed in (("a cat", 1), ("a boat", 2))]
    assert torch.equal(sampler.decode(latent), torch.cat(each))
    with pytest.raises(PipelineError, match="must get a tensor that run or run_batch of this sampler returned"):
        sampler.decode(latent.clone())
    sampler.pipe.vae.decode = lambda *_, **__: 1 / 0
    with pytest.raises(PipelineError, match="LTXPipeline must decode its latents, got ZeroDivisionError"):
        sampler.check_decode()
    sampler.pipe.vae = None
    for decode in (sampler.check_decode, lambda: sampler.decode(latent)):
        with pytest.raises(PipelineError, match="must have a vae, got LTXPipeline without"):
            decode()
    assert torch.equal(sampler.run_batch(["a cat", "a boat"], [1, 2]), latent)


def test_evaluation_judges_latents_alone_where_nothing_can_be_decoded(tmp_path: Path):
    sampler = batched.ltx(4.0)
    signature = adapter_for(sampler.transformer).signature(sampler.transformer)
    segments, rng = (Segment(0.0, 1.0, 0.5),), np.random.default_rng(0)
    layers = tuple(random_schedule(rng, sampler.grid, Blocks(16, 16), signature.heads, 0.5) for _ in range(2))
    write_plan(
        tmp_path / "a.plan", PlanFile(signature, sampler.grid, Blocks(16, 16), segments, StoredLayers.of([layers]))
    )
    (tmp_path / "prompts.txt").write_text("a dog runs across a field\n")
    options = ("--plan", tmp_path / "a.plan", "--prompts", tmp_path / "prompts.txt", "--device", "cpu")
    arguments = ("--model", "support.batched:ltx_guided", *options, "-o", tmp_path / "report")
    invoke(evaluate, *arguments, "--head-prompts", 0)
    found = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    assert "latent_db" in json.dumps(found)
    assert "psnr" not in found["plans"][0].get("metrics", {})


SCHEDULERS = {
    "lcm": diffusers.FlowMatchLCMScheduler(shift=3.0),
    "stochastic": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
}


@pytest.mark.parametrize("name", [*SCHEDULERS, "dpm"])
def test_a_run_repeats_where_the_scheduler_draws_noise(name: str):
    if name == "dpm":  # its pipeline passes the generator where the step's signature has one
        sampler = made("cogvideox")
        sampler.pipe.scheduler = diffusers.CogVideoXDPMScheduler()
        assert torch.equal(sampler.run("a cat", 1), stock(sampler, "a cat", 1))
    else:
        pipe = wan.pipeline()
        pipe.scheduler = SCHEDULERS[name]
        sampler = wan.sampler(pipe=pipe)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    found = sampler.run("a cat", 1)
    assert (torch.get_rng_state() == before[0]).all()
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    for draw in (torch.rand, np.random.rand, lambda _: random.random()):
        draw(1)
    assert torch.equal(sampler.run("a cat", 1), found)
    assert not torch.equal(sampler.run("a cat", 2), found)
    assert torch.equal(sampler.decode(found), sampler.decode(sampler.run("a cat", 1)))


@pytest.mark.gpu
def test_a_run_on_a_gpu_leaves_its_random_state_alone():
    pipe = wan.pipeline().to("cuda")
    pipe.scheduler = SCHEDULERS["lcm"]
    before = torch.cuda.get_rng_state()
    sampler = PipelineSampler(
        pipe, prompt_arguments=lambda prompt: {name: each.cuda() for name, each in wan.embedded(prompt).items()},
        num_inference_steps=4, height=128, width=192, num_frames=17, guidance_scale=1.0,
    )  # fmt: skip
    found = sampler.run("a cat", 1)
    assert (torch.cuda.get_rng_state() == before).all()
    torch.rand(1, device="cuda")
    assert torch.equal(sampler.run("a cat", 1), found)


def test_an_offloaded_pipeline_is_learnt_sampled_and_decoded():
    pipe, prompt_arguments, arguments = families.pipeline("wan")
    plain = PipelineSampler(pipe, prompt_arguments=prompt_arguments, **arguments)
    expected = plain.run("a cat", 1)
    video = plain.decode(expected)
    for part in (pipe.transformer, pipe.vae):
        accelerate.cpu_offload(part, execution_device=torch.device("cpu"))
    forward = pipe.transformer.forward
    sampler = PipelineSampler(pipe, prompt_arguments=prompt_arguments, **arguments)
    assert pipe.transformer.forward is forward
    found = sampler.run("a cat", 1)
    assert torch.equal(found, expected)
    assert torch.equal(sampler.decode(found), video)


def test_noise_of_a_step_is_not_the_first_noise():
    seen = []

    class Watched(diffusers.FlowMatchLCMScheduler):
        def step(self, output: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append((sample, torch.randn(sample.shape)))
            return super().step(output, timestep, sample, *args, **kwargs)

    pipe = wan.pipeline()
    pipe.scheduler = Watched(shift=3.0)
    wan.sampler(pipe=pipe).run("a cat", 1)
    (start, drawn), *_ = seen[-4:]
    assert torch.equal(start, torch.randn(start.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.corrcoef(torch.stack((start.flatten(), drawn.flatten())))[0, 1].abs() < 0.05


def test_a_pipeline_that_does_not_repeat_is_refused():
    class Restless(diffusers.FlowMatchEulerDiscreteScheduler):
        calls = 0

        def step(self, output: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return super().step(output * (1 + 1e-3 * self.calls), *args, **kwargs)

    pipe = wan.pipeline()
    pipe.scheduler = Restless(shift=3.0)
    with pytest.raises(PipelineError, match=r"must always give the same latents.* from WanPipeline with Restless"):
        wan.sampler(pipe=pipe)


def test_forwards_are_counted():
    pipe = wan.pipeline()
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    heun = wan.sampler(pipe=pipe)  # two forwards a step but for the last
    assert len(heun.forwards) == 7
    assert len(heun.times) == 4
    assert heun.forwards == tuple(time for time in heun.times for _ in range(2))[1:]
    guided = wan.sampler(guidance_scale=5.0)
    assert guided.forwards == tuple(time for time in guided.times for _ in range(2))
    assert (guided.branches, batched.ltx(4.0).branches, heun.branches) == (2, 2, 1)
    assert len(batched.ltx(4.0).forwards) == 3
    pipe.scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=17.0
    )
    rounded = wan.sampler(60, pipe=pipe)
    assert len(rounded.forwards) == 60
    assert rounded.forwards[0] == rounded.forwards[1]
    assert len(rounded.times) < 60
    assert rounded.branches == 1
    assert rounded.times == sorted(set(rounded.forwards), reverse=True)


def test_each_expert_has_times_of_its_own():
    pipe = wan.pipeline(experts=2)
    first, second = (
        wan.sampler(8, pipe=pipe, transformer=name, guidance_scale=4.0) for name in ("transformer", "transformer_2")
    )
    assert len(first.times) + len(second.times) == 8
    assert min(first.times) >= 0.6 > max(second.times)
    high, low = [time for time in first.times for _ in range(2)], [time for time in second.times for _ in range(2)]
    assert first.forwards == (*high, *[None] * len(low))
    assert second.forwards == (*[None] * len(high), *low)
    assert first.branches == second.branches == 2
    found = second.run("a cat", 0)
    assert torch.equal(found, first.run("a cat", 0))
    assert torch.equal(second.decode(found), stock(second, "a cat", 0, "pt").transpose(1, 2) * 2 - 1)


@pytest.mark.parametrize("name", ["wan_i2v", "ltx_i2v", "cogvideox_i2v", "hunyuan_i2v"])
def test_images_are_given_by_prompt(name: str, tmp_path: Path):
    pipe, prompt_arguments, arguments = families.pipeline(name)
    picture = arguments.pop("image")
    sampler = PipelineSampler(pipe, prompt_arguments=prompt_arguments, **arguments)
    for refused in (lambda: sampler.check(["a cat"]), lambda: sampler.run("a cat", 0)):
        with pytest.raises(PipelineError, match=rf"{type(pipe).__name__} must have an image .*--images.* for 'a cat'"):
            refused()
    picture.save(tmp_path / "cat.png")
    dark = picture.point(lambda value: value // 4)
    given = with_images(sampler, {"a cat": tmp_path / "cat.png", "a boat": dark, "none": tmp_path / "none.png"})
    given.check(["a cat", "a boat"])
    with pytest.raises(PipelineError, match="'a dog'"):
        given.check(["a dog"])
    with pytest.raises(ValueError, match="none"):
        given.check(["none"])
    found = given.run("a cat", 1)
    assert torch.equal(found, PipelineSampler(
        pipe, prompt_arguments=prompt_arguments, image=picture, **arguments).run("a cat", 1))  # fmt: skip
    assert torch.equal(given.decode(found), stock_with(given, picture))
    assert (given.times, given.grid) == (sampler.times, sampler.grid)


def stock_with(sampler: PipelineSampler, image: Any) -> torch.Tensor:
    arguments = {**sampler.arguments, **sampler._prompt_arguments("a cat"), "image": image, "output_type": "pt"}
    return sampler.pipe(**arguments, generator=torch.Generator("cpu").manual_seed(1)).frames.transpose(1, 2) * 2 - 1


def test_images_for_what_takes_none_are_refused():
    with pytest.raises(PipelineError, match="images must be for a pipeline that takes an image, got WanPipeline"):
        with_images(wan.sampler(), {"a cat": "cat.png"})
    with pytest.raises(PipelineError, match="images must be for a PipelineSampler, got str"):
        with_images("demo", {"a cat": "cat.png"})


def test_a_compiled_transformer_is_not_compiled_to_learn():
    def backend(*_: Any) -> Any:
        raise AssertionError("nothing may be compiled")

    pipe = wan.pipeline()
    pipe.transformer.compile(backend=backend)
    compiled = pipe.transformer._compiled_call_impl
    assert wan.sampler(pipe=pipe).times == [0.999, 0.9, 0.75, 0.5]
    assert pipe.transformer._compiled_call_impl is compiled
    pipe = wan.pipeline()
    pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    assert wan.sampler(pipe=pipe).grid == TokenGrid(5, 8, 12)
    with pytest.raises(Exception, match="nothing may be compiled"):
        wan.sampler(pipe=pipe).run("a cat", 0)


def test_what_cannot_be_sampled_is_refused():
    pipe = wan.pipeline()
    with pytest.raises(PipelineError, match="must have a transformer_2, got WanPipeline without"):
        PipelineSampler(pipe, transformer="transformer_2")
    with pytest.raises(PipelineError, match="must call its transformer_2, got a run of WanPipeline without"):
        wan.sampler(pipe=wan.pipeline(experts=2), steps=1, transformer="transformer_2")
    sampler = wan.sampler(pipe=pipe)
    with pytest.raises(ValueError, match="prompt 1 must not be empty"):
        sampler.check(["a cat", " "])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nothing", "must be one of demo, .*, or MODULE:FUNCTION, got 'nothing'"),
        ("no_such_module:f", "must be a function that can be imported, got .*No module named 'no_such_module'"),
        ("support.wan:nothing", "must be a function that can be imported, got .*module 'support.wan' has no attribute"),
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
    invoke(calibrate, *common, "--samples", 2, "--block-size", 32, "-o", stats)
    assert len(Store.open(stats).samplings) == 2
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
    sizes = ("--block-size", 16, "--times", 3)
    invoke(
        calibrate, "--model", f"support.text_after:{name}", "--prompts", tmp_path / "prompts.txt", *sizes,
        "-o", tmp_path / "stats",
    )  # fmt: skip
    invoke(compile_command, tmp_path / "stats", "-o", tmp_path / "a.plan")
    plan = load_plan(tmp_path / "a.plan")
    assert plan.grid == TokenGrid(5, 8, 12)
    sampler = make_sampler(f"support.text_after:{name}", None, "cpu")
    dense = sampler.run("a dog", 0)
    with plan.attach(sampler.transformer):
        planned = sampler.run("a dog", 0)
    error = float((planned - dense).norm() / dense.norm())
    assert 0 < error < 0.1
    assert torch.equal(sampler.run("a dog", 0), dense)


RECORDED = (
    "wan_vace_reference", "wan_animate", "skyreels_i2v", "ltx2", "ltx2_last", "hunyuan15_i2v", "kandinsky5_i2v",
    "kandinsky6_i2v", "h3_first_last",
)  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
def test_a_plan_from_a_recorded_generation(name: str, tmp_path: Path):
    """Recorded as its users call it, compiled, attached, sampled and detached; each part relative to its own size."""
    sampler = made(name)
    dense = sampler.run("a cat", 3)
    with recording(sampler, tmp_path / "stats", "a cat", 3, block_size=16):
        assert equal(stock(sampler, "a cat", 3), dense)
    invoke(compile_command, tmp_path / "stats", "-o", tmp_path / "a.plan", "--target-density", 0.8)
    with load_plan(tmp_path / "a.plan").attach(sampler.transformer):
        planned = sampler.run("a cat", 3)
    for found, true in zip(parts(planned), parts(dense), strict=True):
        assert 0 < float((found - true).norm() / true.norm()) < 0.1
    assert equal(sampler.run("a cat", 3), dense)


def test_both_experts_are_calibrated_compiled_evaluated_and_attached(tmp_path: Path):
    """Wan 2.2: a plan for each, both at work in one pipeline, on a few-step schedule."""
    plans, held_out = {}, tmp_path / "held_out.txt"
    held_out.write_text("a dog runs across a field\n")
    for name, function in (("transformer", "first_expert"), ("transformer_2", "second_expert")):
        stats, plan = tmp_path / f"{name}.stats", tmp_path / f"{name}.plan"
        common = ("--model", f"support.wan:{function}", "--steps", 8, "--device", "cpu")
        invoke(calibrate, *common, "--samples", 2, "--block-size", 32, "-o", stats)
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


@pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported")
@pytest.mark.parametrize("name", ["wan", "ltx", "cogvideox", "mochi"])
def test_a_generation_around_any_call_is_recorded_as_the_sampler_would(name: str, tmp_path: Path):
    """With guidance in two forwards or in one batch: a pipeline called as its users call it computes as ever."""
    made = wan.sampler if name == "wan" else getattr(batched, name)
    sampler = made(guidance_scale=4.0) if name == "wan" else made(4.0)
    expected = stock(sampler, "a cat", 3)
    options = {"times": 2, "block_size": 16}
    with recording(sampler, tmp_path / "around", "a cat", 3, **options):
        found = stock(sampler, "a cat", 3)
    assert torch.equal(found, expected)
    manifest = make_manifest(sampler, **options)
    with StoreWriter.open(tmp_path / "own", manifest) as writer:
        latent = Calibrator(sampler, writer).calibrate("a cat", 3)
        writer.close_units()
    around, own = Store.open(tmp_path / "around"), Store.open(tmp_path / "own")
    assert around.samplings == own.samplings == (sampling_name("a cat", 3),)
    if torch.equal(latent, expected):  # whatever draws from the global generators does so elsewhere in a run of ours
        tables = around.table().samplings[0], own.table().samplings[0]
        np.testing.assert_allclose(tables[0].window_effect, tables[1].window_effect, rtol=1e-4, atol=1e-7)


def test_recording_refuses(tmp_path: Path):
    sampler = wan.sampler()
    arguments = {**sampler.arguments, **wan.embedded("a cat"), "output_type": "latent"}
    with pytest.raises(CalibrationError, match="a sampling must have a forward at every recorded time, got none at"):
        with recording(sampler, tmp_path, "a cat", block_size=32):
            sampler.pipe(**{**arguments, "num_inference_steps": 7})
    with recording(sampler, tmp_path, "a boat", block_size=32):
        sampler.pipe(**arguments)
    with pytest.raises(StoreError, match=sampling_name("a boat", 0)):
        with recording(sampler, tmp_path, "a boat", block_size=32):
            raise AssertionError("the sampling is there already")


def test_every_so_many_steps():
    sampler = wan.sampler(8)
    assert make_manifest(sampler, every=3).times == tuple(sorted(sampler.times[::3]))
    assert make_manifest(sampler, every=8).times == (sampler.times[0],)
    with pytest.raises(CalibrationError, match="by times or by every, got times 2, every 2"):
        make_manifest(sampler, times=2, every=2)


def test_the_command_measures_every_second_step_of_guided_samplings(tmp_path: Path):
    common = ("--model", "support.wan:guided", "--steps", 4, "--device", "cpu", "--samples", 1, "--block-size", 32)
    options = (*common, "--every", 2, "-o", tmp_path)
    done = invoke(calibrate, *options)
    assert "1 of 4 steps, 8 forwards; 2 times measured" in done.stderr
    store = Store.open(tmp_path)
    assert len(store.manifest.times) == 2
    assert store.meta[store.samplings[0]]["forwards"] == 8
    assert "1 of 1 samplings are done" in invoke(calibrate, *options).stderr
