"""Decides whether the triton backend executes heads of 8 bits on a card: only if they were measured to be faster there.

``calibatt-bench precision`` measures a card and writes a small file, which decides from then on. Until there is one,
measurements that come with the package decide, of another card of the same compute capability (`SHIPPED`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from calibatt.plans.files import write_text
from calibatt.plans.precision import PRECISIONS

KERNEL = (
    "kernels/block_sparse.py", "kernels/quantise.py", "backends/triton.py", "prepass.py", "quantise.py"
)  # fmt: skip
"""The files of the kernel that is timed; if one of them changes, it must be timed again."""


@dataclass(frozen=True)
class Timing:
    """The measured gain of heads of 8 bits over heads of 16.

    Args:
        precision: `INT8` or `INT8_FP8`.
        head_dim: Channels of a head.
        tokens: Tokens of the video.
        speed_up: The time of 16 bits / that of 8 bits, of whole calls, quantisation included.
        problem: Why there is no measurement: a wrong result, or an error.
    """

    precision: int
    head_dim: int
    tokens: int
    speed_up: float
    problem: str = ""

    def __post_init__(self) -> None:
        whole = all(isinstance(each, int) for each in (self.precision, self.head_dim, self.tokens))
        if not (whole and isinstance(self.speed_up, (int, float)) and isinstance(self.problem, str)):
            raise TypeError(f"a timing must be of three integers, a number and a text, got {self}")


SHIPPED: dict[int, Sequence[Timing]] = {}
"""Measurements that come with the package, by compute capability. None yet: the kernel was right on an H200, and no
card was timed."""


@functools.cache
def kernel_digest() -> str:
    """Digest of the source of the kernel, its launcher and its pre-pass."""
    root = Path(__file__).parent
    return hashlib.sha256(b"".join((root / name).read_bytes() for name in KERNEL)).hexdigest()[:12]


def timings_file(device: torch.device) -> Path:
    """The file for the timings of a card with this Triton and this kernel, below `XDG_CACHE_HOME`.

    Raises:
        OSError: That is not set, and this user has no home folder.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise OSError(f"XDG_CACHE_HOME must be set where there is no home folder: {error}") from None
    parts = (torch.cuda.get_device_name(device), f"triton-{triton.__version__}", kernel_digest())
    return cache / "calibatt" / "precision" / (re.sub(r"[^\w.+]+", "-", " ".join(parts)) + ".json")


def remember(device: torch.device, timings: Sequence[Timing], notes: dict[str, str]) -> Path:
    """Writes the timings of a card, which count from now on; returns the file.

    Raises:
        OSError: It cannot be written, or as of `timings_file`.
    """
    path = timings_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({**notes, "timings": [asdict(timing) for timing in timings]}, indent=1) + "\n")
    _remembered.cache_clear()
    return path


@functools.cache
def _remembered(path: Path) -> Sequence[Timing] | None:
    try:
        return [Timing(**timing) for timing in json.loads(path.read_text("utf-8"))["timings"]]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} must be what calibatt-bench precision writes: delete it ({error!r})") from None


def verdict(precision: int, device: torch.device, head_dim: int, tokens: int) -> tuple[bool, str]:
    """Whether heads of a precision are executed on a CUDA device, and what was measured, as a sentence.

    Args:
        precision: `INT8` or `INT8_FP8`.
        device: The CUDA device.
        head_dim: Channels of a head.
        tokens: Tokens of the video; the measurement nearest to it decides. None counts if the card's file cannot be
            read, and the sentence says why.
    """
    (major, minor), name, trouble = torch.cuda.get_device_capability(device), PRECISIONS[precision], ""
    measured: Sequence[Timing] | None = ()
    try:
        path = timings_file(device)
        measured, where = _remembered(path), str(path)
    except (OSError, ValueError) as error:
        trouble = f" ({error})"
    if measured is None:
        measured, where = SHIPPED.get(10 * major + minor, ()), f"another card of sm{major}{minor}"
    alike = [timing for timing in measured if (timing.precision, timing.head_dim) == (precision, head_dim)]
    if not alike:
        card = f"{torch.cuda.get_device_name(device)} with head_dim {head_dim} and triton {triton.__version__}"
        how = "run `calibatt-bench precision` to measure it, or compile the plan with --precision bf16"
        return False, f"{name} is off: it was not measured on {card}{trouble}; {how}"
    nearest = min(alike, key=lambda timing: abs(timing.tokens - tokens))
    on = nearest.speed_up > 1 and not nearest.problem
    outcome = nearest.problem or f"{nearest.speed_up:.2f} times as fast as 16 bit at {nearest.tokens} tokens"
    rest = "" if on else "; compile the plan with --precision bf16"
    return on, f"{name} is {'on' if on else 'off'}: {outcome} ({where}){rest}"
