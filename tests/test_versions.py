"""docs/versions.md: what is demanded and what is exercised, and the oldest diffusers at work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from calibatt.runtime.backends.hopper import TESTED_RELEASES

ROOT = Path(__file__).parent.parent
OLDER_DIFFUSERS = "CALIBATT_OLDER_DIFFUSERS"
"""Environment variable: a folder with the oldest release that is supported (``make test`` installs it)."""
ROWS = {
    cells[0]: cells[1:]
    for line in (ROOT / "docs" / "versions.md").read_text("utf-8").splitlines()
    if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 5
}
DEMANDED = (ROOT / "pyproject.toml").read_text("utf-8")
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def test_the_table_says_what_is_demanded() -> None:
    (python,) = re.findall(r'requires-python = ">=([\d.]+),<3\.(\d+)"', DEMANDED)
    assert ROWS["Python"][:2] == [python[0], f"3.{int(python[1]) - 1}"]
    for name in ("torch", "triton", "diffusers"):
        assert ROWS[name][0] == re.findall(rf'"{name}>=([\d.]+)', DEMANDED)[0]
    assert ROWS["triton for `hopper`"][:2] == [TESTED_RELEASES[0], TESTED_RELEASES[-1]]


def test_the_table_says_what_is_installed() -> None:
    for name in ("torch", "triton", "diffusers"):
        for version in re.findall(rf"{name}==([\d.]+)", MAKEFILE):
            assert version in ROWS[name][2]


@pytest.mark.slow
def test_the_oldest_diffusers_follows_plans() -> None:
    """In a process of its own: a plan on Wan is masked attention, and leaves the model as it was."""
    folder = os.environ.get(OLDER_DIFFUSERS)
    if not folder:
        pytest.skip(f"{OLDER_DIFFUSERS} must be a folder with the oldest diffusers")
    (version,) = re.findall(r"diffusers==([\d.]+)", MAKEFILE)
    paths = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    chosen = ("test_a_sparse_plan_is_masked_attention[1-500]", "test_the_model_stays_what_it_was")
    line = "import pytest, sys; code = pytest.main(sys.argv[1:]); import diffusers; print(diffusers.__version__, code)"
    tests = [f"tests/runtime/test_attach.py::{name}" for name in chosen]
    done = subprocess.run(
        [sys.executable, "-c", line, "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == f"{version} 0", done.stdout + done.stderr
    assert "2 passed" in done.stdout
