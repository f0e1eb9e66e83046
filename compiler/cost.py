"""Predicted milliseconds of attention from the blocks that it computes, on a named device."""

from __future__ import annotations

from dataclasses import dataclass

from calibatt.compiler.errors import CompileError
from calibatt.plans import Blocks


@dataclass(frozen=True)
class Device:
    """What attention costs on one device.

    Args:
        name: What `--device` calls it.
        source: Where the coefficients come from.
        tflops: Floating-point throughput of computed blocks, 10^12 operations a second; a block of ``bq`` queries and
            ``bk`` keys of ``d`` channels takes ``4 bq bk d`` operations. Measured over whole calls, so that it has in
            it what tiles and stores take.
    """

    name: str
    source: str
    tflops: float

    def block_ms(self, blocks: Blocks, head_dim: int) -> float:
        """Milliseconds of one computed block."""
        return 4.0 * blocks.block_q * blocks.block_k * head_dim / (self.tflops * 1e9)


DEVICES = {
    device.name: device
    for device in (
        Device(
            name="h200-hopper",
            source="660 TFLOP/s: whole calls at 720p, density 0.3, 128x128 blocks, 128 channels, 2026-11-26 "
            "(docs/benchmarks/kernels_h200.json)",
            tflops=660.0,
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
