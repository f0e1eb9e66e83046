"""One style for the pages that commands write: a single HTML file each, light and dark, which loads nothing."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ground: #f6f5f1; --ink: #22262e; --faint: #5a606b; --line: #e4e2dc;
  --blue: #1b3d78; --on-blue: #fff; --bad: #b3261e; --good: #1d6b37; }
@media (prefers-color-scheme: dark) { :root { --paper: #16191f; --ground: #21262f; --ink: #e6e4df; --faint: #a0a6b1;
  --line: #3a404b; --blue: #8fb4f0; --on-blue: #10131a; --bad: #ff8a80; --good: #7fd69a; }
  .drawing { filter: invert(.91) hue-rotate(180deg); } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1100px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line); }
.lead, figcaption, footer, caption, small { color: var(--faint); } footer { margin-top: 3rem; font-size: .85rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; }
td, th, caption { white-space: nowrap; } td, th { padding: .2rem .7rem; text-align: right; }
td:first-child, th:first-child { text-align: left; padding-left: 0; white-space: normal; }
th { border-bottom: 1px solid var(--line); vertical-align: bottom; white-space: normal; }
.heat td, .heat th { padding: .1rem .3rem; font-size: .8rem; white-space: nowrap; } .heat { border-spacing: 1px; }
.heat td + td { background: color-mix(in srgb, var(--blue) calc(var(--share) * 100%), var(--paper)); }
.heat .full { color: var(--on-blue); }
.many td, .many th { padding: .1rem; font-size: .65rem; } .many th + th { writing-mode: vertical-rl; }
td.text { white-space: normal; text-align: left; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 1rem; margin: 1.5rem 0; }
.cards div { border: 1px solid var(--line); border-radius: 8px; padding: 1rem; }
.cards b { display: block; font-size: 1.8rem; color: var(--blue); }
.videos { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 1.5rem; }
figure { margin: 0; } img { max-width: 100%; } .videos img { width: 100%; image-rendering: pixelated; }
.bad { color: var(--bad); font-weight: 600; } .good { color: var(--good); font-weight: 600; }
code { background: var(--ground); padding: .1em .3em; border-radius: 4px; overflow-wrap: anywhere; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--blue); }
"""
LONG_CHARACTERS = 30
"""Cells of longer text are broken into lines; shorter ones, and numbers, are not."""
MANY_COLUMNS = 25
"""A heat map with more columns is drawn smaller, so that those of 50 times fit."""


class Html(str):
    """Text that is HTML already. All other text is escaped when it comes into an element."""


def joined(*parts: object) -> Html:
    """Parts one after the other, escaped unless they are `Html`."""
    return Html("".join(part if isinstance(part, Html) else html.escape(str(part)) for part in parts))


def element(name: str, *parts: object, **attributes: object) -> Html:
    """An element, with the class ``kind`` if that is given.

    >>> element("p", "a < b, ", element("b", "c"), kind="lead")
    '<p class="lead">a &lt; b, <b>c</b></p>'
    """
    written = (f' {"class" if key == "kind" else key}="{html.escape(str(at))}"' for key, at in attributes.items() if at)
    return Html(f"<{name}{''.join(written)}>{joined(*parts)}</{name}>")


def table(head: Sequence[object], rows: Sequence[Sequence[object]], caption: str = "", kind: str = "") -> Html:
    """A table; a cell that is an `Html` element ``td`` stays as it is."""

    def row(cells: Sequence[object], name: str) -> Html:
        return element("tr", *(cell if isinstance(cell, Html) else _cell(name, str(cell)) for cell in cells))

    title = element("caption", caption) if caption else ""
    body = element("tbody", *(row(cells, "td") for cells in rows))
    written = element("table", title, element("thead", row(head, "th")), body, kind=kind)
    return element("div", written, kind="wide")


def _cell(name: str, text: str) -> Html:
    return element(name, text, kind="text" if len(text) > LONG_CHARACTERS else "")


def heat(head: Sequence[object], rows: Mapping[str, Sequence[float]], caption: str = "") -> Html:
    """A table of shares in percent, on a ground that is the bluer the larger they are; its rows by name."""
    cells = [
        [name, *(element("td", f"{s:.0%}"[:-1], style=f"--share:{s:.2f}", kind="full" * (s > 0.5)) for s in shares)]
        for name, shares in rows.items()
    ]
    return table(head, cells, caption, kind="heat many" if len(head) > MANY_COLUMNS else "heat")


def cards(*facts: tuple[object, object]) -> Html:
    """The numbers that matter most: large, each with what it is."""
    return element("div", *(element("div", element("b", value), what) for value, what in facts), kind="cards")


def folded(title: str, *parts: object) -> Html:
    """What is shown when somebody asks for it."""
    return element("details", element("summary", title), *parts)


def page(title: str, lead: object, *parts: object, footer: str = "") -> str:
    """A whole page."""
    body = joined(element("h1", title), element("p", lead, kind="lead"), *parts, element("footer", footer))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )
