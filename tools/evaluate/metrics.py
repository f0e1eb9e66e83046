"""Metrics of how two videos differ, and their summary over prompts.

Videos are ``(n, 3, F, H, W)`` in [-1, 1] on one device; every metric computes in float64 and gives one number a video,
float64 ``(n,)`` on the CPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calibatt.tools.calibrate.sampler import Latent, parts

MOST_DB = 100.0
LEAST_SHARE = 10 ** (-MOST_DB / 10)
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def _unit(video: Tensor) -> Tensor:
    """Values in [0, 1], float64."""
    return (video.detach().double().clamp(-1, 1) + 1) / 2


def psnr_db(video: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over all pixels and frames; at most `MOST_DB`."""
    error = (_unit(video) - _unit(reference)).square().mean((1, 2, 3, 4))
    return -10 * error.clamp(min=LEAST_SHARE).log10().cpu()


def latent_db(latent: Latent, reference: Latent) -> Tensor:
    """Signal-to-noise ratio of final latents ``(n, ...)``, -10 log10(||z' - z||^2 / ||z||^2) dB; at most `MOST_DB`.

    Of videos with sound, the mean of both relative squared errors.
    """
    errors = []
    for estimate, true in zip(parts(latent), parts(reference), strict=True):
        lost, size = (x.detach().double().flatten(1).square().sum(1) for x in (estimate - true, true))
        errors.append(lost / size)
    return -10 * torch.stack(errors).mean(0).clamp(min=LEAST_SHARE).log10().cpu()


def ssim(video: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity, mean over frames, channels and places; 1 for equal videos.

    Wang et al., *Image quality assessment: from error visibility to structural similarity* (2004): a Gaussian window
    of 11 x 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, only where the window lies inside the frame.

    Raises:
        ValueError: Frames are smaller than the window.
    """
    if min(video.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"frames must be at least {SSIM_WINDOW} pixels a side for SSIM, got {tuple(video.shape[-2:])}")
    axis = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=video.device) - SSIM_WINDOW // 2
    window = torch.exp(-axis.square() / (2 * SSIM_SIGMA**2))
    window /= window.sum()
    x, y = (_unit(v).permute(0, 2, 1, 3, 4).flatten(0, 2)[:, None] for v in (video, reference))

    def blurred(image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(image, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mx, my = blurred(x), blurred(y)
    vx, vy, both = blurred(x * x) - mx * mx, blurred(y * y) - my * my, blurred(x * y) - mx * my
    similarity = (2 * mx * my + 1e-4) * (2 * both + 9e-4) / ((mx * mx + my * my + 1e-4) * (vx + vy + 9e-4))
    return similarity.view(len(video), -1).mean(1).cpu()


def flicker(video: Tensor, reference: Tensor) -> Tensor:
    """Mean difference of temporal differences: how much more, or less, pixels change from frame to frame.

    mean |(x[t + 1] - x[t]) - (y[t + 1] - y[t])| with pixels in [0, 1]; 0 for equal videos, and for any difference that
    does not change over time.
    """
    change = [_unit(v).diff(dim=2) for v in (video, reference)]
    if not change[0].shape[2]:
        return torch.zeros(len(video), dtype=torch.float64)
    return (change[0] - change[1]).abs().mean((1, 2, 3, 4)).cpu()


@dataclass(frozen=True)
class Metric:
    """A metric and which way is better."""

    name: str
    unit: str
    higher_is_better: bool
    measure: Callable[[Tensor, Tensor], Tensor]


LATENT = Metric("latent", "dB", True, latent_db)
"""The metric of final latents, whatever decodes them; all others are of videos."""
PSNR = Metric("psnr", "dB", True, psnr_db)
SSIM = Metric("ssim", "", True, ssim)
FLICKER = Metric("flicker", "", False, flicker)
ALWAYS = (PSNR, SSIM, FLICKER)
LPIPS = "lpips"


def lpips_metric() -> Metric | str:
    """LPIPS (Zhang et al., 2018; AlexNet), mean over frames, or why it is not available; nothing is downloaded."""
    if find_spec("lpips") is None:
        return "not available: the package lpips is not installed"
    if not any((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet-*.pth")):
        return "not available: the AlexNet weights that the package lpips builds on are not at hand"
    import lpips

    model = lpips.LPIPS(net="alex", verbose=False).eval().requires_grad_(False)

    def measure(video: Tensor, reference: Tensor) -> Tensor:
        pair = (v.detach().cpu().float().clamp(-1, 1) for v in (video, reference))
        frames = [v.permute(0, 2, 1, 3, 4).flatten(0, 1) for v in pair]
        return model(*frames).view(len(video), -1).double().mean(1)

    return Metric(LPIPS, "", False, measure)


@dataclass(frozen=True)
class Summary:
    """The summary of a metric over prompts.

    Args:
        mean: Over prompts.
        standard_error: Of the mean; 0 for one prompt.
        spread: Standard deviation over prompts; 0 for one.
        worst: The worst prompt's number.
        worst_at: Which prompt that is.
        count: Prompts.
    """

    mean: float
    standard_error: float
    spread: float
    worst: float
    worst_at: int
    count: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(values: Sequence[float], higher_is_better: bool) -> Summary:
    """The summary of one number a prompt.

    Raises:
        ValueError: There is none.
    """
    if not values:
        raise ValueError("a summary must be of at least one number, got none")
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    worst_at = min(range(len(values)), key=lambda at: values[at] if higher_is_better else -values[at])
    error = spread / math.sqrt(len(values))
    return Summary(statistics.fmean(values), error, spread, values[worst_at], worst_at, len(values))
