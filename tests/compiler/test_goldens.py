"""Passes on drawn masks: the golden files say what they do. To change them: python tests/update_goldens.py --write"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.drawings import GOLDENS, draw, read, renewed

CASES = sorted(GOLDENS.glob("*/*.txt"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_pass_does_what_its_golden_shows(path: Path) -> None:
    text = path.read_text()
    (passes,) = (line for line in text.splitlines() if line.startswith("passes: "))
    assert path.parent.name in passes
    assert renewed(text) == text


def test_there_are_goldens_of_both_kinds() -> None:
    assert {"refused " in path.read_text() for path in CASES} == {False, True}


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(0, 2**32))
def test_what_is_drawn_reads_back(times: int, heads: int, blocks: int, seed: int) -> None:
    keep = np.random.default_rng(seed).random((times, heads, blocks, blocks)) < 0.5
    at = tuple(float(time) for time in np.linspace(0.25, 0.75, times))
    found = read(draw(at, keep))
    assert found.times == pytest.approx(at)
    np.testing.assert_array_equal(found.keep, keep)
