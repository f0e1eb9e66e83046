"""The demo's report: one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from calibatt.plans import PlanFile
from calibatt.plans.files import write_text
from calibatt.plans.page import Html, cards, element, folded, page
from calibatt.plans.readable import duration
from calibatt.tools.demo.measure import Pair
from calibatt.tools.evaluate.pictures import DIFFERENCE_GAIN, drawn, embedded, side_by_side
from calibatt.tools.inspect_plan.drawing import mask_figure, overview_figure
from calibatt.tools.inspect_plan.summary import heads_of, predicted_snr

OVERVIEW = "Density of every head, layer and denoising time (1 is noise): blocks are where errors cost the video most."
MASK = "Which key blocks (across) each query (down) attends to; lines are frames."


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
    error = stdev(quality) / len(quality) ** 0.5 if len(quality) > 1 else 0.0
    latent, predicted = mean(pair.latent_db for pair in pairs), predicted_snr(plan) or "not predicted"
    dense, planned = (
        f"{duration(facts[f'{kind}_ms'])} ± {duration(facts[f'{kind}_spread_ms'])}" for kind in ("dense", "planned")
    )
    ratio = facts["dense_ms"] / facts["planned_ms"]
    text = page(
        "CalibAtt demo",
        "A small Wan transformer, trained on moving shapes, generated prompts that neither its training nor its "
        "calibration saw: once with dense attention, once on a compiled plan, from the same noise.",
        cards(
            (f"{facts['density']:.0%}", "of dense attention executed"),
            (f"{mean(quality):.1f} dB", f"PSNR against the dense video, mean of {len(pairs)} prompts ± {error:.1f} dB"),
            (f"{latent:.1f} dB", f"signal-to-noise of the final latent; the plan's prediction: {predicted}"),
            (f"{ratio:.2f} x", f"as fast as dense attention, over one video: {dense} dense, {planned} planned"),
        ),
        element("h2", f"Dense, planned, difference × {DIFFERENCE_GAIN}"),
        element("div", *map(_video, pairs), kind="videos"),
        element("h2", "Where the blocks went"),
        element("p", OVERVIEW),
        embedded(drawn(overview_figure(plan, plan_name)), "density of every head at every time", "drawing"),
        element("h2", "One mask"),
        element("p", f"Layer {layer}, head {head}, time {time:.2f}. {MASK}"),
        embedded(drawn(mask_figure(plan, layer, head, time, plan_name)), "one attention mask", "drawing"),
        folded("the pass string", element("p", element("code", plan.passes))),
        footer=f"{facts['command']} · {facts['device']} · {facts['versions']} · {facts['date']}",
    )
    write_text(path, text)


def _video(pair: Pair) -> Html:
    quality = element("b", f"{pair.psnr_db:.1f} dB")
    caption = element("figcaption", pair.prompt, Html("<br>"), quality, f", seed {pair.seed}")
    return element("figure", embedded(side_by_side(pair.dense, pair.planned), pair.prompt), caption)
