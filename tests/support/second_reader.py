"""A second reader of plan files, written from plans/FORMAT.md alone: nothing here is calibatt's.

It is slow and plain on purpose, one check for each rule of the page, and judges the first reader: a file means the same
to both, or is refused by both (`support.judge`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import zstandard

from support.second_container import Refused, container, keys, require, up, whole

COLUMNS = (
    "masks lists head_list head_anchor anchor_ptr anchor_axis group_start group_anchor tile_order head_precision"
).split()
ARRAYS = COLUMNS[2:]


# The header of a plan


def check_header(header: Any, later: bool) -> None:
    keys(
        header,
        "model grid blocks bases segments passes scheduler_hint provenance predicted license notes",
        later,
        "plan",
    )
    model, grid, blocks = header["model"], header["grid"], header["blocks"]
    keys(model, "architecture layers heads head_dim weights_digest", later, "model")
    require(type(model["architecture"]) is str and model["architecture"] != "", "architecture")
    require(all(whole(model[key], 1) for key in ("layers", "heads", "head_dim")), "model")
    require(model["weights_digest"] is None or type(model["weights_digest"]) is str, "weights_digest")
    keys(grid, "frames height width", later, "grid")
    require(all(whole(grid[key], 1) for key in ("frames", "height", "width")), "grid")
    tokens = grid["frames"] * grid["height"] * grid["width"]
    require(tokens < 2**31, "grid: tokens")
    require((model["heads"] + 1) * up(tokens, 256) <= 2**28, "grid: queries of all heads")
    keys(blocks, "block_q block_k", later, "blocks")
    for size in (blocks["block_q"], blocks["block_k"]):
        require(type(size) is int and size in (16, 32, 64, 128, 256), "blocks")
    require(-(-tokens // blocks["block_k"]) <= 65536, "blocks: too many")

    segments, bases = header["segments"], header["bases"]
    require(type(segments) is list and len(segments) > 0, "segments")
    last = 0.0
    for segment in segments:
        keys(segment, "start stop time", later, "segment")
        require(all(type(segment[key]) is float for key in ("start", "stop", "time")), "segment: no float")
        require(segment["start"] == last and segment["start"] < segment["stop"], "segment: order")
        require(segment["start"] <= segment["time"] <= segment["stop"], "segment: time")
        last = segment["stop"]
    require(last == 1.0, "segments: last")
    require(type(bases) is list and len(bases) == len(segments), "bases")
    require(all(whole(base) and base < len(bases) for base in bases), "bases: no segment")
    for base in range(len(bases)):
        for _ in range(4):
            base = bases[base]
        require(bases[base] == base, "bases: more than 4 steps")

    require(all(type(header[key]) is str for key in ("passes", "license", "notes")), "text")
    require(header["scheduler_hint"] is None or type(header["scheduler_hint"]) is dict, "scheduler_hint")
    if "times" in (hint := header["scheduler_hint"] or {}):
        require(type(hint["times"]) is list and hint["times"] != [], "scheduler_hint: times")
        require(all(type(now) in (int, float) and 0 <= now <= 1 for now in hint["times"]), "scheduler_hint: no time")
    require(type(header["provenance"]) is dict, "provenance")
    check_predicted(header["predicted"], len(segments), model["layers"], model["heads"])


def check_predicted(predicted: Any, segments: int, layers: int, heads: int) -> None:
    require(type(predicted) is dict, "predicted")

    def numbers(value: Any, *shape: int) -> bool:
        if not shape:
            return type(value) in (int, float) and math.isfinite(value) and value >= 0
        return type(value) is list and len(value) == shape[0] and all(numbers(each, *shape[1:]) for each in value)

    for key in ("planned_ms", "dense_ms"):
        require(key not in predicted or numbers(predicted[key], segments, layers), key)
    require("head_price" not in predicted or numbers(predicted["head_price"], segments, layers, heads), "head_price")
    latent = predicted.get("latent_db")
    if latent is not None:
        require(type(latent) is dict, "latent_db")
        for key in ("mean", "standard_error", "samplings"):
            require(type(latent.get(key)) in (int, float) and math.isfinite(latent[key]), "latent_db")


# Schedules


@dataclass
class Layer:
    """What one layer computes in one segment.

    Attributes:
        heads: For each head its key blocks, bool (tiles, key blocks); or None: every key block.
        anchors: For each head its axis, first members and anchors; or None: every token is computed.
        order: Tile ids in order of execution.
        precision: For each head 0, 1 or 2.
    """

    heads: list[np.ndarray | None]
    anchors: list[tuple[int, list[int], list[int]] | None]
    order: np.ndarray
    precision: list[int]


@dataclass
class Plan:
    """What a file means: its header, and for each segment its layers."""

    header: dict[str, Any]
    segments: list[list[Layer]]


class Reader:
    """The schedules of one file, layer by layer."""

    def __init__(self, header: dict[str, Any], sections: dict[str, np.ndarray], size: int, grant: int | None) -> None:
        grid, model = header["grid"], header["model"]
        self.frames, self.height, self.width = grid["frames"], grid["height"], grid["width"]
        self.layers, self.heads, self.bases = model["layers"], model["heads"], header["bases"]
        self.block_q = header["blocks"]["block_q"]
        self.key_blocks = -(-self.frames * self.height * self.width // header["blocks"]["block_k"])
        self.row = -(-self.key_blocks // 8)
        self.sections = sections
        self.grant = 64 * 2**20 + 64 * size if grant is None else grant
        self.lists: dict[tuple[int, int], np.ndarray] = {}
        for segment in range(len(self.bases)):
            self.check_sections(segment)
        counts = sum(int(sections[f"{segment}/layers"][-1, 1]) for segment in range(len(self.bases)))
        require(counts * (self.row + 16) <= 128 * self.grant, "limit: lists of all layers")

    def check_sections(self, segment: int) -> None:
        for name in ("layers", "masks", *ARRAYS):
            require(f"{segment}/{name}" in self.sections, f"{segment}/{name} is missing")
        table = self.sections[f"{segment}/layers"]
        require(table.dtype == np.int64 and table.shape == (self.layers + 1, len(COLUMNS)), f"{segment}/layers: shape")
        require(not table[0].any() and bool((table[1:] >= table[:-1]).all()), f"{segment}/layers: not ascending")
        require(table[-1, 1] <= 1099511627776, f"{segment}/layers: lists")
        for column, name in enumerate(COLUMNS):
            if name != "lists":
                section = self.sections[f"{segment}/{name}"]
                kind = np.uint8 if name in ("masks", "head_precision") else np.int32
                require(section.dtype == kind, f"{segment}/{name}: dtype")
                require(section.ndim == 1 and len(section) == table[-1, column], f"{segment}/{name}: length")

    def part(self, segment: int, layer: int, name: str) -> np.ndarray:
        start, stop = self.sections[f"{segment}/layers"][layer : layer + 2, COLUMNS.index(name)]
        return self.sections[f"{segment}/{name}"][start:stop]

    def list_count(self, segment: int, layer: int) -> int:
        table = self.sections[f"{segment}/layers"]
        return int(table[layer + 1, 1] - table[layer, 1])

    def patterns(self, segment: int, layer: int) -> list[tuple[int, list[int], list[int]]]:
        """Axis, first members and anchors of each anchor pattern."""
        pointers, axes, starts, anchors = (
            self.part(segment, layer, name).tolist()
            for name in ("anchor_ptr", "anchor_axis", "group_start", "group_anchor")
        )
        require(len(pointers) == len(axes) + 1, "anchor_ptr: length")
        require(pointers[0] == 0 and pointers[-1] == len(starts), "anchor_ptr: ends")
        require(all(a < b for a, b in pairwise(pointers)), "anchor_ptr: does not rise")
        require(len(starts) == len(anchors), "group_anchor: length")
        result = []
        for axis, begin, end in zip(axes, pointers, pointers[1:], strict=False):
            require(axis in (0, 1), "anchor_axis")
            members = self.frames * (self.height if axis == 0 else 1)
            first, computed = starts[begin:end], anchors[begin:end]
            require(first[0] == 0 and all(a < b for a, b in pairwise(first)), "group_start")
            require(first[-1] < members, "group_start: no member")
            for start, stop, anchor in zip(first, [*first[1:], members], computed, strict=True):
                require(start <= anchor < stop, "group_anchor: not in its group")
                require(axis == 1 or start // self.height == (stop - 1) // self.height, "group_start: two frames")
            result.append((axis, first, computed))
        return result

    def tiles(self, pattern: tuple[int, list[int], list[int]] | None) -> int:
        """Tiles of a head."""
        queries = self.frames * self.height * self.width
        if pattern is not None:
            queries = len(pattern[1]) * self.width * (self.height if pattern[0] == 1 else 1)
        return -(-queries // self.block_q)

    def check_layer(self, segment: int, layer: int) -> Layer:
        """One layer's schedule; its lists stay in `lists` for segments of which this one is the base."""
        patterns = self.patterns(segment, layer)
        firsts = self.part(segment, layer, "head_list").tolist()
        named = self.part(segment, layer, "head_anchor").tolist()
        require(len(firsts) == self.heads and len(named) == self.heads, "heads: length")
        require(all(-1 <= name < len(patterns) for name in named), "head_anchor: no pattern")
        require(set(range(len(patterns))) <= set(named), "head_anchor: a pattern is not named")
        precision = self.part(segment, layer, "head_precision").tolist()
        require(len(precision) == self.heads and set(precision) <= {0, 1, 2}, "head_precision")
        anchors = [None if name < 0 else patterns[name] for name in named]
        tiles = [self.tiles(pattern) for pattern in anchors]
        count = self.list_count(segment, layer)
        require(count <= sum(tiles), "lists: more than tiles")
        for first, own in zip(firsts, tiles, strict=True):
            require(first == -1 or 0 <= first <= count - own, "head_list")
        require(count * (self.row + 16) + sum(tiles) * 16 <= self.grant, "limit: a layer")

        lists = self.unpack(segment, layer, count)
        base = self.bases[segment]
        if base != segment:
            lists = lists ^ self.prediction(base, layer, lists.shape, firsts, tiles)
        self.lists[segment, layer] = lists
        bits = np.unpackbits(lists, axis=1, bitorder="little").astype(bool)
        require(not bits[:, self.key_blocks :].any(), "masks: bits after the last key block")
        bits = bits[:, : self.key_blocks]
        require(bool(bits.any(axis=1).all()), "masks: an empty list")
        require(int(bits.sum()) <= 2147352576, "masks: key blocks")
        heads = [None if first < 0 else bits[first : first + own] for first, own in zip(firsts, tiles, strict=True)]

        order = self.part(segment, layer, "tile_order")
        if len(order):
            require(np.array_equal(np.sort(order), np.arange(sum(tiles))), "tile_order")
        else:
            firsts = np.cumsum([0, *tiles])
            sizes = [
                np.zeros(own, int) if mask is None else -mask.sum(1) for own, mask in zip(tiles, heads, strict=True)
            ]
            order = np.concatenate(
                [first + np.argsort(each, kind="stable") for first, each in zip(firsts[:-1], sizes, strict=True)]
            )
        return Layer(heads, anchors, order, precision)

    def unpack(self, segment: int, layer: int, count: int) -> np.ndarray:
        frame = self.part(segment, layer, "masks").tobytes()
        try:
            require(zstandard.frame_content_size(frame) == count * self.row, "masks: content size")
            worker = zstandard.ZstdDecompressor().decompressobj()
            content = worker.decompress(frame)
        except zstandard.ZstdError as error:
            raise Refused(f"masks: {error}") from None
        require(worker.eof and not worker.unused_data, "masks: not one frame")
        require(len(content) == count * self.row, "masks: content")
        return np.frombuffer(content, np.uint8).reshape(count, self.row)

    def prediction(
        self, base: int, layer: int, shape: tuple[int, ...], firsts: list[int], tiles: list[int]
    ) -> np.ndarray:
        """The base's lists of each head, in the places of this segment's."""
        result = np.zeros(shape, np.uint8)
        filled = np.zeros(shape[0], bool)
        patterns = self.patterns(base, layer)
        base_firsts = self.part(base, layer, "head_list").tolist()
        base_named = self.part(base, layer, "head_anchor").tolist()
        lists = self.lists[base, layer]
        for head, (first, own) in enumerate(zip(firsts, tiles, strict=True)):
            name = base_named[head]
            if min(first, base_firsts[head]) < 0 or self.tiles(None if name < 0 else patterns[name]) != own:
                continue
            places = first + np.flatnonzero(~filled[first : first + own])
            result[places] = lists[base_firsts[head] + places - first]
            filled[places] = True
        return result


def read(data: bytes, grant: int | None = None) -> Plan:
    """What a plan file means.

    Args:
        data: The whole file.
        grant: Bytes that a layer may ask for, where not the page's own.

    Raises:
        Refused: the file breaks a rule, or asks for more memory than it is granted.
    """
    later, header, sections = container(data)
    check_header(header, later)
    segments = len(header["bases"])
    wanted = {f"{segment}/{name}" for segment in range(segments) for name in ("layers", "masks", *ARRAYS)}
    require(later or set(sections) == wanted, "sections: others")
    reader = Reader(header, sections, len(data), grant)
    result: list[list[Layer]] = [[] for _ in range(segments)]
    bases = header["bases"]

    def steps(segment: int) -> int:
        return 0 if bases[segment] == segment else 1 + steps(bases[segment])

    for segment in sorted(range(segments), key=steps):  # bases come first
        result[segment] = [reader.check_layer(segment, layer) for layer in range(reader.layers)]
    return Plan(header, result)
