"""What a stranger may do to a document, to arrays or to a file before the digests are made right again.

Each takes a `random.Random`, so that hypothesis (`st.randoms`), a seed (`support.fuzz`) and a coverage-guided fuzzer
(`support.fuzz --atheris`) drive the same mutations.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import zstandard
from hypothesis import strategies as st

from support import hostile

NUMBERS = (0, -1, 3, 2**16, 2**22, 2**31, 2**40, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"))
OTHERS = (None, True, "", "x", "\x1b[2J", [], [[]], [0.5], ["x"], [1, 2, 3], {}, {"x": 1}, {"kind": "box"})
ODD = (*NUMBERS, *OTHERS)
"""What is put in the place of a value."""
RANDOMS = st.randoms(use_true_random=False)


def odd(rng: random.Random) -> Any:
    """A value that has no business where it is put, now and then at the edge of what a header may hold."""
    if rng.random() > 0.05:
        return copy.deepcopy(rng.choice(ODD))
    length, value = rng.randint(26, 34), rng.choice(([], 0))
    for _ in range(length):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return rng.choice(
        (value, {"k" * rng.choice((31, 32, 255, 256)): 0}, {"é" * rng.choice((127, 128)): 0}, [0.5] * 65537)
    )


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of a document but the whole."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way for key, each in inner for way in ((*path, key), *nodes(each, (*path, key)))]


def document(rng: random.Random, value: Any, most: int = 3) -> Any:
    """The document with a few values replaced, moved a little, removed, renamed or given twice."""
    found = copy.deepcopy(value)
    for _ in range(rng.randint(1, most)):
        if not (ways := nodes(found)):
            break
        *outer, last = rng.choice(ways)
        place = found
        for key in outer:
            place = place[key]
        act = rng.choice(("replace", "replace", "near", "remove", "more"))
        if act == "near" and type(place[last]) is int:
            place[last] += rng.randint(-2, 2)
        elif act == "near" and type(place[last]) is float:
            place[last] = float(np.nextafter(place[last], rng.choice((0, 2))))
        elif act in ("replace", "near"):
            place[last] = odd(rng)
        elif act == "remove":
            del place[last]
        elif isinstance(place, list):
            place.append(copy.deepcopy(place[last]))
        else:
            place[rng.choice(("x", "radii", "kind"))] = place.pop(last)
    return found


def array(rng: random.Random, value: np.ndarray) -> np.ndarray:
    """The array with an element changed, or cut, longer, of another dtype or of another shape."""
    act = rng.choice(("element", "element", "element", "cut", "longer", "dtype", "shape"))
    if act == "element" and value.size:
        found = value.copy()
        at = rng.randrange(value.size)
        if value.dtype.kind == "f":
            found.flat[at] = rng.choice([0.0, -1.0, 1e38, float("nan"), float("inf")])
        else:
            low, high = np.iinfo(value.dtype).min, np.iinfo(value.dtype).max
            changed = rng.choice((int(value.flat[at]) + rng.randint(-2, 2), low, -1, 0, high))
            found.flat[at] = min(max(changed, low), high)
        return found
    if act == "cut" and value.ndim:
        return value[: rng.randint(0, len(value))]
    if act == "longer" and value.ndim:
        return np.concatenate([value, value[: rng.randint(0, 3)]])
    if act == "dtype":
        with np.errstate(invalid="ignore"):
            return value.astype(rng.choice(["uint8", "int32", "int64", "uint16"]))
    return value.reshape(rng.choice([(-1, 1), (1, -1)])) if value.size else value


def documents(value: Any) -> st.SearchStrategy[Any]:
    return RANDOMS.map(lambda rng: document(rng, value))


def arrays(value: np.ndarray) -> st.SearchStrategy[np.ndarray]:
    return RANDOMS.map(lambda rng: array(rng, value))


def raw(rng: random.Random, data: bytes) -> bytes:
    """Bytes with some changed, removed or repeated."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, act = rng.randrange(len(found) + 1), rng.choice(("set", "set", "remove", "insert", "repeat"))
        length = rng.choice((1, 1, 1, 2, 4, 9))
        if act == "set" and at < len(found):
            found[at] = rng.choice((rng.randrange(256), found[at] ^ 1 << rng.randrange(8)))
        elif act == "remove":
            del found[at : at + length]
        elif act == "insert":
            found[at:at] = bytes(rng.randrange(256) for _ in range(length))
        else:
            found[at:at] = found[at : at + length]
    return bytes(found)


def zstd(rng: random.Random, content: bytes) -> bytes:
    """A frame of some bytes, or nearly one, by any of the ways there are to write it."""
    kind = rng.randrange(10)
    if kind == 0:
        return raw(rng, zstandard.compress(content, 1))
    if kind == 1:  # bytes, another frame or a skippable one follow, or come before
        extra = rng.choice((b"\0", zstandard.compress(b""), b"\x50\x2a\x4d\x18\0\0\0\0", zstandard.compress(content)))
        return b"".join(rng.sample([zstandard.compress(content, 1), extra], 2))
    options = {"write_content_size": rng.random() > 0.1, "write_checksum": rng.random() < 0.3}
    if (
        kind == 3 and len(content) < 1 << 17
    ):  # put together here, a window of any size and the size of the content twice
        head = b"\x28\xb5\x2f\xfd" + bytes([0x80, rng.choice((0, 0x50, 0x88, 0x90, 0xA8, 0xF8))])
        block = (len(content) << 3 | 1).to_bytes(3, "little") + content
        return head + (len(content) + rng.choice((0, 0, 0, 1, -1))).to_bytes(4, "little", signed=True) + block
    if kind == 2:
        parameters = zstandard.ZstdCompressionParameters(window_log=rng.choice((10, 20, 27, 28, 31)), **options)
        return zstandard.ZstdCompressor(compression_params=parameters).compress(content)
    return zstandard.ZstdCompressor(level=1, **options).compress(content)


def lists(rng: random.Random, sections: hostile.Sections) -> hostile.Sections:
    """A plan's sections with the lists of one layer changed, or written otherwise, and its table made right."""
    found = dict(sections)
    segment = rng.choice([name[:-6] for name in sections if name.endswith("/masks")])
    table, masks = sections[f"{segment}/layers"], sections[f"{segment}/masks"]
    if table.ndim != 2 or table.shape[1] < 2 or len(table) < 2 or not np.issubdtype(table.dtype, np.integer):
        return found
    layer = rng.randrange(len(table) - 1)
    start, stop = table[layer : layer + 2, 0].tolist()
    old = masks.reshape(-1)[start:stop].tobytes()
    try:
        if zstandard.frame_content_size(old) > 1 << 20:
            return found
        content = zstandard.decompress(old, max_output_size=1 << 20)
    except zstandard.ZstdError:
        return found
    changed = content if rng.random() < 0.4 else array(rng, np.frombuffer(content, np.uint8)).astype(np.uint8).tobytes()
    frame = np.frombuffer(zstd(rng, changed), np.uint8)
    found[f"{segment}/masks"] = np.concatenate([masks.reshape(-1)[:start], frame, masks.reshape(-1)[stop:]])
    table = table.copy()
    table[layer + 1 :, 0] += len(frame) - (stop - start)
    found[f"{segment}/layers"] = table
    return found


def file(
    rng: random.Random,
    header: hostile.Header,
    sections: hostile.Sections,
    magic: bytes = hostile.MAGIC,
    version: tuple[int, int] = hostile.VERSION,
    crc: bool = False,
) -> bytes:
    """A plan, or another file of the container, with something wrong with it and all digests right, if it can be.

    Raises:
        OverflowError: No file can say so: a number is beyond 64 bits.
    """
    sections = dict(sections)
    acts = {"document": 5, "array": 6, "lists": 4 * (magic == hostile.MAGIC), "entries": 2, "raw": 3, "tail": 1}
    chosen = rng.choices(list(acts), list(acts.values()), k=rng.choice((1, 1, 1, 2, 3)))
    if rng.random() < 0.1:
        version = (version[0] + (rng.random() < 0.1), rng.choice((0, 1, 65535)))
        if rng.random() < 0.5:
            sections[rng.choice(("0/x", "x", "~"))] = np.arange(rng.randint(0, 9), dtype=np.int32)
    for act in chosen:
        if act == "document":
            header = document(rng, header, 2)
        elif act == "array":
            name = rng.choice(sorted(sections))
            sections[name] = array(rng, sections[name])
        elif act == "lists":
            sections = lists(rng, sections)
    data = hostile.rebuilt(
        header,
        sections,
        magic,
        version,
        crc,
        entries_to=lambda entries: document(rng, entries, 2) if "entries" in chosen else entries,
        packed_to=lambda packed: raw(rng, packed) if "raw" in chosen else packed,
    )
    if "tail" not in chosen:
        return data
    if rng.random() < 0.5:
        return data[: -rng.choice((1, 63, 64))] if rng.random() < 0.5 else data + bytes(rng.choice((1, 63, 64)))
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
