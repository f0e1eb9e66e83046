"""What follows from the times that `calibatt-bench model` measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calibatt.tools.bench.variants import COPY, FLASH_4

DENSE = ("sdpa-cudnn", "sdpa", FLASH_4)
"""Names of the variants that others are measured against."""


def derived(forwards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What follows from the times of the forwards, for every size, mode and kind of linears whose copy was timed.

    Returns:
        Records of every dense kernel, ``attention_share`` of a forward, and of every plan against each dense kernel:
        ``bound_ms`` = everything else + density x dense attention, ``ratio_to_bound``, ``speedup``.
    """
    places = list(dict.fromkeys((row["size"], row["mode"], row["linears"]) for row in forwards))
    found = []
    for place in places:
        here = [row for row in forwards if (row["size"], row["mode"], row["linears"]) == place]
        rest = next((row["median_ms"] for row in here if row["attention"] == COPY), None)
        if rest is None:
            continue
        references = [row for row in here if row["attention"] in DENSE]
        for row in sorted(here, key=lambda row: row not in references):
            ms, density = row["median_ms"], row["density"]
            own = {key: row[key] for key in ("size", "mode", "linears", "attention", "density")}
            own |= {"ms": ms, "other_ms": rest, "attention_share": (ms - rest) / ms}
            if row in references:
                found.append(own)
            elif row["attention"] != COPY:
                for reference in references:
                    bound, dense_ms = rest + density * (reference["median_ms"] - rest), reference["median_ms"]
                    against = {"against": reference["attention"], "bound_ms": bound, "ratio_to_bound": ms / bound}
                    found.append({**own, **against, "speedup": dense_ms / ms})
    return found


def of_all_layers(samplings: Sequence[dict[str, Any]], layers: int, published: int) -> list[dict[str, Any]]:
    """What samplings with a step cache, and the same without one, would take with all layers.

    A forward that is skipped computes one layer of however many: with few layers, a cache looks worse than it is. What
    a layer takes follows from each pair of samplings, and is added for the layers that are missing.

    Args:
        samplings: As the report has them.
        layers: That they had.
        published: That the model has.

    Returns:
        A record for each of them: ``layer_ms``, and ``all_layers_ms`` of the sampling.
    """
    keys = ("size", "mode", "linears", "attention")
    alone = {tuple(row[key] for key in keys): row for row in samplings if not row["skip"]}
    found = []
    for row in (row for row in samplings if row["skipped_forwards"]):
        plain = alone.get(tuple(row[key] for key in keys))
        if plain is None:  # there was no time for it
            continue
        layer_ms = (plain["median_ms"] - row["median_ms"]) / (row["skipped_forwards"] * (layers - 1))
        for each in (plain, row):
            more = (each["steps"] - each["skipped_forwards"]) * (published - layers) * layer_ms
            about = {key: each[key] for key in (*keys, "skip", "steps", "skipped_forwards")}
            found.append({**about, "layer_ms": layer_ms, "all_layers_ms": each["median_ms"] + more})
    return found


def told(report: dict[str, Any]) -> list[str]:
    """A report's derived numbers for people, a line each."""
    lines = []
    for row in report["derived"]:
        line = f"{row['size']}, {row['mode']}, {row['linears']} linears, {row['attention']}: {row['ms']:.1f} ms"
        line += f", {row['other_ms']:.1f} of them not attention"
        if "against" in row:
            line += (
                f"; {row['speedup']:.2f} times as fast as {row['against']}, {row['ratio_to_bound']:.3f} of the bound"
            )
        else:
            line += f" (attention: {row['attention_share']:.0%})"
        lines.append(line)
    for row in report["of_all_layers"]:
        where, skipped = f"{row['size']}, {row['mode']}, {row['linears']} linears", row["skipped_forwards"]
        lines.append(
            f"{where}, {row['attention']}: {row['steps']} steps, {skipped} skipped, with all layers "
            f"{row['all_layers_ms'] / 1e3:.1f} s"
        )
    return lines
