"""How a pipeline is run for a sampler: its steps followed, its random numbers seeded, its transformers replaced."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from calibatt.runtime.adapters import Arguments, unwrap


class Steps:
    """Follows the steps of a pipeline.

    Args:
        end: Latents that replace the pipeline's own after each step; None: nothing is replaced.
    """

    def __init__(self, end: Tensor | None = None) -> None:
        self.count, self.latents, self._end = 0, end, end

    def on_step_end(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The callback of diffusers after every step; diffusers continues with the latents that it returns, if any."""
        self.count += 1
        self.latents = tensors["latents"]
        return {} if self._end is None else {"latents": self._end.clone()}  # some are written over

    def after(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Replaces a scheduler's step, for a pipeline that has no callback."""

        def followed(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            other = self.on_step_end(None, self.count, None, {"latents": result[0]})
            return (other["latents"], *result[1:]) if other else result

        return followed


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds all global random states, for code that draws without a generator, and restores them afterwards."""
    # Another seed than the generator's: noise that is drawn in a step must differ from the initial noise.
    seed = random.Random(seed).getrandbits(32)
    cuda = device.type == "cuda" or torch.cuda.is_initialized()
    ours, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if cuda else (), device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed_all(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(numpys)


def cheap_forward(model: nn.Module, channel_axis: int, seen: Callable[[Arguments], None]) -> Callable[..., Any]:
    """A forward that shows its arguments and returns a tenth of its latents and of those of the sound."""
    names = tuple(inspect.signature(type(unwrap(model)).forward).parameters)[1:]

    @wraps(type(unwrap(model)).forward.__get__(model))  # some pipelines pass what the signature has
    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        seen(arguments)
        hidden = arguments["hidden_states"]
        given = hidden.shape[channel_axis]
        made = next(
            filter(None, (getattr(model.config, name, None) for name in ("out_channels", "out_visual_dim"))), given
        )
        channels = torch.arange(made, device=hidden.device) % given
        sample, audio = 0.1 * hidden.index_select(channel_axis, channels), arguments.get("audio_hidden_states")
        if arguments.get("return_dict", True):
            return diffusers.models.modeling_outputs.Transformer2DModelOutput(sample=sample)
        return (sample,) if audio is None else (sample, 0.1 * audio)

    return forward
