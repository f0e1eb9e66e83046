"""What can be wrong with a plan file: one exception per broken promise, all below `PlanError`."""

from __future__ import annotations

MAX_MESSAGE = 1000
"""Characters."""


def legible(text: str, most: int = MAX_MESSAGE) -> str:
    """Text from a file or a stranger, made short and harmless for a terminal.

    Args:
        text: Any; what does not print, escape sequences and marks of direction among it, is spelled out. Lines stay.
        most: Characters; of a longer text the middle is left out.
    """
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)


class PlanError(Exception):
    """A plan, or a file in the plan container, breaks a promise of FORMAT.md. Messages are `legible`."""

    def __init__(self, message: str = "") -> None:
        super().__init__(legible(message))


class BadMagic(PlanError):
    """The file does not begin with the magic of the kind that was asked for."""


class UnsupportedVersion(PlanError):
    """The file's major version is not the one this code reads."""


class Truncated(PlanError):
    """The file ends before something that it promises."""


class TrailingBytes(PlanError):
    """The file goes on after its last section."""


class HeaderTooLarge(PlanError):
    """The header is larger than a reader has to accept."""


class HeaderError(PlanError):
    """The header is not the one canonical encoding of a map of plain values."""


class SectionError(PlanError):
    """A section's entry breaks a rule: its name, dtype, shape, length or checksum field, or its order."""


class LayoutError(PlanError):
    """Sections overlap, leave a hole, or do not begin where alignment puts them."""


class PaddingError(PlanError):
    """A byte between two parts of the file is not zero."""


class ChecksumError(PlanError):
    """Bytes differ from those that were written."""


class LimitError(PlanError):
    """The file asks for more memory than this reader grants, or than there is."""


class UnknownCodec(PlanError):
    """A section is stored in a way this code cannot decode."""


class MaskError(PlanError):
    """The block lists of a layer cannot be unpacked, or are not as many as the plan says."""


class MissingSection(PlanError):
    """A section that is needed is not in the file."""


class SchemaError(PlanError):
    """A value of the header is missing, of the wrong kind or out of its range."""


class ScheduleError(PlanError):
    """The arrays of a schedule contradict each other: lists, columns, anchors, heads or tile order."""
