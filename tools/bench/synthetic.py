"""Statistics out of thin air, at the size of real models: for size and speed, never for claims of quality.

    python -m calibatt.tools.bench.synthetic STORE --layers 4 --times 50 --samples 8

A head has one of the kinds that the literature describes. Its block error falls with a distance of that kind, in
eighths of an octave, scaled by a reach that drifts over time; textures that belong to the head, to its place in time
and to the sample are added. All is a pure function of the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
from rich.progress import track

from calibatt.compiler.stats import (
    Ladders,
    Manifest,
    Probe,
    Store,
    StoreWriter,
    UnitStatistics,
    default_windows,
    neighbours,
    window_keep,
)
from calibatt.plans import Blocks, ModelSignature, TokenGrid

Float = npt.NDArray[np.float32]

KINDS = ("spatial", "temporal", "window", "sinks", "rows", "dense", "prompt")
"""Near frames; near rows in all frames, frames alike; both; some columns for all; all of near frames, rows alike; no
structure; a window and places that only the prompt knows."""
OCTAVE = 8
"""Codes of a factor of 2, as in statistics units."""
FIELD_BLOCKS = 2048
MENU_STRIDE = 8


@dataclass(frozen=True)
class Mix:
    """What a synthetic model is made of.

    Args:
        shares: Of the heads, by kind of `KINDS`.
        reach_drift: Relative change of a head's reach from time 0 to time 1, up to this.
        texture_octaves: Standard deviation of what belongs to the head.
        drift_octaves: Of what changes over time, one turn from time 0 to time 1.
        sample_octaves: Of what belongs to the sample.
        coherence: Measured error of a mask / sum of the block errors it drops, median.
    """

    shares: dict[str, float] = field(
        default_factory=lambda: {
            "spatial": 0.2,
            "temporal": 0.2,
            "window": 0.25,
            "sinks": 0.1,
            "rows": 0.1,
            "dense": 0.05,
            "prompt": 0.1,
        }
    )
    reach_drift: float = 0.5
    texture_octaves: float = 0.7
    drift_octaves: float = 0.3
    sample_octaves: float = 0.5
    coherence: float = 2.5


def wan14b_manifest(layers: int = 40, times: int = 50, shift: float = 5.0) -> Manifest:
    """Wan 2.1 14B at 720p, 81 frames: 75,600 tokens, 591 x 591 blocks; `times` of a shifted flow schedule."""
    even = np.linspace(1, 0, times + 1)[:-1]
    shifted = sorted(float(time) for time in shift * even / (1 + (shift - 1) * even))
    grid = TokenGrid(21, 45, 80)
    return Manifest(
        model=ModelSignature("WanTransformer3DModel", layers=layers, heads=40, head_dim=128),
        grid=grid,
        blocks=Blocks(128, 128),
        times=tuple(shifted),
        windows=default_windows(grid),
        row_radius=3,
        frame_radius=4,
        versions={"synthetic": "1"},
    )


class Synthetic:
    """Statistics of a model that does not exist.

    Args:
        manifest: What is recorded; needs block error and no block mass.
        mix: What heads there are.
        seed: Of everything.
    """

    def __init__(self, manifest: Manifest, mix: Mix | None = None, seed: int = 0) -> None:
        self.manifest = manifest
        self.mix = mix or Mix()
        self.seed = seed
        grid, blocks = manifest.grid, manifest.blocks
        q, k = (
            (np.arange(n) + 0.5) * b
            for n, b in ((manifest.q_blocks, blocks.block_q), (manifest.k_blocks, blocks.block_k))
        )
        row_q, row_k = (np.clip(tokens - grid.text_before, 0, grid.video_tokens - 1) / grid.width for tokens in (q, k))
        frames = np.abs(row_q[:, None] // grid.height - row_k // grid.height)
        rows = np.abs(row_q[:, None] % grid.height - row_k % grid.height)
        self._frames, self._rows = frames.astype(np.float32), rows.astype(np.float32)
        rng = np.random.default_rng([seed, 1])
        size = max(FIELD_BLOCKS, 2 * max(manifest.q_blocks, manifest.k_blocks))
        coarse = rng.standard_normal((size // 8 + 2, size // 8 + 2)).astype(np.float32)
        smooth = np.kron(coarse, np.ones((8, 8), np.float32))
        fine = rng.standard_normal(smooth.shape, dtype=np.float32)
        self._texture = ((smooth + 0.5 * fine) / np.sqrt(1.25)).astype(np.float32)
        self.mean = lru_cache(maxsize=1)(self._mean)

    def kinds(self, layer: int) -> list[str]:
        """Of the layer's heads."""
        shares = np.array([self.mix.shares.get(kind, 0.0) for kind in KINDS])
        rng = np.random.default_rng([self.seed, 2, layer])
        return [KINDS[at] for at in rng.choice(len(KINDS), self.manifest.model.heads, p=shares / shares.sum())]

    def texture(self, *key: int) -> Float:
        """A view ``(Q, K)`` of the texture, at a place that the key decides."""
        rng = np.random.default_rng([self.seed, 3, *key])
        y, x = (
            int(rng.integers(side - n + 1)) for side, n in zip(self._texture.shape, self._frames.shape, strict=True)
        )
        found: Float = self._texture[y : y + self._frames.shape[0], x : x + self._frames.shape[1]]
        return found

    def _head(self, kind: str, layer: int, head: int, time: float) -> Float:
        """Codes of a head's mean block error at a time, before they are cut to 0 to 255."""
        rng = np.random.default_rng([self.seed, 4, layer, head])
        near, far = rng.uniform(1.0, 3.0), rng.uniform(0.15, 0.5)
        reach = OCTAVE / (1 + self.mix.reach_drift * rng.uniform(-1, 1) * (time - 0.5))
        columns = rng.random(self._frames.shape[1])
        distance: dict[str, Callable[[], Float]] = {
            "spatial": lambda: near * self._frames + 0.1 * far * self._rows,
            "temporal": lambda: 2 * far * self._rows + 0.05 * near * self._frames,
            "window": lambda: np.hypot(0.7 * near * self._frames, far * self._rows),
            "sinks": lambda: np.where(columns < 0.04, 1.0, 5.0 + near * self._frames).astype(np.float32),
            "rows": lambda: near * self._frames + 0 * self._rows,
            "dense": lambda: 2 + 0 * self._rows,
            "prompt": lambda: 1 + np.hypot(near * self._frames, far * self._rows),
        }
        code = np.minimum(distance[kind](), 20) * np.float32(reach)
        code += np.float32(OCTAVE * self.mix.texture_octaves) * self.texture(layer, head)
        turn, drift = 2 * np.pi * time, OCTAVE * self.mix.drift_octaves
        code += np.float32(drift * np.cos(turn)) * self.texture(layer, head, 1)
        code += np.float32(drift * np.sin(turn)) * self.texture(layer, head, 2)
        code += np.float32(OCTAVE * (1 + 0.3 * rng.standard_normal(columns.size)))
        return np.asarray(code, np.float32)

    def _mean(self, time_index: int, layer: int) -> tuple[Float, npt.NDArray[np.uint8], Float, Float]:
        """Codes ``(H, Q, K)``, code that each plane keeps in each row ``(T, H, Q)``, menu errors, peaks ``(H,)``."""
        manifest = self.manifest
        time, kinds = manifest.times[time_index], self.kinds(layer)
        rng, own = (np.random.default_rng([self.seed, 5, *key]) for key in ((time_index, layer), (layer,)))
        heads = manifest.model.heads
        codes = np.stack([self._head(kind, layer, head, time) for head, kind in enumerate(kinds)])
        mass = np.exp2(-np.arange(256) / (2 * OCTAVE))
        kept = np.empty((len(manifest.thresholds), heads, manifest.q_blocks), np.uint8)
        size = own.normal(-2, 0.7, heads) + 0.3 * np.sin(2 * np.pi * (time + own.random(heads)))
        peak = (10**size / (manifest.q_blocks * manifest.k_blocks)).astype(np.float32)
        windows = [window_keep(each, manifest.grid, manifest.blocks)[::MENU_STRIDE] for each in manifest.windows]
        menu = np.empty((len(manifest.menu), heads), np.float32)
        base = np.arange(manifest.q_blocks)[:, None] * 256
        for head in range(heads):
            code = np.clip(codes[head], 0, 254).astype(np.uint8)
            counted = np.bincount((base + code).reshape(-1), minlength=base.size * 256).reshape(-1, 256)
            share = np.cumsum(counted * mass, 1)
            share /= share[:, -1:]
            for plane, threshold in enumerate(manifest.thresholds):
                kept[plane, head] = (share < threshold).sum(1)
            some = code[::MENU_STRIDE]
            error = np.exp2(some / np.float32(-OCTAVE)) * peak[head]
            masks = [some <= rows[::MENU_STRIDE, None] for rows in kept[:, head]] + windows
            menu[:, head] = [error[~mask].sum() / len(some) for mask in masks]
        noise = own.normal(0, 0.3, menu.shape) + rng.normal(0, 0.05, menu.shape)
        menu *= self.mix.coherence * np.exp(noise)
        return codes, kept, menu, peak

    def unit(self, sample: int, time_index: int, layer: int) -> UnitStatistics:
        """One unit; samples of one (time, layer) are cheap one after the other."""
        manifest, kinds = self.manifest, self.kinds(layer)
        codes, kept, menu, peak = self.mean(time_index, layer)
        heads, k_blocks = manifest.model.heads, manifest.k_blocks
        rng = np.random.default_rng([self.seed, 6, sample, time_index, layer])
        own = np.random.default_rng([self.seed, 7, sample])
        blobs = own.integers(0, k_blocks, 6)
        error = np.empty(codes.shape, np.uint8)
        planes = np.zeros((len(manifest.thresholds), *codes.shape[:2], -(-k_blocks // 8)), np.uint8)
        for head, kind in enumerate(kinds):
            code = codes[head] + np.float32(OCTAVE * self.mix.sample_octaves) * self.texture(layer, head, 3, sample)
            if kind == "prompt":
                for at in blobs:
                    code[:, at : at + k_blocks // 40 + 1] -= 3 * OCTAVE
            np.clip(code, 0, 254, out=code)
            error[head] = code
            least = error[head].min(1)
            for plane in range(len(planes)):
                keep = error[head] <= np.maximum(kept[plane, head], least)[:, None]
                planes[plane, head] = np.packbits(keep, axis=-1, bitorder="little")
        row_error = _copy_error("rows", kinds, manifest.grid.height, manifest.row_radius)
        frame_error = _copy_error("temporal", kinds, manifest.grid.frames, manifest.frame_radius)
        size = np.full(heads, 1e-2, np.float32)
        menu = menu * np.exp(own.normal(0, 0.2, menu.shape) + rng.normal(0, 0.05, menu.shape)).astype(np.float32)
        return UnitStatistics(
            planes=planes,
            menu_error=menu / size,
            menu_residual_error=menu,
            output_size=size,
            row_error=row_error,
            row_residual_error=row_error * size[:, None, None],
            frame_error=frame_error,
            frame_residual_error=frame_error * size[:, None, None],
            block_error=error,
            block_error_peak=peak * np.exp(own.normal(0, 0.2) + rng.normal(0, 0.05)).astype(np.float32),
        )

    def write(self, path: Path, samples: int, done: Callable[[], None] = lambda: None) -> None:
        """Writes a store: `samples` samples, and probes of a time weight that rises a hundredfold with noise."""
        manifest = self.manifest
        names = [f"s{index:02d}" for index in range(samples)]
        with StoreWriter.open(path, manifest) as writer:
            open_samples = [writer.begin(name) for name in names]
            for layer in range(manifest.model.layers):
                for time_index in range(len(manifest.times)):
                    for index, sample in enumerate(open_samples):
                        sample.write(time_index, layer, self.unit(index, time_index, layer))
                    done()
            for name, sample in zip(names, open_samples, strict=True):
                sample.finish({"prompt": f"synthetic {name}", "seed": self.seed})
            for time_index in {int(at) for at in np.linspace(0, len(manifest.times) - 1, 6).round()}:
                for name in names[:2]:
                    weight = 1e-5 * 100.0 ** manifest.times[time_index]
                    writer.write_probe(Probe(name, time_index, weight, 1.0, weight, 0.0))


def _copy_error(repeating: str, kinds: Sequence[str], count: int, radius: int) -> npt.NDArray[np.float32]:
    """float32 ``(H, count, 2 radius)``: small in heads that repeat over rows, or frames; it grows with the distance."""
    offsets = np.array([*range(-radius, 0), *range(1, radius + 1)])
    base = np.array([0.002 if kind == repeating else 0.3 for kind in kinds])[:, None, None]
    return np.where(neighbours(count, radius), base * np.abs(offsets), np.nan).astype(np.float32)


def refine(path: Path, kinds: tuple[str, ...], seed: int = 0) -> None:
    """Made-up errors of ladders and windows for every sample of a store: what a refined store costs, not its worth.

    A head's error falls with a power of what a mask drops; its size drifts over time, one turn from time 0 to time 1.
    """
    store = Store.open(path)
    of, ladders = store.manifest, Ladders(store.samples, kinds)
    rng = np.random.default_rng([seed, 8])
    layers, heads = of.model.layers, of.model.heads
    windows = [window_keep(window, of.grid, of.blocks).mean() for window in of.windows]
    dropped = 1 - np.array([*(ladders.shares * len(kinds)), *windows])
    kind = rng.normal(0, 0.2, (layers, len(kinds) + len(windows), heads))
    kind[:, len(kinds) :] += 0.5  # windows are the worse masks
    kind = np.repeat(kind, [len(ladders.shares)] * len(kinds) + [1] * len(windows), 1)
    power = rng.uniform(2, 8, (layers, 1, heads))
    turn = 2 * np.pi * (np.array(of.times)[:, None, None, None] + rng.random((layers, 1, heads)))
    size = 10 ** (rng.normal(-2, 0.7, (layers, 1, heads)) + 0.3 * np.sin(turn))
    errors = size * dropped[:, None] ** power * np.exp(kind)
    with StoreWriter.open(path, of) as writer:
        for name in sorted(set(store.samples) - set(writer.refine(ladders))):
            own = errors * np.exp(rng.normal(0, 0.2) + rng.normal(0, 0.05, (len(of.times), 1, 1, 1)))
            writer.write_errors(name, own.astype(np.float32), ladders)


@click.command(help=__doc__)
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--layers", type=click.IntRange(1), default=4, show_default=True)
@click.option("--times", type=click.IntRange(1), default=50, show_default=True)
@click.option("--samples", type=click.IntRange(1), default=8, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(store: Path, layers: int, times: int, samples: int, seed: int) -> None:
    """Writes a store of Wan 14B's size."""
    steps = iter(track(range(layers * times), "units"))
    Synthetic(wan14b_manifest(layers, times), seed=seed).write(store, samples, lambda: next(steps, None))


if __name__ == "__main__":
    main()
