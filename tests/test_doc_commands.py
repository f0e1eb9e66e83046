"""Every command of ours in README and docs has options that exist, and is run by a test or said to need a GPU."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import click
import pytest
from test_readme import PAGES, ROOT

SCRIPTS = {
    "calibatt-calibrate": "tools.calibrate",
    "calibatt-compile": "compiler.cli",
    "calibatt-inspect": "tools.inspect_plan",
    "calibatt-evaluate": "tools.evaluate",
    "calibatt-bench": "tools.bench",
    "calibatt-demo": "tools.demo",
}
RUN_BY = {
    "compiler.cli": "compiler/test_cli.py",
    "tools.calibrate": "calibrate/test_command.py",
    "tools.evaluate": "tools/test_evaluate.py",
    "tools.inspect_plan": "tools/test_inspect_plan.py",
    "tools.demo": "tools/test_commands.py",
    "tools.bench kernel": "tools/test_bench_kernel.py",
    "tools.bench model": "tools/test_bench_model.py",
    "tools.bench journey": "tools/test_journey.py",
    "tools.bench precision": "tools/test_bench_precision.py",
    "tools.studies.compiler_scale": "tools/test_compiler_scale.py",
    "tools.studies.defaults": "tools/test_studies.py",
    "tools.studies.distill": "tools/test_demo_train.py",
    "tools.studies.energy": "tools/test_energy.py",
    "tools.studies.figures": "tools/test_bench_model.py",
    "tools.studies.journey": "tools/test_journey.py",
    "tools.studies.pareto": "tools/test_pareto.py",
    "tools.studies.quality": "tools/test_demo_report.py",
    "tools.studies.robustness": "tools/test_studies.py",
    "tools.studies.sizes": "tools/test_studies.py",
    "tools.studies.train": "tools/test_demo_train.py",
}
"""The tests that run each command, on something small."""
OURS = re.compile(rf"(?:{'|'.join(SCRIPTS)}|(?:python|torchrun\b.*?) -m calibatt\.[\w.]+) .*")


def commands(page: str) -> list[tuple[str, bool]]:
    """Commands with arguments; those in blocks of code are whole."""
    text = (ROOT / page).read_text("utf-8").replace("\\\n", " ")
    blocks = [line.strip() for line in text.split("\n") if re.match(r"(    )?(calibatt-|python -m|torchrun)", line)]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]
    whole = [(line.split("  #")[0], True) for line in blocks if OURS.fullmatch(line)]
    return whole + [(span, False) for span in spans if OURS.fullmatch(span)]


def parsed(line: str) -> tuple[str, click.Command, list[str]]:
    """Module, command and arguments."""
    name, *arguments = shlex.split(line)
    if name not in SCRIPTS:
        module = line.split(" -m ")[1].split()[0]
        name, arguments = module, shlex.split(line.split(module, 1)[1])
    module = SCRIPTS.get(name, name.removeprefix("calibatt."))
    file = "" if (ROOT / f"{module.replace('.', '/')}.py").exists() else ".__main__"
    entry = import_module(f"calibatt.{module}{file}")
    command = entry.command if module == "compiler.cli" else entry.main
    if isinstance(command, click.Group):
        part, *arguments = arguments
        found = command.get_command(click.Context(command), part)
        assert found is not None, part
        return f"{module} {part}", found, arguments
    return module, command, arguments


ALL = sorted({(page, *each) for page in PAGES if page != "CHANGELOG.md" for each in commands(page)})


@pytest.mark.parametrize(("page", "line", "whole"), ALL)
def test_a_command_has_its_options_and_is_run_by_a_test(page: str, line: str, whole: bool) -> None:
    name, command, arguments = parsed(line)
    options = {option: each for each in command.params for option in (*each.opts, *each.secondary_opts)}
    assert {word for word in arguments if word.startswith("-") and len(word) > 1} <= {*options, "--help"}
    if whole and "..." not in arguments:
        context = click.Context(command)
        given, rest, _ = command.make_parser(context).parse_args(args=list(arguments))
        missing = [each.name for each in command.params if each.required and not given.get(str(each.name))]
        assert missing == []
        assert rest == []
    test = ROOT / "tests" / RUN_BY[name]
    assert name.split(".")[-1].split()[0] in test.read_text("utf-8")


def test_the_pages_have_commands() -> None:
    assert len(ALL) > 30
    assert {Path(page).name for page, _, _ in ALL} >= {"README.md", "guide.md", "evaluation.md"}
