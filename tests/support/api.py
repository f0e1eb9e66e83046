"""The page docs/api.md, made of the docstrings: ``cd tests && python -m support.api > ../docs/api.md``."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import calibatt
from calibatt.runtime import Adapter, Attachment, Plan, PlanSet

HEAD = """# API

What `import calibatt` offers, and what these functions return. This page is made of the docstrings by
`cd tests && python -m support.api > ../docs/api.md`; a test compares them, and runs the examples.
"""
METHODS = {
    Plan: ("attach", "fitting", "save", "schedule", "explain"),
    PlanSet: ("fitting",),
    Attachment: ("detach", "explain"),
}


def page() -> str:
    """The text of the page."""
    offered = [getattr(calibatt, name) for name in calibatt.__all__ if name != "__version__"]
    parts = [HEAD]
    for entry in [*offered, Plan, PlanSet, Attachment, Adapter]:
        parts.append(_entry(f"## {entry.__name__}", entry))
        parts += [_entry(f"### {entry.__name__}.{name}", getattr(entry, name)) for name in METHODS.get(entry, ())]
    return "\n".join(parts)


def _entry(title: str, entry: Any) -> str:
    return f"{title}\n\n```text\n{entry.__name__}({_parameters(entry)})\n\n{inspect.getdoc(entry)}\n```\n"


def _parameters(entry: Any) -> str:
    """Names, with defaults that are plain values; the docstring has the types."""
    texts = []
    for parameter in inspect.signature(entry).parameters.values():
        default = parameter.default
        plain = "..." if callable(default) else repr(default)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in texts:
            texts.append("*")
        texts.append(f"{stars}{parameter.name}" + ("" if default is parameter.empty else f"={plain}"))
    return textwrap.fill(", ".join(text for text in texts if text != "self"), 100, subsequent_indent="    ")


if __name__ == "__main__":
    print(page(), end="")
