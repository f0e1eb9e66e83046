"""The evaluation's page: what each plan loses, the worst cases first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calibatt.plans.files import write_text
from calibatt.plans.page import Html, element, folded, joined, page, table
from calibatt.plans.readable import number, snr, with_error
from calibatt.tools.evaluate.metrics import Metric
from calibatt.tools.evaluate.pictures import DIFFERENCE_GAIN, embedded

WORST_SHOWN = 4
Animations = Mapping[tuple[str, str, int], Path]
"""PNG files of dense, planned and difference by (key of the plan, prompt, seed)."""


def write_page(path: Path, result: Mapping[str, Any], metrics: Sequence[Metric], animations: Animations) -> None:
    """Writes the page.

    Args:
        path: The HTML file.
        result: What ``report.json`` holds.
        metrics: What was measured.
        animations: By key of the plan, prompt and seed.
    """
    about, floor, plans = result["about"], result["floor"], result["plans"]
    prompts = f"{floor[metrics[0].name]['count']} prompts" if floor else "not measured"
    text = page(
        "What plans lose",
        f"{len(plans[0]['by_prompt'])} held-out videos, each generated dense and planned from the same noise. The "
        f"floor is what two exact dense kernels differ by ({prompts}): no plan can be better. Means over videos ± "
        "their standard errors.",
        table(*summary(result, metrics)),
        *(element("p", f"{name}: {why}") for name, why in result["not_available"].items()),
        *(part for each in plans for part in _plan(each, floor, metrics, animations)),
        footer=f"{about['command']} · {about['device']} · {about['versions']} · {about['date']}",
    )
    write_text(path, text)


def summary(result: Mapping[str, Any], metrics: Sequence[Metric]) -> tuple[list[str], list[list[str]]]:
    """Names of columns, and a row of text for every plan, then one for the floor if it was measured."""
    rows = []
    for plan in result["plans"]:
        latent = plan["predicted_latent_db"]
        predicted = with_error(latent["mean"], latent["standard_error"]) if latent else "not stated"
        rows.append([plan["plan"], f"{plan['density']:.1%}", predicted, *_means(plan["metrics"], metrics)])
    if result["floor"]:
        rows.append(["floor: two exact kernels", "100.0%", "", *_means(result["floor"], metrics)])
    return ["plan", "density", "predicted latent, dB", *map(_titled, metrics)], rows


def _titled(metric: Metric) -> str:
    return f"{metric.name}, {metric.unit}" if metric.unit else metric.name


def _means(summaries: Mapping[str, Any], metrics: Sequence[Metric]) -> list[str]:
    return [with_error(*(summaries[metric.name][key] for key in ("mean", "standard_error"))) for metric in metrics]


def _plan(
    plan: Mapping[str, Any], floor: Mapping[str, Any], metrics: Sequence[Metric], animations: Animations
) -> list[Html]:
    first, prompts = metrics[0], plan["by_prompt"]
    videos = sorted(prompts, key=lambda row: row[first.name] * (1 if first.higher_is_better else -1))
    measured = []
    for metric, mean in zip(metrics, _means(plan["metrics"], metrics), strict=True):
        values = plan["metrics"][metric.name]
        worst = number(values["worst"]), prompts[values["worst_at"]]["prompt"]
        measured.append(
            [_titled(metric), mean, number(values["spread"]), *worst, *(_means(floor, [metric]) if floor else [])]
        )
    every = [[row["prompt"], row["seed"], *(number(row[metric.name]) for metric in metrics)] for row in videos]
    shown = f": dense, planned, difference × {DIFFERENCE_GAIN}" if len(metrics) > 1 else ""
    pictures = (_video(row, plan["executes"], metrics, animations) for row in videos[:WORST_SHOWN])
    return [
        element("h2", plan["plan"]),
        _verdict(plan["verdict"]),
        table(["", "mean", "spread over videos", "worst", "at", *(["floor"] if floor else [])], measured),
        *(_heads(plan["heads"]) if plan["heads"] else []),
        element("h3", f"Worst prompts{shown}"),
        element("div", *pictures, kind="videos"),
        folded("every prompt", table(["prompt", "seed", *map(_titled, metrics)], every)),
        folded("the pass string", element("p", element("code", plan["passes"]))),
    ]


def _video(row: Mapping[str, Any], executes: str, metrics: Sequence[Metric], animations: Animations) -> Html:
    path = animations[executes, row["prompt"], row["seed"]]
    picture = embedded(path.read_bytes(), row["prompt"]) if path.exists() else ""
    values = ", ".join(f"{metric.name} {number(row[metric.name])} {metric.unit}".rstrip() for metric in metrics)
    caption = element("figcaption", f"{row['prompt']}, seed {row['seed']}", Html("<br>"), element("b", values))
    return element("figure", picture, caption)


def _verdict(verdict: Mapping[str, Any]) -> Html:
    if not verdict["checks"]:
        return element("p", "Nothing was required.")
    checks = (
        joined(
            " ", element("span", f"{each['requirement']}: {number(each['value'])}", kind=("bad", "good")[each["holds"]])
        )
        for each in verdict["checks"]
    )
    return element("p", "Passed:" if verdict["passed"] else "Failed:", *checks)


def _heads(heads: Mapping[str, Any]) -> list[Html]:
    text = f"{heads['heads_measured']:,} heads (each layer and time counts), measured on {heads['prompts']} samplings. "
    if "first_order_latent" in heads:
        latent = heads["first_order_latent"]
        text += f"To first order the latent SNR is {with_error(latent['mean'], latent['standard_error'])} dB. "
    if "ratio" in heads:
        text += f"Their squared effect is {number(heads['ratio'])} times what calibration promised. "
    else:
        text += "The plan does not say what calibration promised: heads are ranked by their effect alone. "
    broken = "; ".join(f"layer {row['layer']}, head {row['head']} at time {row['time']:.3f}" for row in heads["broken"])
    verdict = element("span", f"Broken: {broken}.", kind="bad") if broken else "No head is broken."
    rows = [
        [f"layer {row['layer']}, head {row['head']}, time {row['time']:.3f}"]
        + [snr(row[name]) if name in row else "not stated" for name in ("promised", "effect", "effect_worst_prompt")]
        + [f"{number(row['ratio'])} x" if "ratio" in row else "", f"{row['share']:.1%}"]
        for row in heads["heads"]
    ]
    names = ["head", "promised", "measured", "worst prompt", "squared effect / promised", "share of the plan's"]
    caption = "The latent SNR if a head alone were planned; heads that do most beyond their promise come first"
    return [element("p", text, verdict), table(names, rows, caption)]
