"""What a calibration will cost: disk by counting, hours and device memory from a trial of two steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from calibatt.compiler.stats import Manifest
from calibatt.plans import EIGHT_BITS
from calibatt.tools.calibrate.calibration import Calibrator
from calibatt.tools.calibrate.work import device_of

TRIAL_FORWARDS = 2
GB = 1e9
FREE_SHARE = 0.85
"""Share of a device's memory that may be used before the inputs of blocks are moved to the CPU."""
OPEN_BYTES, CLOSED_BYTES = 4, 2
"""Bytes of a block in a unit that is being added to, and in one that is finished."""


@dataclass(frozen=True)
class Disk:
    """Bytes of a store: finished, and at most while it is written (with one sampling in progress)."""

    finished: int
    peak: int


@dataclass(frozen=True)
class Trial:
    """What two forwards of a sampling took.

    Args:
        forward_seconds: Seconds of a forward as the sampling runs it.
        pull_seconds: Seconds of its differentiation, including all measurements.
        peak_bytes: Most device memory in use; 0 on a CPU.
        kernels: The library whose attention kernels computed.
    """

    forward_seconds: float
    pull_seconds: float
    peak_bytes: int
    kernels: str

    def hours(self, forwards: int, pulled: int, samplings: int) -> float:
        """Hours for so many samplings, with so many forwards and so many differentiated ones each."""
        return samplings * (forwards * self.forward_seconds + pulled * self.pull_seconds) / 3600


def forwards_of(calibrator: Calibrator) -> tuple[int, int]:
    """Forwards of a sampling, and how many of them are differentiated: all from the first measured one on."""
    order = getattr(calibrator.sampler, "forwards", calibrator.sampler.times)
    measured = (index for index, now in enumerate(order) if now is not None and calibrator.moment(now) is not None)
    return len(order), len(order) - next(measured, len(order))


def disk_bytes(manifest: Manifest, samplings: int, forwards: int, vectors: int, latent_bytes: int) -> Disk:
    """Bytes on disk, without the headers of files.

    Args:
        manifest: What is measured.
        samplings: How many samplings.
        forwards: Forwards of each sampling.
        vectors: Random vectors of each sampling.
        latent_bytes: Bytes of one output of a forward, and of a gradient of its input.
    """
    model = manifest.model
    units = len(manifest.times) * model.layers
    blocks = model.heads * manifest.q_blocks * manifest.k_blocks
    counts = 2 * len(manifest.thresholds) * blocks
    copies = (
        4
        * model.heads
        * 2
        * (manifest.grid.height * manifest.row_radius + manifest.grid.frames * manifest.frame_radius)
    )
    masks = len(manifest.windows) + len(manifest.shares) + len(EIGHT_BITS)
    tables = samplings * units * model.heads * 4 * vectors * masks
    journal = forwards * latent_bytes * (1 + vectors)
    closed, opened = (units * (size * blocks + counts + copies) for size in (CLOSED_BYTES, OPEN_BYTES))
    return Disk(closed + tables, opened + tables + journal)


def wants_cpu(calibrator: Calibrator) -> bool:
    """Whether the inputs of a forward's blocks should wait on the CPU, because they would fill the device."""
    device = device_of(calibrator.sampler)
    if device.type != "cuda":
        return False
    model, grid = calibrator.manifest.model, calibrator.manifest.grid
    inputs = model.layers * grid.tokens * model.heads * model.head_dim * 2
    planes = 2 + calibrator.vectors + len(calibrator.manifest.thresholds)
    sums = 4 * planes * model.layers * model.heads * calibrator.manifest.q_blocks * calibrator.manifest.k_blocks
    free, total = torch.cuda.mem_get_info(device)
    return inputs + sums + 24 * inputs // model.layers > free - (1 - FREE_SHARE) * total


def trial(calibrator: Calibrator, prompt: str, seed: int) -> Trial:
    """Runs two forwards of a sampling and differentiates both. The second ones are timed; nothing is stored.

    Raises:
        CalibrationError, ChainError: The model cannot be measured.
    """
    device = device_of(calibrator.sampler)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds, kernels = calibrator.rehearse(prompt, seed, TRIAL_FORWARDS)
    return Trial(*seconds, torch.cuda.max_memory_allocated(device) if cuda else 0, kernels)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
