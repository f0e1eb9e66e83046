"""The demo's world: sentences and scenes agree, nothing held out is trained on, the checks know truth from error."""

import pytest
import torch

from calibatt.tools.demo_model import world
from calibatt.tools.studies import rendering


@pytest.fixture(scope="module")
def test_scenes():
    return world.scenes(128, torch.Generator().manual_seed(0), test=True)


def test_sentences_parse_back(test_scenes):
    for scene in test_scenes:
        assert torch.equal(world.parse(world.sentence(scene)), scene)


def test_words_of_scenes_are_those_of_sentences(test_scenes):
    prompts = [world.sentence(scene) for scene in test_scenes]
    assert torch.equal(world.words(prompts), rendering.scene_words(test_scenes))


def test_held_out_scenes_are_apart(test_scenes):
    train = world.scenes(512, torch.Generator().manual_seed(0))
    assert world.held_out(test_scenes).all()
    assert not world.held_out(train).any()


def test_two_shapes_differ_in_colour():
    scenes = world.scenes(512, torch.Generator().manual_seed(1))
    two = scenes[:, world.COUNT] == 1
    assert two.any()
    assert (scenes[two, world.FIRST + 1] != scenes[two, world.SECOND + 1]).all()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "word 1 .* must be one of a; got 'the end'"),
        ("a tiny red circle moving up fast on a plain navy background", "word 2 .* small, large; got 'tiny'"),
        ("a small red circle moving up fast on a plain navy", "word 12 .* background; got 'the end'"),
        ("a small red circle moving up fast on a plain navy background please", "must end after 'background'"),
        (
            "a small red circle moving up fast and a large red ring moving up fast on a plain navy background",
            "must differ in colour, got red twice",
        ),
    ],
)
def test_a_prompt_of_another_world_is_refused(prompt, message):
    with pytest.raises(world.PromptError, match=message):
        world.words([prompt])


def test_rendering_is_deterministic_and_bounded(test_scenes):
    first, second = (rendering.render(test_scenes[:4], torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (4, 3, world.FRAMES, world.PIXELS, world.PIXELS)
    assert first.abs().max() <= 1


def test_the_small_world_is_the_one_that_the_weights_were_trained_on():
    generator = torch.Generator().manual_seed(5)
    scenes = world.scenes(16, generator)
    drawn = [rendering.render(scenes, generator), rendering.render(scenes, generator, frames=2)]
    summary = [round(float(video.double().mul(torch.arange(48)).mean()), 6) for video in drawn]
    assert summary == [-11.169105, -11.222566]


def test_a_clip_shows_the_same_more_finely(test_scenes):
    scenes = test_scenes[:16]
    small, fine = (
        rendering.render(scenes, torch.Generator().manual_seed(3), world.Clip(n, p)) for n, p in ((8, 48), (15, 96))
    )
    coarse = torch.nn.functional.avg_pool2d(fine[:, :, ::2].flatten(0, 2), 2).view(small.shape)
    assert (coarse - small).abs().mean() < 0.01
    assert fine.shape == (16, 3, 15, 96, 96)


@pytest.mark.slow
@pytest.mark.parametrize("clip", world.CLIPS.values(), ids=world.CLIPS)
def test_the_checks_know_rendered_truth_in_every_clip(test_scenes, clip):
    scenes = test_scenes[:48]
    video = rendering.render(scenes, torch.Generator().manual_seed(4), clip)
    rates = rendering.measure(video, scenes).rates()
    assert rates.pop("judged") >= 35
    assert rates == {"colour": 1.0, "shape": 1.0, "direction": 1.0}
    wrong = scenes.clone()
    there = wrong[:, world.FIRST] >= 0
    wrong[there, world.FIRST + 2] = (wrong[there, world.FIRST + 2] + 3) % len(world.SHAPES)
    wrong[there, world.FIRST + 3] = (wrong[there, world.FIRST + 3] + 3) % len(world.DIRECTIONS)
    first = rendering.measure(video, wrong)
    assert float(first.shape[first.asked[:, 0], 0].float().mean()) <= 0.1
    assert float(first.direction[first.asked[:, 0], 0].float().mean()) <= 0.1


def test_the_checks_score_rendered_truth_right(test_scenes):
    video = rendering.render(test_scenes, torch.Generator().manual_seed(4))
    rates = rendering.measure(video, test_scenes).rates()
    assert rates["judged"] >= 100
    assert min(rates["colour"], rates["shape"], rates["direction"]) >= 0.98


def test_the_checks_see_what_is_wrong(test_scenes):
    video = rendering.render(test_scenes, torch.Generator().manual_seed(4))
    for slot, name in ((1, "colour"), (2, "shape"), (3, "direction")):
        other = test_scenes.clone()
        for first in (world.FIRST, world.SECOND):
            names = len(world.OBJECT_SLOTS[slot])
            there = other[:, first] >= 0
            other[there, first + slot] = (other[there, first + slot] + 3) % names
        rates = rendering.measure(video, other).rates()
        assert rates[name] <= 0.15, (name, rates)


def test_nothing_to_judge_is_no_rate() -> None:
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    found = rendering.Verdict(nothing, nothing, nothing, nothing).rates()
    assert found == {"colour": None, "shape": None, "direction": None, "judged": 0}
