"""A plan in pictures: one head's mask over the sequence, and the density of every head."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from calibatt.plans import DENSE, FRAMES, NO_ANCHORS, LayerSchedule, PlanFile, TokenGrid
from calibatt.plans.files import whole_file
from calibatt.tools.inspect_plan.summary import GRADIENT, heads_of

Floats = npt.NDArray[np.float64]

COMPUTED = np.array([27, 61, 120]) / 255
COPIED = np.array([160, 190, 226]) / 255
DROPPED = np.array([247, 246, 242]) / 255
ANCHOR = "#e4572e"
FRAME = "#e4a03a"
INK = "#22262e"
FAINT_INK = "#5a606b"
MASK_PIXELS = 1400
MARKED_CELL_POINTS = 6
"""Smallest cell of the overview in which a head's kind is marked."""
STYLE = {
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.8,
}


def draw_mask(plan: PlanFile, layer: int, head: int, time: float, name: str, path: Path) -> None:
    """Writes `mask_figure` as PNG."""
    save_figure(mask_figure(plan, layer, head, time, name), path)


def draw_overview(plan: PlanFile, name: str, path: Path) -> None:
    """Writes `overview_figure` as PNG."""
    save_figure(overview_figure(plan, name), path)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG; the file is whole or absent."""
    FigureCanvasAgg(figure)
    with whole_file(path) as file:
        figure.savefig(file, dpi=200, facecolor="white", format="png")


def mask_figure(plan: PlanFile, layer: int, head: int, time: float, name: str) -> Figure:
    """Draws which key blocks each token of the sequence attends to.

    Queries go down and keys go right, both to scale in tokens, so that partial blocks and blocks that straddle rows
    look as they are. What copies its anchor's output is pale; the strip on the left marks anchors.

    Args:
        plan: The plan.
        layer: Layer, from 0.
        head: Head, from 0.
        time: Denoising time in [0, 1].
        name: What to call the plan.
    """
    schedule = plan.schedule(time, layer)
    segment = plan.segments[plan.segment_index(time)]
    grid = plan.grid
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 8.6))
        axes = figure.add_axes((0.1, 0.08, 0.86, 0.8))
        axes.imshow(
            mask_image(schedule, head, MASK_PIXELS),
            extent=(0, grid.tokens, grid.tokens, 0),
            interpolation="antialiased",
            aspect="equal",
        )
        _mark_sequence(axes, grid)
        _mark_block_grid(axes, plan)
        member = _member(schedule, head)
        if member is not None:
            _mark_anchors(axes, schedule, head)
        blocks = plan.blocks
        axes.set_xlabel(f"keys by frame: {schedule.k_blocks:,} blocks of {blocks.block_k} tokens")
        axes.set_ylabel(f"queries by frame: {schedule.q_blocks:,} blocks of {blocks.block_q} tokens")
        figure.text(
            0.1,
            0.955,
            f"layer {layer}, head {head}, time {time:.3g}: density {schedule.head_density(head):.1%}",
            fontsize=14,
            fontweight="bold",
        )
        span = f"segment {segment.start:.3g} to {segment.stop:.3g}"
        figure.text(0.1, 0.93, f"{name} · {_what(schedule, head)} · {span}", fontsize=9, color=FAINT_INK)
        figure.legend(handles=_legend(member), loc="upper left", bbox_to_anchor=(0.093, 0.924), ncols=4, frameon=False)
    return figure


def mask_image(schedule: LayerSchedule, head: int, pixels: int) -> Floats:
    """The mask as colours, float64 ``(pixels, pixels, 3)``; a pixel is the mean of what it covers, however small."""
    tokens, block_k = schedule.grid.tokens, schedule.blocks.block_k
    source, tile = _sources(schedule, head)
    copied = source != np.arange(tokens)
    strip = tile * 2 + copied
    edges = np.concatenate([[0], np.flatnonzero(strip[1:] != strip[:-1]) + 1, [tokens]])
    keep = schedule.tile_keep(head)[tile[edges[:-1]]].astype(np.float64)
    pale = copied[edges[:-1], None]
    rows = _coverage(edges, pixels)
    columns = _coverage(np.minimum(np.arange(schedule.k_blocks + 1) * block_k, tokens), pixels)
    computed = (rows @ (keep * ~pale) @ columns.T)[..., None]
    copies = (rows @ (keep * pale) @ columns.T)[..., None]
    return np.clip(DROPPED + computed * (COMPUTED - DROPPED) + copies * (COPIED - DROPPED), 0, 1)


def _sources(schedule: LayerSchedule, head: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For each token, the token computed in its place and that one's tile, both int64 ``(N,)``."""
    source = schedule.token_source(head)
    return source, np.searchsorted(schedule.packed_queries(head), source) // schedule.blocks.block_q


def _coverage(edges: npt.NDArray[np.int64], pixels: int) -> Floats:
    """Share of each pixel that each interval covers, float64 ``(pixels, intervals)``; rows sum to 1."""
    scaled = edges * (pixels / edges[-1])
    low = np.maximum(scaled[None, :-1], np.arange(pixels)[:, None])
    high = np.minimum(scaled[None, 1:], np.arange(1, pixels + 1)[:, None])
    return np.maximum(high - low, 0.0)


def _what(schedule: LayerSchedule, head: int) -> str:
    lists, pattern = int(schedule.head_list[head]), int(schedule.head_anchor[head])
    if lists == DENSE:
        text = "all blocks"
    else:
        others = [other for other in np.flatnonzero(schedule.head_list == lists) if other != head]
        text = "listed blocks"
        if others:
            text += f" shared with {len(others)} other head{'s' if len(others) > 1 else ''}"
    if pattern == NO_ANCHORS:
        return text
    members = schedule.grid.tokens // int(schedule.member_tokens[pattern])
    return f"{text} · {len(schedule.groups(pattern)[0]):,} of {members:,} {_member(schedule, head)}s computed"


def _member(schedule: LayerSchedule, head: int) -> str | None:
    """What a head's anchors are: ``row``, ``frame``, or None."""
    pattern = int(schedule.head_anchor[head])
    if pattern == NO_ANCHORS:
        return None
    return "frame" if schedule.anchor_axis[pattern] == FRAMES else "row"


def _legend(member: str | None) -> list[Any]:
    handles: list[Any] = [Patch(facecolor=tuple(COMPUTED), label="computed")]
    if member is not None:
        handles.append(Patch(facecolor=tuple(COPIED), label=f"copied from the anchor {member}"))
    handles.append(Patch(facecolor=tuple(DROPPED), edgecolor="#b9b9b4", label="not computed"))
    if member is not None:
        handles.append(Patch(facecolor=ANCHOR, label=f"anchor {member}"))
    return handles


def _mark_sequence(axes: Axes, grid: TokenGrid) -> None:
    """Frame borders as lines, frames as labels, rows as small ticks where they can be told apart."""
    per_frame = grid.height * grid.width
    borders = [frame * per_frame for frame in range(grid.frames + 1)]
    for border in borders:
        if 0 < border < grid.tokens:
            for line in (axes.axhline, axes.axvline):
                line(border, color=FRAME, linewidth=0.6, alpha=0.7)
    step = math.ceil(grid.frames / 24)
    ticks = {borders[frame] + per_frame / 2: str(frame) for frame in range(0, grid.frames, step)}
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(list(ticks), labels=list(ticks.values()))
        axis.set_tick_params(which="major", length=0, pad=10)
        if grid.rows <= 160:
            rows = np.arange(grid.rows + 1) * grid.width
            axis.set_ticks(rows, minor=True)
            axis.set_tick_params(which="minor", length=2.5, width=0.5)


def _mark_block_grid(axes: Axes, plan: PlanFile) -> None:
    """Thin lines between blocks, where there are few."""
    tokens = plan.grid.tokens
    if plan.blocks.k_blocks(tokens) <= 64:
        for border in range(plan.blocks.block_k, tokens, plan.blocks.block_k):
            axes.axvline(border, color="white", linewidth=0.5, alpha=0.8)


def _mark_anchors(axes: Axes, schedule: LayerSchedule, head: int) -> None:
    grid, pattern = schedule.grid, int(schedule.head_anchor[head])
    size = int(schedule.member_tokens[pattern])
    for anchor in schedule.groups(pattern)[1]:
        start = 1 - int(anchor) * size / grid.tokens
        stop = start - size / grid.tokens
        axes.fill_between(
            (-0.012, -0.003), start, stop, transform=axes.transAxes, color=ANCHOR, linewidth=0, clip_on=False
        )


def overview_figure(plan: PlanFile, name: str) -> Figure:
    """Draws the density of every head: a panel for each segment, layers down, heads across.

    Panels follow the denoising, from noise to video. Where there is room, a dot marks an anchored head and a ring a
    dense one.

    Args:
        plan: The plan.
        name: What to call it.
    """
    densities, kinds = heads_of(plan).densities, heads_of(plan).kinds
    segments, layers, heads = densities.shape
    columns = min(segments, 4 if segments <= 8 else 6 if segments <= 24 else 10)
    rows = math.ceil(segments / columns)
    left, right, top, bottom, gap = 0.6, 1.1, 1.0, 0.55, 0.42
    panel = (11.0 - left - right) / columns
    width, height = panel - 0.14, panel * min(max(layers / heads, 0.6), 1.6)
    total = top + rows * (height + gap) - gap + bottom
    cell_points = 72 * min(width / heads, height / layers)
    colours = LinearSegmentedColormap.from_list("density", [tuple(part / 255 for part in stop) for stop in GRADIENT])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.0, total))

        def add_axes(x: float, y: float, wide: float, high: float) -> Axes:
            """Axes at a place in inches, y downwards from the top."""
            return figure.add_axes((x / 11.0, 1 - (y + high) / total, wide / 11.0, high / total))

        for place, index in enumerate(reversed(range(segments))):
            down, across = divmod(place, columns)
            axes = add_axes(left + across * panel, top + down * (height + gap), width, height)
            image = axes.imshow(densities[index], cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            if cell_points >= MARKED_CELL_POINTS:
                _mark_kinds(axes, kinds[index], cell_points)
            title = f"time {plan.segments[index].time:.2f}: {densities[index].mean():.0%}"
            axes.set_title(title, fontsize=9 if panel > 1.4 else 7, loc="left", pad=3)
            for axis, count, inches in ((axes.xaxis, heads, width), (axes.yaxis, layers, height)):
                step = next(step for step in (1, 2, 5, 10, 20, 50, 100, count) if count / step <= 4 * inches)
                axis.set_ticks(range(0, count, step))
                axis.set_tick_params(length=2, labelsize=7)
            if across == 0:
                axes.set_ylabel("layer")
            else:
                axes.set_yticklabels([])
            if place + columns >= segments:
                axes.set_xlabel("head")
        bar = add_axes(11.0 - right + 0.25, top, 0.14, total - top - bottom)
        figure.colorbar(image, cax=bar, label="density", format=lambda value, _: f"{value:.0%}")
        title = f"{name}: density {np.average(densities.mean((1, 2)), weights=plan.steps):.1%}"
        figure.text(left / 11.0, 1 - 0.36 / total, title, fontsize=14, fontweight="bold")
        model, grid = plan.signature, plan.grid
        text = f"{model.architecture} · {grid.frames} x {grid.height} x {grid.width} tokens · from noise to video"
        if cell_points >= MARKED_CELL_POINTS:
            text += " · dot: anchored head, ring: dense head"
        figure.text(left / 11.0, 1 - 0.6 / total, text, fontsize=9, color=FAINT_INK)
    return figure


def _mark_kinds(axes: Axes, kinds: npt.NDArray[np.str_], cell_points: float) -> None:
    for kind, face in (("anchored", "white"), ("dense", "none")):
        layer, head = np.nonzero(kinds == kind)
        marker = {"marker": "o", "markersize": min(0.35 * cell_points, 5.0), "markeredgewidth": 0.7}
        axes.plot(head, layer, linestyle="none", markerfacecolor=face, markeredgecolor="white", **marker)
