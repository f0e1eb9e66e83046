"""What README and docs name is there: links, commands, modules."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "docs/comfyui.md",
    "docs/design.md",
    "docs/evaluation.md",
    "docs/models.md",
    "docs/benchmarks/README.md",
    "plans/FORMAT.md",
)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links or page != "README.md"
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


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
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)) <= {*targets}
