"""The specification against the code: FORMAT.md names what is written, and nothing that is not there."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import calibatt.plans
from calibatt.compiler.stats import unit
from calibatt.plans import Container, Segment, container, encoding, errors, header, schedule, schema, stored
from calibatt.plans.plan import COLUMNS, MAGIC, MAX_LISTS, VERSION

FORMAT = (Path(calibatt.plans.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
TEXT = " ".join(FORMAT.split())
WORDS = set(re.findall(r"`([^`]+)`", FORMAT))
GOLDEN = Container.open(Path(__file__).parent / "golden" / "tiny.plan", magic=MAGIC, version=VERSION)


def test_every_error_is_specified() -> None:
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert all(issubclass(getattr(errors, name), errors.PlanError) for name in classes)
    assert classes <= WORDS
    assert {word for word in WORDS if re.fullmatch(r"[A-Z]\w+(Error|Magic|Version|Truncated)", word)} <= classes


def test_every_section_is_specified() -> None:
    specified = re.findall(r"^\| `s/([^`]+)`", FORMAT, re.MULTILINE)
    assert {name.split("/")[1] for name in GOLDEN.names} == set(specified)
    assert specified == ["layers", *(name for name in COLUMNS if name != "lists")]  # the order of its columns


def test_every_header_key_is_specified() -> None:
    written = set()
    for key, value in GOLDEN.header.items():
        written.add(key)
        if key in ("model", "grid", "blocks"):
            written |= {f"{key}.{name}" for name in value}
    written |= {f"segments[].{item.name}" for item in fields(Segment)}
    table = FORMAT[FORMAT.index("### The map `header`") : FORMAT.index("### Sections")]
    assert written == set(re.findall(r"^\| `([^`]+)`", table, re.MULTILINE))


def test_every_limit_is_specified() -> None:
    assert f"MUST be {VERSION[0]} for a plan" in FORMAT
    version = f"version {VERSION[0]}.{VERSION[1]}"
    assert version in FORMAT.splitlines()[0]
    assert MAGIC.decode() in WORDS
    for value in (
        container.MAX_HEADER_BYTES,
        container.MAX_ELEMENTS,
        header.MAX_ITEMS,
        header.MAX_DEPTH,
        header.MAX_VALUES,
        schedule.MAX_QUERIES,
        schedule.MAX_KEPT,
        schema.MAX_BLOCKS,
        MAX_LISTS,
    ):
        assert re.search(rf"at most {value}\b", TEXT)
    assert f"MUST have at most {header.MAX_KEY_BYTES} each" in TEXT
    assert f"{encoding.LAYER_BYTES >> 20} MiB and {encoding.FILE_TIMES} times the size" in TEXT
    assert f"all layers {stored.LAYERS} times as much, tiles not counted" in TEXT
    assert f"`{encoding.LIMIT_VARIABLE}`" in TEXT
    assert ", ".join(container.DTYPES) in TEXT
    assert f"1 to {container.MAX_NAME_BYTES} bytes" in TEXT
    assert f"at most {container.MAX_DIMENSIONS} integers" in TEXT
    assert f"multiple of {container.ALIGNMENT_BYTES}" in TEXT
    assert f"statistics units (magic `{unit.MAGIC.decode()}`, from version {unit.VERSION[0]}.{unit.VERSION[1]})" in TEXT
    sizes = [str(size) for size in schema.BLOCK_SIZES]
    assert f"{', '.join(sizes[:-1])} or {sizes[-1]}" in TEXT
