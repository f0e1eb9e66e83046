"""The second measurement of a store: exact errors of the masks that the compiler may choose, on dense trajectories.

Every sample is sampled once more. At each recorded call some query blocks of every head are looked at: attention is
split by key block once, and every mask of every ladder is then a sum over the blocks that it keeps.
"""

from __future__ import annotations

import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from calibatt.compiler.gather import StatisticsSource
from calibatt.compiler.stats import Ladders, Store, StoreWriter, window_keep
from calibatt.plans import Blocks
from calibatt.runtime.adapters import Adapter, adapter_for
from calibatt.tools.calibrate.listen import Call, ListenError, listening
from calibatt.tools.calibrate.recorder import StepCounter, recorded_steps
from calibatt.tools.calibrate.sampler import Sampler
from calibatt.tools.calibrate.statistics import by_key_block, projected_values, projection_factor

QUERY_BLOCKS = 96
"""Query blocks of a head on which masks are measured, unless asked otherwise."""
SCORES_AT_ONCE = {"cpu": 1 << 23, "cuda": 1 << 26}
"""Scores held at a time, over all heads and query blocks (32 or 256 MiB in float32; five times that in all)."""
REMEMBERED_BYTES = 4 << 30
"""Levels of units that are kept from sample to sample; the others are made again from the store for each."""


def mask_errors(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    levels: Tensor,
    windows: Tensor,
    shares: int,
    blocks: Blocks,
    picked: Sequence[int],
    stride: int,
    offset: int,
) -> Tensor:
    """What masked attention changes, exactly, over some queries.

    Args:
        q: ``(H, N, D)``.
        k: ``(H, N, D)``.
        values: ``(H, N, D)`` values behind the projection, float32.
        levels: uint8 ``(S, H, Q, K)``; level l of a ladder keeps the blocks that are at most l.
        windows: bool ``(W, Q, K)``.
        shares: Levels of a ladder.
        blocks: Block sizes.
        picked: Query blocks that are measured, ascending.
        stride: Every `stride`-th query of them is.
        offset: The first one, below `stride`.

    Returns:
        Float32 ``(S * shares + W, H)``: the mean over measured queries of ||O_kept - O||^2 of the projected values.
    """
    heads, tokens, _ = q.shape
    lost = q.new_zeros(heads, len(levels) * shares + len(windows), dtype=torch.float32)
    rungs = torch.arange(shares, device=q.device, dtype=torch.uint8)
    queries = 0
    for some, which, index in _pieces(heads, tokens, blocks.block_q, picked, stride, offset, q.device):
        measured = len(index) // len(which)
        p, sums = by_key_block(q[some][:, index], k[some], values[some], blocks.block_k)
        level = levels[:, some][:, :, which, None]  # (S, h, n, 1, K)
        keep = (level <= rungs[:, None]).permute(1, 2, 0, 3, 4).flatten(2, 3)
        every = windows[:, which].transpose(0, 1).expand(len(keep), -1, -1, -1)
        keep = torch.cat([keep, every], 2).float()  # (h, n, C, K)
        sums = sums.unflatten(2, (len(which), measured)).transpose(1, 2)  # (h, n, K, c, D)
        share = keep @ p.unflatten(1, (len(which), measured)).mT
        output = sums.sum(2)
        kept = (keep @ sums.flatten(3)).unflatten(3, output.shape[2:])
        change = kept.div_(share.clamp_(min=1e-30)[..., None]).sub_(output[:, :, None])
        lost[some] += change.square_().sum((1, 3, 4))
        queries += len(index) if some.start == 0 else 0
    return lost.T / queries


def _pieces(
    heads: int, tokens: int, block_q: int, picked: Sequence[int], stride: int, offset: int, device: torch.device
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some heads, some query blocks of them (all equally full), and the tokens of these blocks that are measured."""
    full = [block for block in picked if (block + 1) * block_q <= tokens]
    for which in (full, [block for block in picked if block * block_q < tokens < (block + 1) * block_q]):
        if not which:
            continue
        size = min(block_q, tokens - which[0] * block_q)
        within = torch.arange(offset if offset < size else 0, size, stride, device=device)
        # Many query blocks of few heads: all keys and values of a head are copied for each piece.
        at_once = max(1, SCORES_AT_ONCE[device.type] // (tokens * len(within)))
        heads_at_once = max(1, at_once // len(which))
        for first in range(0, heads, heads_at_once):
            for part in torch.tensor(which, device=device).split(at_once):
                index = (part[:, None] * block_q + within).reshape(-1)
                yield slice(first, min(heads, first + heads_at_once)), part, index


class Refiner:
    """Measures the ladders of a store's samples.

    Args:
        sampler: What to run.
        store: The statistics, all samples of which the ladders are derived from.
        ladders: What is measured.
        query_blocks: Query blocks of each head that are looked at, drawn for each call; all of them if fewer.
        adapter: The model's row; found by its class if absent.
        on_unit: Called after every unit.

    Raises:
        ListenError: The store is of another model or grid, or two of its times share a step.
    """

    def __init__(
        self,
        sampler: Sampler,
        store: Store,
        ladders: Ladders,
        query_blocks: int = QUERY_BLOCKS,
        *,
        adapter: Adapter | None = None,
        on_unit: Callable[[], None] = lambda: None,
    ) -> None:
        self.sampler, self.store, self.ladders = sampler, store, ladders
        self.query_blocks = query_blocks
        self.adapter = adapter or adapter_for(sampler.transformer)
        manifest = store.manifest
        self.steps = recorded_steps(manifest, sampler.times)
        self._source = StatisticsSource(store)
        self._on_unit = on_unit
        self._remembered: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        masks = [torch.from_numpy(window_keep(window, manifest.grid, manifest.blocks)) for window in manifest.windows]
        self._windows = torch.stack(masks) if masks else torch.zeros(0, manifest.q_blocks, manifest.k_blocks).bool()
        if (signature := self.adapter.signature(sampler.transformer)) != manifest.model:
            raise ListenError(f"the store must be of {signature}, got {manifest.model}")
        if sampler.grid != manifest.grid:
            raise ListenError(f"the store must be of {sampler.grid}, got {manifest.grid}")

    def refine(self, writer: StoreWriter, name: str) -> None:
        """Samples one sample again and writes its errors; an exception leaves nothing of it.

        Args:
            writer: Of the store, its refinement begun.
            name: Of the sample.

        Raises:
            ListenError: A forward is not as the manifest says, or a recorded step has no such branch.
            StoreError: A unit is damaged, or the errors are there already.
        """
        meta, begun = self.store.meta[name], time.perf_counter()
        found: dict[tuple[int, int], Tensor] = {}
        count = StepCounter(self.sampler.times)
        here = forward = 0

        def on_forward(now: float) -> bool:
            nonlocal here, forward
            step, forward = count(now)
            here = self.steps.index(step) if step in self.steps else -1
            return here >= 0 and forward <= meta["branch"]

        def on_call(call: Call) -> None:
            if call.branch(forward) == meta["branch"]:
                found[here, call.layer] = self.measure(call, here, f"{name}/{here}/{call.layer}/refine")
                self._on_unit()

        model, grid = self.sampler.transformer, self.store.manifest.grid
        with listening(model, grid, on_forward, on_call, self.adapter, batches=True):
            self.sampler.run(meta["prompt"], meta["seed"])
        times, layers = len(self.steps), self.store.manifest.model.layers
        if absent := [self.store.manifest.times[index] for index in range(times) if (index, 0) not in found]:
            raise ListenError(f"every recorded step must have a forward {meta['branch']}, got none at times {absent}")
        errors = torch.stack([torch.stack([found[at, layer] for layer in range(layers)]) for at in range(times)])
        told = {"query_blocks": self.query_blocks, "seconds": time.perf_counter() - begun}
        writer.write_errors(name, errors.cpu().numpy(), self.ladders, **told)

    def measure(self, call: Call, time_index: int, seed: str) -> Tensor:
        """Errors of one call's masks relative to the residual stream, float32 ``(C, H)``, on its device."""
        manifest, device = self.store.manifest, call.q.device
        blocks, stride = manifest.blocks, manifest.query_stride
        heads, tokens, head_dim = call.q.shape
        q_blocks, k_blocks = blocks.q_blocks(tokens), blocks.k_blocks(tokens)
        generator = np.random.default_rng(zlib.crc32(seed.encode()))
        picked = sorted(generator.permutation(q_blocks)[: self.query_blocks].tolist())
        offset = int(generator.integers(stride))
        behind = projected_values(call.v, projection_factor(call.projection, heads, head_dim))
        levels = self._levels(time_index, call.layer, device)[..., :q_blocks, :k_blocks]
        self._windows = self._windows.to(device)
        windows = self._windows[:, :q_blocks, :k_blocks]
        shares = len(self.ladders.shares)
        errors = mask_errors(call.q, call.k, behind, levels, windows, shares, blocks, picked, stride, offset)
        return errors / call.residual_square

    def _levels(self, time_index: int, layer: int, device: torch.device) -> Tensor:
        at = time_index, layer
        if at not in self._remembered:
            levels = torch.from_numpy(self._source.levels(self.ladders, time_index, layer)).to(device)
            self._remembered[at] = levels
            # Samples come to the units in one order: those that are there longest are needed soonest.
            if sum(each.numel() for each in self._remembered.values()) > REMEMBERED_BYTES:
                del self._remembered[at]
            return levels
        return self._remembered[at]
