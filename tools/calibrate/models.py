"""What ``--model`` may name: the demo model, or a function that makes a sampler."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from calibatt.tools.calibrate.sampler import Sampler

PROMPTS_FILE = Path(__file__).with_name("prompts.txt")
"""Prompts to calibrate on where the user has none: people, animals, places, motion of things and of the camera."""
MODEL_HELP = "demo, or MODULE:FUNCTION; FUNCTION(steps, device) returns a Sampler, for example a PipelineSampler."


def _demo(steps: int | None, device: str) -> Sampler:
    from calibatt.tools.demo.sampler import STEPS, DemoSampler

    return DemoSampler(steps=steps or STEPS, device=device)


def _demo_prompts(count: int, seed: int) -> list[str]:
    from calibatt.tools.demo.sampler import training_prompts

    return training_prompts(count, seed)


SAMPLERS: dict[str, Callable[[int | None, str], Sampler]] = {"demo": _demo}
"""Samplers that come with us, by name."""
PROMPTS: dict[str, Callable[[int, int], list[str]]] = {"demo": _demo_prompts}
"""Models that have prompts of their own."""


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
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--model {model} must be a function that can be imported, got {error}") from error
    sampler = function(steps, device)
    if lacking := [part for part in ("transformer", "grid", "times", "versions", "run") if not hasattr(sampler, part)]:
        kind = type(sampler).__name__
        raise ValueError(f"--model {model} must return a Sampler, got {kind} without {', '.join(lacking)}")
    return sampler


def default_prompts() -> list[str]:
    """Our prompts, one a line of `PROMPTS_FILE`."""
    return PROMPTS_FILE.read_text("utf-8").splitlines()
