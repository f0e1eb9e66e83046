"""The trained demo model draws what its prompt says."""

import json

import pytest
import torch

from calibatt.tools.demo_model import world
from calibatt.tools.demo_model.model import FEW_STEPS, GROWN, WEIGHTS, DemoModel, generate, noise, times, trained
from calibatt.tools.studies import rendering


def test_the_weights_are_small_enough_for_the_repository():
    assert WEIGHTS.stat().st_size <= 16 * 2**20
    assert GROWN.stat().st_size <= 16 * 2**20
    assert FEW_STEPS.stat().st_size <= 2**20


@pytest.mark.parametrize(("size", "tokens", "shift"), [("medium", 16384, 5.657), ("large", 36864, 8.485)])
def test_the_grown_weights_are_for_the_larger_clips(size: str, tokens: int, shift: float):
    model, files = trained(f"demo-{size}")
    assert files == [GROWN]
    assert model.grid.tokens == tokens
    assert model.shift == pytest.approx(shift, abs=1e-3)
    scenes = world.scenes(1, torch.Generator().manual_seed(3), test=True)
    video = rendering.render(scenes, torch.Generator().manual_seed(3))
    assert model.transformer.rope(video)[0].shape == (1, 8 * 24 * 24, 1, 64)


@pytest.mark.parametrize("size", ["medium", "large"])
def test_grown_prompts_are_right_by_the_record(size: str):
    record = json.loads(GROWN.with_name("train.json").read_text("utf-8"))
    found = record["checks"][size]
    assert found["judged"] >= 50
    assert min(found["colour"], found["shape"], found["direction"]) >= 0.9


def test_a_held_out_prompt_is_drawn_in_four_steps_by_the_lora():
    prompt = "a large yellow triangle moving right fast on a plain navy background"
    video = generate(trained("demo-few-steps")[0], [prompt], [1])
    verdict = rendering.measure(video, world.parse(prompt)[None])
    assert [bool(each[0, 0]) for each in (verdict.asked, verdict.colour, verdict.shape, verdict.direction)] == [
        True
    ] * 4


def test_noise_depends_on_the_seed_alone():
    together, alone = noise([7, 8]), noise([8])
    assert torch.equal(together[1:], alone)


def test_times_fall_from_noise_to_video():
    schedule = times(8)
    assert schedule[0] == 1
    assert schedule[-1] == 0
    assert (schedule.diff() < 0).all()


@pytest.mark.slow
def test_a_held_out_prompt_is_drawn():
    prompt = "a large yellow triangle moving right fast on a plain navy background"
    scene = world.parse(prompt)[None]
    video = generate(DemoModel.load(), [prompt], [1], steps=4)
    verdict = rendering.measure(video, scene)
    assert verdict.asked[0, 0]
    assert verdict.colour[0, 0]
    assert verdict.shape[0, 0]
    assert verdict.direction[0, 0]
