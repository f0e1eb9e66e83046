"""The synthetic world of the demo: one or two shapes that move over a background, and the sentence that says so.

A *scene* is a row of small integers, one a slot (`SLOTS`). It can be written as a sentence and parsed back;
`tools/studies/rendering.py` renders it to a video, and measures videos against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan", "white", "orange")
SHAPES = ("circle", "square", "triangle", "ring", "cross", "diamond")
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
SPEEDS = ("slowly", "fast")
PATTERNS = ("plain", "shaded", "h-striped", "v-striped")
GROUNDS = ("grey", "navy", "brown", "forest", "purple", "teal")

OBJECT_SLOTS = (SIZES, COLOURS, SHAPES, DIRECTIONS, SPEEDS)
SLOTS = (("one", "two"), *OBJECT_SLOTS, *OBJECT_SLOTS, PATTERNS, GROUNDS)
COUNT, FIRST, SECOND, PATTERN, GROUND = 0, 1, 6, 11, 12
"""Columns of a scene: the number of shapes, where each shape's five slots begin, the background. An absent second
shape has -1 in its slots."""

WORDS = ("", *dict.fromkeys(w for slot in SLOTS[1:] for w in slot), "a", "moving", "and", "on", "background")
MAX_WORDS = 20

FRAMES, PIXELS = 8, 48
"""Of the world as it was first trained, which lengths and speeds are told in."""


@dataclass(frozen=True)
class Clip:
    """How finely the world is drawn. Prompts mean the same in every clip: shapes are of the same size relative to the
    picture, and move as far from the first frame to the last.

    Args:
        frames: Of a video.
        pixels: Side of its square pictures.
    """

    frames: int = FRAMES
    pixels: int = PIXELS

    @property
    def scale(self) -> float:
        """Pixels to one of the small clip's."""
        return self.pixels / PIXELS

    @property
    def pace(self) -> float:
        """Frames of the small clip that pass from one frame to the next."""
        return (FRAMES - 1) / (self.frames - 1)


SMALL = Clip()
CLIPS = {"small": SMALL, "medium": Clip(16, 64), "large": Clip(16, 96)}
"""Of 4,608, 16,384 and 36,864 tokens where a token is 2 x 2 pixels of a frame."""


class PromptError(ValueError):
    """A prompt is no sentence of this world."""


def sentence(scene: Tensor) -> str:
    """The prompt of one scene ``(13,)``, for example "a small red circle moving up fast on a plain navy background"."""
    code = [int(value) for value in scene]
    parts = []
    for first in (FIRST, SECOND)[: code[COUNT] + 1]:
        size, colour, shape, way, speed = (
            names[i] for names, i in zip(OBJECT_SLOTS, code[first : first + 5], strict=True)
        )
        parts.append(f"a {size} {colour} {shape} moving {way} {speed}")
    return " and ".join(parts) + f" on a {PATTERNS[code[PATTERN]]} {GROUNDS[code[GROUND]]} background"


def parse(prompt: str) -> Tensor:
    """The scene int64 ``(13,)`` that `sentence` would write as `prompt`.

    Raises:
        PromptError: Some word is not what the grammar wants there; names the word, its place and what was expected.
    """
    words = prompt.lower().replace(",", " ").split()
    scene = torch.full((len(SLOTS),), -1)
    at = 0

    def take(expected: tuple[str, ...]) -> int:
        nonlocal at
        word = words[at] if at < len(words) else "the end"
        if word not in expected:
            raise PromptError(f"word {at + 1} of {prompt!r} must be one of {', '.join(expected)}; got {word!r}")
        at += 1
        return expected.index(word)

    for count, first in enumerate((FIRST, SECOND)):
        take(("a",))
        for slot, names in enumerate(OBJECT_SLOTS):
            if slot == 3:
                take(("moving",))
            scene[first + slot] = take(names)
        scene[COUNT] = count
        if count == 1 or take(("and", "on")) == 1:
            break
    if scene[COUNT] == 1:
        take(("on",))
    take(("a",))
    scene[PATTERN] = take(PATTERNS)
    scene[GROUND] = take(GROUNDS)
    take(("background",))
    if at != len(words):
        raise PromptError(f"{prompt!r} must end after 'background', got {words[at]!r}")
    if scene[COUNT] == 1 and scene[FIRST + 1] == scene[SECOND + 1]:
        raise PromptError(f"the two shapes of {prompt!r} must differ in colour, got {COLOURS[scene[FIRST + 1]]} twice")
    return scene


def words(prompts: list[str]) -> Tensor:
    """Word numbers of sentences, int64 ``(n, MAX_WORDS)``, 0 after the end.

    Raises:
        PromptError: A prompt is no sentence of this world.
    """
    out = torch.zeros(len(prompts), MAX_WORDS, dtype=torch.long)
    for row, prompt in zip(out, prompts, strict=True):
        text = sentence(parse(prompt)).split()
        row[: len(text)] = torch.tensor([WORDS.index(word) for word in text])
    return out


def held_out(scenes: Tensor) -> Tensor:
    """bool ``(n,)``: a fixed sixteenth of all scenes is never trained on."""
    weight = torch.tensor([0, 9, 13, 7, 5, 0, 0, 0, 0, 0, 0, 3, 11], device=scenes.device)
    return (scenes * weight).sum(1) % 16 == 7


def scenes(count: int, generator: torch.Generator, *, test: bool = False) -> Tensor:
    """Random scenes, int64 ``(count, 13)`` on the generator's device: all held out (`test`) or none."""
    device = generator.device
    found = torch.empty(0, len(SLOTS), dtype=torch.long, device=device)
    while len(found) < count:
        draw = [
            torch.randint(0, len(names), (count * (32 if test else 2),), generator=generator, device=device)
            for names in SLOTS
        ]
        some = torch.stack(draw, 1)
        single = some[:, COUNT] == 0
        keep = (held_out(some) == test) & (single | (some[:, FIRST + 1] != some[:, SECOND + 1]))
        some[:, SECOND:PATTERN] = torch.where(single[:, None], -1, some[:, SECOND:PATTERN])
        found = torch.cat([found, some[keep]])
    return found[:count]
