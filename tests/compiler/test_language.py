"""Pass strings: what is read is what is printed, and what cannot be read says why."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, ClassVar, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibatt.compiler.errors import CompileError, PassError, PassSyntaxError
from calibatt.compiler.language import DEFAULT_PASSES, parse_passes, print_passes
from calibatt.compiler.passes import PASSES, Pass

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "agreement": st.floats(0, 1, exclude_min=True),
    "threshold": st.floats(0, 1, exclude_min=True),
    "target_db": st.none(),
    "target_density": st.none() | st.floats(0, 1, exclude_min=True),
    "menu": st.sampled_from(["windows", "cuts+windows", "cuts"]),
    "precision": st.sampled_from(["bf16", "auto"]),
    "max_difference": st.floats(0, 1),
    "group": st.integers(2, 9),
    "max_growth": st.floats(0, 1),
    "max_group_rows": st.integers(1, 99),
    "max_group_frames": st.integers(1, 99),
}
BY_TYPE: dict[Any, st.SearchStrategy[Any]] = {int: st.integers(0, 1000)}


@st.composite
def any_pass(draw: st.DrawFn) -> Pass:
    kind = PASSES[draw(st.sampled_from(sorted(PASSES)))]()
    hints = get_type_hints(kind)
    options = [each.name for each in fields(kind)]
    return kind(**{name: draw(VALUES[name] if name in VALUES else BY_TYPE[hints[name]]) for name in options})


@given(st.lists(any_pass(), min_size=1, max_size=5))
def test_what_is_printed_reads_back(passes: list[Pass]) -> None:
    text = print_passes(passes)
    assert parse_passes(text) == tuple(passes)
    assert print_passes(parse_passes(text)) == text
    assert parse_passes(text.replace(",", " ,\n ").replace("=", " = ").replace("{", " { ")) == tuple(passes)


@pytest.mark.parametrize("name", PASSES)
def test_the_registry_gives_frozen_dataclasses_of_that_name(name: str) -> None:
    kind = PASSES[name]()
    assert is_dataclass(kind)
    assert issubclass(kind, Pass)
    assert kind.name == name
    assert set(get_type_hints(kind)) - {each.name for each in fields(kind)} == {"name", "decides"}
    for hint in (get_type_hints(kind)[each.name] for each in fields(kind)):
        assert hint in (int, float, str) or isinstance(hint, UnionType)
    with pytest.raises(FrozenInstanceError):
        kind().name = "other"


def test_the_default_passes_print_with_every_option_that_has_a_value() -> None:
    assert print_passes(parse_passes(DEFAULT_PASSES)) == (
        "select{target-density=0.5,menu=windows+cuts,precision=bf16},"
        "anchors{max-group-rows=4,max-group-frames=8},"
        "select{target-density=0.5,menu=windows+cuts,precision=bf16},schedule,lower"
    )


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("", PassSyntaxError, "passes must read name{option=value,...},name,..., got ''"),
        ("vote,", PassSyntaxError, "passes must read name{option=value,...},name,..., got ''"),
        ("vote lower", PassSyntaxError, "passes must be separated by commas, got 'lower' after 'vote'"),
        ("vote{agreement=0.5", PassSyntaxError, "separated by commas, got '{agreement=0.5' after 'vote'"),
        (
            "merge",
            PassSyntaxError,
            "a pass must be one of vote, select, anchors, repeat, merge-heads, schedule, lower, got 'merge'",
        ),
        ("vote{agree=1}", PassSyntaxError, "vote: an option must be one of agreement, threshold, got 'agree'"),
        ("lower{x=1}", PassSyntaxError, "lower: an option must not be given (it has none), got 'x'"),
        ("vote{agreement}", PassSyntaxError, "vote: an option must read option=value, got 'agreement'"),
        ("vote{agreement=1,agreement=1}", PassSyntaxError, "vote: agreement must be given once, got it again"),
        ("vote{agreement=half}", PassSyntaxError, "vote: agreement must be a finite number, got 'half'"),
        ("vote{agreement=nan}", PassSyntaxError, "vote: agreement must be a finite number, got 'nan'"),
        ("vote{agreement=2}", PassError, "vote: agreement must be in (0, 1], got 2.0"),
        ("repeat{group=0.5}", PassSyntaxError, "repeat: group must be an integer, got '0.5'"),
        (
            "select{menu=planes+pears}",
            PassError,
            "select: menu must name some of windows, cuts, joined by",
        ),
        ("select{menu=a b}", PassSyntaxError, "select: menu must be of letters, digits"),
        (
            "select{target-density=0.5,target-db=30}",
            PassError,
            "target-density and target-db must not be given together, got 0.5, 30.0",
        ),
        ("select{precision=fp4}", PassError, "select: precision must be bf16 or auto, got fp4"),
        ("select{target-density=0}", PassError, "select: target-density must be in (0, 1], got 0.0"),
        ("select{max-error=1}", PassSyntaxError, "select: an option must be one of target-density, target-db"),
        ("repeat{group=1}", PassError, "repeat: group must be at least 2, got 1"),
        ("repeat{max-difference=-1}", PassError, "repeat: max-difference must not be negative, got -1.0"),
        ("anchors{max-group-rows=0}", PassError, "anchors: max-group-rows must be at least 1, got 0"),
    ],
)
def test_what_is_wrong_is_named(text: str, kind: type[CompileError], message: str) -> None:
    with pytest.raises(kind) as raised:
        parse_passes(text)
    assert message in str(raised.value)


def test_a_pass_changes_something() -> None:
    @dataclass(frozen=True)
    class Nothing(Pass):
        name: ClassVar[str] = "nothing"

    with pytest.raises(TypeError, match="change"):
        Nothing()
