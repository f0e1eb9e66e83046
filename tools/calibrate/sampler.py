"""What calibration must know of a sampler, whatever the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn

from calibatt.plans import TokenGrid

OnStep = Callable[[int, Tensor], None]


class Sampler(Protocol):
    """A model with its denoising loop; the same prompt and seed always give the same result.

    Attributes:
        transformer: The model whose self-attention is measured.
        grid: Its token sequence.
        times: Denoising time that the transformer receives at each step, falling, in [0, 1].
        versions: What else made the result: names to versions or digests.
    """

    transformer: nn.Module
    grid: TokenGrid
    times: list[float]
    versions: dict[str, str]

    def check(self, prompts: Sequence[str]) -> None:
        """Proves that prompts can be sampled.

        Raises:
            ValueError: One cannot; says which and why.
        """

    def run(
        self, prompt: str, seed: int, start_step: int = 0, start: Tensor | None = None, on_step: OnStep | None = None
    ) -> Tensor:
        """Samples one prompt.

        Args:
            prompt: What to show.
            seed: Of the noise.
            start_step: The first step to take.
            start: The latent that enters `start_step`, as `on_step` saw it; the seed's noise for step 0 if absent.
            on_step: Called with every step and the latent that enters it.

        Returns:
            The final latent.
        """

    def run_batch(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        start_step: int = 0,
        start: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Samples several prompts in one loop, each as `run` does but for rounding; only evaluation asks for it."""

    def decode(self, latent: Tensor) -> Tensor:
        """Final latents ``(n, ...)`` as videos ``(n, 3, F, H, W)`` in [-1, 1]; only evaluation asks for it."""
