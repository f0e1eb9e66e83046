"""What a JSON file of a bench says of itself: command, date, device, versions, clocks."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from calibatt.plans.files import write_text

PACKAGES = ("triton", "diffusers", "torchao", "flash-attn-4", "nvidia-cutlass-dsl")
OUT_OF_TIME = "out of time"


def typed(name: str) -> str:
    """The command that is running: its name, and the options that were given; files are named without their folders."""
    context, words = click.get_current_context(), [name]
    for option in context.command.params:
        value = context.params.get(option.name or "")
        if context.get_parameter_source(option.name or "") in (ParameterSource.DEFAULT, None) or value is None:
            continue
        if value is False:
            words.append(option.secondary_opts[0])
            continue
        words.append(option.opts[-1])
        if value is not True:
            text = ",".join(f"{each:g}" for each in value) if isinstance(value, list) else str(value)
            words.append(shlex.quote(value.name if isinstance(value, Path) else text))
    return " ".join(words)


def header(name: str, device: torch.device) -> dict[str, Any]:
    """How every report begins.

    Args:
        name: Of the command that is running.
        device: What it measures.
    """
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    return {
        "command": typed(name),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "versions": found,
    }


def write_report(output: Path | None, report: dict[str, Any]) -> None:
    """Writes a report, if it is to be written."""
    if output is not None:
        write_text(output, json.dumps(report, indent=1) + "\n")


def gpu_name(device: torch.device) -> str:
    """What drivers call a GPU; PyTorch's index is another number where CUDA_VISIBLE_DEVICES hides some."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def state(device: torch.device) -> dict[str, str]:
    """Clocks, power and temperature of a GPU right now, as its driver tells them; empty where it does not."""
    if device.type != "cuda":
        return {}
    query = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", gpu_name(device)]
        values = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(query.split(","), (value.strip() for value in values.strip().split(",")), strict=True))
