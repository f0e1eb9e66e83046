"""Stores whose digests are right and whose values are not: each ends in a `StoreError`, or means something."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support import stats

from calibatt.compiler.cli import command
from calibatt.compiler.stats import ManifestError, ManifestMismatch, Store, StoreError, StoreWriter
from calibatt.compiler.stats.files import read_manifest
from calibatt.compiler.stats.manifest import Manifest
from calibatt.compiler.stats.sampling import MAGIC as SAMPLING
from calibatt.compiler.stats.unit import MAGIC as UNIT
from calibatt.compiler.stats.unit import VERSION
from calibatt.plans import Container, write_container

NUMBERS = (0, -1, 3, 2**31, 2**40, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"))
OTHERS = (None, True, "", "x", "\x1b[2J", [], [[]], [0.5], ["x"], [1, 2, 3], {}, {"x": 1}, {"kind": "box"})
ODD = st.sampled_from((*NUMBERS, *OTHERS))
"""What is put in the place of a value."""


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of a JSON document but the whole."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way for key, each in inner for way in ((*path, key), *nodes(each, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """The document with a few values replaced, removed, renamed or given twice."""
    found = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        if not (ways := nodes(found)):
            break
        *outer, last = draw(st.sampled_from(ways))
        place = found
        for key in outer:
            place = place[key]
        act = draw(st.sampled_from(("replace", "replace", "remove", "more")))
        if act == "replace":
            place[last] = copy.deepcopy(draw(ODD))
        elif act == "remove":
            del place[last]
        elif isinstance(place, list):
            place.append(place[last])
        else:
            place[draw(st.sampled_from(("x", "radii", "kind")))] = place.pop(last)
    return found


OF = stats.manifest(thresholds=(0.8, 0.9))


@given(mutated(json.loads(OF.to_json())))
def test_any_manifest_ends_in_its_error_or_is_one(value: Any) -> None:
    try:
        found = Manifest.from_json(json.dumps(value))
    except ManifestError:
        return
    assert Manifest.from_json(found.to_json()) == found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stats.write_store(tmp_path_factory.mktemp("stats") / "store", OF)


@given(st.data())
def test_any_header_ends_in_a_store_error_or_a_plan(
    store: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Headers and arrays of units and samplings, changed, with digests made right again, under the whole compiler."""
    folder = tmp_path_factory.mktemp("any")
    mine = shutil.copytree(store, folder / "store")
    name, magic = data.draw(st.sampled_from([("units/t000_l000.unit", UNIT), ("samplings/s1.sampling", SAMPLING)]))
    file = Container.open(store / name, magic=magic, version=VERSION, crc=True)
    sections = {each: file.section(each).copy() for each in file.names}
    header = file.header
    if data.draw(st.booleans()):
        header = data.draw(mutated(header))
    else:
        array = sections[data.draw(st.sampled_from(file.names))]
        flat = array.reshape(-1)
        flat[data.draw(st.integers(0, max(0, len(flat) - 1)))] = data.draw(
            st.sampled_from([0, 1, 255] if array.dtype.kind in "ui" else [0.0, -1.0, 1e38, float("nan"), float("inf")])
        )
    try:
        write_container(mine / name, magic=magic, version=VERSION, header=header, sections=sections, crc=True)
    except Exception:  # no file could say so
        return
    passes = data.draw(st.sampled_from(["select,anchors,select,schedule,lower", "vote,repeat,lower"]))
    arguments = [str(mine), "-o", str(folder / "p.plan"), "--passes", passes, "--report", str(folder / "r.html")]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code in (0, 2), result.exception
    assert result.exit_code == 0 or result.stderr.count("\n") == 1, result.stderr
    assert len(result.stderr) < 1200
    assert "\x1b" not in result.output


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


def other_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text(stats.manifest(times=(0.5,)).to_json())


def not_ours(folder: Path) -> None:
    (folder / "thesis.tex").write_text("precious")


@pytest.mark.parametrize(("make", "kind"), [(other_manifest, ManifestMismatch), (not_ours, ManifestError)])
@pytest.mark.parametrize("start", [StoreWriter.open, StoreWriter.join])
def test_a_refused_folder_keeps_no_lock(
    tmp_path: Path, make: Callable[[Path], None], kind: type[StoreError], start: Callable[..., StoreWriter]
) -> None:
    make(tmp_path)
    before = kept(tmp_path)
    with pytest.raises(kind):
        start(tmp_path, OF)
    assert kept(tmp_path) == before


def test_joining_where_nobody_is_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(OF.to_json())
    with pytest.raises(StoreError, match="must be open in another process of this job, got nobody"):
        StoreWriter.join(tmp_path, OF)
    assert kept(tmp_path) == {"manifest.json"}


def test_messages_about_a_store_are_short_and_do_nothing_to_a_terminal(tmp_path: Path) -> None:
    value = json.loads(OF.to_json())
    value["versions"] = ["\x1b[2J" + "x" * 900_000]
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    for read in (read_manifest, Store.open):
        with pytest.raises(ManifestError, match="versions must be a map of strings") as caught:
            read(tmp_path)
        assert len(str(caught.value)) < 1100
        assert str(caught.value).isprintable()
