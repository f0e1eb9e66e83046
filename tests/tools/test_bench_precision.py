"""`calibatt-bench precision`: what it finds wrong, what it makes of times, what it remembers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from calibatt.plans import INT8, INT8_FP8, TokenGrid
from calibatt.runtime import eight_bits
from calibatt.runtime.ops import attend
from calibatt.tools.bench import precision
from calibatt.tools.bench.__main__ import main
from calibatt.tools.bench.kernel import Size

CPU = torch.device("cpu")


def by(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The torch backend in place of the one that is measured, its output changed."""
    return lambda q, k, v, schedule, backend: change(attend(q, k, v, schedule, "torch"))


@pytest.mark.parametrize("each", [INT8, INT8_FP8])
def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, each: int) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(precision, "attend", by(lambda out: out))
    assert precision.wrong(each, 64, CPU) == ""
    for change in (lambda out: 1.1 * out, lambda out: out.roll(1, 2), lambda out: torch.nan * out):
        monkeypatch.setattr(precision, "attend", by(change))
        assert precision.wrong(each, 64, CPU).startswith("it is wrong: ")
    monkeypatch.setattr(precision, "attend", by(lambda out: 1 / 0))
    assert precision.wrong(each, 64, CPU) == "it fails: ZeroDivisionError: division by zero"


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(size: Size, made: dict[tuple[str, float], Any], *_: Any) -> list[dict[str, Any]]:
        times = {"16 bit": 3.0, "int8 QK": 2.0}
        assert {name for name, _ in made} == set(times)
        return [
            {"size": size.name, "backend": name, "median_ms": ms, "p10_ms": ms, "p90_ms": ms}
            for name, ms in times.items()
        ]

    monkeypatch.setattr(precision, "measure", measured)
    size = Size("tiny", TokenGrid(1, 8, 16), 64, 2, 64, torch.bfloat16, (0.3,))
    assert precision.timings(size, {INT8: "", INT8_FP8: "it is wrong"}, CPU, 1) == [
        eight_bits.Timing(INT8, 64, 128, 1.5),
        eight_bits.Timing(INT8_FP8, 64, 128, 0.0, "it is wrong"),
    ]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A GPU of which nothing is known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))


@pytest.mark.usefixtures("card")
def test_what_was_measured_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "wrong", lambda *_: "")
    monkeypatch.setattr(
        precision,
        "timings",
        lambda size, *_: [eight_bits.Timing(INT8, size.head_dim, size.grid.tokens, 1.25)],
    )
    found = CliRunner().invoke(main, ["precision"])
    assert found.exit_code == 0, found.output
    assert "head size 128: int8 QK is on: 1.25 times as fast as 16 bit at 75600 tokens\n" in found.output
    assert eight_bits.verdict(INT8, torch.device("cuda"), 64, 10)[0]
    assert not eight_bits.verdict(INT8_FP8, torch.device("cuda"), 64, 10)[0]
    eight_bits._remembered.cache_clear()


@pytest.mark.usefixtures("card")
def test_too_little_memory_is_no_failure_of_the_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(precision, "inputs", lambda *_: [torch.zeros(1)] * 3)
    monkeypatch.setattr(precision, "attend", full)
    found = CliRunner().invoke(main, ["precision"])
    assert found.exit_code == 1
    assert found.output == (
        "Error: cuda must have memory left to measure 480p, head size 128, nothing is remembered: "
        "CUDA out of memory. Tried to allocate 2 GiB\n"
    )
    assert not [*tmp_path.rglob("*.json")]


def test_without_a_gpu_it_is_refused() -> None:
    found = CliRunner().invoke(main, ["precision", "--device", "cpu"])
    assert found.exit_code == 2
    assert "--device must be a cuda device of this machine, got 'cpu'" in found.output
