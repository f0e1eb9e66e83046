"""A random video transformer small enough that everything can be measured in a test, and statistics of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from calibatt.compiler.cost import device_named
from calibatt.compiler.emit import compile_in_memory
from calibatt.compiler.gather import StatisticsSource
from calibatt.compiler.language import parse_passes
from calibatt.compiler.stats import Ladders, Manifest, Store, StoreWriter, default_windows
from calibatt.plans import Blocks, ModelSignature, PlanFile, TokenGrid
from calibatt.tools.calibrate.probing import Trajectory
from calibatt.tools.calibrate.recorder import Recorder, sample_name
from calibatt.tools.calibrate.refining import Refiner
from calibatt.tools.calibrate.statistics import unit_statistics

GRID = TokenGrid(4, 8, 8)
TIMES = (1.0, 0.8, 0.4)
MODEL = ModelSignature("WanTransformer3DModel", layers=2, heads=2, head_dim=16)
CALIBRATED = (("a", 0), ("bb", 1))


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

    def run(self, prompt: str, seed: int, start_step: int = 0, start: Any = None, on_step: Any = None) -> torch.Tensor:
        return self.run_batch([prompt], [seed], start_step, start, on_step)

    def run_batch(
        self, prompts: Any, seeds: Any, start_step: int = 0, start: Any = None, on_step: Any = None
    ) -> torch.Tensor:
        self.runs += 1
        size = (3, GRID.frames, 2 * GRID.height, 2 * GRID.width)
        latent = torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        latent = latent if start is None else start
        texts = [torch.randn(3, 16, generator=torch.Generator().manual_seed(len(prompt))) for prompt in prompts]
        schedule = [*self.times, 0.0]
        for step in range(start_step, len(self.times)):
            if on_step:
                on_step(step, latent)
            now, then = schedule[step], schedule[step + 1]
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


def tiny_store(path: Path) -> Store:
    """Statistics of two samples, the time weight probed on one."""
    sampler = TinyVideoSampler()
    manifest = Manifest(MODEL, GRID, Blocks(16, 16), tuple(sorted(TIMES)), windows=default_windows(GRID), row_radius=2)
    with StoreWriter.open(path, manifest) as writer:
        recorder = Recorder(sampler, manifest, unit_statistics)
        for prompt, seed in CALIBRATED:
            recorder.record(writer, prompt, seed)
        store, name = Store.open(path), sample_name(*CALIBRATED[0])
        trajectory = Trajectory(sampler, *CALIBRATED[0], range(3))
        for index in range(3):
            found = trajectory.probe(
                name,
                index,
                2 - index,
                lambda layer, index=index: torch.from_numpy(store.unit(name, index, layer).keep(0, manifest)),
                manifest.blocks,
            )
            if found:
                writer.write_probe(found)
    return Store.open(path)


def tiny_refined(path: Path, ladders: Callable[[tuple[str, ...]], Ladders] = Ladders) -> Store:
    """The same, its ladders measured on all query blocks."""
    store = tiny_store(path)
    asked = ladders(store.samples)
    with StoreWriter.open(path, store.manifest) as writer:
        assert writer.refine(asked) == ()
        refiner = Refiner(TinyVideoSampler(), store, asked)
        for name in store.samples:
            refiner.refine(writer, name)
        assert writer.refine(asked) == store.samples
    return Store.open(path)


def tiny_plan(store: Store, density: float = 0.6) -> PlanFile:
    """A plan compiled from it."""
    passes = parse_passes(f"vote,protect,select{{target-density={density},menu=planes+windows+cuts}},schedule,lower")
    return compile_in_memory(store, StatisticsSource(store), passes, device_named("h200-triton"))
