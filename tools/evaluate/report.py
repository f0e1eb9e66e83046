"""The evaluation's page: one HTML file that needs nothing else, the worst cases first."""

from __future__ import annotations

import html
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calibatt.plans.files import write_text
from calibatt.tools.evaluate.metrics import Metric
from calibatt.tools.evaluate.pictures import DIFFERENCE_GAIN, embedded

TEMPLATE = Path(__file__).with_name("report.html")
WORST_SHOWN = 4


def write_page(
    path: Path, result: Mapping[str, Any], metrics: Sequence[Metric], animations: Mapping[tuple[str, str, int], Path]
) -> None:
    """Writes the page.

    Args:
        path: The HTML file.
        result: What ``report.json`` holds.
        metrics: What was measured.
        animations: PNG files of dense, planned and difference by (key of the plan, prompt, seed).
    """
    about = result["about"]
    floor = result["floor"]
    page = string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        count=len(result["plans"][0]["by_prompt"]),
        floor_count=f"{floor[metrics[0].name]['count']} prompts" if floor else "not measured",
        summary=_summary(result, metrics),
        unavailable=html.escape("; ".join(f"{name}: {why}" for name, why in result["not_available"].items())),
        plans="\n".join(_plan(plan, metrics, animations) for plan in result["plans"]),
        command=html.escape(about["command"]),
        device=html.escape(about["device"]),
        versions=html.escape(about["versions"]),
        date=html.escape(about["date"]),
    )
    write_text(path, page)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table of ready HTML cells."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    named = f"<caption>{caption}</caption>" if caption else ""
    return f"<table>{named}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def number(value: float) -> str:
    """Four digits or so, as people read them."""
    return f"{value:.2f}" if 0.1 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


def predicted(plan: Mapping[str, Any]) -> str:
    """The signal-to-noise that the plan's header predicts of the final latent."""
    found = plan["predicted_latent_db"]
    return f"{number(found['mean'])} ± {number(found['standard_error'])}" if found else "not stated"


def with_error(summary: Mapping[str, Any]) -> str:
    """A mean and its standard error."""
    return f"{number(summary['mean'])} &plusmn; {number(summary['standard_error'])}"


def _summary(result: Mapping[str, Any], metrics: Sequence[Metric]) -> str:
    head = ["plan", "density", "predicted latent, dB"]
    for metric in metrics:
        unit = f", {metric.unit}" if metric.unit else ""
        head += [f"{metric.name}{unit}", "spread", "worst"]
    rows = []
    for plan in result["plans"]:
        row = [html.escape(plan["plan"]), f"{plan['density']:.3f}", predicted(plan)]
        for metric in metrics:
            found = plan["metrics"][metric.name]
            row += [with_error(found), number(found["spread"]), number(found["worst"])]
        rows.append(row)
    if result["floor"]:
        row = ["floor: two exact kernels", "1.000", ""]
        for metric in metrics:
            found = result["floor"][metric.name]
            row += [with_error(found), number(found["spread"]), number(found["worst"])]
        rows.append(row)
    return _table(head, rows)


def _plan(plan: Mapping[str, Any], metrics: Sequence[Metric], animations: Mapping[tuple[str, str, int], Path]) -> str:
    parts = [f"<h2>{html.escape(plan['plan'])}</h2>", _verdict(plan["verdict"])]
    if plan["heads"]:
        parts.append(_heads(plan["heads"]))
    first = metrics[0]
    rows = sorted(plan["by_prompt"], key=lambda row: row[first.name] * (1 if first.higher_is_better else -1))
    shown = f": dense, planned, difference &times; {DIFFERENCE_GAIN}" if len(metrics) > 1 else ""
    parts.append(f"<h3>Worst prompts{shown}</h3><div class='videos'>")
    for row in rows[:WORST_SHOWN]:
        path = animations[plan["executes"], row["prompt"], row["seed"]]
        picture = embedded(path.read_bytes(), row["prompt"]) if path.exists() else ""
        told = ", ".join(f"{metric.name} {number(row[metric.name])}" for metric in metrics)
        caption = f"{html.escape(row['prompt'])}, seed {row['seed']}<br><b>{told}</b>"
        parts.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    parts.append("</div><details><summary>every prompt</summary>")
    cells = [
        [html.escape(row["prompt"]), str(row["seed"]), *(number(row[metric.name]) for metric in metrics)]
        for row in rows
    ]
    parts.append(_table(["prompt", "seed", *(metric.name for metric in metrics)], cells) + "</details>")
    parts.append(f"<p>Passes: <code>{html.escape(plan['passes'])}</code></p>")
    return "\n".join(parts)


def _verdict(verdict: Mapping[str, Any]) -> str:
    if not verdict["checks"]:
        return "<p>Nothing was required.</p>"
    told = [
        f"<span class='{'good' if check['holds'] else 'bad'}'>{html.escape(check['requirement'])}: "
        f"{number(check['value'])}</span>"
        for check in verdict["checks"]
    ]
    return f"<p>{'Passed' if verdict['passed'] else 'Failed'}: {', '.join(told)}</p>"


def _heads(heads: Mapping[str, Any]) -> str:
    lines = [
        f"{heads['heads_measured']} heads (every time and layer counts) on {heads['prompts']} dense samplings with "
        f"{heads['vectors']} random vectors each."
    ]
    if "first_order_latent" in heads:
        lines.append(f"To first order the latent SNR is {with_error(heads['first_order_latent'])} dB.")
    if "ratio" in heads:
        lines.append(f"The squared effect is {number(heads['ratio'])} times what calibration promised.")
    else:
        lines.append("The plan does not say what calibration promised: heads are ranked by their effect alone.")
    broken = [f"layer {row['layer']}, head {row['head']} at time {row['time']:.3f}" for row in heads["broken"]]
    lines.append(f"<span class='bad'>Broken: {'; '.join(broken)}.</span>" if broken else "No head is broken.")
    rows = [
        [
            f"layer {row['layer']}, head {row['head']}, time {row['time']:.3f}",
            *(number(row[name]) for name in ("effect", "effect_worst_prompt")),
            *((number(row["promised"]), number(row["ratio"])) if "promised" in row else ("not stated", "")),
            f"{row['share']:.1%}",
        ]
        for row in heads["heads"]
    ]
    head = ["head", "squared effect", "worst prompt", "promised", "ratio", "share"]
    caption = "heads that change the final latent most beyond their promise; squared effects, relative to its size"
    return f"<p>{' '.join(lines)}</p>{_table(head, rows, caption)}"
