"""Rows of a study: judged once, kept in a JSON, joined with those of other processes, shown as tables and curves."""

from __future__ import annotations

import json
import math
import statistics as stats
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from calibatt.compiler.gather import Samplings
from calibatt.plans.files import write_text
from calibatt.tools.inspect_plan.drawing import save_figure
from calibatt.tools.studies.bench import Bench, Rule
from calibatt.tools.studies.stores import sampling_counts

MISSED = 0.01
"""A density that is farther from what was asked for is named."""

SETTINGS = ("device", "versions", "model", "tokens", "prompts", "calibration", "steps", "store", "samples", "vectors")
"""Rows stand beside each other only where these are the same."""

console = Console(stderr=True)


def mean_and_error(values: Sequence[float]) -> dict[str, float]:
    error = stats.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": stats.fmean(values), "standard_error": error}


def difference(row: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    """What a row's PSNR is above another's, paired by prompt."""
    return mean_and_error([a - b for a, b in zip(row["psnr"], base["psnr"], strict=True)])


def cell(row: dict[str, Any] | None, base: dict[str, Any] | None = None) -> str:
    """A row in a table: its mean PSNR (standard error), milliseconds of attention if they were timed, in square
    brackets the difference from another row, and the density where it is not the one that was asked for."""
    if row is None:
        return "not judged"
    text = "{mean:.1f} ({standard_error:.1f})".format(**mean_and_error(row["psnr"]))
    if row.get("attention_ms"):
        text += f", {row['attention_ms']:.1f} ms"
    if base is not None and base is not row:
        text += " [{mean:+.1f} ({standard_error:.1f})]".format(**difference(row, base))
    return text if abs(row["density"] - row["target"]) < MISSED else f"{text} at {row['density']:.2f}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    names, *lines = (f"| {' | '.join(line)} |" for line in (columns, *rows))
    return [names, "|---" * len(columns) + "|", *lines, ""]


def by_target(
    rows: Sequence[dict[str, Any]], key: str, base: str, of: Sequence[dict[str, Any]] | None = None
) -> list[str]:
    """The table of a study: a line for each name under a key of the rows, a column for each density.

    Args:
        rows: The rows.
        key: What names them.
        base: Name of the rows that others are compared with.
        of: Rows whose densities are columns; `rows` if absent.
    """
    targets = sorted({row["target"] for row in of or rows})
    at = {(row[key], row["target"]): row for row in rows}
    names = dict.fromkeys(row[key] for row in rows)
    columns = [key, *(f"density {target:g}" for target in targets)]
    return table(columns, [[n, *(cell(at.get((n, t)), at.get((base, t))) for t in targets)] for n in names])


def page(title: str, result: dict[str, Any], text: str, *tables: Sequence[str]) -> str:
    """Markdown: what was measured and by which command, then tables."""
    about = result["about"]
    measured = f"`{about['command']}`; {about['device']}, {about['versions']}, {about['date']}."
    return "\n".join([f"# {title}", "", *textwrap.wrap(text, 118), "", measured, "", *(x for t in tables for x in t)])


def draw_curve(axes: Any, rows: Sequence[dict[str, Any]], key: str = "density", **style: Any) -> None:
    """Mean PSNR of rows, with its standard error, against what they have under a key."""
    quality = [mean_and_error(row["psnr"]) for row in rows]
    x, y, error = [row[key] for row in rows], [q["mean"] for q in quality], [q["standard_error"] for q in quality]
    axes.errorbar(x, y, yerr=error, marker="o", markersize=3.5, **style)
    axes.grid(color="#e4e2dc")
    axes.spines[["top", "right"]].set_visible(False)


def caption(result: dict[str, Any]) -> str:
    """What was measured, below or above a picture."""
    about = result["about"]
    return f"{result['prompts']} held-out prompts; {about['device']}, {about['versions']}, {about['date']}"


class Judgements:
    """Rows of a study, written to its JSON after every one; what is there is not done again.

    Args:
        output: The JSON.
        seconds: Begin no rule after so many.
        timed: Measure the milliseconds of attention; not where others use the device, or nobody asks for them.

    Raises:
        ValueError: The file is there and is no JSON of a study.
    """

    def __init__(self, output: Path, seconds: float = math.inf, *, timed: bool = True) -> None:
        self.output, self.seconds, self.timed, self.began = output, seconds, timed, time.perf_counter()
        self.result: dict[str, Any] = _read(output) if output.exists() else {"rows": []}

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.result["rows"]
        return rows

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    @property
    def is_over(self) -> bool:
        return self.elapsed > self.seconds

    def begin(self, about: dict[str, str], **settings: Any) -> None:
        """Says what all rows have in common.

        Args:
            about: Of `evaluate.harness.about`.
            settings: What else they depend on, some of `SETTINGS`.

        Raises:
            ValueError: There are rows of another device, of other versions or settings.
        """
        self._agree({"about": about, **settings}, self.output, missing=True)
        self.result |= {"about": about, **settings}

    def join(self, path: Path) -> None:
        """Takes the rows of another JSON in, as if they had been judged here.

        Raises:
            ValueError: It is no JSON of a study, or of another device, of other versions or settings.
        """
        other = _read(path)
        self._agree(other, path, missing=False)
        self.result |= other | self.result | {"rows": self.rows + other["rows"]}

    def _agree(self, other: dict[str, Any], path: Path, *, missing: bool) -> None:
        ours, theirs = (each | each.get("about", {}) for each in (self.result, other))
        for key in SETTINGS if self.rows else ():
            if key in theirs and (missing or key in ours) and ours.get(key) != theirs[key]:
                raise ValueError(
                    f"rows of one study must have the same {key}, got {ours.get(key)!r} and, in {path}, "
                    f"{theirs[key]!r}: give another file"
                )

    def judge(
        self,
        bench: Bench,
        method: str,
        target: float,
        make: Callable[[], Rule],
        store: Callable[[], Samplings] | None = None,
        **labels: Any,
    ) -> None:
        """Judges a rule; one that cannot be made says why.

        Args:
            bench: It judges.
            method: Its name in the rows.
            target: Density asked for.
            make: Makes the rule.
            store: The statistics that it is made from; what these were made of goes into the row.
            labels: What else tells its row from others.
        """
        which = {"method": method, "target": target, **labels}
        if self.is_over or self._row(which) is not None:
            return
        start = self.elapsed
        try:
            rule = make()
        except ValueError as error:
            console.print(f"{_name(which)}: {error}", markup=False)
            return
        row = which | ({} if store is None else {"store": sampling_counts(store())})
        row |= bench.judge(rule, timed=self.timed)
        self.rows.append({k: [round(x, 4) for x in v] if isinstance(v, list) else v for k, v in row.items()})
        console.print(
            f"{self.elapsed:6.1f} s (+{self.elapsed - start:.1f})  {_name(which)}: density {row['density']:.3f}, "
            f"{cell(row)}",
            markup=False,
        )
        self.write()

    def time(
        self, bench: Bench, method: str, target: float, make: Callable[[], Rule], videos: int, **labels: Any
    ) -> None:
        """Measures the attention time of a row that has been judged again, unless that has been done."""
        which = {"method": method, "target": target, **labels}
        row = self._row(which)
        if row is None or "timed_videos" in row or self.is_over:
            return
        row |= {"attention_ms": round(bench.attention_ms(make(), videos), 4), "timed_videos": videos}
        console.print(f"{self.elapsed:6.1f} s  {_name(which)}: {row['attention_ms']:.2f} ms", markup=False)
        self.write()

    def _row(self, which: dict[str, Any]) -> dict[str, Any] | None:
        return next((row for row in self.rows if all(row.get(k) == v for k, v in which.items())), None)

    def write(self) -> None:
        write_text(self.output, json.dumps(self.result) + "\n")

    def finish(
        self,
        tell: Callable[[dict[str, Any]], str] | None = None,
        markdown: Path | None = None,
        draw: Callable[[dict[str, Any]], Any] | None = None,
        figure: Path | None = None,
    ) -> None:
        """Writes the JSON, and as Markdown and as a picture what it says, where that is asked for."""
        self.write()
        if tell is not None and markdown is not None:
            write_text(markdown, tell(self.result))
        if draw is not None and figure is not None:
            save_figure(draw(self.result), figure)
        console.print(f"{self.elapsed:.1f} s: {self.output}", markup=False)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found["rows"], list):
            raise TypeError("rows")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} must be the JSON of a study, with its rows, got {error!r}") from None
    return found


def _name(which: dict[str, Any]) -> str:
    density, *names = which["target"], *(str(value) for key, value in which.items() if key != "target")
    return f"{' '.join(names)} @{density:g}"
