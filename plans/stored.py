"""The layers of a plan file, decoded when they are used."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from calibatt.plans.encoding import (
    LIMIT_VARIABLE,
    MAX_BASES,
    EncodedLayer,
    base_segments,
    encode,
    finish,
    layer_bytes,
    unpack,
)
from calibatt.plans.errors import LimitError, PlanError, ScheduleError, SchemaError
from calibatt.plans.schedule import LayerSchedule, check_bits
from calibatt.plans.schema import Blocks, TokenGrid

CACHE_BYTES = 1 << 27
"""Size of each of the two caches in which `StoredLayers` keeps the layers used last."""
LAYERS = 128
"""All lists of a file together may need so many times what one layer may."""
PROVE_BYTES = 1 << 30
"""Memory that threads share while they prove a file; one thread runs in any case."""


class StoredLayers:
    """The schedules of a plan, decoded and proved when they are asked for; ``[segment][layer]``.

    The layers used last are cached, and bases of other segments once more. All methods may be called from many threads.

    Args:
        where: What errors name.
        grid: The video tokens.
        blocks: Block sizes.
        heads: Of every layer.
        bases: The base of each segment; `check_bases` holds.
        layers: ``[segment][layer]``.
        granted: Most `layer_bytes` of a layer; the lists of all layers may need `LAYERS` times as much. None: no limit.

    Raises:
        LimitError: All lists need more than is granted.
        ScheduleError: A layer has another number of heads.
    """

    def __init__(
        self,
        where: str,
        grid: TokenGrid,
        blocks: Blocks,
        heads: int,
        bases: Sequence[int],
        layers: Sequence[Sequence[EncodedLayer]],
        granted: int | None = None,
    ) -> None:
        self.where, self.grid, self.blocks, self.heads = where, grid, blocks, heads
        self.bases, self.layers, self.granted = tuple(bases), layers, granted
        k_blocks = blocks.k_blocks(grid.tokens)
        needed = [layer_bytes(layer.lists, k_blocks, 0) for each in layers for layer in each]
        if granted is not None and sum(needed) > LAYERS * granted:
            rule = f"need at most {LAYERS * granted} bytes for its lists ({LIMIT_VARIABLE} grants more)"
            raise LimitError(f"{where}the plan must {rule}, got {sum(needed)}")
        self._most_bytes = max(needed, default=0)
        for segment, each in enumerate(layers):
            for at, layer in enumerate(each):
                if (given := len(layer.small["head_list"])) != heads:
                    raise ScheduleError(
                        f"segment {segment}, layer {at}: head_list must have {heads} heads, got {given}"
                    )
        mask_blocks = heads * blocks.q_blocks(grid.tokens) * blocks.k_blocks(grid.tokens)
        kept = max(4, 8 * CACHE_BYTES // mask_blocks)
        self._unpacked = lru_cache(maxsize=kept)(self._unpack)
        self.schedule = lru_cache(maxsize=kept)(self._schedule)

    @classmethod
    def of(cls, schedules: Sequence[Sequence[LayerSchedule]]) -> StoredLayers:
        """Stores schedules, ``[segment][layer]``: at least one, all of one grid, blocks and number of heads.

        Raises:
            ScheduleError: A schedule breaks a promise of `LayerSchedule`, or is of another grid or other blocks; the
                message names segment and layer.
            SchemaError: Segments have different numbers of layers.
        """
        first = schedules[0][0]
        for segment, layers in enumerate(schedules):
            if len(layers) != len(schedules[0]):
                rule = f"have {len(schedules[0])} schedules, one a layer"
                raise SchemaError(f"segment {segment} must {rule}, got {len(layers)}")
            for layer, schedule in enumerate(layers):
                where = f"segment {segment}, layer {layer}"
                if (schedule.grid, schedule.blocks) != (first.grid, first.blocks):
                    given = f"{schedule.grid}, {schedule.blocks}"
                    raise ScheduleError(f"{where}: grid and blocks must be the first schedule's, got {given}")
                try:
                    schedule.check()
                except ScheduleError as error:
                    raise ScheduleError(f"{where}: {error}") from None
        bases = base_segments(len(schedules))
        encoded = [
            [encode(layer, None if base == index else schedules[base][at]) for at, layer in enumerate(layers)]
            for index, (base, layers) in enumerate(zip(bases, schedules, strict=True))
        ]
        return cls("", first.grid, first.blocks, first.heads, bases, encoded)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredLayers, (self.where, self.grid, self.blocks, self.heads, self.bases, self.layers, self.granted)

    def _unpack(self, segment: int, layer: int) -> LayerSchedule:
        """A layer that can serve as a base."""
        base = self.bases[segment]
        return self._unpack_from(None if base == segment else self._unpacked(base, layer), segment, layer)

    def _unpack_from(self, base: LayerSchedule | None, segment: int, layer: int) -> LayerSchedule:
        with self._named(segment, layer):
            return unpack(self.layers[segment][layer], base, self.grid, self.blocks, self.granted)

    def _finish(self, unpacked: LayerSchedule, segment: int, layer: int) -> LayerSchedule:
        with self._named(segment, layer):
            return finish(unpacked)

    @contextmanager
    def _named(self, segment: int, layer: int) -> Iterator[None]:
        """Adds plan, segment and layer to the message of an error."""
        try:
            yield
        except PlanError as error:
            raise type(error)(f"{self.where}segment {segment}, layer {layer}: {error}") from None
        except MemoryError:
            raise LimitError(
                f"{self.where}segment {segment}, layer {layer}: must fit in memory, got too little"
            ) from None

    def _schedule(self, segment: int, layer: int) -> LayerSchedule:
        """A layer, proved.

        Raises:
            MaskError, ScheduleError: What is stored breaks a promise; names plan, segment and layer.
        """
        return self._finish(self._unpacked(segment, layer), segment, layer)

    def forget(self) -> None:
        """Empties the caches of layers used last."""
        for cached in (self._unpacked, self.schedule):
            cached.cache_clear()

    def walk(self) -> Iterator[tuple[int, int, LayerSchedule]]:
        """Segment, layer and schedule of every layer: each is decoded once, and few are held at a time.

        Raises:
            MaskError, ScheduleError: As `schedule`, when the layer's turn comes.
        """
        for layer in self._every_layer():
            for segment, unpacked in self._walk(layer):
                yield segment, layer, self._finish(unpacked, segment, layer)

    def prove(self) -> None:
        """Decodes every layer once, on all cores, and stores none. Each thread holds about `MAX_BASES` + 4 layers.

        Raises:
            MaskError, ScheduleError: The first broken promise of the first layer that breaks one.
        """
        at_once = PROVE_BYTES // ((MAX_BASES + 4) * self._most_bytes + 1)
        with ThreadPoolExecutor(max(1, min(os.cpu_count() or 1, at_once))) as pool:
            for _ in pool.map(self._prove, self._every_layer()):
                pass

    def _prove(self, layer: int) -> None:
        for segment, unpacked in self._walk(layer):
            with self._named(segment, layer):
                check_bits(unpacked)

    def _every_layer(self) -> range:
        return range(len(self.layers[0]) if self.layers else 0)

    def _walk(self, layer: int) -> Iterator[tuple[int, LayerSchedule]]:
        """Every segment of a layer before `finish`; a base comes before the segments stored as differences from it."""
        above: dict[int, list[int]] = defaultdict(list)
        for segment, base in enumerate(self.bases):
            above[base].append(segment)

        def visit(segment: int, base: LayerSchedule | None) -> Iterator[tuple[int, LayerSchedule]]:
            unpacked = self._unpack_from(base, segment, layer)
            yield segment, unpacked
            for each in above[segment]:
                if each != segment:
                    yield from visit(each, unpacked)

        for segment, base in enumerate(self.bases):
            if base == segment:
                yield from visit(segment, None)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, segment: int) -> list[LayerSchedule]:
        return [self.schedule(segment, layer) for layer in range(len(self.layers[segment]))]
