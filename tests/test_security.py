"""What SECURITY.md says, and that every line of it is tested."""

from __future__ import annotations

import ast
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support import hostile
from support.plans import tiny_plan

from calibatt.plans import PlanFile, write_plan

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "SECURITY.md").read_text("utf-8")
LINES = re.findall(r"^- (.*(?:\n  .*)*)", PAGE, re.MULTILINE)
UNSAFE = {"eval", "exec", "compile", "__import__"}
PICKLES = {ROOT / "compiler" / "shelf.py"}
"""What unpickles: units that the same job wrote into its own folder."""


def test_there_is_something_to_prove() -> None:
    assert len(LINES) > 10


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_every_line_names_tests_that_exist(line: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line)
    assert named, line
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text("utf-8"))
        assert name in {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}, (path, name)


def test_nothing_of_a_file_is_executed() -> None:
    """No code of ours evaluates, and what unpickles is what a job wrote itself."""
    for path in [
        each for folder in ("plans", "compiler", "runtime", "tools") for each in (ROOT / folder).rglob("*.py")
    ]:
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names} | {(getattr(node, "module", "") or "")}
                assert not names & {"pickle", "marshal", "shelve", "dill", "yaml"} or path in PICKLES, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in UNSAFE, (path, node.lineno)
                given = {each.arg: ast.unparse(each.value) for each in node.keywords}
                assert called != "torch.load" or given.get("weights_only") == "True", (path, node.lineno)
                assert given.get("allow_pickle", "False") == "False", (path, node.lineno)


def test_what_a_plan_says_of_itself_is_not_proved(tmp_path: Path) -> None:
    lie = replace(tiny_plan(), provenance={"prompts_digest": "made up"}, license="mine", notes="40 dB at no cost")
    write_plan(tmp_path / "a.plan", lie)
    assert PlanFile.read(tmp_path / "a.plan").notes == lie.notes


def test_a_digest_is_no_signature(tmp_path: Path) -> None:
    header, sections = hostile.dense_parts()
    for notes in ("mine", "yours"):
        (tmp_path / notes).write_bytes(hostile.rebuilt(header | {"notes": notes}, sections))
        assert PlanFile.read(tmp_path / notes).notes == notes


CUT = """
import os, sys
from calibatt.plans import PlanFile
plan = PlanFile.read(sys.argv[1])
os.truncate(sys.argv[1], 0)
plan.prove()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the fault is Linux's")
def test_a_file_cut_while_it_is_mapped_faults(tmp_path: Path) -> None:
    write_plan(tmp_path / "a.plan", tiny_plan())
    done = subprocess.run([sys.executable, "-c", CUT, str(tmp_path / "a.plan")], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGBUS
