"""Made-up statistics at the size of real models: for measurements of size and speed, never for claims of quality.

    python -m calibatt.tools.studies.synthetic STORE --layers 4 --times 50 --samples 8

A head has one of the kinds that the literature describes. Its block error falls with a distance of that kind, in
eighths of an octave, scaled by a reach that drifts over time; textures that belong to the head and to its place in time
are added. Effects are errors with the noise of few samplings. All is a pure function of the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
from rich.progress import track

from calibatt.compiler.stats import (
    Manifest,
    SamplingTables,
    StoreWriter,
    Unit,
    code_values,
    default_windows,
    neighbours,
    window_keep,
)
from calibatt.compiler.stats.files import unit_name
from calibatt.compiler.stats.unit import write_unit
from calibatt.plans import EIGHT_BITS, Blocks, ModelSignature, TokenGrid
from calibatt.plans.files import UNITS
from calibatt.tools.bench.options import count_option
from calibatt.tools.studies.options import PATH, all_of, study_command

Float = npt.NDArray[np.float32]

KINDS = ("spatial", "temporal", "window", "sinks", "rows", "dense", "prompt")
"""Near frames; near rows in all frames, frames alike; both; some columns for all; all of near frames, rows alike; no
structure; a window whose places differ from prompt to prompt."""
OCTAVE = 8
"""Codes of a factor of 2, as in statistics units."""
FIELD_BLOCKS = 2048
ROW_STRIDE = 8
"""What masks cost is added up over every so many query blocks."""
VECTORS = 2
ROUNDING = 0.02
"""Effects of 8 bits / those of windows."""


@dataclass(frozen=True)
class Mix:
    """What a synthetic model is made of.

    Args:
        shares: Of the heads, by kind of `KINDS`.
        reach_drift: Relative change of a head's reach from time 0 to time 1, up to this.
        texture_octaves: Standard deviation of what belongs to the head.
        drift_octaves: Of what changes over time, one turn from time 0 to time 1.
        coherence: Measured price of a mask / its blocks' errors added up as if all pointed one way, median.
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
    coherence: float = 0.3


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
        manifest: What is recorded; without thresholds.
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
        row_q, row_k = (np.minimum(tokens, grid.tokens - 1) / grid.width for tokens in (q, k))
        frames = np.abs(row_q[:, None] // grid.height - row_k // grid.height)
        rows = np.abs(row_q[:, None] % grid.height - row_k % grid.height)
        self._frames, self._rows = frames.astype(np.float32), rows.astype(np.float32)
        rng = np.random.default_rng([seed, 1])
        size = max(FIELD_BLOCKS, 2 * max(manifest.q_blocks, manifest.k_blocks))
        coarse = rng.standard_normal((size // 8 + 2, size // 8 + 2)).astype(np.float32)
        smooth = np.kron(coarse, np.ones((8, 8), np.float32))
        fine = rng.standard_normal(smooth.shape, dtype=np.float32)
        self._texture = ((smooth + 0.5 * fine) / np.sqrt(1.25)).astype(np.float32)

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

    def unit(self, time_index: int, layer: int, names: tuple[str, ...]) -> tuple[Unit, Float]:
        """A unit of so many samplings, and what its windows and the masks of its ladder cost, float32 ``(W + C, H)``;
        all relative to the level of the time."""
        manifest, kinds = self.manifest, self.kinds(layer)
        heads, shape = manifest.model.heads, (manifest.q_blocks, manifest.k_blocks)
        rng, own = (np.random.default_rng([self.seed, 5, *key]) for key in ((time_index, layer), (layer,)))
        time = manifest.times[time_index]
        size = own.normal(0, 1.5, heads) + 0.7 * np.sin(2 * np.pi * (time + own.random(heads)))
        share = np.exp(size) / np.exp(size).sum() / manifest.model.layers
        windows = [window_keep(each, manifest.grid, manifest.blocks)[::ROW_STRIDE] for each in manifest.windows]
        noise = OCTAVE * np.log2(rng.chisquare(VECTORS * len(names), (64, 64)) / (VECTORS * len(names)))
        noise = np.tile(noise, [-(-side // 64) for side in shape])[: shape[0], : shape[1]]
        error, effect = np.empty((heads, *shape), np.uint8), np.empty((heads, *shape), np.uint8)
        peaks = np.empty(heads, np.float32)
        price = np.empty((len(windows) + len(manifest.shares), heads), np.float32)
        for head, kind in enumerate(kinds):
            code = self._head(kind, layer, head, time)
            error[head] = np.clip(code, 0, 254)
            effect[head] = np.clip(code - noise + 2 * OCTAVE, 0, 254)
            number = np.bincount(error[head].reshape(-1), minlength=256)
            peaks[head] = share[head] / (number @ code_values(1.0))
            some = error[head, ::ROW_STRIDE]
            root = np.sqrt(code_values(float(peaks[head])))[some]
            below = np.searchsorted(np.cumsum(number), np.array(manifest.shares) * code.size)
            masks = [*windows, *(some <= last for last in below)]
            price[:, head] = [((root * ~mask).sum(1) ** 2).sum() * len(code) / len(some) for mask in masks]
        price *= self.mix.coherence * np.exp(own.normal(0, 0.3, price.shape)).astype(np.float32)
        grid, rows, frames = manifest.grid, manifest.row_radius, manifest.frame_radius
        row_effect = _copy_effect("rows", kinds, share, grid.height, rows)
        frame_effect = _copy_effect("temporal", kinds, share, grid.frames, frames)
        return Unit(names, effect, 4 * peaks, error, peaks, row_effect, frame_effect), price

    def write(self, path: Path, samples: int, done: Callable[[], None] = lambda: None) -> None:
        """Writes a closed store of so many samplings, whose levels rise a hundredfold with noise."""
        manifest, rng = self.manifest, np.random.default_rng([self.seed, 6])
        model, times = manifest.model, len(manifest.times)
        names = tuple(f"s{index:02d}" for index in range(samples))
        windows = len(manifest.windows)
        price = np.empty((times, model.layers, windows + len(manifest.shares), model.heads))
        with StoreWriter.open(path, manifest) as writer:
            for layer in range(model.layers):
                for at in range(times):
                    unit, price[at, layer] = self.unit(at, layer, names)
                    write_unit(path / UNITS / unit_name(at, layer), unit, manifest, (at, layer))
                    done()
            for index, name in enumerate(names):
                level = 1e-5 * 100.0 ** np.array(manifest.times) * np.exp(rng.normal(0, 0.3))
                signed = rng.normal(0, 1, (VECTORS, *price.shape)) * np.sqrt(price * level[:, None, None, None])
                signed = signed.astype(np.float32)
                ladder = signed[:, :, :, windows:] * np.float32(1 if index else np.nan)
                eight = signed[:, :, :, : len(EIGHT_BITS)] * np.float32(ROUNDING)
                tables = SamplingTables(level, signed[:, :, :, :windows], ladder, eight)
                writer.finish(name, tables, {"prompt": f"synthetic {name}", "seed": self.seed, "vectors": VECTORS})


def _copy_effect(
    repeating: str, kinds: Sequence[str], share: npt.NDArray[np.float64], count: int, radius: int
) -> npt.NDArray[np.float32]:
    """float32 ``(H, count, 2 radius)``: small in heads that repeat over rows, or frames; it grows with the distance."""
    offsets = np.array([*range(-radius, 0), *range(1, radius + 1)])
    base = (np.array([0.02 if kind == repeating else 3.0 for kind in kinds]) * share)[:, None, None]
    return np.where(neighbours(count, radius), base * np.abs(offsets), np.nan).astype(np.float32)


SYNTHETIC = all_of(
    count_option("--layers", 4, "Of the model."),
    count_option("--times", 50, "That are recorded."),
    count_option("--samples", 8, "Samplings."),
)


@study_command("python -m calibatt.tools.studies.synthetic", __doc__)
@click.argument("store", type=PATH)
@SYNTHETIC
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(store: Path, layers: int, times: int, samples: int, seed: int) -> None:
    steps = iter(track(range(layers * times), "units"))
    Synthetic(wan14b_manifest(layers, times), seed=seed).write(store, samples, lambda: next(steps, None))


if __name__ == "__main__":
    main()
