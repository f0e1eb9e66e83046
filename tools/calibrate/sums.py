"""The measurements of one layer at one time of a sampling: sums over its calls, in the form that a store takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibatt.compiler.stats import Manifest, SamplingTables, Unit, neighbours
from calibatt.plans import EIGHT_BITS
from calibatt.tools.calibrate import effects
from calibatt.tools.calibrate.chain import Cotangents
from calibatt.tools.calibrate.gradients import AttentionCall


@dataclass(eq=False)
class LayerSums:
    """Signed effects of one layer at one time, added up over its calls; see `effects`.

    Args:
        words: int32 ``(H or 1, Q, K)``: the masks that are measured, one bit for each.
        has_ladder: Whether the last of these masks are a ladder.
        effect: ``(V, H, Q, K)``, of dropping single blocks.
        error: ``(H, Q, K)``, not signed.
        masks: float64 ``(V, M, H)``.
        precisions: float64 ``(V, len(EIGHT_BITS), H)``.
        rows: float64 ``(V, H, height, 2 R)``, of copied rows.
        frames: float64 ``(V, H, frames, 2 S)``, of copied frames.
        votes: int32 ``(T, H, Q, K)``; None without thresholds.
        calls: How many have been added.
        row_difference: ``(H, height, 2 R)``; 0 without thresholds.
    """

    words: Tensor
    has_ladder: bool
    effect: Tensor
    error: Tensor
    masks: Tensor
    precisions: Tensor
    rows: Tensor
    frames: Tensor
    votes: Tensor | None = None
    calls: int = 0
    row_difference: Tensor | float = 0.0

    @classmethod
    def empty(
        cls, manifest: Manifest, vectors: int, windows: Sequence[Any], earlier: Unit | None, device: torch.device
    ) -> LayerSums:
        """Sums before any call.

        Args:
            manifest: Of the store.
            vectors: Random vectors of the final latent.
            windows: The masks of the windows, bool ``(Q, K)``.
            earlier: Measurements of other samplings, from which a ladder of masks is made; no ladder if absent.
            device: The device of the calls.
        """
        sizes, heads = (manifest.q_blocks, manifest.k_blocks), manifest.model.heads
        masks = torch.from_numpy(np.array(windows, np.bool_).reshape(-1, 1, *sizes)).to(device)
        if earlier is not None:
            values = (earlier.effect_values(), earlier.error_values())
            effect, error = (torch.from_numpy(x).to(device) for x in values)
            rungs = effects.ladder(effect * error, manifest.shares)
            masks = torch.cat([masks.expand(-1, len(effect), -1, -1), rungs])

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            words=effects.mask_words(masks),
            has_ladder=earlier is not None,
            effect=zeros(vectors, heads, *sizes, dtype=torch.float32),
            error=zeros(heads, *sizes, dtype=torch.float32),
            masks=zeros(vectors, len(masks), heads),
            precisions=zeros(vectors, len(EIGHT_BITS), heads),
            rows=zeros(vectors, heads, manifest.grid.height, 2 * manifest.row_radius),
            frames=zeros(vectors, heads, manifest.grid.frames, 2 * manifest.frame_radius),
        )

    def add(self, call: AttentionCall, manifest: Manifest) -> None:
        """Adds the measurements of one call."""
        blocks, grid = manifest.blocks, manifest.grid
        effect, masks, rounding = effects.block_effects(call, self.words, self.masks.shape[1], blocks)
        self.effect += effect
        self.masks += masks
        self.precisions += effects.precision_effects(call, rounding, blocks)
        self.error += effects.block_errors(call, blocks)
        rows, frames = effects.copy_effects(call, grid, manifest.row_radius, manifest.frame_radius)
        self.rows += rows
        self.frames += frames
        self.calls += 1
        if manifest.thresholds:
            self._count(call, manifest)

    def _count(self, call: AttentionCall, manifest: Manifest) -> None:
        """Counts for the paper's own method: which blocks hold the mass, how far rows are apart."""
        mass, _ = effects.block_statistics(call.q, call.k, call.v, manifest.blocks, effects.ERROR_STRIDE, call.video)
        others = call.q.shape[1] > manifest.grid.tokens
        planes = effects.keep_planes(mass, manifest.thresholds, others).int()
        self.votes = planes if self.votes is None else self.votes + planes
        out = call.out[:, call.video]
        self.row_difference = self.row_difference + effects.row_differences(out, manifest.grid, manifest.row_radius)

    def is_finite(self) -> bool:
        """Whether everything that was added is finite."""
        every = (self.effect, self.error, self.masks, self.precisions, self.rows, self.frames)
        return all(bool(x.isfinite().all()) for x in every)

    def level(self) -> Tensor:
        """Sum over the blocks of the mean squared effect of each, float64 ``()``."""
        return self.effect.square().mean(0).sum(dtype=torch.float64)

    def unit(self, name: str, manifest: Manifest, level: float) -> Unit:
        """The unit of the sampling of this name; `level` is that of all layers."""

        def squares(x: Tensor, members: int) -> np.ndarray:
            """Mean over vectors of squared effects of copies, NaN where there is no such member."""
            squared = (x.square().mean(0) / level).float().cpu().numpy()
            return np.where(neighbours(members, x.shape[-1] // 2), squared, np.float32(np.nan))

        counts: dict[str, Any] = {}
        if self.votes is not None:
            counts = {
                "votes": self.votes.cpu().numpy().astype(np.uint16),
                "vote_samples": self.calls,
                "row_difference": (self.row_difference / self.calls).cpu().numpy(),
            }
        return Unit.of(
            name,
            effect=(self.effect.square().mean(0) / level).cpu().numpy(),
            error=(self.error / level).cpu().numpy(),
            row_effect=squares(self.rows, manifest.grid.height),
            frame_effect=squares(self.frames, manifest.grid.frames),
            **counts,
        )


@dataclass(eq=False)
class Moment:
    """One time of a sampling: numbers of its forwards, gradients of those that are done, sums of its layers."""

    numbers: list[int] = field(default_factory=list)
    pulled: dict[int, Cotangents] = field(default_factory=dict)
    layers: dict[int, LayerSums] = field(default_factory=dict)


def table_of(layers: Sequence[LayerSums], manifest: Manifest, level: float) -> dict[str, np.ndarray]:
    """What is stored for one time of one sampling: signed effects of whole masks and of precisions, and the level."""
    windows, rungs, precisions = [], [], []
    count = len(manifest.windows)
    for sums in layers:
        masks = sums.masks.float().cpu().numpy()
        windows.append(masks[:, :count])
        none = np.full((len(masks), len(manifest.shares), manifest.model.heads), np.nan, np.float32)
        rungs.append(masks[:, count:] if sums.has_ladder else none)
        precisions.append(sums.precisions.float().cpu().numpy())
    return {
        "level": np.array(level),
        "window_effect": np.stack(windows, 1),
        "ladder_effect": np.stack(rungs, 1),
        "precision_effect": np.stack(precisions, 1),
    }


def tables_of(times: Sequence[dict[str, np.ndarray]]) -> SamplingTables:
    """The tables of all times of a sampling, joined along an axis of times: the first, or the one after the vectors."""
    return SamplingTables(
        **{key: np.stack([table[key] for table in times], 0 if key == "level" else 1) for key in times[0]}
    )
