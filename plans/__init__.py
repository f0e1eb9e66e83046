"""The plan file: what is in it, what it promises, and the one way to read and write it."""

from calibatt.plans.container import Container, write_container
from calibatt.plans.encoding import EncodedLayer, base_segments, encode
from calibatt.plans.errors import PlanError, ScheduleError, SchemaError
from calibatt.plans.masks import longest_first, schedule_of
from calibatt.plans.plan import PlanFile, write_plan
from calibatt.plans.precision import BF16, EIGHT_BITS, INT8, INT8_FP8, PRECISIONS, told_precisions
from calibatt.plans.schedule import DENSE, FRAMES, NO_ANCHORS, ROWS, LayerSchedule
from calibatt.plans.schema import BLOCK_SIZES, MAX_BLOCKS, Blocks, ModelSignature, Segment, TokenGrid
from calibatt.plans.stored import StoredLayers

__all__ = [
    "BF16",
    "BLOCK_SIZES",
    "DENSE",
    "EIGHT_BITS",
    "FRAMES",
    "INT8",
    "INT8_FP8",
    "MAX_BLOCKS",
    "NO_ANCHORS",
    "PRECISIONS",
    "ROWS",
    "Blocks",
    "Container",
    "EncodedLayer",
    "LayerSchedule",
    "ModelSignature",
    "PlanError",
    "PlanFile",
    "ScheduleError",
    "SchemaError",
    "Segment",
    "StoredLayers",
    "TokenGrid",
    "base_segments",
    "encode",
    "longest_first",
    "schedule_of",
    "told_precisions",
    "write_container",
    "write_plan",
]
