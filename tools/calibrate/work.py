"""Plans the work of a calibration: its prompts, what is measured, and defaults that follow from model and grid."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from calibatt.compiler.stats import Manifest, default_windows
from calibatt.plans import Blocks, TokenGrid
from calibatt.runtime.adapters import Adapter
from calibatt.runtime.backends import UnsupportedBackendError
from calibatt.tools.calibrate.calibration import CalibrationError
from calibatt.tools.calibrate.chain import ChainError
from calibatt.tools.calibrate.checks import CheckError, check_gradients, check_model
from calibatt.tools.calibrate.models import DEFAULT_SAMPLES, DEMOS, MOST_TIMES, SMALL_TOKENS, default_prompts
from calibatt.tools.calibrate.pipeline import PipelineError
from calibatt.tools.calibrate.sampler import Sampler, transformers_of

SMALL_VECTORS = 8
ROW_RADIUS, FRAME_RADIUS = 3, 4

MODEL_ERRORS = (CalibrationError, ChainError, CheckError, PipelineError, UnsupportedBackendError, ValueError)
"""Errors of a user's model or call."""

Work = list[tuple[str, int]]
"""Prompts and their seeds."""


def default_block_size(grid: TokenGrid, device: torch.device) -> int:
    """Tokens of a block: 128, the size for the fastest kernel; 64 for small grids and on a CPU."""
    return 128 if device.type == "cuda" and grid.tokens > SMALL_TOKENS else 64


def default_vectors(grid: TokenGrid, device: torch.device) -> int:
    """Random vectors for each sampling: one, and more for small grids on a GPU."""
    return SMALL_VECTORS if device.type == "cuda" and grid.tokens <= SMALL_TOKENS else 1


def make_manifest(
    sampler: Sampler,
    *,
    block_size: int | None = None,
    times: int | None = None,
    every: int | None = None,
    thresholds: tuple[float, ...] = (),
    adapter: Adapter | None = None,
) -> Manifest:
    """The manifest of a store: what is measured of a sampler's model.

    Args:
        sampler: The sampler.
        block_size: Tokens per query and per key block; `default_block_size` if absent.
        times: How many of the steps are measured, evenly spread from the first to the last; at most `MOST_TIMES` if
            absent.
        every: In place of `times`: measure every so many steps, from the first one on.
        thresholds: Shares of attention mass whose blocks are counted, for the paper's own method; ascending.
        adapter: The model's row; found by its class if absent.

    Returns:
        Its manifest.

    Raises:
        CalibrationError: There are fewer steps, or both `times` and `every` are given.
        StoreError: A value breaks its rule.
        UnknownModelError: No adapter fits the model.
    """
    steps = len(sampler.times)
    if times is not None and every is not None:
        raise CalibrationError(f"measured steps must be chosen by times or by every, got times {times}, every {every}")
    if times is not None and times > steps:
        raise CalibrationError(f"the number of measured times must be at most {steps} steps, got {times}")
    chosen = range(0, steps, every) if every is not None else spread(steps, times or min(steps, MOST_TIMES))
    transformer, grid = sampler.transformer, sampler.grid
    size = block_size or default_block_size(grid, device_of(sampler))
    return Manifest(
        model=transformers_of(sampler, adapter)[transformer].signature(transformer),
        grid=grid,
        blocks=Blocks(size, size),
        times=tuple(sorted(sampler.times[step] for step in chosen)),
        windows=default_windows(grid),
        row_radius=min(ROW_RADIUS, grid.height - 1),
        frame_radius=min(FRAME_RADIUS, grid.frames - 1),
        thresholds=thresholds,
        versions={
            "calibatt": importlib.metadata.version("calibatt"),
            "torch": str(torch.__version__),
            **sampler.versions,
        },
    )


def check_sampler(sampler: Sampler, adapter: Adapter | None = None) -> None:
    """Refuses a sampler whose transformers cannot all be differentiated, before any work.

    Raises:
        CheckError: Names the model or layer and what to do.
        UnknownModelError: No row fits a model.
    """
    for model in (sampler.transformer, *getattr(sampler, "other_transformers", ())):
        check_model(model)
    for model, row in transformers_of(sampler, adapter).items():
        check_gradients(model, row)


@contextmanager
def device_memory(hint: str) -> Iterator[None]:
    """Context manager or decorator: says in one line that the device has too little memory, and what takes less."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise MemoryError(f"device memory must suffice, got too little; {hint}") from None


def device_of(sampler: Sampler) -> torch.device:
    """The device on which the sampler's model computes, even if its weights wait elsewhere between uses."""
    pipe = getattr(sampler, "pipe", None)
    device = getattr(pipe, "_execution_device", None) if pipe is not None else None
    return torch.device(device) if device is not None else next(sampler.transformer.parameters()).device


def spread(size: int, count: int) -> list[int]:
    """At most `count` of the numbers below `size`, evenly spread, the first and last among them."""
    return sorted({int(index) for index in np.linspace(0, size - 1, min(count, size)).round()})


def read_prompts(path: Path) -> list[str]:
    """Reads one prompt a line; empty lines are skipped, and so is the mark of UTF-8 that some editors write.

    Raises:
        ValueError: The file is not UTF-8 or has no prompt.
        OSError: It cannot be read.
    """
    try:
        prompts = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8, got {error}") from None
    if not prompts:
        raise ValueError(f"{path} must have at least one prompt, one a line, got none")
    return prompts


def read_images(path: Path, prompts: list[str]) -> dict[str, str]:
    """Reads the image of each prompt: one path or address a line, in the order of the prompts.

    Raises:
        ValueError: There are fewer images than prompts, or a prompt comes twice.
        OSError: The file cannot be read.
    """
    images = read_prompts(path)
    if len(set(prompts)) < len(prompts):
        raise ValueError("prompts with --images must differ, since each has one image, got one twice")
    if len(images) < len(prompts):
        raise ValueError(f"--images must name an image for each of {len(prompts)} prompts, got {len(images)} in {path}")
    return dict(zip(prompts, images, strict=False))


def plan_work(model: str, path: Path | None, samples: int | None, seed: int) -> Work:
    """The prompts and their seeds: `seed` for the first, one more for each.

    Raises:
        ValueError: More samples than prompts.
        OSError: The file cannot be read.
    """
    if path is not None:
        prompts = read_prompts(path)
        if samples is not None and samples > len(prompts):
            raise ValueError(f"--samples must be at most the {len(prompts)} prompts of {path}, got {samples}")
        prompts = prompts[:samples]
    elif model in DEMOS:
        from calibatt.tools.demo_model.sampler import training_prompts  # diffusers, which other models may lack

        prompts = training_prompts(samples or DEFAULT_SAMPLES, seed)
    else:
        known = default_prompts()
        if samples is not None and samples > len(known):
            raise ValueError(
                f"--samples must be at most our {len(known)} prompts, or come with --prompts, got {samples}"
            )
        prompts = known[: samples or DEFAULT_SAMPLES]
    return [(prompt, seed + index) for index, prompt in enumerate(prompts)]


def pick_device(device: str) -> str:
    """The device that ``--device`` names.

    Raises:
        ValueError: This machine has no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        named = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu or cuda, got {device!r}") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0}.get(named.type, 0)
    if (named.index or 0) >= count:
        raise ValueError(f"--device must be a device of this machine, got {device!r}")
    return device
