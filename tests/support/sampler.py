"""A random video transformer small enough that everything can be measured in a test, and statistics of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from calibatt.compiler.cost import device_named
from calibatt.compiler.gather import StatisticsSource
from calibatt.compiler.language import parse_passes
from calibatt.compiler.stats import Manifest, Store, StoreWriter, default_windows
from calibatt.plans import Blocks, ModelSignature, PlanFile, TokenGrid
from calibatt.tools.calibrate.calibration import Calibrator
from calibatt.tools.studies.in_memory import compile_in_memory

GRID = TokenGrid(4, 8, 8)
TIMES = (1.0, 0.8, 0.4)
MODEL = ModelSignature("WanTransformer3DModel", layers=2, heads=2, head_dim=16)
CALIBRATED = tuple(("a" * length, length) for length in (1, 2, 6, 7, 8, 9))


class TinyVideoSampler:
    """A `Sampler` in pixel space whose attention is sharp enough for masks to matter."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=MODEL.heads,
            attention_head_dim=MODEL.head_dim,
            in_channels=3,
            out_channels=3,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=MODEL.layers,
            rope_max_seq_len=32,
        ).requires_grad_(False)
        for block in self.transformer.blocks:
            block.scale_shift_table.data *= 5
            block.attn1.norm_q.weight.data *= 4
        self.times = list(TIMES)
        self.grid = GRID
        self.versions = {"weights": "random"}
        self.runs = 0

    def check(self, prompts: Any) -> None:
        pass

    def run(self, prompt: str, seed: int) -> torch.Tensor:
        return self.run_batch([prompt], [seed])

    def run_batch(self, prompts: Any, seeds: Any) -> torch.Tensor:
        self.runs += 1
        size = (3, GRID.frames, 2 * GRID.height, 2 * GRID.width)
        latent = torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        texts = [torch.randn(3, 16, generator=torch.Generator().manual_seed(len(prompt))) for prompt in prompts]
        for now, then in pairwise([*self.times, 0.0]):
            time = torch.full((len(latent),), now * 1000)
            with torch.no_grad():
                velocity = self.transformer(latent, time, torch.stack(texts), return_dict=False)[0]
            latent = latent + (then - now) * velocity
        return latent

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return latent.clamp(-1, 1)


def tiny_sampler(steps: int | None, device: str) -> TinyVideoSampler:
    """What ``--model`` may name."""
    return TinyVideoSampler()


def second_rank_fails(steps: int | None, device: str) -> TinyVideoSampler:
    """A sampler that fails in the second process of a job, at its second prompt."""
    made = TinyVideoSampler()
    run = made.run

    def fail(*args: Any, **kwargs: Any) -> torch.Tensor:
        if made.runs:
            raise ValueError("the sampler must sample, got an error")
        return run(*args, **kwargs)

    if os.environ.get("RANK") == "1":
        made.run = fail  # type: ignore[method-assign]
    return made


def tiny_manifest(times: Sequence[float] = TIMES) -> Manifest:
    windows, times = default_windows(GRID), tuple(sorted(times))
    return Manifest(MODEL, GRID, Blocks(16, 16), times, windows, row_radius=2, frame_radius=2, thresholds=(0.8, 0.9))


def tiny_store(
    path: Path,
    work: Sequence[tuple[str, int]] = CALIBRATED,
    times: Sequence[float] = TIMES,
    recorded: Sequence[float] | None = None,
) -> Store:
    """Statistics of some samplings with steps at `times`, of which only the `recorded` ones may be measured."""
    sampler = TinyVideoSampler()
    sampler.times = list(times)
    with StoreWriter.open(path, tiny_manifest(recorded or times)) as writer:
        calibrator = Calibrator(sampler, writer, vectors=4)
        for prompt, seed in work:
            calibrator.calibrate(prompt, seed)
        writer.close_units()
    return Store.open(path)


PASSES = "select{target-density=D},schedule,lower"


def tiny_plan(store: Store, density: float = 0.6, passes: str = PASSES) -> PlanFile:
    """A plan compiled from it; D stands for the density."""
    parsed = parse_passes(passes.replace("D", f"{density:g}"))
    return compile_in_memory(store, StatisticsSource(store), parsed, device_named("h200-triton"))
