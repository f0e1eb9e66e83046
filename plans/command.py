"""What all commands share: how they fail. One line on stderr, and an exit code that says which kind of failure."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

from calibatt.plans.errors import PlanError, legible

P = ParamSpec("P")
R = TypeVar("R")

FAILED, WRONG, INCOMPLETE, INTERRUPTED = 1, 2, 3, 130
"""Exit codes: a requirement does not hold; the call or its input is wrong; the result is written, but not all that
should follow it; Ctrl-C."""
EXTRAS = {
    "runtime": ("torch", "triton"),
    "tools": ("matplotlib", "PIL", "safetensors"),
    "models": ("diffusers", "transformers", "ftfy", "peft"),
}
"""What each extra of the package brings, by the names that are imported."""
NOBODY_READS = "not all could be said: the output was closed before all was written"


class Incomplete(Exception):
    """The result is written, but something that should follow it is not; the message says what."""


def told(error: BaseException) -> str:
    """An error as one line that does nothing to a terminal."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, ModuleNotFoundError):
        extra = next((name for name, brings in EXTRAS.items() if (error.name or "").split(".")[0] in brings), None)
        text = f"{error.name} must be installed: pip install '{f'calibatt[{extra}]' if extra else error.name}'"
    return legible(" ".join((text or type(error).__name__).split()))


def fail(name: str, reason: str, code: int = WRONG) -> NoReturn:
    """Says why on stderr, and ends with an exit code."""
    print(f"{name}: {reason}", file=sys.stderr)
    raise SystemExit(code)


def one_line(name: str | Callable[[], str], *errors: type[Exception]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates the function of a command: what is expected to go wrong ends in one line and an exit code.

    Args:
        name: Of the command, or what says it.
        errors: What else is expected, besides plans and files that are wrong, missing modules and too little memory.
    """
    expected: tuple[type[Exception], ...] = (PlanError, OSError, MemoryError, ModuleNotFoundError, *errors)

    def decorate(call: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(call)
        def framed(*args: P.args, **kwargs: P.kwargs) -> R:
            for stream in (sys.stdout, sys.stderr):  # an ASCII terminal shows ? for other characters
                if hasattr(stream, "reconfigure"):
                    stream.reconfigure(errors="replace")
            who = name if isinstance(name, str) else name()
            try:
                result = call(*args, **kwargs)
                sys.stdout.flush()
                return result
            except KeyboardInterrupt:
                fail(who, "interrupted", INTERRUPTED)
            except Incomplete as error:
                _quiet_stdout()
                fail(who, told(error), INCOMPLETE)
            except BrokenPipeError:
                _quiet_stdout()
                fail(who, NOBODY_READS, INCOMPLETE)
            except SystemExit as ended:
                if isinstance(ended.__context__, BrokenPipeError):  # so rich ends a program
                    fail(who, NOBODY_READS, INCOMPLETE)
                raise
            except expected as error:
                fail(who, told(error))

        return framed

    return decorate


def _quiet_stdout() -> None:
    """Sends what is left in stdout nowhere: Python flushes it at exit, and would fail once more."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
