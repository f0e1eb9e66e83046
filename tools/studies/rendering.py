"""Scenes of the demo's world as videos, to train on, and what a video shows of its scene.

Positions, exact radii, exact speeds and stripe phases are free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibatt.tools.demo_model.world import (
    COUNT,
    FIRST,
    GROUND,
    PATTERN,
    PIXELS,
    SECOND,
    SHAPES,
    SLOTS,
    SMALL,
    WORDS,
    Clip,
)

RGB = [[0.9, -0.8, -0.8], [-0.8, 0.8, -0.7], [-0.7, -0.5, 1.0], [0.9, 0.9, -0.8]]
RGB += [[0.9, -0.7, 0.9], [-0.7, 0.9, 0.9], [0.95, 0.95, 0.95], [1.0, 0.15, -0.9]]
GROUND_RGB = [[-0.35, -0.35, -0.35], [-0.85, -0.8, -0.2], [-0.3, -0.6, -0.8]]
GROUND_RGB += [[-0.8, -0.3, -0.75], [-0.4, -0.85, -0.3], [-0.85, -0.25, -0.25]]
RADIUS_PIXELS = (5.0, 8.5)
SPEED_PIXELS = (1.0, 2.7)


def scene_words(scenes: Tensor) -> Tensor:
    """`words` of many scenes ``(n, 13)`` at once, on their device; used in training."""
    number = {word: i for i, word in enumerate(WORDS)}
    table = torch.zeros(len(SLOTS), 9, dtype=torch.long, device=scenes.device)
    for slot, names in enumerate(SLOTS[1:], 1):
        table[slot, : len(names)] = torch.tensor([number[name] for name in names])
    code = table[torch.arange(len(SLOTS), device=scenes.device), scenes.clamp(min=0)]

    def fixed(word: str) -> Tensor:
        return torch.full_like(code[:, :1], number[word])

    def shape(first: int) -> list[Tensor]:
        return [fixed("a"), code[:, first : first + 3], fixed("moving"), code[:, first + 3 : first + 5]]

    ground = [fixed("on"), fixed("a"), code[:, PATTERN : GROUND + 1], fixed("background")]
    two = torch.cat([*shape(FIRST), fixed("and"), *shape(SECOND), *ground], 1)
    one = torch.cat([*shape(FIRST), *ground], 1)
    one = torch.nn.functional.pad(one, (0, two.shape[1] - one.shape[1]))
    return torch.where((scenes[:, COUNT] == 1)[:, None], two, one)


def _cover(shape: Tensor, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Anti-aliased coverage in [0, 1] of a shape with its centre at dx = dy = 0."""
    ax, ay = dx.abs(), dy.abs()
    far = (dx * dx + dy * dy).sqrt()
    distance = [
        far - radius,
        torch.maximum(ax, ay) - 0.86 * radius,
        torch.maximum(dy - 0.6 * radius, 0.866 * ax - 0.5 * dy - 0.6 * radius),
        (far - 0.75 * radius).abs() - 0.25 * radius,
        torch.minimum(
            torch.maximum(ax - radius, ay - 0.33 * radius),
            torch.maximum(ay - radius, ax - 0.33 * radius),
        ),
        (ax + ay) * 0.707 - 0.75 * radius,
    ]
    chosen = distance[0]
    for kind, other in enumerate(distance[1:], 1):
        chosen = torch.where(shape == kind, other, chosen)
    return (0.5 - chosen).clamp(0, 1)


def render(scenes: Tensor, generator: torch.Generator, clip: Clip = SMALL, frames: int | None = None) -> Tensor:
    """Draws scenes; a shape's whole path lies inside the picture, so it never turns.

    Args:
        scenes: int64 ``(n, 13)``.
        generator: Source of all that the scene leaves free; on the scenes' device.
        clip: How finely to draw.
        frames: Frames to draw, at the clip's pace; all of the clip's if absent.

    Returns:
        float32 ``(n, 3, frames, pixels, pixels)`` in [-1, 1].
    """
    n, device = len(scenes), scenes.device
    pixels, scale, frames = clip.pixels, clip.scale, frames or clip.frames

    def random() -> Tensor:
        return torch.rand(n, generator=generator, device=device)

    def column(x: Tensor) -> Tensor:
        return x.view(n, 1, 1, 1)

    axis = torch.arange(pixels, device=device) + 0.5
    x, y = axis.view(1, 1, 1, -1), axis.view(1, 1, -1, 1)
    period, phase = column((7.5 + 4.5 * random()) * scale), column(random() * 2 * torch.pi)
    pattern = column(scenes[:, PATTERN])
    shade = torch.where(pattern == 1, 0.6 * (y / pixels - 0.5) + 0 * x, 0.0)
    for kind, along in ((2, y), (3, x)):
        stripes = (torch.sin(along * 2 * torch.pi / period + phase) * 3).clamp(-1, 1)
        shade = torch.where(pattern == kind, 0.18 * stripes + 0 * x + 0 * y, shade)
    ground = torch.tensor(GROUND_RGB, device=device)[scenes[:, GROUND]].view(n, 3, 1, 1, 1)
    video = (ground + shade.unsqueeze(1)).expand(n, 3, frames, pixels, pixels)
    time, step_scale = torch.arange(frames, device=device), scale * clip.pace
    for first in (SECOND, FIRST):  # the first shape lies on top
        size, colour, shape, way, speed = scenes[:, first : first + 5].unbind(1)
        there = column(size >= 0).float()
        radius = torch.tensor(RADIUS_PIXELS, device=device)[size.clamp(min=0)] * (0.95 + 0.15 * random()) * scale
        pace = torch.tensor(SPEED_PIXELS, device=device)[speed.clamp(min=0)] * (0.9 + 0.2 * random()) * step_scale
        angle = way * (torch.pi / 4)
        centre = []
        for step in (pace * torch.cos(angle), pace * torch.sin(angle)):
            low, high = radius + scale, pixels - radius - scale
            travel = step * (frames - 1)
            start = low - travel.clamp(max=0) + (high - low - travel.abs()).clamp(min=0) * random()
            centre.append((start[:, None] + step[:, None] * time).view(n, frames, 1, 1))
        cover = there * _cover(column(shape), x - centre[0], y - centre[1], column(radius))
        paint = torch.tensor(RGB, device=device)[colour.clamp(min=0)].view(n, 3, 1, 1, 1)
        video = torch.lerp(video, paint, cover.unsqueeze(1))
    return video.clamp(-1, 1)


@dataclass(frozen=True)
class Verdict:
    """What a video shows of the shapes its prompt asks for; all bool ``(n, 2)``, first and second shape.

    Args:
        asked: The prompt has this shape, in clear sight in at least three of eight frames, so that it can be judged.
        colour: The prompt's colour is there, in a fitting amount.
        shape: The outline is the prompt's rather than any other's.
        direction: It moves the prompt's way, within 30 degrees.
    """

    asked: Tensor
    colour: Tensor
    shape: Tensor
    direction: Tensor

    def rates(self) -> dict[str, float | None]:
        """Share of right answers among the judged shapes, None where none can be judged, and their number."""
        count, names = int(self.asked.sum()), ("colour", "shape", "direction")
        rates = {name: float(getattr(self, name)[self.asked].float().mean()) if count else None for name in names}
        return {**rates, "judged": count}


def measure(video: Tensor, scenes: Tensor) -> Verdict:
    """Measures colour, shape and direction on generated frames.

    A shape is found by its colour. A frame counts for it where the other shape is at least two pixels of the small clip
    away from it. The outline is compared with all six, drawn at the measured area and centroid.

    Args:
        video: ``(n, 3, frames, pixels, pixels)`` in [-1, 1], of any clip.
        scenes: int64 ``(n, 13)``.
    """
    video = video.float()
    found = [_find(video, scenes[:, first + 1]) for first in (FIRST, SECOND)]
    two = (scenes[:, COUNT] == 1)[:, None]
    reach = round(2 * video.shape[-1] / PIXELS)
    near = torch.nn.functional.max_pool2d(found[0].float(), 2 * reach + 1, 1, reach) * found[1]
    clear = ~(two & (near.sum((2, 3)) > 0))
    verdicts = []
    for first, mask in zip((FIRST, SECOND), found, strict=True):
        colour, outline, way = _judge(mask.float(), clear, scenes[:, first : first + 5])
        asked = (scenes[:, first] >= 0) & (clear.sum(1) * 8 >= 3 * video.shape[2])
        verdicts.append((asked, colour, outline & colour, way & colour))
    return Verdict(*(torch.stack(part, 1) for part in zip(*verdicts, strict=True)))


def _find(video: Tensor, colour: Tensor) -> Tensor:
    """bool ``(n, frames, h, w)``: pixels of a colour."""
    want = torch.tensor(RGB, device=video.device)[colour.clamp(min=0)].view(-1, 3, 1, 1, 1)
    return (video - want).pow(2).sum(1) < 0.5


def _judge(mask: Tensor, clear: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape, way = slots[:, 2], slots[:, 3]
    n, frames, side, _ = mask.shape
    device = mask.device
    axis = torch.arange(side, device=device) + 0.5
    x, y = axis.view(1, 1, 1, -1), axis.view(1, 1, -1, 1)
    area = mask.sum((2, 3))
    cx = (mask * x).sum((2, 3)) / area.clamp(min=1)
    cy = (mask * y).sum((2, 3)) / area.clamp(min=1)
    seen = clear & (area >= 12 * (side / PIXELS) ** 2)
    weight = seen.float()
    total = weight.sum(1).clamp(min=1)
    colour = weight.sum(1) >= 0.8 * clear.sum(1)
    # outline: mean overlap with each shape over the clear frames
    overlap = []
    for kind in range(len(SHAPES)):
        code, quarter = torch.tensor(kind, device=device), torch.tensor(side / 4, device=device)
        unit = _cover(code, x - side / 2, y - side / 2, quarter)
        per = unit.sum() / (side / 4) ** 2
        radius = (area.clamp(min=1) / per).sqrt().view(n, frames, 1, 1)
        ox = ((unit * x).sum() / unit.sum() - side / 2) * radius / (side / 4)
        oy = ((unit * y).sum() / unit.sum() - side / 2) * radius / (side / 4)
        drawn = _cover(code, x - cx.view(n, frames, 1, 1) + ox, y - cy.view(n, frames, 1, 1) + oy, radius)
        common, either = torch.minimum(drawn, mask).sum((2, 3)), torch.maximum(drawn, mask).sum((2, 3))
        overlap.append((common / either.clamp(min=1) * weight).sum(1) / total)
    outline = torch.stack(overlap, 1).argmax(1) == shape
    # direction: least squares line through the centroids of the clear frames
    time = torch.arange(frames, device=device, dtype=torch.float32).expand(n, -1)
    late = (time - (time * weight).sum(1, keepdim=True) / total[:, None]) * weight
    vx, vy = (late * cx).sum(1), (late * cy).sum(1)
    angle = way * (torch.pi / 4)
    cosine = (vx * angle.cos() + vy * angle.sin()) / (vx * vx + vy * vy).sqrt().clamp(min=1e-6)
    return colour, outline, cosine > 0.866
