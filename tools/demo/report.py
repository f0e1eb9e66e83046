"""The demo's report: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import statistics
import string
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from calibatt.plans import PlanFile
from calibatt.tools.demo.measure import Pair
from calibatt.tools.inspect_plan.drawing import mask_figure, overview_figure

TEMPLATE = Path(__file__).with_name("report.html")
SCALE = 4
FRAME_MS = 180
DIFFERENCE_GAIN = 4
GAP_PIXELS = 2


def animation(videos: list[Tensor]) -> bytes:
    """Videos ``(3, F, H, W)`` in [-1, 1] side by side as an animated PNG."""
    shown = [torch.nn.functional.pad(v.float().clamp(-1, 1), (GAP_PIXELS,) * 4, value=1.0) for v in videos]
    frames = ((torch.cat(shown, 3) + 1) * 127.5).byte().permute(1, 2, 3, 0)
    frames = frames.repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2)
    pictures = [Image.fromarray(frame.numpy()) for frame in frames]
    out = io.BytesIO()
    pictures[0].save(
        out, "PNG", save_all=True, append_images=pictures[1:], duration=FRAME_MS, loop=0, default_image=False
    )
    return out.getvalue()


def side_by_side(pair: Pair) -> bytes:
    """Dense, planned and their difference, enlarged `DIFFERENCE_GAIN` times around grey."""
    difference = (pair.planned.clamp(-1, 1) - pair.dense.clamp(-1, 1)) * DIFFERENCE_GAIN / 2
    return animation([pair.dense, pair.planned, difference])


def _embedded(picture: bytes, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'


def _drawn(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    out = io.BytesIO()
    figure.savefig(out, dpi=130, facecolor="white", format="png")
    return out.getvalue()


def most_telling_head(plan: PlanFile) -> tuple[int, int, int]:
    """Segment, layer and head of the mask to show: the one whose density is nearest to a quarter."""
    places = [
        (abs(schedule.head_density(head) - 0.25), segment, layer, head)
        for segment, layers in enumerate(plan.schedules)
        for layer, schedule in enumerate(layers)
        for head in range(schedule.heads)
    ]
    return min(places)[1:]


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
        f"<figure>{_embedded(side_by_side(pair), pair.prompt)}"
        f"<figcaption>{html.escape(pair.prompt)}<br><b>{pair.psnr_db:.1f} dB</b>, seed {pair.seed}</figcaption>"
        "</figure>"
        for pair in pairs
    )
    ratio = facts["dense_ms"] / facts["planned_ms"]
    page = string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        density=f"{facts['density']:.2f}",
        psnr=f"{statistics.mean(quality):.1f}",
        error=f"{error:.1f}",
        count=len(pairs),
        dense=f"{facts['dense_ms'] / 1e3:.2f}",
        dense_spread=f"{facts['dense_spread_ms'] / 1e3:.2f}",
        planned=f"{facts['planned_ms'] / 1e3:.2f}",
        planned_spread=f"{facts['planned_spread_ms'] / 1e3:.2f}",
        ratio=f"{ratio:.2f}",
        gain=DIFFERENCE_GAIN,
        cards=cards,
        overview=_embedded(_drawn(overview_figure(plan, plan_name)), "density of every head at every time"),
        mask=_embedded(_drawn(mask_figure(plan, layer, head, time, plan_name)), "one attention mask"),
        layer=layer,
        head=head,
        time=f"{time:.2f}",
        passes=html.escape(plan.passes),
        device=html.escape(facts["device"]),
        versions=html.escape(facts["versions"]),
        command=html.escape(facts["command"]),
        date=html.escape(facts["date"]),
    )
    path.write_text(page, encoding="utf-8")
