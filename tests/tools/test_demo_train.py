"""Training and distillation of the demo model at toy size: their files exist, load and go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers import FlowMatchLCMScheduler

from calibatt.compiler.cli import command as compile_command
from calibatt.runtime import load_plan
from calibatt.tools.calibrate.__main__ import main as calibrate
from calibatt.tools.calibrate.models import make_sampler
from calibatt.tools.demo import __main__ as demo
from calibatt.tools.demo_model import model, world
from calibatt.tools.demo_model.model import DemoModel, generate, noise, times
from calibatt.tools.demo_model.world import Clip
from calibatt.tools.evaluate.__main__ import main as evaluate
from calibatt.tools.inspect_plan.__main__ import main as inspect_plan
from calibatt.tools.studies import distill, train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]

TOY = model.CONFIG | {"num_attention_heads": 1, "attention_head_dim": 16, "ffn_dim": 32, "num_layers": 1}
TOY |= {"text_dim": 8, "freq_dim": 16}
PROMPT = "a small red circle moving up fast on a plain navy background"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Weights of a toy model; the clips are small ones."""
    monkeypatch.setitem(world.CLIPS, "medium", Clip(4, 24))
    monkeypatch.setitem(world.CLIPS, "large", Clip(4, 32))
    monkeypatch.setattr(train, "BATCH_TOKENS", 2 * 4 * 12 * 12)
    monkeypatch.setattr(train, "SHORT_BATCH", 1)
    torch.manual_seed(0)
    path = tmp_path / "toy.safetensors"
    train.save_model(path, DemoModel(TOY))
    return path


def run(command: Any, *arguments: object) -> None:
    found = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert found.exit_code == 0, found.output + repr(found.exception)


@pytest.mark.slow
def test_training_goes_on_from_weights_at_sizes_in_turn(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    saved = []
    save = train.save_model
    monkeypatch.setattr(train, "save_model", lambda *args, **notes: (saved.append(notes), save(*args, **notes)))
    settings = ["--seconds", 1, "--check-prompts", 2, "--device", "cpu"]
    run(train.main, "--from", toy, "--size", "large", "--size", "medium", "-o", tmp_path / "out", *settings)
    record = json.loads((tmp_path / "out" / "train.json").read_text())
    assert {row[2] for row in record["loss"]} == {"large", "medium"} == set(record["checks"])
    assert all(row[3] > 0 for row in record["loss"])
    assert len(saved) > 2, "weights are written while it trains"
    assert abs(record["videos"]["large"] - record["videos"]["medium"]) <= record["videos"]["medium"]
    for name in ("loss.png", "samples_large.png", "samples_medium.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    trained = DemoModel.load(tmp_path / "out" / "weights.safetensors")
    assert trained.clip == Clip(4, 32)
    assert trained.shift == pytest.approx(3 * (4 * 16 * 16 / 4608) ** 0.5)
    changed = zip(trained.parameters(), DemoModel.load(toy).parameters(), strict=True)
    assert any((new - old).abs().max() > 0 for new, old in changed)


@pytest.mark.slow
def test_training_from_nothing_is_continued_from_its_checkpoint(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "CONFIG", TOY)
    monkeypatch.setattr(world, "SMALL", Clip(4, 24))
    monkeypatch.setitem(world.CLIPS, "small", Clip(4, 24))
    parts = ["--checkpoint", tmp_path / "kept.pt", "--seconds", 2, "--check-prompts", 1, "--device", "cpu"]
    run(train.main, "--part-seconds", 1, "-o", tmp_path / "a", *parts)
    run(train.main, "-o", tmp_path / "b", *parts)
    first, second = (json.loads((tmp_path / name / "train.json").read_text()) for name in "ab")
    assert second["steps"] > first["steps"]
    assert second["loss"][: len(first["loss"])] == first["loss"]
    assert {"short", "small"} == {row[2] for row in second["loss"]}


def test_the_same_place_has_the_same_angles_in_every_clip():
    small, large = (DemoModel(TOY, clip).transformer.rope for clip in (world.SMALL, Clip(8, 96)))
    torch.testing.assert_close(large.freqs_cos[:48:2, small.t_dim :], small.freqs_cos[:24, small.t_dim :])
    torch.testing.assert_close(large.freqs_sin[:8, : small.t_dim], small.freqs_sin[:8, : small.t_dim])
    stock = model.WanTransformer3DModel(**TOY).rope
    assert torch.equal(small.freqs_cos, stock.freqs_cos)
    assert torch.equal(small.freqs_sin, stock.freqs_sin)


def test_weights_say_their_clip_and_shift(tmp_path):
    path = tmp_path / "weights.safetensors"
    train.save_model(path, DemoModel(TOY, Clip(4, 24), shift=2.5))
    found = DemoModel.load(path)
    assert (found.clip, found.shift, found.grid.tokens) == (Clip(4, 24), 2.5, 4 * 12 * 12)
    video = generate(found, [PROMPT], [1], 2)
    assert video.shape == (1, 3, 4, 24, 24)
    assert DemoModel.load(path, clip=Clip(4, 32)).shift == pytest.approx(3 * (1024 / 4608) ** 0.5)
    half = DemoModel.load(path, dtype=torch.bfloat16)
    assert half.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert half.transformer.scale_shift_table.dtype == torch.float32
    assert (generate(half, [PROMPT], [1], 2) - video).abs().mean() < 0.1 * video.abs().mean()


def test_new_noise_is_what_diffusers_adds():
    torch.manual_seed(0)
    toy_model = DemoModel(TOY, Clip(2, 24)).eval()
    got = generate(toy_model, [PROMPT], [7], 3, new_noise=True)
    grid = times(3, toy_model.shift)
    scheduler = FlowMatchLCMScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=grid[:-1].tolist())
    generator = torch.Generator().manual_seed(7)
    video = torch.randn((3, 2, 24, 24), generator=generator)[None]
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            velocity = toy_model(video, timestep[None] / 1000, world.words([PROMPT]))
        video = scheduler.step(velocity, timestep, video, generator, return_dict=False)[0]
    torch.testing.assert_close(got, video, atol=1e-4, rtol=1e-4)
    assert torch.equal(noise([7], Clip(2, 24))[0], torch.randn(video.shape[1:], generator=generator.manual_seed(7)))


def test_two_steps_of_the_teacher_are_its_own_sampling():
    torch.manual_seed(0)
    toy_model = DemoModel(TOY, Clip(2, 24)).eval()
    toy_model.transformer.add_adapter(
        distill.LoraConfig(r=2, target_modules=["attn1.to_q"], init_lora_weights=False), "few"
    )
    grid = times(8, toy_model.shift)
    words, start = world.words([PROMPT]), noise([1], Clip(2, 24))
    now, middle, then = (grid[i : i + 1] for i in range(3))
    mean = distill.two_steps(toy_model, start, now, middle, then, words)
    arrived = start + (then - now) * mean
    with distill.teaching(toy_model), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        video = start
        for at, to in ((now, middle), (middle, then)):
            video = video + (to - at) * toy_model(video, at, words).float()
    torch.testing.assert_close(arrived, video, atol=1e-4, rtol=1e-4)
    student = distill.begin(toy_model, 1, True, words, start, start)
    assert (student - start).abs().max() > 0


def test_a_lora_is_distilled_and_loads(toy, tmp_path):
    out = tmp_path / "out"
    weights = DemoModel(TOY, Clip(3, 24))
    train.save_model(toy, weights)
    settings = ["--weights", toy, "--batch", 1, "--check-prompts", 1, "--device", "cpu"]
    run(distill.main, "--seconds", 1, "-o", out, *settings)
    record = json.loads((out / "distill.json").read_text())
    assert len(record["checks"]) == 4
    assert record["steps"] >= 4
    found = DemoModel.load(toy).load_lora(out / "few_steps.safetensors")
    plain = DemoModel.load(toy)
    assert (generate(found, [PROMPT], [1], 4) - generate(plain, [PROMPT], [1], 4)).abs().max() > 0
    run(distill.main, "--seconds", 0.1, "--from", out / "few_steps.safetensors", "-o", tmp_path / "again", *settings)


def test_a_lora_of_the_demo_is_at_most_a_mebibyte(tmp_path):
    found = DemoModel()
    found.transformer.add_adapter(distill.LoraConfig(r=distill.RANK, target_modules=distill.TARGETS), model.LORA)
    distill.save_lora(tmp_path / "lora.safetensors", found)
    assert (tmp_path / "lora.safetensors").stat().st_size <= 2**20


def test_what_is_no_lora_is_refused(toy):
    with pytest.raises(ValueError, match=r"must hold a LoRA of a transformer, got encoder\.places\.weight"):
        DemoModel.load(toy).load_lora(toy)


@pytest.mark.parametrize("command", [train.main, distill.main])
def test_what_is_no_model_is_refused(toy, tmp_path, command):
    random_lora(tmp_path / "lora.safetensors", 1, DemoModel(TOY, Clip(4, 24)))
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    option = "--from" if command is train.main else "--weights"
    for name in ("lora", "text"):
        path = tmp_path / f"{name}.safetensors"
        found = CliRunner().invoke(command, [option, str(path), "-o", str(tmp_path / "out"), "--device", "cpu"])
        assert found.exit_code == 2, repr(found.exception)
        assert f"{path} must hold weights of a demo model, got " in found.stderr


def test_a_wrong_lora_is_found_before_the_checks(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "check", lambda *_: pytest.fail("checked first"))
    arguments = ["--weights", toy, "--from", toy, "-o", tmp_path / "out", "--device", "cpu"]
    found = CliRunner().invoke(distill.main, [*map(str, arguments)])
    assert found.exit_code == 2, repr(found.exception)
    assert "must hold a LoRA of a transformer" in found.stderr


def test_absent_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "GROWN", tmp_path / "none")
    monkeypatch.setattr(model, "FEW_STEPS", tmp_path / "none")
    for name, message in (
        ("large", "weights of the large demo model must"),
        ("few-steps-noise", "the LoRA for few steps must"),
    ):
        with pytest.raises(ValueError, match=rf"{message} be in .*none"):
            make_sampler(f"demo-{name}", None, "cpu")


def random_lora(path: Path, rank: int, like: DemoModel) -> None:
    """A LoRA of the shape of the trained one, of random values."""
    config = distill.LoraConfig(r=rank, target_modules=distill.TARGETS, init_lora_weights=False)
    like.transformer.add_adapter(config, model.LORA)
    distill.save_lora(path, like)


@pytest.mark.slow
def test_the_few_steps_demo_is_calibrated_compiled_attached_and_shown(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "WEIGHTS", toy)
    monkeypatch.setattr(model, "FEW_STEPS", tmp_path / "lora.safetensors")
    torch.manual_seed(1)
    train.save_model(toy, DemoModel(TOY, Clip(4, 24)))
    random_lora(model.FEW_STEPS, 4, DemoModel(TOY, Clip(4, 24)))
    commands = {"calibatt-calibrate": calibrate, "calibatt-compile": compile_command, "calibatt-inspect": inspect_plan}
    typed = []

    def in_this_process(module: str, name: str, arguments: list[str]) -> None:
        typed.append([name, *arguments])
        run(commands[name], *arguments)

    monkeypatch.setattr(demo, "_run", in_this_process)
    out = tmp_path / "out"
    run(demo.main, "--few-steps", "-o", out, "--calibration-prompts", 1, "--held-out-prompts", 1, "--device", "cpu")
    assert typed[0][:3] == ["calibatt-calibrate", "--model", "demo-few-steps"]
    page = (out / "report.html").read_text()
    assert "calibatt-demo --few-steps" in page
    plan = load_plan(out / "demo.plan")
    assert len(plan.file.segments) <= 4
    few = make_sampler("demo-few-steps-noise", None, "cpu")
    assert (len(few.times), few.times) == (4, model.trained("demo-few-steps")[0].times()[:-1].tolist())
    assert few.versions["sampler"] == "new noise at every step"
    with plan.attach(few.transformer):
        assert few.run(PROMPT, 1).shape == (1, 3, 4, 24, 24)
    prompts, report = tmp_path / "prompts.txt", tmp_path / "report"
    prompts.write_text(PROMPT)
    settings = ["--model", "demo-few-steps", "--head-prompts", 1, "--floor-prompts", 1, "--device", "cpu", "-o", report]
    run(evaluate, "--plan", out / "demo.plan", "--prompts", prompts, *settings)
    assert (report / "report.html").exists()
    noisy = tmp_path / "noisy"
    run(calibrate, "--model", "demo-few-steps-noise", "--samples", 1, "--device", "cpu", "-o", noisy)
    run(compile_command, noisy, "-o", tmp_path / "noisy.plan")
