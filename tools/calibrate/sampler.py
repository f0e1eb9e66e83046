"""What calibration needs of a sampler, for any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from calibatt.plans import TokenGrid
from calibatt.runtime.adapters import Adapter, adapter_for

Latent = Tensor | tuple[Tensor, ...]
"""Final latents ``(n, ...)`` of videos; with sound a pair of both latents, which count the same."""


def parts(latent: Latent) -> tuple[Tensor, ...]:
    """The latent of the videos, and that of their sound if they have one."""
    return (latent,) if isinstance(latent, Tensor) else tuple(latent)


class Sampler(Protocol):
    """A model with its denoising loop; the same prompt and seed always give the same result, bit for bit.

    A sampler may also have ``forwards``, the denoising time of every forward of a run (None for another transformer);
    ``branches``, how many samples a step gives the transformer (1 if absent); and ``check_decode()``, which proves
    before any work that `decode` works.

    Attributes:
        transformer: The model whose self-attention is measured.
        grid: Its token sequence.
        times: The denoising times that the transformer receives in a run, each once, falling, in [0, 1].
        versions: Versions or digests, by name, of everything else that determines the result.
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

    def run(self, prompt: str, seed: int) -> Latent:
        """The final latent ``(1, ...)`` of one prompt, from the noise of a seed."""

    def run_batch(self, prompts: Sequence[str], seeds: Sequence[int]) -> Latent:
        """Final latents ``(n, ...)`` of several prompts, each the same as by `run`, up to rounding."""

    def decode(self, latent: Latent) -> Tensor:
        """Decodes what `run` or `run_batch` returned to videos ``(n, 3, F, H, W)`` in [-1, 1]; only evaluation does."""


def transformers_of(sampler: Sampler, adapter: Adapter | None = None) -> dict[nn.Module, Adapter]:
    """All transformers of a sampling and their rows, the measured one first.

    Args:
        sampler: The sampler.
        adapter: The measured model's row; the sampler's own, or that of the model's class, if absent.

    Raises:
        UnknownModelError: No row fits a model.
    """
    own = adapter or getattr(sampler, "adapter", None) or adapter_for(sampler.transformer)
    others = (model for model in getattr(sampler, "other_transformers", ()) if model is not sampler.transformer)
    return {sampler.transformer: own} | {model: adapter_for(model) for model in others}
