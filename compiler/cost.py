"""Predicted milliseconds of attention from the blocks that it computes, and in what precision, on a named device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from calibatt.compiler.errors import CompileError
from calibatt.plans import BF16, INT8, INT8_FP8, Blocks


@dataclass(frozen=True)
class Speed:
    """What a head costs in some precision.

    Args:
        blocks: Time of a computed block relative to one in 16 bit, kernel alone, by tokens of the video. It is linear
            between two sizes, and constant beyond the smallest and the largest.
        prepass_ns: Nanoseconds of rounding a head's inputs before the kernel, for each token and channel.
    """

    blocks: Mapping[int, float]
    prepass_ns: float = 0.0

    def block(self, tokens: int) -> float:
        """Time of a computed block / that of one in 16 bit, of a video of so many tokens."""
        return float(np.interp(tokens, sorted(self.blocks), [self.blocks[each] for each in sorted(self.blocks)]))


@dataclass(frozen=True)
class Device:
    """What attention costs on one device.

    Args:
        name: What `--device` calls it.
        source: Where the coefficients come from.
        tflops: Floating-point throughput of computed blocks, 10^12 operations a second; a block of ``bq`` queries and
            ``bk`` keys of ``d`` channels takes ``4 bq bk d`` operations. Measured over whole calls, so that it has in
            it what tiles and stores take.
        eight_bit: By precision, where the device has it and it was measured.
    """

    name: str
    source: str
    tflops: float
    eight_bit: Mapping[int, Speed] = field(default_factory=dict)

    def block_ms(self, blocks: Blocks, head_dim: int) -> float:
        """Milliseconds of one computed block."""
        return 4.0 * blocks.block_q * blocks.block_k * head_dim / (self.tflops * 1e9)

    @property
    def speeds(self) -> dict[int, Speed]:
        """By precision."""
        return {BF16: Speed({1: 1.0}), **self.eight_bit}


_TOKENS_480P, _TOKENS_720P = 32_760, 75_600
_CHANNELS_720P = 40 * _TOKENS_720P * 128
"""Tokens times channels of 40 heads of 128 channels, for which pre-passes were timed."""

DEVICES = {
    device.name: device
    for device in (
        Device(
            name="h200-hopper",
            source="660 TFLOP/s: whole calls at 720p, density 0.3, 128x128 blocks, 128 channels, 2026-11-26 "
            "(docs/benchmarks/kernels_h200.json); 8 bits: one H200, structured masks of density 0.3 and 0.5, "
            "2026-11-30, kernels alone: int8 QK 1.24 times as fast at 720p, 1.14 at 480p, with fp8 PV 1.37 and 1.08; "
            "pre-passes of 40 heads at 720p 0.86 and 1.42 ms; below 480p assumed to gain ever less",
            tflops=660.0,
            eight_bit={
                INT8: Speed({1: 1.0, _TOKENS_480P: 1 / 1.14, _TOKENS_720P: 1 / 1.24}, 0.86e6 / _CHANNELS_720P),
                INT8_FP8: Speed({1: 1.0, _TOKENS_480P: 1 / 1.08, _TOKENS_720P: 1 / 1.37}, 1.42e6 / _CHANNELS_720P),
            },
        ),
        Device(
            name="h200-triton",
            source="437 TFLOP/s: as h200-hopper, by the triton backend",
            tflops=436.6,
        ),
        Device(
            name="cpu-2core",
            source="provisional: 100 GFLOP/s assumed for two cores, nothing measured",
            tflops=0.1,
        ),
    )
}
"""The devices there are coefficients for."""


def device_named(name: str) -> Device:
    """The device of that name.

    Raises:
        CompileError: There is none.
    """
    if name not in DEVICES:
        raise CompileError(f"device must be one of {', '.join(DEVICES)}, got {name!r}")
    return DEVICES[name]
