"""The demo's report: one HTML file that needs nothing else."""

from __future__ import annotations

import html
import statistics
import string
from pathlib import Path
from typing import Any

import numpy as np

from calibatt.plans import PlanFile
from calibatt.plans.files import write_text
from calibatt.tools.demo.measure import Pair
from calibatt.tools.evaluate.pictures import DIFFERENCE_GAIN, drawn, embedded, side_by_side
from calibatt.tools.inspect_plan.drawing import mask_figure, overview_figure
from calibatt.tools.inspect_plan.summary import heads_of, predicted_snr

TEMPLATE = Path(__file__).with_name("report.html")


def most_telling_head(plan: PlanFile) -> tuple[int, int, int]:
    """Segment, layer and head of the mask to show: the one whose density is nearest to a quarter."""
    distance = np.abs(heads_of(plan).densities - 0.25)
    segment, layer, head = (int(at) for at in np.unravel_index(distance.argmin(), distance.shape))
    return segment, layer, head


def write_report(path: Path, plan: PlanFile, plan_name: str, pairs: list[Pair], facts: dict[str, Any]) -> None:
    """Writes the report.

    Args:
        path: The HTML file.
        plan: The plan that was attached.
        plan_name: How to call it.
        pairs: Held-out prompts, generated twice.
        facts: `density`, `dense_ms`, `dense_spread_ms`, `planned_ms`, `planned_spread_ms`, `device`, `versions`,
            `command`, `date`.
    """
    segment, layer, head = most_telling_head(plan)
    time = plan.segments[segment].time
    quality = [pair.psnr_db for pair in pairs]
    error = statistics.stdev(quality) / len(quality) ** 0.5 if len(quality) > 1 else 0.0
    cards = "\n".join(
        f"<figure>{embedded(side_by_side(pair.dense, pair.planned), pair.prompt)}"
        f"<figcaption>{html.escape(pair.prompt)}<br><b>{pair.psnr_db:.1f} dB</b>, seed {pair.seed}</figcaption>"
        "</figure>"
        for pair in pairs
    )
    ratio = facts["dense_ms"] / facts["planned_ms"]
    page = string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        density=f"{facts['density']:.2f}",
        psnr=f"{statistics.mean(quality):.1f}",
        error=f"{error:.1f}",
        latent=f"{statistics.mean(pair.latent_db for pair in pairs):.1f}",
        predicted=predicted_snr(plan) or "not predicted",
        count=len(pairs),
        dense=f"{facts['dense_ms'] / 1e3:.2f}",
        dense_spread=f"{facts['dense_spread_ms'] / 1e3:.2f}",
        planned=f"{facts['planned_ms'] / 1e3:.2f}",
        planned_spread=f"{facts['planned_spread_ms'] / 1e3:.2f}",
        ratio=f"{ratio:.2f}",
        gain=DIFFERENCE_GAIN,
        cards=cards,
        overview=embedded(drawn(overview_figure(plan, plan_name)), "density of every head at every time"),
        mask=embedded(drawn(mask_figure(plan, layer, head, time, plan_name)), "one attention mask"),
        layer=layer,
        head=head,
        time=f"{time:.2f}",
        passes=html.escape(plan.passes),
        device=html.escape(facts["device"]),
        versions=html.escape(facts["versions"]),
        command=html.escape(facts["command"]),
        date=html.escape(facts["date"]),
    )
    write_text(path, page)
