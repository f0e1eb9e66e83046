"""Stores whose digests are right and whose values are not: each ends in a `StoreError`, or means something."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support import mutations, stats

from calibatt.compiler.cli import command
from calibatt.compiler.stats import ManifestError, ManifestMismatch, Store, StoreError, StoreWriter
from calibatt.compiler.stats.files import read_manifest
from calibatt.compiler.stats.manifest import Manifest
from calibatt.compiler.stats.sampling import MAGIC as SAMPLING
from calibatt.compiler.stats.unit import MAGIC as UNIT
from calibatt.compiler.stats.unit import VERSION
from calibatt.plans import Blocks, Container, write_container

OF = stats.manifest(thresholds=(0.8, 0.9))


@given(mutations.documents(json.loads(OF.to_json())))
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
        header = data.draw(mutations.documents(header))
    else:
        name_of = data.draw(st.sampled_from(file.names))
        sections[name_of] = data.draw(mutations.arrays(sections[name_of]))
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


def test_a_store_of_which_no_plan_could_be_made_is_refused_before_it_is_measured() -> None:
    for width, heads, words in ((1 << 20, 300, "at most 268435456 tokens"), (1 << 22, 1, "at most 65536 key blocks")):
        model, grid = replace(OF.model, heads=heads), replace(OF.grid, frames=1, height=1, width=width)
        with pytest.raises(ManifestError, match=f"grid must have {words}"):
            stats.manifest(model=model, grid=grid, blocks=Blocks(32, 32), row_radius=0, frame_radius=0)
