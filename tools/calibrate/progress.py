"""Shows the progress of a long job: a bar in a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 30.0


class Steps:
    """Counts the work that is done, and shows how much is left.

    Args:
        name: What is going on.
        total: All of the work, in any unit.
        console: Where a bar is shown; lines go where it writes.
        quiet: Say nothing.
    """

    def __init__(self, name: str, total: float, console: Console, quiet: bool) -> None:
        self._name, self._total, self._done = name, total, 0.0
        self._console, self._quiet = console, quiet
        self._begun = self._told = time.monotonic()
        self.bar: Progress | None = None
        if console.is_terminal and not quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
            self.bar = Progress(*columns, TextColumn("left:"), TimeRemainingColumn(), console=console)
            self._task = self.bar.add_task(name, total=total)

    def advance(self, work: float) -> None:
        """Counts so much more as done."""
        self._done = min(self._done + work, self._total)
        if self.bar is not None:
            self.bar.update(self._task, completed=self._done)
        elif not self._quiet and time.monotonic() - self._told >= LINE_SECONDS and self._done:
            self._told = time.monotonic()
            gone = self._told - self._begun
            left = gone * (self._total - self._done) / self._done
            share = self._done / self._total
            print(
                f"{self._name}: {share:.0%} done, {_clock(gone)} gone, {_clock(left)} left", file=sys.stderr, flush=True
            )


@contextmanager
def steps(name: str, total: float, console: Console, quiet: bool = False) -> Iterator[Steps]:
    """Shows the progress of what happens inside; see `Steps`."""
    shown = Steps(name, total, console, quiet)
    if shown.bar is None:
        yield shown
    else:
        with shown.bar:
            yield shown


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
