"""Timesteps are read once a sampling, and never stale. On the CPU, which is told that it is far away."""

from __future__ import annotations

import pytest
import torch

from calibatt.runtime import timesteps
from calibatt.runtime.timesteps import MOST_BYTES, Timesteps


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of everything fetched."""
    sizes: list[int] = []
    fetch = timesteps.fetch

    def counting(storage: torch.UntypedStorage) -> torch.Tensor:
        sizes.append(storage.nbytes())
        return fetch(storage)

    monkeypatch.setattr(timesteps, "at_hand", lambda x: False)
    monkeypatch.setattr(timesteps, "fetch", counting)
    return sizes


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_all_steps_of_a_sampling_are_fetched_at_once(fetched: list[int], dtype: torch.dtype) -> None:
    schedule = torch.tensor([999, 937, 833, 625]).to(dtype)
    known = Timesteps()
    for now in schedule:
        found = known.read(now.expand(2))
        assert (found.dtype, found.tolist()) == (dtype, [now.item()] * 2)
    assert fetched == [schedule.nbytes]


def test_what_is_written_or_new_is_fetched_again(fetched: list[int]) -> None:
    schedule = torch.tensor([999.0, 500.0])
    known = Timesteps()
    assert known.read(schedule[:1]).tolist() == [999]
    schedule[0] = 10
    assert known.read(schedule[:1]).tolist() == [10]
    schedule[1:].add_(1)
    assert known.read(schedule[1]).item() == 501
    assert known.read(torch.tensor([7.0])).tolist() == [7]
    assert known.read(schedule[:1]).tolist() == [10]
    assert len(fetched) == 5


def test_memory_that_is_held_is_not_given_to_others(fetched: list[int]) -> None:
    known = Timesteps()
    for step in range(100):  # each freed before the next one is made
        assert known.read(torch.tensor([float(step)])).item() == step


def test_inference_tensors_and_large_ones_are_read_as_they_are(fetched: list[int]) -> None:
    known = Timesteps()
    with torch.inference_mode():
        schedule = torch.tensor([1.0, 2.0])
        assert known.read(schedule[1]).item() == 2
        schedule[1] = 3
        assert known.read(schedule[1]).item() == 3
    assert known.read(torch.ones(MOST_BYTES)[5]).item() == 1
    assert fetched == []


def test_what_is_at_hand_is_given_back() -> None:
    timestep = torch.tensor([5])
    assert Timesteps().read(timestep) is timestep


def test_the_default_device_is_of_no_concern(fetched: list[int]) -> None:
    schedule = torch.tensor([999.0, 500.0])
    with torch.device("meta"):
        assert Timesteps().read(schedule[1:]).tolist() == [500]
