"""Plan files whose digests are right and whose contents mean harm. As a program: reads some, within little memory.

``python hostile.py MEGABYTES FILE...`` prints a line for each file: the error that reading and proving it ended in, or
``accepted``. More memory than that, beyond what Python and numpy have, is a `MemoryError`.
"""

from __future__ import annotations

import resource
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import zstandard

from calibatt.plans import (
    Blocks,
    Container,
    ModelSignature,
    PlanFile,
    Segment,
    StoredLayers,
    TokenGrid,
    schedule_of,
    write_container,
    write_plan,
)
from calibatt.plans.plan import COLUMNS, MAGIC, VERSION

Header, Sections = dict[str, Any], dict[str, np.ndarray]


def dense_parts() -> tuple[Header, Sections]:
    """Header and sections of the smallest plan: one token, layer, head and segment."""
    grid, blocks = TokenGrid(1, 1, 1), Blocks(16, 16)
    stored = StoredLayers.of([[schedule_of(grid, blocks, [np.ones((1, 1), np.uint8)])]])
    plan = PlanFile(ModelSignature("M", 1, 1, 8), grid, blocks, (Segment(0, 1, 0),), stored)
    with tempfile.TemporaryDirectory() as folder:
        write_plan(path := Path(folder) / "dense.plan", plan)
        container = Container.open(path, magic=MAGIC, version=VERSION)
        return container.header, {name: container.section(name).copy() for name in container.names}


def changed(
    width: int = 1,
    heads: int = 1,
    layers: int = 1,
    blocks: tuple[int, int] = (16, 16),
    lists: int = 0,
    bits: bytes | None = None,
    **arrays: np.ndarray,
) -> tuple[Header, Sections]:
    """`dense_parts` with another grid, other arrays of every layer, and a frame of bits for so many lists of each."""
    header, sections = dense_parts()
    header["model"] |= {"heads": heads, "layers": layers}
    header["grid"]["width"] = width
    header["blocks"] |= dict(zip(("block_q", "block_k"), blocks, strict=True))
    of_head = {name: np.full(heads, -1, np.int32) for name in ("head_list", "head_anchor")}
    small = {name: np.asarray(array, np.int32) for name, array in (of_head | arrays).items()}
    small.setdefault("head_precision", np.zeros(heads, np.uint8))
    if bits is not None:
        small["masks"] = np.frombuffer(bits, np.uint8)
    parts = {name: small.get(name, sections.get(f"0/{name}")) for name in COLUMNS}
    step = [lists if name == "lists" else len(parts[name]) for name in COLUMNS]
    for name in COLUMNS:
        if name != "lists":
            sections[f"0/{name}"] = np.concatenate([parts[name]] * layers)
    sections["0/layers"] = np.arange(layers + 1)[:, None] * np.array(step)
    return header, sections


def frame(byte: bytes, count: int) -> bytes:
    """A zstd frame of one byte many times."""
    return zstandard.ZstdCompressor().compress(byte * count)


def with_header(change: Callable[[Header], None]) -> bytes:
    """The smallest plan with a header that no writer of ours would write, its digest right."""
    header, sections = dense_parts()
    change(header)
    return rebuilt(header, sections)


def deep(levels: int) -> list[Any]:
    """Many empty lists before another list of that kind."""
    return [*[[]] * 65535, deep(levels - 1)] if levels else []


def in_order(value: Any) -> Any:
    """Maps by their keys, as a header has them."""
    if isinstance(value, list):
        return [in_order(each) for each in value]
    return {key: in_order(value[key]) for key in sorted(value)} if isinstance(value, dict) else value


def rebuilt(
    header: Header,
    sections: Sections,
    magic: bytes = MAGIC,
    version: tuple[int, int] = VERSION,
    crc: bool = False,
    entries_to: Callable[[Any], Any] = lambda entries: entries,
    packed_to: Callable[[bytes], bytes] = lambda packed: packed,
) -> bytes:
    """A file of the container, whatever its header, put together without the code under test.

    Args:
        header: The map ``header``.
        sections: Arrays by name.
        magic: Of a plan, where nothing else is said.
        version: Major and minor.
        crc: A CRC-32 of each section, as statistics have.
        entries_to: What becomes of the list ``sections``.
        packed_to: What becomes of the packed header; the digest is that of the result.
    """
    entries, data = [], b""
    for name in sorted(sections):
        data += bytes(-len(data) % 64)
        raw = np.ascontiguousarray(sections[name]).tobytes()
        facts = {"checksum": blake2b(raw, digest_size=16).digest(), "codec": "raw"}
        facts |= {"crc32": zlib.crc32(raw)} if crc else {}
        facts |= {"dtype": sections[name].dtype.name, "length": len(raw), "name": name, "offset": len(data)}
        entries.append(facts | {"shape": list(sections[name].shape)})
        data += raw
    packed = packed_to(msgpack.packb({"header": in_order(header), "sections": in_order(entries_to(entries))}))
    start = magic + struct.pack("<HHI", *version, len(packed))
    head = start + blake2b(start + packed, digest_size=16).digest() + packed
    return head + bytes(-len(head) % 64) + data


def written(parts: tuple[Header, Sections]) -> Callable[[Path], None]:
    header, sections = parts
    return lambda path: write_container(path, magic=MAGIC, version=VERSION, header=header, sections=sections) and None


def literal(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


@cache
def plans() -> dict[str, tuple[Callable[[Path], None], str, str]]:
    """By name: what writes the file, the error it must end in, and words of it."""
    every_group = np.zeros(140, np.int32)
    huge = {"width": 1 << 24, "blocks": (256, 256)}
    return {
        "grid of 2^63": (
            written(changed(width=1 << 63)),
            "SchemaError",
            "grid must be of fewer than 2147483648 tokens",
        ),
        "grid of 2^31": (written(changed(width=1 << 31)), "SchemaError", "got 2147483648"),
        "key of 1 MB": (
            literal(with_header(lambda header: header["provenance"].update({"k" * 1_000_000: [0] * 65536}))),
            "HeaderError",
            "header.header.provenance must have keys of at most 255 bytes, got one of 1000000",
        ),
        "four million empty lists": (
            literal(with_header(lambda header: header["provenance"].update(a=[[[]] * 65536] * 31))),
            "HeaderError",
            "header must have at most 524288 values",
        ),
        "lists begun and never ended": (
            literal(with_header(lambda header: header["provenance"].update(a=deep(30)))),
            "HeaderError",
            "header must have at most 524288 values",
        ),
        "a header of 16 MB": (
            literal(with_header(lambda header: header.update(notes="n" * (16 << 20)))),
            "HeaderTooLarge",
            "at most 4194304 bytes",
        ),
        "queries beyond int32": (
            written(changed(width=1 << 24, heads=200, blocks=(16, 256))),
            "ScheduleError",
            "grid must have at most 268435456 tokens, padded to whole blocks, over 200 heads and one more",
        ),
        "tiles of a small file": (
            written(changed(width=1 << 22, heads=60, blocks=(16, 256))),
            "LimitError",
            "CALIBATT_PLAN_BYTES",
        ),
        "patterns of nobody": (
            written(
                changed(
                    **huge,
                    anchor_ptr=np.arange(141),
                    anchor_axis=np.ones(140),
                    group_start=every_group,
                    group_anchor=every_group,
                )
            ),
            "ScheduleError",
            "head_anchor must name each of 140 patterns, got none of pattern 0",
        ),
        "2^31 kept blocks": (
            written(
                changed(
                    width=1 << 23,
                    blocks=(256, 128),
                    lists=32768,
                    bits=frame(b"\xff", 32768 * 8192),
                    head_list=np.zeros(1),
                )
            ),
            "LimitError",
            "the layer must need at most",
        ),
        "lists of many layers": (
            written(
                changed(
                    width=1 << 22,
                    layers=300,
                    blocks=(256, 128),
                    lists=15000,
                    bits=frame(b"\xff", 15000 * 4096),
                )
            ),
            "LimitError",
            "the plan must need at most",
        ),
    }


def main() -> None:
    more, *paths = sys.argv[1:]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    data = int(status["VmData"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (data + int(more) * 1_000_000,) * 2)
    for path in paths:
        try:
            PlanFile.read(path).prove()
            print("accepted")
        except Exception as error:
            print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
