"""The demo model as calibration sees it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from torch import Tensor

from calibatt.tools.demo_model import world
from calibatt.tools.demo_model.model import DemoModel, generate, trained


class DemoSampler:
    """A `calibatt.tools.calibrate.sampler.Sampler`.

    Args:
        model: The model; the trained one if absent.
        steps: Denoising steps; the model's own if absent.
        device: Where it runs.
        new_noise: Every step adds new noise; see `generate`.
        files: What the model was loaded from.
    """

    def __init__(
        self,
        model: DemoModel | None = None,
        *,
        steps: int | None = None,
        device: str = "cpu",
        new_noise: bool = False,
        files: Sequence[Path] = (),
    ) -> None:
        self.versions = {"diffusers": diffusers.__version__}
        if model is None:
            model, files = trained("demo", device)
        if files:
            content = b"".join(path.read_bytes() for path in files)
            self.versions["weights"] = hashlib.blake2b(content, digest_size=16).hexdigest()
        if new_noise:
            self.versions["sampler"] = "new noise at every step"
        self._model, self._new_noise = model.to(device), new_noise
        self.transformer, self.grid = model.transformer, model.grid
        self.times = model.times(steps)[:-1].tolist()

    def check(self, prompts: Sequence[str]) -> None:
        """Raises `PromptError` for the first prompt that is no sentence of the demo's world."""
        world.words(list(prompts))

    def run(self, prompt: str, seed: int) -> Tensor:
        """One video ``(1, 3, F, H, W)``."""
        return self.run_batch([prompt], [seed])

    def run_batch(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Videos ``(n, 3, F, H, W)`` of several prompts in one loop; each as `run` makes it, but for rounding."""
        return generate(self._model, list(prompts), list(seeds), len(self.times), new_noise=self._new_noise)

    def decode(self, latent: Tensor) -> Tensor:
        """The latents of this model are videos."""
        return latent


def named(name: str, steps: int | None, device: str) -> DemoSampler:
    """The sampler of a ``--model``; see `calibatt.tools.calibrate.models.DEMOS`.

    Raises:
        ValueError: Its files are not here.
    """
    model, files = trained(name.removesuffix("-noise"), device)
    return DemoSampler(model, steps=steps, device=device, new_noise=name.endswith("-noise"), files=files)


def training_prompts(count: int, seed: int) -> list[str]:
    """Sentences of scenes that training may have seen, and the held-out checks never use."""
    return [world.sentence(scene) for scene in world.scenes(count, torch.Generator().manual_seed(seed))]
