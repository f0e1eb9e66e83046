"""`import calibatt`: what it offers, what it costs, and that it works wherever it is imported from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import calibatt
from calibatt import runtime
from calibatt.tools.calibrate.pipeline import PipelineSampler

ROOT = Path(__file__).parent.parent
PLAN = ROOT / "plans" / "demo.plan"


def run(*line: str | Path, folder: Path = ROOT, **environment: str) -> str:
    """What a Python prints that is started in a folder."""
    command = [sys.executable, "-W", "error", *map(str, line)]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_everything_is_offered_under_its_own_name() -> None:
    for name in {*calibatt.__all__} - {"PipelineSampler", "__version__"}:
        assert getattr(calibatt, name) is getattr(runtime, name)
    assert calibatt.PipelineSampler is PipelineSampler
    assert set(calibatt.__all__) <= set(dir(calibatt))
    with pytest.raises(AttributeError, match="module 'calibatt' has no attribute 'attack'"):
        calibatt.attack  # noqa: B018


def test_importing_it_costs_nothing() -> None:
    code = "import sys; sys.modules.update(torch=None, numpy=None); import calibatt; print(calibatt.__version__)"
    assert run("-c", code) == calibatt.__version__


def test_what_needs_more_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\nimport calibatt\n"
        "try: calibatt.load_plan\nexcept ModuleNotFoundError as error: print(error)"
    )
    assert run("-c", code) == "calibatt.load_plan: torch must be installed: pip install 'calibatt[runtime]'"


@pytest.mark.slow
def test_it_works_with_the_checkout_as_working_folder() -> None:
    """Where the folder `calibatt` is found first, and the other packages are not in it."""
    code = "import calibatt.plans; print(calibatt.load_plan('plans/demo.plan').grid.tokens)"
    assert run("-c", code) == "4608"
    assert "Wan" in run("-m", "calibatt.tools.inspect_plan", PLAN)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    assert "Wan" in run("-W", "ignore", *torchrun, "-m", "calibatt.tools.inspect_plan", PLAN)
    found = run("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/plans/test_format.py")
    assert "test_format.py" in found


@pytest.mark.parametrize("inside", [True, False], ids=["in the checkout", "elsewhere"])
def test_it_works_as_a_wheel(tmp_path: Path, inside: bool) -> None:
    """The packages in one folder, as installed; without what an editable install adds to Python's imports."""
    site, elsewhere = tmp_path / "site" / "calibatt", tmp_path / "elsewhere"
    site.mkdir(parents=True)
    elsewhere.mkdir()
    for name in ("calibatt/__init__.py", "plans", "compiler", "runtime", "tools"):
        (site / Path(name).name).symlink_to(ROOT / name)
    code = (
        "import sys; sys.meta_path[:] = [each for each in sys.meta_path if 'editable' not in repr(each)]\n"
        "import calibatt, calibatt.plans, calibatt.compiler; print(calibatt.__file__, calibatt.plans.__file__)"
    )
    found = run("-c", code, folder=ROOT if inside else elsewhere, PYTHONPATH=str(site.parent)).split()
    first = ROOT / "calibatt" if inside else site
    assert found == [str(first / "__init__.py"), str(site / "plans" / "__init__.py")]
