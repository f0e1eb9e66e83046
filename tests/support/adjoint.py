"""What calibration says of masks, and what a mask that is really run says: both of tiny samplers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibatt.compiler.stats import Manifest, SamplingTables, Store, StoreWriter, default_windows, window_keep
from calibatt.plans import Blocks
from calibatt.runtime.adapters import adapter_for
from calibatt.runtime.intercept import Interception
from calibatt.tools.calibrate.calibration import Calibrator, _cotangent, sampling_name
from calibatt.tools.calibrate.pipeline import PipelineSampler
from calibatt.tools.calibrate.sampler import Latent, parts
from support import wan

BLOCKS = Blocks(16, 32)
PROMPT, SEED = "a boat", 1
STEP = 0.2
"""Of finite differences, as a part of a mask's whole error."""
LEAST_EFFECT = 1e-4
"""Effects on <u, z> / ||z|| below this are lost in fp32: they count as if they were so large."""

Coefficient = Callable[[float, int], np.ndarray]
"""``coefficient(time, layer)``: float64 ``(windows, heads)``, how much of each mask's error is added to each head."""


def small_wan(pipe: Any = None, scheduler: Any = None, steps: int = 3, **options: Any) -> PipelineSampler:
    """Three latent frames of 4 x 6 tokens."""
    pipe = pipe or wan.pipeline()
    pipe.scheduler = scheduler or pipe.scheduler
    options = {"guidance_scale": 1.0, "height": 64, "width": 96, "num_frames": 9, **options}
    return PipelineSampler(pipe, prompt_arguments=wan.embedded, num_inference_steps=steps, **options)


def manifest_of(sampler: Any, blocks: Blocks = BLOCKS, **options: Any) -> Manifest:
    """All times of the sampler, all default windows, copies over one row and frame."""
    options = {"row_radius": 1, "frame_radius": 1, "windows": default_windows(sampler.grid), **options}
    model = adapter_for(sampler.transformer).signature(sampler.transformer)
    return Manifest(model, sampler.grid, blocks, tuple(sorted(sampler.times)), **options)


def calibrated(
    sampler: Any, folder: Path, *, vectors: int = 3, work: Sequence[tuple[str, int]] = ((PROMPT, SEED),), **options: Any
) -> Store:
    """A store of samplings."""
    with StoreWriter.open(folder, manifest_of(sampler, **options)) as writer:
        calibrator = Calibrator(sampler, writer, vectors=vectors)
        for prompt, seed in work:
            calibrator.calibrate(prompt, seed)
    return Store.open(folder)


def tables_of(store: Store, prompt: str = PROMPT, seed: int = SEED) -> SamplingTables:
    """What one of its samplings says."""
    return store.table().samplings[store.samplings.index(sampling_name(prompt, seed))]


def flat(latent: Latent) -> Tensor:
    """All values of a final latent, float64: of the video, then of the sound."""
    return torch.cat([x.double().flatten() for x in parts(latent)])


def random_vectors(latent: Latent, vectors: int, seed: int = SEED) -> list[Tensor]:
    """The vectors that calibration draws for a final latent, flat; each part counts relative to its own size."""
    ends = parts(latent)
    drawn = ([_cotangent(x, seed, vector, index) for index, x in enumerate(ends)] for vector in range(vectors))
    return [flat(tuple(each)) / len(ends) ** 0.5 for each in drawn]


def keeps_of(manifest: Manifest) -> Tensor:
    """The manifest's windows by pair of video tokens, bool ``(windows, V, V)``."""
    keeps = [torch.from_numpy(window_keep(each, manifest.grid, manifest.blocks)) for each in manifest.windows]
    found = torch.stack(keeps).repeat_interleave(manifest.blocks.block_q, 1)
    return found.repeat_interleave(manifest.blocks.block_k, 2)[:, : manifest.grid.tokens, : manifest.grid.tokens]


def mask_error(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, start: int) -> Tensor:
    """What a mask of the video's tokens, the first of which is `start`, changes in the output of one head: float64
    ``(B, N, D)``; q, k, v ``(B, N, D)``."""
    q, k, v = (x.detach().double() for x in (q, k, v))
    scores, video = q @ k.mT * q.shape[-1] ** -0.5, slice(start, start + len(keep))
    masked = scores.clone()
    masked[:, video, video].masked_fill_(~keep, -torch.inf)
    return (masked.softmax(-1) - scores.softmax(-1)) @ v


def disturbed(sampler: Any, manifest: Manifest, coefficient: Coefficient, step: float) -> Tensor:
    """The final latent, flat, where every mask's error, times its coefficient and the step, is added to attention."""
    keeps = keeps_of(manifest)

    def attend(q: Tensor, k: Tensor, v: Tensor, site: Any, context: tuple[float, int]) -> Tensor:
        now, start = context
        out = site.stock(q, k, v).clone()
        factors = coefficient(now, site.layer) * step
        for window, head in zip(*factors.nonzero(), strict=True):
            error = mask_error(q[:, :, head], k[:, :, head], v[:, :, head], keeps[window], start)
            out[:, :, head] = out[:, :, head].double() + factors[window, head] * error
        return out

    model, adapter = sampler.transformer, adapter_for(sampler.transformer)

    def begin(arguments: Any) -> tuple[float, int]:
        return float(adapter.time(arguments)), adapter.video_start(model, arguments)

    interception = Interception(model, adapter, attend, begin=begin)
    try:
        return flat(sampler.run(PROMPT, SEED))
    finally:
        interception.detach()


def difference(
    sampler: Any, manifest: Manifest, coefficient: Coefficient, vectors: Sequence[Tensor], step: float = STEP
) -> np.ndarray:
    """The effect on <u, z> for each vector u by central differences of fourth order."""
    runs = {times: disturbed(sampler, manifest, coefficient, times * step) for times in (-2, -1, 1, 2)}
    slope = (8 * (runs[1] - runs[-1]) - (runs[2] - runs[-2])) / (12 * step)
    return np.array([float((slope * u).sum()) for u in vectors])


def random_coefficients(manifest: Manifest, seed: int, only: float | None = None) -> Coefficient:
    """A window and a sign drawn for every time, layer and head; if ``only`` is given, at that time alone."""
    rng, heads = np.random.default_rng(seed), manifest.model.heads
    drawn = np.zeros((len(manifest.times), manifest.model.layers, len(manifest.windows), heads))
    picked = rng.integers(len(manifest.windows), size=(*drawn.shape[:2], 1, heads))
    np.put_along_axis(drawn, picked, rng.choice([-1.0, 1.0], picked.shape), 2)

    def coefficient(now: float, layer: int) -> np.ndarray:
        index = int(np.abs(np.array(manifest.times) - now).argmin())
        there = abs(manifest.times[index] - now) <= 1e-3 and only in (None, manifest.times[index])
        return drawn[index, layer] * there

    return coefficient


def predicted(manifest: Manifest, tables: SamplingTables, coefficient: Coefficient) -> np.ndarray:
    """The same effect as calibration says it."""
    found = 0.0
    for index, time in enumerate(manifest.times):
        for layer in range(manifest.model.layers):
            effects = tables.window_effect[:, index, layer].astype(np.float64)
            found = found + np.einsum("vwh,wh->v", effects, coefficient(time, layer))
    return found


def assert_effects_agree(sampler: Any, store: Store, tolerance: float = 0.01, step: float = STEP) -> float:
    """Effects of calibration agree with differences: of random masks at all times together, and at each time alone.

    Returns:
        The largest disagreement, as a part of the root mean square of the differences of its kind.
    """
    manifest, tables = store.manifest, tables_of(store)
    drawn = random_vectors(sampler.run(PROMPT, SEED), tables.vectors)
    worst = 0.0
    for only in (None, *manifest.times):
        coefficients = [random_coefficients(manifest, seed, only) for seed in range(2 if only is None else 1)]
        true = np.stack([difference(sampler, manifest, each, drawn, step) for each in coefficients])
        said = np.stack([predicted(manifest, tables, each) for each in coefficients])
        found = float(np.abs(true - said).max() / max(np.sqrt(np.square(true).mean()), LEAST_EFFECT))
        assert found <= tolerance, (only, true, said)
        worst = max(worst, found)
    return worst
