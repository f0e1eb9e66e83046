"""A diffusers video pipeline as calibration and evaluation see it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import diffusers
import PIL.Image
import torch
from diffusers.utils import load_image
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from calibatt.plans import TokenGrid
from calibatt.runtime.adapters import Adapter, Arguments, adapter_for
from calibatt.tools.calibrate.chain import with_attributes
from calibatt.tools.calibrate.running import Steps, cheap_forward, seeded
from calibatt.tools.calibrate.sampler import Latent, parts

TRANSFORMERS = ("transformer", "transformer_2", "transformer_ref")
"""Denoisers that a pipeline may have."""
REHEARSAL = "nothing"
"""The prompt of runs in which transformers compute next to nothing."""


class PipelineError(ValueError):
    """A pipeline that cannot be used as a sampler."""


class _Forward(NamedTuple):
    """What one forward of the transformer was given, and in which of the pipeline's steps, 0 first."""

    step: int
    time: float
    grid: TokenGrid
    samples: int


class _Made(NamedTuple):
    """Arguments and seed of a run, and the latents after its last step, in the form in which the pipeline continues."""

    arguments: dict[str, Any]
    seed: int
    latents: Tensor


class PipelineSampler:
    """A `calibatt.tools.calibrate.sampler.Sampler` of a diffusers pipeline, a modular one included.

    The pipeline is called as its users call it: any scheduler, guidance in one or two forwards, offloading. Of a
    modular pipeline the block ``decode`` is run to decode only. Where there is sound, final latents are two. Grid and
    times are learnt from two runs of one seed with transformers that compute next to nothing, which also prove that a
    run can be repeated. They call `prompt_arguments` for the prompt "nothing".

        >>> sampler = PipelineSampler(
        ...     pipe, num_inference_steps=2, height=128, width=192, num_frames=17, prompt_arguments=embed
        ... )
        >>> sampler.grid
        TokenGrid(frames=5, height=8, width=12)
        >>> [round(time, 2) for time in sampler.times]  # denoising times of the steps, 1 is pure noise
        [1.0, 0.75]

    Args:
        pipe: The pipeline, on the device on which it shall run.
        transformer: Name of the denoiser to measure: a pipeline of two experts has two plans.
        adapter: The model's row; found by its class if absent.
        prompt_arguments: A function from a prompt to the arguments of the pipeline beside `arguments`;
            ``{"prompt": prompt}`` if absent.
        images: The image of each prompt, a path, URL or `PIL.Image.Image`, for a pipeline that takes one.
        arguments: Arguments of every call: height, width, num_frames, num_inference_steps, guidance_scale...

    Attributes:
        forwards: The denoising time of every forward in a run, in order; None for one of another transformer. Branches
            of guidance count one each where each has a forward of its own, and as one where they are a batch.
        times: Denoising times of the transformer, each once, falling.
        branches: How many samples a step gives the transformer: 2 with guidance, in two forwards or in one.

    Raises:
        PipelineError: The pipeline lacks the transformer, never calls it, does not repeat, or takes no images.
        UnknownModelError: No adapter fits the transformer.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        transformer: str = "transformer",
        adapter: Adapter | None = None,
        prompt_arguments: Callable[[str], dict[str, Any]] = lambda prompt: {"prompt": prompt},
        images: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        model = getattr(pipe, transformer, None)
        self._name = type(pipe).__name__
        if not isinstance(model, nn.Module):
            raise PipelineError(f"the pipeline must have a {transformer}, got {self._name} without")
        self.pipe, self.transformer = pipe, model
        self.arguments, self._prompt_arguments = arguments, prompt_arguments
        self.adapter = adapter or adapter_for(model)
        self._set_images(images or {})
        self._made = WeakTensorKeyDictionary()
        """By each tensor that `run` and `run_batch` returned, as long as it lives: the runs that made it."""
        self.versions = {
            "diffusers": diffusers.__version__,
            "pipeline": self._name,
            "scheduler": type(pipe.scheduler).__name__,
        }
        forwards = self.prove_repeatable()
        present = [forward for forward in forwards if forward is not None]
        if not present:
            raise PipelineError(f"the pipeline must call its {transformer}, got a run of {self._name} without")
        if len(grids := {forward.grid for forward in present}) > 1:
            raise PipelineError(f"all forwards must have one token grid, got {', '.join(map(str, grids))}")
        self.grid = present[0].grid
        self.forwards = tuple(forward and forward.time for forward in forwards)
        self.times = sorted({forward.time for forward in present}, reverse=True)
        self.branches = sum(forward.samples for forward in present if forward.step == present[0].step)

    @property
    def other_transformers(self) -> tuple[nn.Module, ...]:
        """The pipeline's other denoisers, through which errors travel too."""
        candidates = (getattr(self.pipe, name, None) for name in TRANSFORMERS)
        return tuple(x for x in candidates if isinstance(x, nn.Module) and x is not self.transformer)

    def check(self, prompts: Sequence[str]) -> None:
        """Proves that prompts can be sampled.

        Raises:
            ValueError: A prompt is empty, or its image cannot be read.
            PipelineError: The pipeline needs an image, and a prompt has none.
        """
        for index, prompt in enumerate(prompts):
            if not prompt.strip():
                raise ValueError(f"prompt {index} must not be empty, got {prompt!r}")
            if self._images or _needs_image(self.pipe):
                self._arguments_of(prompt)

    def prove_repeatable(self) -> list[_Forward | None]:
        """Proves that one seed always gives the same latents, whatever the transformer computes.

        Returns:
            The forwards of a run, None for one of another transformer.

        Raises:
            PipelineError: Two runs differ.
        """
        (first, forwards), (second, _) = self._rehearse(), self._rehearse()
        if not all(map(torch.equal, first, second)):
            raise PipelineError(
                f"one seed must always give the same latents, got others the second time from {self._name} with "
                f"{self.versions['scheduler']}"
            )
        return forwards

    def check_decode(self) -> None:
        """Proves that `decode` works, by a run with transformers that compute next to nothing and its decoding.

        Raises:
            PipelineError: The pipeline has no VAE, or its decoding fails.
        """
        self._check_vae()
        try:
            self._decoded(self._arguments_of(REHEARSAL), 0)
        except Exception as error:
            raise PipelineError(f"{self._name} must decode its latents, got {type(error).__name__}: {error}") from error

    def run(self, prompt: str, seed: int) -> Latent:
        """Samples a prompt: what the pipeline returns with ``output_type="latent"``.

        Every random number follows from the seed, and the random states of torch, numpy and Python stay as they were.

        Raises:
            PipelineError: The pipeline needs an image, and the prompt has none.
        """
        return self.run_batch([prompt], [seed])

    def run_batch(self, prompts: Sequence[str], seeds: Sequence[int]) -> Latent:
        """Samples prompts one after the other; see `run`."""
        results, made = [], []
        for prompt, seed in zip(prompts, seeds, strict=True):
            arguments, steps = self._arguments_of(prompt), Steps()
            results.append(self._call(arguments, seed, steps))
            made.append(_Made(arguments, seed, steps.latents))
        latents = tuple(map(torch.cat, zip(*results, strict=True)))
        self._made[latents[0]] = made
        return latents[0] if len(latents) == 1 else latents

    def decode(self, latent: Latent) -> Tensor:
        """Videos ``(n, 3, F, H, W)`` in [-1, 1], by the pipeline's own code.

        The pipeline is called once more as it was for the latents, with transformers that compute next to nothing, and
        goes on from the latents that its last step had.

        Args:
            latent: What `run` or `run_batch` returned, the very tensors: decoding may need prompt, image and seed.

        Raises:
            PipelineError: The pipeline has no VAE, or the tensor is another one.
        """
        self._check_vae()
        if (made := self._made.get(parts(latent)[0])) is None:
            raise PipelineError("decode must get a tensor that run or run_batch of this sampler returned, got another")
        return torch.cat([self._decoded(*each) for each in made])

    def _check_vae(self) -> None:
        if getattr(self.pipe, "vae", None) is None:
            raise PipelineError(f"to decode latents the pipeline must have a vae, got {self._name} without")

    def _decoded(self, arguments: dict[str, Any], seed: int, latents: Tensor | None = None) -> Tensor:
        """What the pipeline shows after a run that ends with these latents; if absent, with its own."""
        with self._standing_in():
            video = self._call(arguments, seed, Steps(latents), "pt")[0]  # (n, F, 3, H, W) in [0, 1]
        return video.transpose(1, 2).float() * 2 - 1

    def _set_images(self, images: Mapping[str, Any]) -> None:
        if images and "image" not in _inputs(self.pipe):
            raise PipelineError(f"images must be for a pipeline that takes an image, got {self._name}")
        self._images = dict(images)

    def _arguments_of(self, prompt: str) -> dict[str, Any]:
        """All arguments for a prompt."""
        arguments = {**self.arguments, **self._prompt_arguments(prompt)}
        if prompt in self._images:
            image = self._images[prompt]
            arguments["image"] = load_image(image if isinstance(image, PIL.Image.Image) else str(image))
        if _needs_image(self.pipe) and arguments.get("image") is None:
            if prompt != REHEARSAL:
                raise PipelineError(
                    f"{self._name} must have an image for every prompt (--images, or images of PipelineSampler), got "
                    f"none for {prompt!r}"
                )
            arguments["image"] = PIL.Image.new("RGB", (64, 64), "grey")
        return arguments

    def _call(
        self, arguments: dict[str, Any], seed: int, steps: Steps, output_type: str = "latent"
    ) -> tuple[Tensor, ...]:
        """The result of the pipeline: the video or its latents, and the latents of its sound if it has one."""
        arguments = {**arguments, "generator": torch.Generator("cpu").manual_seed(seed)}
        modular, latent = _is_modular(self.pipe), output_type == "latent"
        with seeded(seed, self.pipe._execution_device), ExitStack() as stack:
            if "callback_on_step_end" in _inputs(self.pipe):
                arguments["callback_on_step_end"] = steps.on_step_end
            else:
                scheduler = self.pipe.scheduler
                stack.enter_context(with_attributes(scheduler, step=steps.after(scheduler.step)))
            if modular and latent:
                blocks = self.pipe.blocks
                blocks.sub_blocks.pop("decode", None)
                stack.enter_context(with_attributes(self.pipe, _blocks=blocks))
            else:
                arguments["output_type"] = output_type
            made = self.pipe(**arguments)
        names = ("latents", "audio_latents") if modular else ("frames", "audio")
        names = names if latent else ("videos",) if modular else names[:1]
        outputs = [x for x in (getattr(made, name, None) for name in names) if x is not None]
        if modular and len(outputs) > 1:
            outputs[1] = outputs[1][None]  # both channels of one video
        return tuple(x if isinstance(x, Tensor) else torch.stack(list(x)) for x in outputs)

    def _rehearse(self) -> tuple[tuple[Tensor, ...], list[_Forward | None]]:
        """The latents of a run whose transformers compute next to nothing, and its forwards."""
        forwards: list[_Forward | None] = []
        steps = Steps()

        def seen(arguments: Arguments) -> None:
            time = float(self.adapter.time(arguments))
            grid = self.adapter.token_grid(self.transformer, arguments)
            forwards.append(_Forward(steps.count, time, grid, len(arguments["hidden_states"])))

        with self._standing_in(seen, lambda arguments: forwards.append(None)):
            return self._call(self._arguments_of(REHEARSAL), 0, steps), forwards

    @contextmanager
    def _standing_in(
        self,
        seen: Callable[[Arguments], None] = lambda arguments: None,
        others: Callable[[Arguments], None] = lambda arguments: None,
    ) -> Iterator[None]:
        """Replaces the forwards of this sampler's transformer and of the others by ones that report their arguments."""
        with ExitStack() as stack:
            for name in TRANSFORMERS:
                model = getattr(self.pipe, name, None)
                if isinstance(model, nn.Module):
                    show = seen if model is self.transformer else others
                    forward = cheap_forward(model, self.adapter.channel_axis, show)
                    stack.enter_context(with_attributes(model, forward=forward, _compiled_call_impl=None))
            yield


def with_images(sampler: Any, images: Mapping[str, Any]) -> PipelineSampler:
    """A sampler like this one, with these images of prompts; see `PipelineSampler`.

    Raises:
        PipelineError: It is no `PipelineSampler`, or its pipeline takes no image.
    """
    if not isinstance(sampler, PipelineSampler):
        raise PipelineError(f"images must be for a PipelineSampler, got {type(sampler).__name__}")
    other = copy.copy(sampler)
    other._set_images(images)
    return other


def _is_modular(pipe: Any) -> bool:
    return isinstance(pipe, getattr(diffusers, "ModularPipeline", ()))


def _inputs(pipe: Any) -> Mapping[str, bool]:
    """Names of the arguments that a pipeline can be called with, and whether each is required."""
    if _is_modular(pipe):
        return {x.name: x.required for x in pipe.blocks.inputs}
    parameters = inspect.signature(type(pipe).__call__).parameters
    return {name: x.default is x.empty for name, x in parameters.items()}


def _needs_image(pipe: Any) -> bool:
    """Whether a pipeline starts from an image; some declare the argument optional although they need it."""
    named = any("ImageToVideo" in kind.__name__ for kind in type(pipe).__mro__)
    inputs = _inputs(pipe)
    return "image" in inputs and (named or inputs["image"])
