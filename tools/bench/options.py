"""Options that benches and studies share. What is wrong with a value is said before any work."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch

Decorator = Callable[[Any], Any]


def count_option(name: str, default: int | None, text: str, least: int = 1) -> Decorator:
    """An option whose value is a whole number, `least` or more."""
    return click.option(name, type=click.IntRange(least), default=default, show_default=default is not None, help=text)


def device_option(default: str = "auto", kinds: Sequence[str] = ("cpu", "cuda")) -> Decorator:
    """The option ``--device``: a `torch.device` of this machine, which becomes the current one.

    Libraries launch their kernels, and events are recorded, on the current device whatever their tensors are on.
    """

    def read(context: click.Context, parameter: click.Parameter, text: str) -> torch.device:
        count = {"cpu": 1, "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0}
        try:
            device = torch.device(("cuda" if count["cuda"] else "cpu") if text == "auto" else text)
        except RuntimeError:
            device = None
        if device is None or device.type not in kinds or (device.index or 0) >= count[device.type]:
            raise click.UsageError(f"--device must be a {' or '.join(kinds)} device of this machine, got {text!r}")
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)
        return device

    text = f"{', '.join(kinds)}, or auto: cuda where there is one." if default == "auto" else None
    return click.option("--device", default=default, show_default=True, callback=read, help=text)


def file_option(*names: str, text: str, required: bool = False) -> Decorator:
    """An option that names a file to write; its folder is made, and must be one that can be written."""

    def ready(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                problem = "" if os.access(path.parent, os.W_OK) else "a folder that cannot be written"
            except OSError as error:
                problem = str(error.strerror)
            if problem:
                rule = f"{parameter.opts[-1]} must name a file that can be written"
                raise click.UsageError(f"{rule}, got {path}: {problem}")
        return path

    kind = click.Path(path_type=Path, dir_okay=False)
    return click.option(*names, type=kind, required=required, callback=ready, help=text)


def output_option(text: str = "JSON to write after every measurement.", *, required: bool = False) -> Decorator:
    return file_option("-o", "--output", text=text, required=required)


def choose(text: str | None, known: Sequence[str], option: str, separator: str = ",") -> list[str]:
    """Names joined by commas, or another separator; all that are known if absent.

    Raises:
        click.UsageError: One is not known.
    """
    names = [name.strip() for name in text.split(separator)] if text else list(known)
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"{option} must be some of {f'{separator} '.join(known)}; got {unknown[0]!r}")
    return list(dict.fromkeys(names))


def densities_option(default: str, text: str | None = None) -> Decorator:
    """The option ``--densities``: a list of numbers in (0, 1]."""

    def read(context: click.Context, parameter: click.Parameter, given: str) -> list[float]:
        try:
            found = [float(part) for part in given.split(",")]
        except ValueError:
            found = []
        if not found or not all(0 < value <= 1 for value in found):
            raise click.UsageError(f"--densities must be numbers in (0, 1] joined by commas, got {given!r}")
        return found

    return click.option("--densities", default=default, show_default=True, callback=read, help=text)


SECONDS = click.option("--seconds", type=float, default=float("inf"), help="Begin nothing after so many seconds.")
ROUNDS = count_option("--rounds", 10, "Measurements of each case.")
