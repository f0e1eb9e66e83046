"""The demo model as calibration sees it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import diffusers
import torch
from torch import Tensor

from calibatt.plans import TokenGrid
from calibatt.tools.demo import world
from calibatt.tools.demo.model import STEPS, WEIGHTS, DemoModel, generate, times


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
        self.transformer = model.transformer
        self.times = times(steps)[:-1].tolist()
        frames, height, width = model.config["patch_size"]
        self.grid = TokenGrid(world.FRAMES // frames, world.PIXELS // height, world.PIXELS // width)

    def check(self, prompts: Sequence[str]) -> None:
        """Raises `PromptError` for the first prompt that is no sentence of the demo's world."""
        world.words(list(prompts))

    def run(self, prompt: str, seed: int) -> Tensor:
        """One video ``(1, 3, F, H, W)``."""
        return self.run_batch([prompt], [seed])

    def run_batch(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Videos ``(n, 3, F, H, W)`` of several prompts in one loop; each as `run` makes it, but for rounding."""
        return generate(self._model, list(prompts), list(seeds), len(self.times))

    def decode(self, latent: Tensor) -> Tensor:
        """The latents of this model are videos."""
        return latent


def training_prompts(count: int, seed: int) -> list[str]:
    """Sentences of scenes that training may have seen, and the held-out checks never use."""
    return [world.sentence(scene) for scene in world.scenes(count, torch.Generator().manual_seed(seed))]
