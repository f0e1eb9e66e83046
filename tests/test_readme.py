"""What README and docs name is there: links, commands, modules."""

from __future__ import annotations

import ast
import re
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "plans/FORMAT.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    links = [link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links or page != "README.md"
    for path, _, section in links:
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if section:
            titles = re.findall(r"^#+ (.*)", target.read_text("utf-8"), re.MULTILINE)
            assert section in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, section


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_prose_fit_a_window(page: str) -> None:
    """Tables and code may be wider."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "    ", "!["))] == []


def test_every_picture_is_shown() -> None:
    text = "".join((ROOT / page).read_text("utf-8") for page in PAGES)
    pictures = [path.name for path in (ROOT / "docs" / "pictures").iterdir() if path.suffix in (".png", ".svg")]
    assert [name for name in pictures if name not in text] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_there(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    scripts = {script.name for script in entry_points(group="console_scripts")}
    assert set(re.findall(r"\bcalibatt-[a-z]+", text)) <= scripts
    modules = re.findall(r"python -m\s+(calibatt[\w.]+\w)", text)
    assert [module for module in modules if find_spec(module) is None] == []
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= {*targets}


@pytest.mark.parametrize("page", PAGES)
def test_python_is_python(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        ast.parse(block)


def test_what_contributors_are_sent_to_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    paths = re.findall(r"`((?:plans|compiler|runtime|tools|tests|docs)/[\w/.]+)`", text)
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("folder", ["plans", "compiler", "runtime"])
def test_the_map_of_files_names_every_module_and_no_other(folder: str) -> None:
    text = (ROOT / "docs" / "design.md").read_text("utf-8")
    table = text[text.index(f"| {folder}/ | |") :].split("\n\n")[0]
    named = set(re.findall(r"`(\w+\.py|\w+/)`", "".join(row.split("|")[1] for row in table.splitlines())))
    files = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    folders = {f"{path.parent.name}/" for path in (ROOT / folder).glob("*/__init__.py")}
    assert named == files | folders
