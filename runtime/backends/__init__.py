"""The backends: who can execute a schedule, and where. A backend is a module with `supports` and `run`.

    supports(outline, device, dtype, head_dim) -> list[str]       reasons why not; empty: it can
    run(q, k, v, bound, scale, return_lse, video_start, lengths)  arguments as of `ops.planned_attention`, trusted
        -> (out, lse)                                             lse is None unless asked for
    PRECISIONS                                                    those it multiplies in, a set; `BF16` alone if absent

A module is imported when it is first asked, so that the torch backend works where triton is not installed.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from calibatt.plans.precision import BF16, PRECISIONS
from calibatt.runtime.schedule import Outline

BACKENDS = {
    "reference": "calibatt.runtime.reference",
    "torch": "calibatt.runtime.backends.torch",
    "triton": "calibatt.runtime.backends.triton",
    "hopper": "calibatt.runtime.backends.hopper",
}
AUTO = ("hopper", "triton", "torch")
"""What `auto` tries, best first."""


class UnsupportedBackendError(RuntimeError):
    """A backend was asked for that cannot execute this schedule here; says every reason."""


def load_backend(name: str) -> ModuleType:
    """The module of a backend.

    Raises:
        ValueError: No backend has this name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {name!r}")
    return _module(BACKENDS[name])


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(name)  # asks for locks even where the module is loaded


def backend_reasons(name: str, outline: Outline, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Why the backend cannot execute this schedule here; empty if it can.

    Raises:
        ValueError: No backend has this name.
    """
    try:
        backend = load_backend(name)
    except ImportError as error:
        return [f"cannot be imported: {error}"]
    reasons: list[str] = backend.supports(outline, device, dtype, head_dim)
    for precision in sorted(outline.precisions - getattr(backend, "PRECISIONS", {BF16})):
        reasons.append(f"it cannot execute heads of precision {precision} ({PRECISIONS.get(precision)})")
    return reasons
