"""Every command: help without what it needs, one line for what is missing, exit codes, files whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support.plans import tiny_plan

from calibatt.plans import PlanError, write_plan
from calibatt.plans.command import Incomplete, one_line
from calibatt.plans.files import alone, whole_file, write_text
from calibatt.tools.calibrate.models import make_sampler

ROOT = Path(__file__).parent.parent.parent
EXTRAS = ("torch", "triton", "matplotlib", "PIL", "safetensors", "diffusers", "transformers", "ftfy")
BLOCKED = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({EXTRAS!r}))
module, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = module
runpy.run_module(module, run_name="__main__")
"""
"""Runs a module where nothing is installed but what the package needs without extras."""
COMMANDS = {
    "calibatt-calibrate": "calibatt.tools.calibrate",
    "calibatt-compile": "calibatt.compiler.cli",
    "calibatt-inspect": "calibatt.tools.inspect_plan",
    "calibatt-evaluate": "calibatt.tools.evaluate",
    "calibatt-bench": "calibatt.tools.bench",
    "calibatt-demo": "calibatt.tools.demo",
}
GOLDEN = ROOT / "tests" / "plans" / "golden" / "tiny.plan"


def without_extras(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    line = [sys.executable, "-W", "error", "-c", BLOCKED, COMMANDS[name], *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, env={**os.environ, **environment}, check=False)


def test_every_console_script_is_here() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    scripts = text[text.index("[project.scripts]") : text.index("[tool.setuptools]")]
    found = {name: target.strip(' "').split(":")[0].removesuffix(".__main__") for name, target in
             (line.split("=") for line in scripts.splitlines() if "=" in line)}  # fmt: skip
    assert {name.strip(): target for name, target in found.items()} == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_nothing_and_a_terminal_of_ascii_shows_it(name: str) -> None:
    done = without_extras(name, "--help", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert f"Usage: {name}".encode() in done.stdout
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("name", "arguments", "missing"),
    [
        ("calibatt-calibrate", ("-o", "none/stats"), "torch must be installed: pip install 'calibatt[runtime]'"),
        ("calibatt-evaluate", ("--plan", "x", "--prompts", "y"), "torch must be installed"),
        ("calibatt-demo", ("-o", "none/demo"), "torch must be installed: pip install 'calibatt[runtime]'"),
        ("calibatt-bench", ("kernel",), "torch must be installed: pip install 'calibatt[runtime]'"),
        ("calibatt-bench", ("model", "--help"), "torch must be installed: pip install 'calibatt[runtime]'"),
        ("calibatt-inspect", (GOLDEN, "--overview-png", "none/x.png"), "matplotlib must be installed: pip install "),
    ],
)
def test_what_is_missing_is_one_line(name: str, arguments: tuple[object, ...], missing: str) -> None:
    done = without_extras(name, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.decode().startswith(f"{name}: {missing}")
    assert done.stderr.count(b"\n") == 1


def test_the_demo_refuses_a_device_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from calibatt.tools.demo.__main__ import main

    result = CliRunner().invoke(main, ["--device", "abacus", "-o", str(tmp_path / "demo")])
    assert result.exit_code == 2
    assert result.stderr == "calibatt-demo: --device must be auto, cpu or cuda, got 'abacus'\n"
    assert not (tmp_path / "demo").exists()


def test_what_needs_no_extra_works_without(tmp_path: Path) -> None:
    done = without_extras("calibatt-inspect", GOLDEN, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert b"TinyTransformer" in done.stdout


@pytest.mark.parametrize("where", ["closed", "full"])
def test_an_output_that_cannot_be_shown_is_told(where: str) -> None:
    read, write = os.pipe()
    os.close(read)
    if where == "full":
        os.close(write)
        write = os.open("/dev/full", os.O_WRONLY)
    line = [sys.executable, "-m", COMMANDS["calibatt-inspect"], str(GOLDEN)]
    done = subprocess.run(line, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    told = {"closed": b"the output was closed before all was written", "full": b"No space left on device"}
    assert done.returncode == {"closed": 3, "full": 2}[where]
    assert done.stderr.startswith(b"calibatt-inspect: ")
    assert told[where] in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("text", ["\x1b[2J", "\x9b2J\x07", "\u202e"])
def test_the_name_of_a_file_does_nothing_to_a_terminal(tmp_path: Path, text: str) -> None:
    write_plan(tmp_path / f"a{text}.plan", tiny_plan())
    (tmp_path / f"b{text}.plan").write_bytes(b"junk")
    for name in ("a", "b", "none"):
        line = [sys.executable, "-m", COMMANDS["calibatt-inspect"], str(tmp_path / f"{name}{text}.plan")]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == (0 if name == "a" else 2)
        assert text not in done.stdout + done.stderr
        assert repr(text)[1:-1] in "".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PlanError("a\x1b[2J\nb"), 2, "it: a\\x1b[2J b"),
        (OSError(28, "No space left on device", "file"), 2, "it: file: No space left on device"),
        (OSError("odd"), 2, "it: odd"),
        (MemoryError(), 2, "it: MemoryError"),
        (
            ModuleNotFoundError("No module named 'diffusers'", name="diffusers.models"),
            2,
            "it: diffusers.models must be",
        ),
        (ModuleNotFoundError("No module named 'x'", name="x"), 2, "it: x must be installed: pip install 'x'"),
        (KeyError("expected here"), 2, "it: 'expected here'"),
        (Incomplete("written, not shown"), 3, "it: written, not shown"),
        (BrokenPipeError(32, "Broken pipe"), 3, "it: not all could be said"),
        (KeyboardInterrupt(), 130, "it: interrupted"),
    ],
)
def test_every_kind_of_failure_has_its_line_and_code(error: BaseException, code: int, line: str) -> None:
    @click.command()
    @one_line("it", KeyError)
    def it() -> None:
        raise error

    result = CliRunner().invoke(it, [])
    assert result.exit_code == code
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1


def test_what_nobody_expects_is_not_hidden() -> None:
    @one_line("it")
    def it() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        it()


@pytest.mark.parametrize("name", ["os:path", "os:getcwd", "os:nothing", "support.hostile_model:sampler", ":", "os:"])
def test_a_model_that_is_none_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "broken.py").write_text(
        "def sampler(steps, device):\n    return {}['x']\nraise SystemError('on import')\n"
    )
    (tmp_path / "failing.py").write_text("def sampler(steps, device):\n    return {}['x']\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="--model"):
        make_sampler(name, None, "cpu")
    with pytest.raises(
        ValueError, match=r"must be a function that can be imported, got SystemError: on import \(broken"
    ):
        make_sampler("broken:sampler", None, "cpu")
    with pytest.raises(ValueError, match=r"must return a Sampler, got KeyError: 'x' \(failing.py, line 2\)"):
        make_sampler("failing:sampler", None, "cpu")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(path := tmp_path / "a.txt", "before")

    def half(error: Exception) -> None:
        with whole_file(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(OSError, match=r"a\.txt") as caught:
        half(OSError(28, "No space left on device"))
    assert caught.value.filename == str(path)
    with pytest.raises(ZeroDivisionError):
        half(ZeroDivisionError())
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(FileNotFoundError) as missing:
        write_text(tmp_path / "none" / "b.txt", "")
    assert missing.value.filename == str(tmp_path / "none" / "b.txt")


def test_pictures_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    from calibatt.tools.inspect_plan.__main__ import main

    def half(self: Figure, file: object, **_: object) -> None:
        file.write(b"\x89PNG")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    for option in (["--overview-png"], ["--layer", "0", "--head", "0", "--png"]):
        (tmp_path / "x.png").write_text("before")
        result = CliRunner().invoke(main, [str(GOLDEN), *option, str(tmp_path / "x.png")])
        assert result.exit_code == 2
        assert result.stderr == f"calibatt-inspect: {tmp_path}/x.png: No space left on device\n"
        assert (tmp_path / "x.png").read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["x.png"]


def test_a_lock_is_held_by_one_and_gone_afterwards(tmp_path: Path) -> None:
    with alone(tmp_path / "a", RuntimeError("busy")):
        with pytest.raises(RuntimeError, match="busy"), alone(tmp_path / "a", RuntimeError("busy")):
            pass
        with alone(tmp_path / "b", RuntimeError("busy")):
            pass
        assert [each.name for each in tmp_path.iterdir()] == [".a.lock"]
    with alone(tmp_path / "a", RuntimeError("busy")):
        pass
    assert list(tmp_path.iterdir()) == []
