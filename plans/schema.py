"""The vocabulary of a plan: what model, what tokens, what blocks, what times.

Everything here is a small frozen value that checks itself when it is made, so no user of one has to check it again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calibatt.plans.errors import SchemaError

BLOCK_SIZES = (16, 32, 64, 128, 256)
MAX_BLOCKS = 1 << 16
"""Block columns are stored as uint16."""
INT32_END = 1 << 31
"""Kernels count in int32, so every count must stay below."""


def _require(ok: bool, what: str, rule: str, value: object) -> None:
    if not ok:
        raise SchemaError(f"{what} must be {rule}, got {value!r}")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class TokenGrid:
    """The video tokens of a sequence, in raster order (frame, y, x).

    Other tokens (text, audio, conditions) stand before them, the *prefix*, or after them, the *suffix*. How many there
    are is known at run time only.

    Args:
        frames: Latent frames after patching.
        height: Spatial rows of tokens in a frame.
        width: Tokens in a row.

    Raises:
        SchemaError: A size is not a positive integer.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            value = getattr(self, name)
            _require(_is_int(value, 1), f"grid.{name}", "a positive integer", value)

        _require(self.tokens < INT32_END, "grid", f"of fewer than {INT32_END} tokens", self.tokens)

    @property
    def rows(self) -> int:
        """Spatial rows over all frames; row r is row ``r % height`` of frame ``r // height``."""
        return self.frames * self.height

    @property
    def tokens(self) -> int:
        """Video tokens, V."""
        return self.rows * self.width


@dataclass(frozen=True)
class Blocks:
    """Tokens per query block and per key block; powers of two from 16 to 256.

    Raises:
        SchemaError: A size is not one of `BLOCK_SIZES`.
    """

    block_q: int = 128
    block_k: int = 128

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k"):
            value = getattr(self, name)
            _require(_is_int(value, 1) and value in BLOCK_SIZES, f"blocks.{name}", f"one of {BLOCK_SIZES}", value)

    def q_blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_q)

    def k_blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_k)


@dataclass(frozen=True)
class ModelSignature:
    """What a plan was calibrated on, and what it may be attached to.

    Args:
        architecture: Class name of the transformer, for example ``WanTransformer3DModel``.
        layers: Self-attention layers, in execution order.
        heads: Attention heads per layer.
        head_dim: Channels per head.
        weights_digest: Optional digest of the weights; compared only where both sides have one.
    """

    architecture: str
    layers: int
    heads: int
    head_dim: int
    weights_digest: str | None = None

    def __post_init__(self) -> None:
        _require(
            isinstance(self.architecture, str) and bool(self.architecture),
            "model.architecture",
            "a non-empty string",
            self.architecture,
        )
        for name in ("layers", "heads", "head_dim"):
            value = getattr(self, name)
            _require(_is_int(value, 1), f"model.{name}", "a positive integer", value)
        _require(
            self.weights_digest is None or isinstance(self.weights_digest, str),
            "model.weights_digest",
            "a string or absent",
            self.weights_digest,
        )


@dataclass(frozen=True)
class Segment:
    """A half-open range [start, stop) of denoising time; the segment that stops at 1 includes 1.

    Time 1 is pure noise. `time` is the calibrated time that the segment stands for.
    """

    start: float
    stop: float
    time: float

    def __post_init__(self) -> None:
        ordered = 0.0 <= self.start < self.stop <= 1.0
        _require(ordered, "segment", "0 <= start < stop <= 1", (self.start, self.stop))
        inside = self.start <= self.time <= self.stop
        _require(inside, "segment.time", "inside its segment", (self.start, self.time, self.stop))


def check_predicted(predicted: Mapping[str, Any], segments: int, layers: int, heads: int) -> None:
    """Proves the shapes of what a plan may predict, so that its readers need not.

    Raises:
        SchemaError: ``planned_ms``, ``dense_ms``, ``head_price`` or ``latent_db`` is there and of another kind.
    """
    for name, shape in (
        ("planned_ms", (segments, layers)),
        ("dense_ms", (segments, layers)),
        ("head_price", (segments, layers, heads)),
    ):
        right = name not in predicted or _is_table(predicted[name], shape)
        rule = f"lists of lists of finite numbers, none negative, {shape}"
        _require(right, f"predicted.{name}", rule, None if right else str(predicted[name])[:80])
    latent = predicted.get("latent_db")
    names = ("mean", "standard_error", "samplings")
    right = latent is None or (isinstance(latent, Mapping) and all(_is_number(latent.get(name)) for name in names))
    _require(right, "predicted.latent_db", f"nil or a map of finite numbers {', '.join(names)}", latent)


def check_hint(hint: Mapping[str, Any]) -> None:
    """Proves the times of a scheduler hint, so that its readers need not.

    Raises:
        SchemaError: ``times`` is there, and no list of numbers in [0, 1].
    """
    times = hint.get("times", [0.0])
    right = (
        isinstance(times, list | tuple) and len(times) > 0 and all(_is_number(now) and 0 <= now <= 1 for now in times)
    )
    _require(right, "scheduler_hint.times", "a list of numbers in [0, 1], one at least", str(times)[:80])


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _is_table(value: object, shape: tuple[int, ...]) -> bool:
    if not shape:
        return _is_number(value) and value >= 0  # type: ignore[operator]
    right = isinstance(value, list | tuple) and len(value) == shape[0]
    return right and all(_is_table(each, shape[1:]) for each in value)  # type: ignore[attr-defined]
