"""What ``--model`` may name: the demo model, or a function that makes a sampler."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # --help works without torch
    from calibatt.tools.calibrate.sampler import Sampler

DEFAULT_SAMPLES = 8
MOST_TIMES = 15
"""Steps that are measured by default; plans are keyed by time, so a finer schedule may follow them."""
SMALL_TOKENS = 8192
"""Grids of at most so many tokens gain by blocks of 64, and several random vectors a sampling cost little on a GPU."""
FIRST_SEED = 5000
"""Seed of the first held-out video; each further one has the next."""
PROMPTS_FILE = Path(__file__).with_name("prompts.txt")
"""Prompts to calibrate on where the user has none: people, animals, places, motion of things and of the camera."""
MODEL_HELP = (
    "demo (or demo-medium, demo-large, demo-few-steps, demo-few-steps-noise), or MODULE:FUNCTION; "
    "FUNCTION(steps, device) returns a Sampler, for example a PipelineSampler."
)


def _demo(name: str, steps: int | None, device: str) -> Sampler:
    from calibatt.tools.demo_model.sampler import named

    return named(name, steps, device)


DEMOS = ("demo", "demo-medium", "demo-large", "demo-few-steps", "demo-few-steps-noise")
SAMPLERS: dict[str, Callable[[int | None, str], Sampler]] = {name: partial(_demo, name) for name in DEMOS}
"""Samplers that come with us, by name."""


def make_sampler(model: str, steps: int | None, device: str) -> Sampler:
    """The sampler of a ``--model``.

    Args:
        model: A name of `SAMPLERS`, or ``module:function``; modules in the working directory are found.
        steps: Denoising steps; None: the model's own.
        device: ``cpu`` or ``cuda``.

    Raises:
        ValueError: There is no such model, or the function returns something else.
    """
    if model in SAMPLERS:
        return SAMPLERS[model](steps, device)
    module, _, name = model.partition(":")
    if not module or not name:
        raise ValueError(f"--model must be one of {', '.join(SAMPLERS)}, or MODULE:FUNCTION, got {model!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(import_module(module), name)
    except Exception as error:
        raise ValueError(f"--model {model} must be a function that can be imported, got {_where(error)}") from error
    try:
        sampler = function(steps, device)
    except Exception as error:
        raise ValueError(f"--model {model} must return a Sampler, got {_where(error)}") from error
    if lacking := [part for part in ("transformer", "grid", "times", "versions", "run") if not hasattr(sampler, part)]:
        kind = type(sampler).__name__
        raise ValueError(f"--model {model} must return a Sampler, got {kind} without {', '.join(lacking)}")
    return sampler


def _where(error: Exception) -> str:
    """An error raised by code that is not ours, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def default_prompts() -> list[str]:
    """Our prompts, one a line of `PROMPTS_FILE`."""
    return PROMPTS_FILE.read_text("utf-8").splitlines()
