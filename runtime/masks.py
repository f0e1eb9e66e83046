"""Makes plans from your own block masks: a published pattern, a measurement, a hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from calibatt.plans import (
    Blocks,
    LayerSchedule,
    ModelSignature,
    PlanFile,
    Segment,
    StoredLayers,
    TokenGrid,
    base_segments,
    encode,
    schedule_of,
)
from calibatt.runtime.adapters import Adapter, adapter_for
from calibatt.runtime.plan import Plan

Bool = npt.NDArray[np.bool_]


def plan_from_masks(
    masks: npt.ArrayLike | torch.Tensor,
    grid: TokenGrid | tuple[int, int, int],
    blocks: Blocks | tuple[int, int] = (128, 128),
    *,
    model: nn.Module | ModelSignature,
    segments: Sequence[float] = (0.0, 1.0),
    adapter: Adapter | None = None,
    notes: str = "",
) -> Plan:
    """Makes a plan in which every head follows a block mask that you give.

    A mask has a row for every query block and a column for every key block of the video's tokens, which are in the
    order (frame, y, x) and cut into blocks from the first one on; the last block may be partial. True keeps a block.
    Text and other tokens beside the video are not part of a mask: they attend to everything, and everything to them.

        >>> import numpy as np
        >>> from calibatt.plans import ModelSignature
        >>> model = ModelSignature("WanTransformer3DModel", layers=2, heads=4, head_dim=64)
        >>> near = np.abs(np.subtract.outer(np.arange(6), np.arange(6))) <= 1  # 6 blocks see their neighbours
        >>> masks = np.broadcast_to(near, (2, 4, 6, 6))
        >>> plan = plan_from_masks(masks, (4, 4, 6), (16, 16), model=model)
        >>> round(plan.schedule(time=0.5, layer=1).density, 3)
        0.444

    ``plan.attach(transformer)`` runs it, ``plan.save("mine.plan")`` stores it.

    Args:
        masks: bool ``(layers, heads, Q, K)``, or ``(segments, layers, heads, Q, K)``: a numpy array or a tensor on any
            device. Q and K are the grid's tokens / block size, rounded up. Every row must keep a block.
        grid: The video's tokens: latent frames, rows and columns after patching.
        blocks: Tokens of a query block and of a key block, each one of `calibatt.plans.BLOCK_SIZES`.
        model: The transformer that the plan is for, or its signature.
        segments: Edges of the segments of denoising time, from 0 to 1 (pure noise), one more than there are segments:
            ``(0.0, 0.8, 1.0)`` for two, of which the second is the noisier one, where sampling begins.
        adapter: The model's row, for a family that `calibatt.runtime.adapters.ADAPTERS` lacks.
        notes: Text that is stored in the plan, such as where the masks come from.

    Raises:
        SchemaError: `grid` or `blocks` has a size that no plan can have.
        UnknownModelError: The model's family is not known.
        ValueError: The masks are not bool, have another shape than model, grid, blocks and segments ask for, or a row
            that keeps nothing; or `segments` does not rise from 0 to 1.
    """
    grid = grid if isinstance(grid, TokenGrid) else TokenGrid(*grid)
    blocks = blocks if isinstance(blocks, Blocks) else Blocks(*blocks)
    if not isinstance(model, ModelSignature):
        model = (adapter or adapter_for(model)).signature(model)
    edges = [float(edge) for edge in segments]
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != 1 or any(not a < b for a, b in pairwise(edges)):
        raise ValueError(f"segments must be edges that rise from 0 to 1, got {edges}")
    every = masks if isinstance(masks, torch.Tensor) else np.asarray(masks)
    bases = base_segments(len(edges) - 1)
    shape = (len(bases), model.layers, model.heads, blocks.q_blocks(grid.tokens), blocks.k_blocks(grid.tokens))
    kind = str(every.dtype).removeprefix("torch.")
    if kind != "bool" or tuple(every.shape) not in (shape, shape[1:] if len(bases) == 1 else shape):
        rule = f"bool of (segments, layers, heads, query blocks, key blocks) = {shape}"
        raise ValueError(f"masks must be {rule}, the first may be left out if it is 1; got {kind} of {(*every.shape,)}")
    every = every.reshape(shape)
    stored: list[list[Any]] = [[] for _ in bases]
    for layer in range(model.layers):
        packed = [
            _pack(of_segment[layer], grid, blocks, f"segment {segment}, layer {layer}")
            for segment, of_segment in enumerate(every)
        ]
        for segment, base in enumerate(bases):
            stored[segment].append(encode(packed[segment], None if base == segment else packed[base]))
    return Plan(
        PlanFile(
            signature=model,
            grid=grid,
            blocks=blocks,
            segments=tuple(Segment(start, stop, (start + stop) / 2) for start, stop in pairwise(edges)),
            schedules=StoredLayers("", grid, blocks, model.heads, bases, stored),
            notes=notes,
        )
    )


def _pack(masks: Any, grid: TokenGrid, blocks: Blocks, where: str) -> LayerSchedule:
    """The schedule of one layer's masks, bool ``(heads, Q, K)``; heads with the same mask share its lists."""
    keep: Bool = masks.cpu().numpy() if isinstance(masks, torch.Tensor) else masks
    if len(empty := np.argwhere(~keep.any(axis=2))):
        head, row = empty[0].tolist()
        raise ValueError(f"masks must keep a key block in every row, got none in {where}, head {head}, row {row}")
    return schedule_of(grid, blocks, [*np.packbits(keep, axis=2, bitorder="little")])
