"""A plan in numbers: as plain values for scripts, and laid out for a terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from calibatt.plans import BF16, DENSE, FRAMES, NO_ANCHORS, PRECISIONS, ROWS, PlanFile, readable, told_precisions
from calibatt.plans.errors import legible

EVALUATION = "evaluation"
"""Where the provenance of a plan holds the verdict that `calibatt-evaluate --stamp` writes."""
METRIC_UNITS = {"latent": ", dB", "psnr": ", dB"}
SECTIONS_SHOWN = 3
GRADIENT = ((27, 38, 79), (38, 92, 140), (38, 148, 150), (122, 198, 120), (250, 214, 90), (240, 120, 60))
"""Colours (red, green, blue) of densities 0, 0.2, ..., 1: cold is cheap, hot is dense."""


@dataclass(frozen=True, eq=False)
class Heads:
    """Density, kind and precision of every head of a plan.

    Args:
        densities: Density, float64 ``(segments, layers, heads)``.
        kinds: ``(segments, layers, heads)``: dense, sparse, or anchored (whatever it lists).
        frames: Heads, over layers and segments, whose anchors are whole frames.
        sharing: Heads, likewise, whose lists another head of the layer uses too.
        precisions: uint8 ``(segments, layers, heads)``, of `plans.PRECISIONS`.
    """

    densities: npt.NDArray[np.float64]
    kinds: npt.NDArray[np.str_]
    frames: int
    sharing: int
    precisions: npt.NDArray[np.uint8]


@lru_cache(maxsize=1)
def heads_of(plan: PlanFile) -> Heads:
    """Sees every layer once, in little memory.

    Raises:
        PlanError: A layer breaks a promise of FORMAT.md.
    """
    shape = len(plan.segments), plan.signature.layers, plan.signature.heads
    densities, kinds, frames, sharing = np.zeros(shape), np.zeros(shape, "<U8"), 0, 0
    precisions = np.zeros(shape, np.uint8)
    dense = plan.blocks.q_blocks(plan.grid.tokens) * plan.blocks.k_blocks(plan.grid.tokens)
    for segment, layer, packed in plan.walk():
        densities[segment, layer] = [packed.computed_blocks(head) / dense for head in range(packed.heads)]
        precisions[segment, layer] = packed.head_precision
        listed = np.where(packed.head_list == DENSE, "dense", "sparse")
        kinds[segment, layer] = np.where(packed.head_anchor != NO_ANCHORS, "anchored", listed)
        axis = np.append(packed.anchor_axis, ROWS)[packed.head_anchor]  # NO_ANCHORS, -1, takes the last
        frames += int((axis == FRAMES).sum())
        _, counts = np.unique(packed.head_list[packed.head_list != DENSE], return_counts=True)
        sharing += int(counts[counts > 1].sum())
    return Heads(densities, kinds, frames, sharing, precisions)


def summarise(plan: PlanFile, path: Path) -> dict[str, Any]:
    """Everything `show` shows, and more, as values that JSON can hold (bytes aside).

    Times are denoising times, ``*_bytes`` bytes and ``*_ms`` milliseconds; lists over segments ascend in time.
    ``density`` and ``predicted_forward_ms`` are means over the steps of the sampling that the plan is for, ``steps`` in
    each segment; over the segments, where the plan does not say its steps. A mean over time itself would be that of no
    sampler, since steps are closer together at some times.
    """
    heads = heads_of(plan)
    densities, kinds = heads.densities, heads.kinds
    tokens = plan.grid.tokens
    return {
        "file": str(path),
        "file_bytes": path.stat().st_size,
        "digest": plan.digest,
        "model": asdict(plan.signature),
        "grid": asdict(plan.grid) | {"tokens": tokens},
        "blocks": asdict(plan.blocks)
        | {"q_blocks": plan.blocks.q_blocks(tokens), "k_blocks": plan.blocks.k_blocks(tokens)},
        "density": float(np.average(densities.mean((1, 2)), weights=plan.steps)),
        "segments": [
            asdict(segment) | {"steps": steps, "density": float(densities[index].mean()), "heads": _count(kinds[index])}
            for index, (segment, steps) in enumerate(zip(plan.segments, plan.steps, strict=True))
        ],
        "layer_density": densities.mean(axis=2).tolist(),
        "precisions": {name: int((heads.precisions == each).sum()) for each, name in PRECISIONS.items()},
        "layer_eight_bit": (heads.precisions != BF16).mean(axis=2).tolist(),
        "heads": _count(kinds) | {"with_anchor_frames": heads.frames, "sharing_lists": heads.sharing},
        "section_bytes": plan.section_bytes(),
        "predicted": dict(plan.predicted),
        "predicted_forward_ms": predicted_forward_ms(plan),
        "passes": plan.passes,
        "scheduler_hint": plan.scheduler_hint,
        "provenance": dict(plan.provenance),
        "license": plan.license,
        "notes": plan.notes,
    }


def predicted_forward_ms(plan: PlanFile) -> dict[str, float] | None:
    """Attention of one forward, all layers, mean over steps: ``planned`` and ``dense``; None where not predicted."""
    if not {"planned_ms", "dense_ms"} <= set(plan.predicted):
        return None
    of = {kind: np.sum(plan.predicted[f"{kind}_ms"], axis=1) for kind in ("planned", "dense")}
    return {kind: float(np.average(values, weights=plan.steps)) for kind, values in of.items()}


def predicted_snr(plan: PlanFile) -> str | None:
    """The predicted signal-to-noise of the final latent, in words; None where it is not stated."""
    if not (latent := plan.predicted.get("latent_db")):
        return None
    mean, error, count = (latent[name] for name in ("mean", "standard_error", "samplings"))
    return f"{mean:.1f} dB (standard error {error:.1f}, {count} samplings that measured a ladder)"


def _count(kinds: npt.NDArray[np.str_]) -> dict[str, int]:
    return {kind: int((kinds == kind).sum()) for kind in ("dense", "sparse", "anchored")}


def show(plan: PlanFile, path: Path, console: Console | None = None) -> None:
    """Prints the summary and the heat map of densities."""
    console = console or Console()
    console.print(_facts(plan, summarise(plan, path)))
    console.print()
    _print_heat_map(plan, heads_of(plan).densities.mean(axis=2), console)


def _facts(plan: PlanFile, values: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _fact_lines(plan, values):
        table.add_row(name, Text(legible(text)))
    return table


def _fact_lines(plan: PlanFile, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, grid, blocks, heads = plan.signature, plan.grid, values["blocks"], values["heads"]
    total = len(plan.segments) * model.layers * model.heads
    frames = f" ({heads['with_anchor_frames']:,} by frames)" if heads["with_anchor_frames"] else ""
    lines = [
        ("plan", f"{values['file']}  {readable.size(values['file_bytes'])}"),
        ("digest", plan.digest),
        ("model", f"{model.architecture}: {model.layers} layers x {model.heads} heads x {model.head_dim} channels"),
        ("grid", f"{grid.frames} frames x {grid.height} rows x {grid.width} tokens = {grid.tokens:,} video tokens"),
        (
            "blocks",
            f"{plan.blocks.block_q} queries x {plan.blocks.block_k} keys: "
            f"{blocks['q_blocks']:,} x {blocks['k_blocks']:,} blocks a head",
        ),
        ("density", f"{values['density']:.1%} of the blocks of dense attention, mean over {_over(plan)}"),
        (
            "heads",
            f"{heads['dense']:,} dense, {heads['sparse']:,} sparse, {heads['anchored']:,} anchored{frames}; "
            f"{heads['sharing_lists']:,} share lists (of {total:,}: every layer and segment counts)",
        ),
    ]
    lines += _named("precision", _precision_lines(heads_of(plan).precisions))
    lines += _named("predicted", _predicted_lines(plan, values["predicted_forward_ms"]))
    sections = sorted(values["section_bytes"].items(), key=lambda item: -item[1])
    rest = sum(size for _, size in sections[SECTIONS_SHOWN:])
    shown = [f"{name} {readable.size(size)}" for name, size in sections[:SECTIONS_SHOWN]]
    lines.append(("bytes", ", ".join([*shown, f"all other sections {readable.size(rest)}"])))
    lines += _named("passes", re.split(r",(?![^{]*\})", plan.passes) if plan.passes else ["none"])
    provenance = dict(plan.provenance)
    if EVALUATION in provenance:
        lines += _named("evaluated", _evaluation_lines(provenance.pop(EVALUATION)))
    lines += _named("sampler", _map_lines(plan.scheduler_hint or {})) + _named("provenance", _map_lines(provenance))
    lines += [(name, value) for name, value in (("license", plan.license), ("notes", plan.notes)) if value]
    return lines


def _over(plan: PlanFile) -> str:
    """What the density is a mean over."""
    known = "times" in (plan.scheduler_hint or {})
    return f"{sum(plan.steps)} steps of a sampling" if known else "segments (the plan does not say its steps)"


def _precision_lines(precisions: npt.NDArray[np.uint8]) -> list[str]:
    """Shares of precisions, and the layers with the fewest and the most heads in 8 bits, if there are any."""
    shares = (precisions != BF16).mean((0, 2))
    if not shares.any():
        return [told_precisions(precisions)]
    low, high = shares.argmin(), shares.argmax()
    span = f"from {shares[low]:.1%} of its heads (layer {low}) to {shares[high]:.1%} (layer {high})"
    return [told_precisions(precisions), f"a layer has {span if low != high else f'{shares[low]:.1%}'} in 8 bits"]


def _evaluation_lines(stamp: Any) -> list[str]:
    """The stamp of `calibatt-evaluate --stamp` in words; anything else that stands in its place, too."""
    if not isinstance(stamp, Mapping):
        return [readable.words(stamp)]
    rest = {name: value for name, value in stamp.items() if name not in ("verdict", "metrics")}
    lines = [str(stamp.get("verdict", "no verdict"))]
    for name, summary in dict(stamp.get("metrics") or {}).items():
        unit = f"{name}{METRIC_UNITS.get(name, '')}"
        try:
            mean = readable.with_error(summary["mean"], summary["standard_error"])
            lines.append(f"{unit}: {mean}, the worst video {readable.number(summary['worst'])}")
        except (KeyError, TypeError):
            lines.append(f"{unit}: {readable.words(summary)}")
    return lines + _map_lines(rest)


def _named(name: str, lines: list[str]) -> list[tuple[str, str]]:
    return [(name if index == 0 else "", line) for index, line in enumerate(lines)]


def _predicted_lines(plan: PlanFile, forward: Mapping[str, float] | None) -> list[str]:
    """The predictions of the header; lists over heads as their sums."""
    lines, predicted = [], dict(plan.predicted)
    predicted.pop("density", None)  # the density is counted, not predicted
    if isinstance(cost := predicted.pop("cost", None), float):
        lines.append(f"cost: {cost:.1%} of that of dense attention in 16 bit")
    if forward:
        gain = readable.number(forward["dense"] / forward["planned"]) if forward["planned"] else "infinitely many"
        times = f"{readable.duration(forward['planned'])} a forward, {readable.duration(forward['dense'])} dense"
        lines.append(f"attention: {times}, {gain} times as fast")
    if snr := predicted_snr(plan):
        lines.append(f"signal-to-noise of the final latent: {snr}")
    try:
        price = float(np.array(predicted["head_price"], dtype=np.float64).sum())
        lines.append(f"were the errors of heads independent of each other: {readable.snr(price)}")
    except (KeyError, TypeError, ValueError):
        pass
    shown = ("planned_ms", "dense_ms", "latent_db", "head_price")
    return lines + _map_lines({name: value for name, value in predicted.items() if name not in shown})


def _map_lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{key.replace('_', ' ')}: {readable.words(value)}" for key, value in sorted(values.items())]


def colour(density: float) -> tuple[int, int, int]:
    """The colour of a density in [0, 1]: linear between the colours of `GRADIENT`."""
    stops = np.linspace(0, 1, len(GRADIENT))
    red, green, blue = (round(float(np.interp(density, stops, channel))) for channel in zip(*GRADIENT, strict=True))
    return red, green, blue


def _print_heat_map(plan: PlanFile, densities: npt.NDArray[np.float64], console: Console) -> None:
    """Layers down, segments across in the order in which they run: from noise to video."""
    order = range(len(plan.segments) - 1, -1, -1)
    label = len(str(plan.signature.layers - 1)) + 8
    cell = 5 if label + 5 * len(order) <= console.width else 1
    console.print(Text("density in % of dense attention, by layer and denoising time (1 is pure noise)", style="bold"))
    if cell == 5:
        console.print(Text("time".ljust(label) + "".join(f"{plan.segments[index].time:5.2f}" for index in order)))
    else:
        first, last = f"{plan.segments[-1].time:.2f}", f"{plan.segments[0].time:.2f}"
        console.print(Text("time".ljust(label) + first + last.rjust(max(len(order) - len(first), 5))))
    for layer in range(plan.signature.layers):
        line = Text(f"layer {layer}".ljust(label))
        for index in order:
            line.append_text(_cell(float(densities[index, layer]), cell))
        console.print(line, overflow="crop", no_wrap=True)
    mean = Text("mean".ljust(label), style="bold")
    for index in order:
        mean.append_text(_cell(float(densities[index].mean()), cell))
    console.print(mean, overflow="crop", no_wrap=True)


def _cell(density: float, width: int) -> Text:
    red, green, blue = colour(density)
    if width == 1:
        return Text(" ░▒▓█"[min(int(density * 5), 4)], style=f"rgb({red},{green},{blue})")
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else "white"
    return Text(f"{100 * density:4.0f} ", style=f"{ink} on rgb({red},{green},{blue})")
