"""The trained demo model draws what its prompt says."""

import pytest
import torch

from calibatt.tools.demo import world
from calibatt.tools.demo.model import WEIGHTS, DemoModel, generate, noise, times


def test_the_weights_are_small_enough_for_the_repository():
    assert WEIGHTS.stat().st_size <= 16 * 2**20


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
    verdict = world.measure(video, scene)
    assert verdict.asked[0, 0]
    assert verdict.colour[0, 0]
    assert verdict.shape[0, 0]
    assert verdict.direction[0, 0]
