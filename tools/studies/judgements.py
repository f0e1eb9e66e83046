"""Rows of a study: judged once, kept in a JSON, joined with those of other processes."""

from __future__ import annotations

import json
import math
import statistics as stats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from calibatt.plans.files import write_text
from calibatt.tools.studies.bench import Bench, Rule

console = Console(stderr=True)


def mean_and_error(values: list[float]) -> dict[str, float]:
    error = stats.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": stats.fmean(values), "standard_error": error}


class Judgements:
    """Rows of a study, written to its JSON after every one; what is there is not done again.

    Args:
        output: The JSON.
        seconds: Begin no rule after so many.
        timed: Keep the milliseconds of attention; not where others use the device, or nobody asks for them.
    """

    def __init__(self, output: Path, seconds: float = math.inf, *, timed: bool = True) -> None:
        self.output, self.seconds, self.timed, self.began = output, seconds, timed, time.perf_counter()
        self.result: dict[str, Any] = json.loads(output.read_text("utf-8")) if output.exists() else {"rows": []}

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def join(self, path: Path) -> None:
        """Takes the rows of another JSON in, as if they had been judged here."""
        other = json.loads(path.read_text("utf-8"))
        self.result |= other | self.result | {"rows": self.result["rows"] + other["rows"]}

    def judge(self, bench: Bench, method: str, target: float, make: Callable[[], Rule], **labels: Any) -> None:
        """Judges a rule; one that cannot be made says why.

        Args:
            bench: It judges.
            method: Its name in the rows.
            target: Density asked for.
            make: Makes the rule.
            labels: What else tells its row from others.
        """
        which = {"method": method, "target": target, **labels}
        if self.elapsed > self.seconds or any(which.items() <= row.items() for row in self._plain_rows()):
            return
        start = self.elapsed
        name = " ".join([method, *map(str, labels.values())])
        try:
            rule = make()
        except ValueError as error:
            console.print(f"{name} @{target:g}: {error}", markup=False)
            return
        row = which | bench.judge(rule)
        if not self.timed:
            row["attention_ms"] = None
        rounded = {
            key: [round(x, 4) for x in value] if isinstance(value, list) else value for key, value in row.items()
        }
        self.result["rows"].append(rounded)
        quality = mean_and_error(row["psnr"])
        console.print(
            f"{self.elapsed:6.1f} s (+{self.elapsed - start:.1f})  {name} @{target:g}: density {row['density']:.3f}, "
            f"{quality['mean']:.2f} ± {quality['standard_error']:.2f} dB, {row['attention_ms']} ms",
            markup=False,
        )
        self.write()

    def time(
        self, bench: Bench, method: str, target: float, make: Callable[[], Rule], videos: int, **labels: Any
    ) -> None:
        """Measures the attention time of a row that has been judged again, unless that has been done."""
        which = {"method": method, "target": target, **labels}
        row = next((row for row in self.result["rows"] if all(row.get(k) == v for k, v in which.items())), None)
        if row is None or "timed_videos" in row or self.elapsed > self.seconds:
            return
        row |= {"attention_ms": round(bench.attention_ms(make(), videos), 4), "timed_videos": videos}
        name = " ".join([method, *map(str, labels.values())])
        console.print(f"{self.elapsed:6.1f} s  {name} @{target:g}: {row['attention_ms']:.2f} ms", markup=False)
        self.write()

    def _plain_rows(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if not isinstance(v, list)} for row in self.result["rows"]]

    def write(self) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.output, json.dumps(self.result) + "\n")
