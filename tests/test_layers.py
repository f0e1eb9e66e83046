"""Imports go down only: whiteboard and fences of docs/design.md, section 2, read from every import statement."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "triton"}
FORBIDDEN = {
    "plans": {"calibatt.compiler", "calibatt.runtime", "calibatt.tools"},
    "compiler": {"calibatt.runtime", "calibatt.tools", *HEAVY},
    "runtime": {"calibatt.compiler", "calibatt.tools", "scipy", "networkx"},
    "tools/inspect_plan": {"calibatt.compiler", "calibatt.runtime", *HEAVY},
}
"""What may not be imported below each folder, anywhere in a file."""
OURS = {"plans", "compiler", "runtime", "tools"}


def imports(source: str) -> set[str]:
    """Every module that a file imports by statement, at any depth; ``from a import b`` counts as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {base} | {f"{base}.{name.name}" for name in node.names}
    return found


def crossed(modules: set[str], fence: set[str]) -> set[str]:
    return {module for module in modules if any(f"{module}.".startswith(f"{name}.") for name in fence)}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_no_import_crosses_a_fence(folder: str) -> None:
    assert files(folder)
    for path in files(folder):
        assert not crossed(imports(path.read_text("utf-8")), FORBIDDEN[folder]), path


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["calibatt"] * (parts[0] != "calibatt") + [part for part in parts if part != "__init__"])


@cache
def import_graph() -> networkx.DiGraph:
    """Our modules, and which of them each imports; those for types, and those inside of functions, count as well."""
    sources = {module_of(path): path for folder in OURS | {"calibatt"} for path in files(folder)}
    graph = networkx.DiGraph()
    graph.add_nodes_from((module, {"path": path}) for module, path in sources.items())
    for module, path in sources.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                longer = [f"{node.module}.{name.name}" for name in node.names]
                found = [each if each in sources else str(node.module) for each in longer]
            else:
                continue
            graph.add_edges_from((module, each) for each in found if each in sources)
    return graph


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = import_graph()
    assert len(graph) > 100
    assert [sorted(each) for each in networkx.strongly_connected_components(graph) if len(each) > 1] == []


def test_the_whiteboard_is_the_import_graph() -> None:
    text = (ROOT / "docs" / "design.md").read_text("utf-8")
    rows = text.partition("    box  ")[2].partition("\n\n")[0].splitlines()[1:]
    drawn = {}
    boxes = {}
    for row in rows:
        box, folders, imported = re.split(r"  +", row.strip())
        boxes |= dict.fromkeys(folders.split(), box)
        drawn[box] = set() if imported == "nothing of ours" else set(imported.split(", "))
        assert not drawn[box] & {*drawn}, f"{box} imports upwards"
    assert len(drawn) <= 10
    graph = import_graph()
    where = {
        module: next((boxes[folder] for folder in boxes if path.is_relative_to(ROOT / folder)), None)
        for module, path in graph.nodes(data="path")
    }
    homeless = {str(graph.nodes[module]["path"].relative_to(ROOT)) for module, box in where.items() if box is None}
    assert {path for path in homeless if not path.startswith("tools/studies/")} == {"tools/__init__.py"}
    found = {box: {where[b] for a, b in graph.edges if where[a] == box and where[b] != box} for box in drawn}
    assert found == drawn


def test_plans_import_numpy_msgpack_and_zstandard_only() -> None:
    allowed = {"calibatt", "numpy", "msgpack", "zstandard", *sys.stdlib_module_names}
    for path in files("plans"):
        assert {module.split(".")[0] for module in imports(path.read_text("utf-8"))} <= allowed, path


def test_our_own_modules_are_imported_absolutely() -> None:
    for folder in OURS:
        for path in files(folder):
            for module in imports(path.read_text("utf-8")):
                assert not module.startswith("."), f"{path} imports {module}"
                assert module.split(".")[0] not in OURS, f"{path} imports {module}"
                assert module != "calibatt", f"{path} comes in by the front door"


def test_the_walk_sees_every_form_of_import() -> None:
    source = "import a.b\ndef f():\n    from c.d import e\nif 1:\n    from . import g\nfrom .h import i\n"
    assert imports(source) == {"a.b", "c.d", "c.d.e", ".", "..g", ".h", ".h.i"}
    assert crossed({"torch.nn", "torchvision", "calibatt.compiler"}, {"torch", "calibatt.compiler"}) == {
        "torch.nn",
        "calibatt.compiler",
    }


def test_studies_are_not_installed_and_nothing_installed_imports_them() -> None:
    """The wheel holds the packages that pyproject.toml lists: all folders with an `__init__.py` but the studies."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    packages = re.findall(r'"([\w.]+)"', text[text.index("\npackages = [") : text.index("[tool.setuptools.dynamic]")])
    folders = {".".join(path.parent.relative_to(ROOT).parts) for folder in OURS for path in files(folder)}
    assert {*packages} == {"calibatt", *(f"calibatt.{folder}" for folder in folders - {"tools.studies"})}
    studies = ROOT / "tools" / "studies"
    for path in (path for folder in OURS for path in files(folder) if studies not in path.parents):
        assert not crossed(imports(path.read_text("utf-8")), {"calibatt.tools.studies"}), path


def test_plans_load_without_torch() -> None:
    """In a fresh interpreter in which torch, triton and scipy cannot be imported."""
    code = "import sys; sys.modules.update(torch=None, triton=None, scipy=None); import calibatt.plans"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {
        path: len(path.read_text("utf-8").splitlines()) for folder in OURS | {"calibatt"} for path in files(folder)
    }
    assert {str(path): length for path, length in lengths.items() if length > 400} == {}
