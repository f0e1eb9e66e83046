"""Programs of this folder under the installed triton or under an older one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

OLDER_TRITON = "CALIBATT_OLDER_TRITON"
"""Environment variable: a folder with the oldest of the tested releases (``make test`` installs it)."""


def run_program(
    program: ModuleType, cases: list[dict[str, Any]], triton: str | None = None, **environment: str
) -> list[dict[str, Any]]:
    """What a program prints for its cases.

    Args:
        program: Takes a list of cases as its argument and prints as long a list, both JSON.
        cases: The cases.
        triton: A folder with another release of triton.
        environment: Variables for the program.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    tests = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, [triton, inherited.get("PYTHONPATH"), tests]))
    command = [sys.executable, str(program.__file__), json.dumps(cases)]
    result = subprocess.run(
        command, env={**inherited, "PYTHONPATH": paths, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, (result.returncode, result.stderr)
    return json.loads(result.stdout.splitlines()[0])
