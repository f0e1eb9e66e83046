"""The demo model as calibration sees it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import diffusers
import torch
from torch import Tensor

from calibatt.plans import TokenGrid
from calibatt.tools.calibrate.sampler import OnStep
from calibatt.tools.demo import world
from calibatt.tools.demo.model import STEPS, WEIGHTS, DemoModel, euler, noise, times


class DemoSampler:
    """A `calibatt.tools.calibrate.sampler.Sampler`.

    Args:
        model: The model; the trained one if absent.
        steps: Denoising steps.
        device: Where it runs.
    """

    def __init__(self, model: DemoModel | None = None, *, steps: int = STEPS, device: str = "cpu") -> None:
        self.versions = {"diffusers": diffusers.__version__}
        if model is None:
            model = DemoModel.load(device=device)
            self.versions["weights"] = hashlib.blake2b(WEIGHTS.read_bytes(), digest_size=16).hexdigest()
        self._model = model.to(device)
        self._device = torch.device(device)
        self._schedule = times(steps).tolist()
        self.transformer = model.transformer
        self.times = self._schedule[:-1]
        frames, height, width = model.config["patch_size"]
        self.grid = TokenGrid(world.FRAMES // frames, world.PIXELS // height, world.PIXELS // width)

    def check(self, prompts: Sequence[str]) -> None:
        """Raises `PromptError` for the first prompt that is no sentence of the demo's world."""
        world.words(list(prompts))

    def run(
        self, prompt: str, seed: int, start_step: int = 0, start: Tensor | None = None, on_step: OnStep | None = None
    ) -> Tensor:
        """One video ``(1, 3, F, H, W)``; see `Sampler.run`.

        Raises:
            ValueError: A later step without its latent, or a step that the schedule does not have.
        """
        return self.run_batch([prompt], [seed], start_step, start, on_step)

    def run_batch(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        start_step: int = 0,
        start: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Videos ``(n, 3, F, H, W)`` of several prompts in one loop; each as `run` makes it, but for rounding."""
        if not 0 <= start_step < len(self.times):
            raise ValueError(f"start_step must be from 0 to {len(self.times) - 1}, got {start_step}")
        if start is None and start_step:
            raise ValueError(f"start must be given for step {start_step}, got none")
        video = noise(list(seeds)) if start is None else start
        words = world.words(list(prompts)).to(self._device)
        seen = (lambda step, latent: on_step(start_step + step, latent)) if on_step else (lambda step, latent: None)
        return euler(self._model, video.to(self._device), words, self._schedule[start_step:], seen)

    def decode(self, latent: Tensor) -> Tensor:
        """The latents of this model are videos."""
        return latent


def training_prompts(count: int, seed: int) -> list[str]:
    """Sentences of scenes that training may have seen, and the held-out checks never use."""
    return [world.sentence(scene) for scene in world.scenes(count, torch.Generator().manual_seed(seed))]
