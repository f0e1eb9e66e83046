"""A diffusers video pipeline as calibration and evaluation see it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from calibatt.plans import TokenGrid
from calibatt.runtime.adapters import Adapter, Arguments, adapter_for
from calibatt.tools.calibrate.sampler import OnStep

TRANSFORMERS = ("transformer", "transformer_2")
"""Denoisers that a pipeline may have."""


class PipelineError(ValueError):
    """A pipeline that cannot be sampled as it must be."""


class PipelineSampler:
    """A `calibatt.tools.calibrate.sampler.Sampler` of a diffusers pipeline.

    ``branches`` says how many samples a step gives the transformer: 2 with guidance, in two forwards or in one.

    The pipeline is called as its users call it: any scheduler, guidance in one or two forwards, offloading. Grid and
    times are learnt from a run with a transformer that computes nothing. A run always begins at the noise, because
    solvers of higher order keep a history; probes of late times therefore cost a whole run each.

    Args:
        pipe: The pipeline, where it shall run.
        transformer: Which of its denoisers is meant: a pipeline of two experts has two plans.
        adapter: The model's row; found by its class if absent.
        prompt_arguments: What the pipeline is called with for a prompt, beside `arguments`; ``{"prompt": prompt}`` if
            absent.
        arguments: What every call has: height, width, num_frames, num_inference_steps, guidance_scale...

    Raises:
        PipelineError: The pipeline lacks the transformer, or never calls it.
        UnknownModelError: No adapter fits the transformer.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        transformer: str = "transformer",
        adapter: Adapter | None = None,
        prompt_arguments: Callable[[str], dict[str, Any]] = lambda prompt: {"prompt": prompt},
        **arguments: Any,
    ) -> None:
        model = getattr(pipe, transformer, None)
        if not isinstance(model, nn.Module):
            raise PipelineError(f"the pipeline must have a {transformer}, got {type(pipe).__name__} without")
        self.pipe, self.transformer = pipe, model
        self.arguments, self._prompt_arguments = arguments, prompt_arguments
        self.versions = {
            "diffusers": diffusers.__version__,
            "pipeline": type(pipe).__name__,
            "scheduler": type(pipe.scheduler).__name__,
        }
        self.grid, self.times, self._first, self.branches = self._learn(adapter or adapter_for(model))

    def check(self, prompts: Sequence[str]) -> None:
        """A pipeline takes any prompt.

        Raises:
            ValueError: A prompt is empty.
        """
        for index, prompt in enumerate(prompts):
            if not prompt.strip():
                raise ValueError(f"prompt {index} must not be empty, got {prompt!r}")

    def run(
        self, prompt: str, seed: int, start_step: int = 0, start: Tensor | None = None, on_step: OnStep | None = None
    ) -> Tensor:
        """Samples a prompt; see `Sampler.run`.

        Steps are those of this transformer. `start_step` and `start` change nothing: a run from the noise passes
        through the same latents.
        """

        def seen(step: int, latents: Tensor) -> None:
            if on_step is not None and 0 <= step - self._first < len(self.times):
                on_step(step - self._first, latents)

        return self._call(prompt, seed, seen)

    def run_batch(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        start_step: int = 0,
        start: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Samples prompts one after the other; `on_step` is not called, since no step has all of their latents.

        Raises:
            PipelineError: `on_step` is given.
        """
        if on_step is not None:
            raise PipelineError("on_step must not be given to run_batch of a pipeline: its prompts run one by one")
        return torch.cat([self.run(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)])

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Videos ``(n, 3, F, H, W)`` in [-1, 1], by the pipeline's VAE.

        Raises:
            PipelineError: The VAE does not say how its latents are normalised.
        """
        vae = self.pipe.vae
        config = vae.config
        if getattr(config, "latents_mean", None) is None or getattr(config, "latents_std", None) is None:
            raise PipelineError(f"the VAE must have latents_mean and latents_std, got {type(vae).__name__} without")
        shape = (1, -1, 1, 1, 1)
        mean, std = (
            torch.tensor(values).view(shape).to(latent) for values in (config.latents_mean, config.latents_std)
        )
        return vae.decode((latent * std + mean).to(vae.dtype), return_dict=False)[0].float().clamp(-1, 1)

    def _call(self, prompt: str, seed: int, seen: Callable[[int, Tensor], None]) -> Tensor:
        def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            seen(step + 1, tensors["latents"])
            return {}

        with _first_sample(self.pipe.scheduler, lambda latents: seen(0, latents)):
            found = self.pipe(
                **self.arguments,
                **self._prompt_arguments(prompt),
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="latent",
                callback_on_step_end=on_step_end,
            )
        return found.frames if isinstance(found.frames, Tensor) else torch.stack(list(found.frames))

    def _learn(self, adapter: Adapter) -> tuple[TokenGrid, list[float], int, int]:
        """Grid and falling times of the transformer's forwards, the first step that calls it, and how many samples
        each step gives it.
        """
        found: list[tuple[int, float, TokenGrid, int]] = []
        step = 0

        def seen(now: int, latents: Tensor) -> None:
            nonlocal step
            step = now

        def forward(arguments: Arguments) -> None:
            time, grid = float(adapter.time(arguments)), adapter.token_grid(self.transformer, arguments)
            found.append((step, time, grid, len(arguments["hidden_states"])))

        with ExitStack() as stack:
            for name in TRANSFORMERS:
                model = getattr(self.pipe, name, None)
                if isinstance(model, nn.Module):
                    stack.enter_context(
                        _computing_nothing(model, forward if model is self.transformer else None, adapter)
                    )
            self._call("nothing", 0, seen)
        if not found:
            raise PipelineError("the pipeline must call the transformer, got a run without")
        if len(grids := {grid for _, _, grid, _ in found}) > 1:
            raise PipelineError(f"all forwards must have one token grid, got {', '.join(map(str, grids))}")
        times = [time for _, time, _, _ in found]
        branches = sum(size for _, time, _, size in found if time == times[0])
        return found[0][2], list(dict.fromkeys(times)), found[0][0], branches


@contextmanager
def _first_sample(scheduler: Any, seen: Callable[[Tensor], None]) -> Iterator[None]:
    """Shows the latents that a scheduler's first step starts from; no callback of a pipeline does."""
    step = scheduler.step
    names = tuple(inspect.signature(step).parameters)

    def first(*args: Any, **kwargs: Any) -> Any:
        scheduler.step = step
        seen((dict(zip(names, args, strict=False)) | kwargs)["sample"])
        return step(*args, **kwargs)

    scheduler.step = first
    try:
        yield
    finally:
        del scheduler.step


@contextmanager
def _computing_nothing(
    model: nn.Module, forward: Callable[[Arguments], None] | None, adapter: Adapter
) -> Iterator[None]:
    """A transformer whose forward tells its arguments and returns zeros."""
    names = tuple(inspect.signature(type(model).forward).parameters)[1:]
    own = model.__dict__.get("forward")

    def stub(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if forward is not None:
            forward(arguments)
        hidden = arguments["hidden_states"]
        shape = list(hidden.shape)
        shape[adapter.channel_axis] = getattr(model.config, "out_channels", None) or shape[adapter.channel_axis]
        zeros = hidden.new_zeros(shape)
        if arguments.get("return_dict", True):
            return diffusers.models.modeling_outputs.Transformer2DModelOutput(sample=zeros)
        return (zeros,)

    model.forward = stub  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own  # type: ignore[method-assign]
