"""A whole plan: header values, segments of time and the schedules of every layer in each, in one file."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import numpy as np

from calibatt.plans.container import Container, write_container
from calibatt.plans.encoding import (
    MAX_BASES,
    EncodedLayer,
    check_bases,
    granted_bytes,
)
from calibatt.plans.errors import ScheduleError, SchemaError, SectionError
from calibatt.plans.files import FilePath
from calibatt.plans.schedule import SMALL_ARRAYS, Int64, LayerSchedule, dtype_of
from calibatt.plans.schema import Blocks, ModelSignature, Segment, TokenGrid, check_hint, check_predicted
from calibatt.plans.stored import StoredLayers

MAGIC = b"CALIBPLN"
VERSION = (5, 0)
COLUMNS = ("masks", "lists", *SMALL_ARRAYS)
"""Of ``s/layers``; all but ``lists`` are sections."""

Value = TypeVar("Value", ModelSignature, TokenGrid, Blocks)


@dataclass(frozen=True, eq=False)
class PlanFile:
    """Everything a plan file says, checked: a schedule when it is first asked for.

    Args:
        signature: The model the plan is for.
        grid: The video tokens it is for.
        blocks: Its block sizes.
        segments: Ascending, covering [0, 1] without gap or overlap.
        schedules: ``schedules[segment][layer]``; all of the plan's grid, blocks and heads.
        passes: The pass string that compiled it.
        scheduler_hint: What is known of the sampling that it is for, plain values, or None: ``times``, where present,
            are the denoising times of its steps.
        provenance: Where it comes from: samples, digest of the prompts, versions of the tools; plain values.
        predicted: Predicted cost; plain values. ``planned_ms`` and ``dense_ms``, where present, are lists over the
            segments of lists over the layers: milliseconds of one attention call. See `check_predicted`.
        license: License of the plan.
        notes: Anything else a reader should know.
        digest: Of the file it was read from, 32 hexadecimal digits; empty for a plan that was not read.

    Raises:
        SchemaError: A header value is wrong, segments do not cover [0, 1], or schedules are missing.
        ScheduleError: Schedules are of another grid, other blocks or heads.
    """

    signature: ModelSignature
    grid: TokenGrid
    blocks: Blocks
    segments: tuple[Segment, ...]
    schedules: StoredLayers
    passes: str = ""
    scheduler_hint: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    predicted: Mapping[str, Any] = field(default_factory=dict)
    license: str = ""
    notes: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        for name in ("passes", "license", "notes"):
            _require_kind(name, getattr(self, name), str)
        for name in ("provenance", "predicted"):
            _require_kind(name, getattr(self, name), Mapping)
        if self.scheduler_hint is not None:
            _require_kind("scheduler_hint", self.scheduler_hint, Mapping)
            check_hint(self.scheduler_hint)
        _check_segments(self.segments)
        check_predicted(self.predicted, len(self.segments), self.signature.layers, self.signature.heads)
        if len(self.schedules) != len(self.segments):
            raise SchemaError(f"schedules must be {len(self.segments)}, one a segment, got {len(self.schedules)}")
        for index, layers in enumerate(self.schedules.layers):
            if len(layers) != self.signature.layers:
                rule = f"have {self.signature.layers} schedules, one a layer"
                raise SchemaError(f"segment {index} must {rule}, got {len(layers)}")
        given, mine = ((each.grid, each.blocks) for each in (self.schedules, self))
        if given != mine:
            raise ScheduleError(f"schedules must have the plan's grid and blocks, {mine}, got {given}")
        if self.schedules.heads != self.signature.heads:
            raise ScheduleError(f"schedules must have {self.signature.heads} heads, got {self.schedules.heads}")

    @classmethod
    def read(cls, path: FilePath) -> PlanFile:
        """Maps a plan file and proves its bytes and header; a schedule is proved when it is first asked for.

        Raises:
            PlanError: The first broken promise of FORMAT.md; the message names file, rule and value.
            OSError: The file cannot be read.
        """
        container = Container.open(path, magic=MAGIC, version=VERSION)
        container.verify()
        try:
            return _parse(container)
        except (SchemaError, ScheduleError) as error:
            raise type(error)(f"{container.path}: {error}") from None

    def segment_index(self, time: float) -> int:
        """The segment that holds a denoising time.

        Raises:
            ValueError: `time` is not in [0, 1].
        """
        if not 0.0 <= time <= 1.0:
            raise ValueError(f"time must be a denoising time in [0, 1], got {time}")
        return bisect_right(self.segments, time, key=lambda segment: segment.start) - 1

    @property
    def steps(self) -> tuple[int, ...]:
        """How many steps of the sampling that the plan is for each segment holds; one each if the plan does not say."""
        if "times" not in (hint := self.scheduler_hint or {}):
            return (1,) * len(self.segments)
        counts = Counter(map(self.segment_index, hint["times"]))
        return tuple(counts[index] for index in range(len(self.segments)))

    def schedule(self, time: float, layer: int) -> LayerSchedule:
        """What a layer executes at a denoising time.

        Raises:
            ValueError: `time` is not in [0, 1], or the model has no such layer.
        """
        if not 0 <= layer < self.signature.layers:
            raise ValueError(f"layer must be 0 to {self.signature.layers - 1}, got {layer}")
        return self.schedules.schedule(self.segment_index(time), layer)

    def walk(self) -> Iterator[tuple[int, int, LayerSchedule]]:
        """Segment, layer and schedule of every layer, in any order: the way to see all of a plan in little memory.

        Raises:
            MaskError, ScheduleError: A layer of the file breaks a promise, when its turn comes.
        """
        return self.schedules.walk()

    def prove(self) -> None:
        """Decodes every layer once, so that none can fail later.

        Raises:
            MaskError, ScheduleError: The first broken promise; names file, segment and layer.
        """
        self.schedules.prove()

    def section_bytes(self) -> dict[str, int]:
        """Bytes of every kind of section over all segments."""
        every = [layer for layers in self.schedules.layers for layer in layers]
        sizes = {name: sum(layer.small[name].nbytes for layer in every) for name in SMALL_ARRAYS}
        table = len(self.segments) * (self.signature.layers + 1) * len(COLUMNS) * 8
        return {"masks": sum(layer.masks.nbytes for layer in every), **sizes, "layers": table}


def write_plan(path: FilePath, plan: PlanFile) -> int:
    """Writes a plan: the same plan always gives the same bytes, whole or not at all.

    Args:
        path: Where to; an existing file is replaced.
        plan: What to write; its `digest` is not written.

    Returns:
        Bytes written.

    Raises:
        HeaderError: `provenance`, `predicted` or `scheduler_hint` hold other than plain values.
        OSError: The file cannot be written.
    """
    header = {
        "model": asdict(plan.signature),
        "grid": asdict(plan.grid),
        "blocks": asdict(plan.blocks),
        "bases": list(plan.schedules.bases),
        "segments": [{key: float(value) + 0.0 for key, value in asdict(part).items()} for part in plan.segments],
        "passes": plan.passes,
        "scheduler_hint": plan.scheduler_hint,
        "provenance": plan.provenance,
        "predicted": plan.predicted,
        "license": plan.license,
        "notes": plan.notes,
    }
    sections: dict[str, Any] = {}
    for index, layers in enumerate(plan.schedules.layers):
        parts = [{"masks": layer.masks, **layer.small} for layer in layers]
        sizes = [
            [layer.lists if name == "lists" else len(part[name]) for name in COLUMNS]
            for layer, part in zip(layers, parts, strict=True)
        ]
        sections[f"{index}/layers"] = np.cumsum([[0] * len(COLUMNS), *sizes], axis=0, dtype=np.int64)
        for name in parts[0]:
            sections[f"{index}/{name}"] = np.concatenate([part[name] for part in parts])
    return write_container(path, magic=MAGIC, version=VERSION, header=header, sections=sections)


def _parse(container: Container) -> PlanFile:
    header = _known("header", container.header, _HEADER_KEYS, container.newer)
    signature = _value(ModelSignature, "model", header, container.newer)
    grid = _value(TokenGrid, "grid", header, container.newer)
    blocks = _value(Blocks, "blocks", header, container.newer)
    _require_kind("segments", header["segments"], list)
    segments = tuple(
        _segment(f"segments[{index}]", value, container.newer) for index, value in enumerate(header["segments"])
    )
    _check_segments(segments)
    names = {name for name in COLUMNS if name != "lists"} | {"layers"}
    expected = {f"{index}/{name}" for index in range(len(segments)) for name in names}
    unknown = sorted(set(container.names) - expected)
    if unknown and not container.newer:
        rule = f"have only the sections of its {len(segments)} segments"
        raise SectionError(f"{container.path}: the plan must {rule}, got {unknown[0]!r}")
    encoded = [_layers(container, index, signature.layers) for index in range(len(segments))]
    bases = _bases(header["bases"], len(segments))
    granted = granted_bytes(container.size_bytes)
    schedules = StoredLayers(f"{container.path}: ", grid, blocks, signature.heads, bases, encoded, granted)
    return PlanFile(
        signature=signature,
        grid=grid,
        blocks=blocks,
        segments=segments,
        schedules=schedules,
        digest=container.digest,
        **{key: header[key] for key in _FREE_KEYS},
    )


_FREE_KEYS = ("passes", "scheduler_hint", "provenance", "predicted", "license", "notes")
_HEADER_KEYS = ("model", "grid", "blocks", "segments", "bases", *_FREE_KEYS)


def _bases(value: object, segments: int) -> tuple[int, ...]:
    """Each segment's base, checked: at most `MAX_BASES` steps lead to a segment that is its own base."""
    _require_kind("bases", value, list)
    assert isinstance(value, list)
    right = len(value) == segments and all(type(base) is int and 0 <= base < segments for base in value)
    if not right or not check_bases(value):
        rule = f"lead from each of {segments} segments to one that is its own base in at most {MAX_BASES} steps"
        raise SchemaError(f"bases must {rule}, got {str(value)[:80]}")
    return tuple(value)


def _layers(container: Container, index: int, layers: int) -> list[EncodedLayer]:
    """A segment's layers as they are stored."""
    arrays = {name: container.section(f"{index}/{name}") for name in COLUMNS if name != "lists"}
    name = f"{index}/layers"
    starts: Int64 = container.section(name)
    shape = (layers + 1, len(COLUMNS))
    if starts.dtype != np.int64 or starts.shape != shape:
        given = f"{starts.dtype} of {starts.shape}"
        raise SectionError(f"{container.path}: section {name!r} must be int64 of shape {shape}, got {given}")
    for column, of in enumerate(COLUMNS):
        ptr = starts[:, column]
        stop = ptr[-1] if of == "lists" else arrays[of].size
        flat = of == "lists" or arrays[of].ndim == 1
        if not flat or ptr[0] != 0 or ptr[-1] != stop or (ptr[1:] < ptr[:-1]).any() or stop > MAX_LISTS:
            what = (
                f"{MAX_LISTS} at most" if of == "lists" else f"the length of section '{index}/{of}', {arrays[of].shape}"
            )
            given = f"{ptr[:4].tolist()}..{ptr[-1]}"
            raise SectionError(
                f"{container.path}: column {column} of section {name!r} must rise from 0 to {what}, got {given}"
            )
    for of, array in arrays.items():
        if (kind := np.dtype(np.uint8) if of == "masks" else dtype_of(of)) != array.dtype:
            raise ScheduleError(
                f"segment {index}, layer 0: {of} must be a one-dimensional {kind} array, got {array.dtype}"
            )
    at, parts = COLUMNS.index("lists"), []
    for layer in range(layers):
        lists = int(starts[layer + 1, at] - starts[layer, at])
        part = {of: arrays[of][starts[layer, i] : starts[layer + 1, i]] for i, of in enumerate(COLUMNS) if of in arrays}
        parts.append(EncodedLayer(part.pop("masks"), lists, part))
    return parts


MAX_LISTS = 1 << 40


def _check_segments(segments: tuple[Segment, ...]) -> None:
    edge = 0.0
    for index, segment in enumerate(segments):
        if segment.start != edge:
            rule = f"start at {edge}, where the one before stops"
            raise SchemaError(f"segments[{index}] must {rule}, got {segment.start}")
        edge = segment.stop
    if edge != 1.0:
        raise SchemaError(f"segments must cover [0, 1], got {len(segments)} that stop at {edge}")


def _segment(where: str, value: object, newer: bool) -> Segment:
    values = _known(where, value, ("start", "stop", "time"), newer)
    for key, number in values.items():
        _require_kind(f"{where}.{key}", number, float)
    return Segment(**values)


def _value(kind: type[Value], key: str, header: dict[str, Any], newer: bool) -> Value:
    return kind(**_known(key, header[key], tuple(item.name for item in fields(kind)), newer))


def _known(where: str, value: object, keys: tuple[str, ...], newer: bool) -> dict[str, Any]:
    """The known keys of a map, all of them; an unknown key is an error unless the file is newer."""
    _require_kind(where, value, dict)
    assert isinstance(value, dict)
    missing = [key for key in keys if key not in value]
    if missing:
        raise SchemaError(f"{where} must have the key {missing[0]!r}, got none")
    unknown = sorted(set(value) - set(keys))
    if unknown and not newer:
        raise SchemaError(f"{where} must have only the keys {', '.join(keys)}, got {unknown[0]!r}")
    return {key: value[key] for key in keys}


def _require_kind(where: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise SchemaError(f"{where} must be of type {kind.__name__.lower()}, got {type(value).__name__}")
