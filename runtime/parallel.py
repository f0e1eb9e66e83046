"""Ulysses context parallelism: each rank computes some heads of the whole sequence.

Outside of attention a rank has its part of the sequence (diffusers' `enable_parallelism` cuts it). Before attention the
ranks exchange: all heads of some tokens become some heads of all tokens; after it, the other way. Which heads a rank
computes is ours to choose, so every layer's work is spread evenly, whatever its plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from calibatt.plans.schedule import LayerSchedule
from calibatt.runtime.adapters import Site
from calibatt.runtime.device_schedule import DeviceSchedule, move
from calibatt.runtime.schedule import AttentionSchedule

Heads = Sequence[torch.Tensor]
"""The heads that each rank computes: int64 ``(heads of the rank,)`` on the device, by rank."""


class ParallelismError(ValueError):
    """A model is spread over ranks in a way that a plan cannot follow."""


@dataclass(frozen=True)
class Ulysses:
    """The ranks that run one forward together, as one of them sees them.

    Args:
        group: Their process group.
        rank: Number of this rank, and of its part of the sequence.
        ranks: How many ranks there are.
        uneven: Whether parts of the sequence, and numbers of heads, may differ by one.
    """

    group: dist.ProcessGroup
    rank: int
    ranks: int
    uneven: bool

    def check(self, heads: int, tokens: int) -> None:
        """Proves that heads and tokens can be spread over the ranks.

        Raises:
            ParallelismError: They cannot.
        """
        for what, count in (("heads", heads), ("tokens", tokens)):
            if count < self.ranks or (count % self.ranks and not self.uneven):
                rule = "be at least" if self.uneven else "be a multiple of"
                raise ParallelismError(f"{what} must {rule} the {self.ranks} ranks of ulysses_degree, got {count}")

    def lengths(self, tokens: int) -> list[int]:
        """Tokens that each rank has outside of attention."""
        return even_counts(tokens, self.ranks)

    def tokens_to_heads(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: Heads, tokens: int
    ) -> tuple[torch.Tensor, ...]:
        """Exchanges this rank's tokens of all heads for all tokens of this rank's heads.

        Args:
            q: ``(B, length, H, D)``, this rank's part of the sequence.
            k: As q.
            v: As q.
            heads: Who computes which heads.
            tokens: Of the whole sequence.

        Returns:
            q, k and v, each ``(B, N, heads of this rank, D)``, strided views of one tensor.
        """
        batch, length, _, head_dim = q.shape
        mine = len(heads[self.rank])
        sent = [length * batch * 3 * len(some) * head_dim for some in heads]
        received = [count * batch * 3 * mine * head_dim for count in self.lengths(tokens)]
        parts, whole = q.new_empty(sum(sent)), q.new_empty(sum(received))
        for some, part in zip(heads, parts.split(sent), strict=True):
            places = part.view(length, batch, 3, len(some), head_dim)
            for index, x in enumerate((q, k, v)):
                places[:, :, index] = x.index_select(2, some).transpose(0, 1)
        dist.all_to_all_single(whole, parts, received, sent, group=self.group)
        return whole.view(tokens, batch, 3, mine, head_dim).transpose(0, 1).unbind(2)

    def heads_to_tokens(self, out: torch.Tensor, heads: Heads) -> torch.Tensor:
        """Exchanges all tokens of this rank's heads for this rank's tokens of all heads.

        Args:
            out: ``(B, N, heads of this rank, D)``; best as `tokens_to_heads` lays it out, N outermost.
            heads: Who computed which heads.

        Returns:
            ``(B, length, H, D)``, contiguous.
        """
        batch, tokens, mine, head_dim = out.shape
        lengths = self.lengths(tokens)
        length = lengths[self.rank]
        sent = [count * batch * mine * head_dim for count in lengths]
        received = [length * batch * len(some) * head_dim for some in heads]
        parts = out.new_empty(sum(received))
        dist.all_to_all_single(parts, out.transpose(0, 1).reshape(-1), received, sent, group=self.group)
        gathered = out.new_empty(batch, length, sum(map(len, heads)), head_dim)
        for some, part in zip(heads, parts.split(received), strict=True):
            gathered[:, :, some] = part.view(length, batch, len(some), head_dim).transpose(0, 1)
        return gathered


class Share(AttentionSchedule):
    """This rank's heads of a layer in one segment; they are chosen, and cut out of the schedule, when it is bound.

    Args:
        whole: The schedule of all heads.
        ulysses: The ranks.
    """

    def __init__(self, whole: AttentionSchedule, ulysses: Ulysses) -> None:
        self._whole, self._ulysses = whole, ulysses
        heads = even_counts(whole.heads, ulysses.ranks)[ulysses.rank]
        lists = min(whole.most_lists, heads * whole.q_blocks)
        super().__init__(whole.grid, whole.blocks, heads, whole.precisions, lists, whole.most_queries)
        self._heads: dict[torch.device, Heads] = {}

    @cached_property
    def divided(self) -> list[list[int]]:
        """The heads of each rank; every rank computes the same."""
        return divide(self._whole.work, self._ulysses.ranks)

    @property
    def core(self) -> LayerSchedule:
        """The schedule of this rank's heads, cut out anew."""
        return self._whole.core.select(self.divided[self._ulysses.rank])

    def bind(self, device: torch.device | str) -> DeviceSchedule:
        """As of `AttentionSchedule`; also puts there which heads go where."""
        bound = super().bind(device)
        if bound.device not in self._heads:
            heads = [head for some in self.divided for head in some]
            order = move(torch.tensor(heads, device="cpu"), bound.device)
            self._heads[bound.device] = order.split([len(some) for some in self.divided])
        return bound

    def unbind(self) -> None:
        """As of `AttentionSchedule`."""
        super().unbind()
        self._heads = {device: heads for device, heads in self._heads.items() if device in self._bound}

    def tokens_to_heads(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`Ulysses.tokens_to_heads`, of this layer."""
        return self._ulysses.tokens_to_heads(q, k, v, self._heads[self.bind(q.device).device], self.grid.tokens)

    def heads_to_tokens(self, out: torch.Tensor) -> torch.Tensor:
        """`Ulysses.heads_to_tokens`, of this layer."""
        return self._ulysses.heads_to_tokens(out, self._heads[out.device])


def divide(work: Sequence[int], ranks: int) -> list[list[int]]:
    """Spreads heads over ranks, the most work first, each to the rank with the least work that still has room.

    Args:
        work: Work of each head.
        ranks: How many ranks, at most as many as heads.

    Returns:
        The heads of each rank, ascending; equally many for all, or one less for the last ranks.
    """
    capacity = even_counts(len(work), ranks)
    shares: list[list[int]] = [[] for _ in capacity]
    load = [0] * ranks
    for head in sorted(range(len(work)), key=lambda head: -work[head]):
        rank = min((rank for rank in range(ranks) if len(shares[rank]) < capacity[rank]), key=load.__getitem__)
        shares[rank].append(head)
        load[rank] += work[head]
    return [sorted(heads) for heads in shares]


def slowest_rank(works: Iterable[Sequence[int]], ranks: int) -> tuple[float, float]:
    """How long ranks wait for the slowest one, which is another one in every layer.

    Args:
        works: For each layer, the work of each head.
        ranks: At most as many as heads.

    Returns:
        Work of the slowest rank / mean work of a rank, over all layers: with heads spread by `divide`, and in order.
    """
    divided = in_order = mean = 0.0
    for work in works:
        divided += max(sum(work[head] for head in heads) for heads in divide(work, ranks))
        parts = torch.tensor(work, device="cpu").split(even_counts(len(work), ranks))
        in_order += max(int(part.sum()) for part in parts)
        mean += sum(work) / ranks
    return divided / mean, in_order / mean


def even_counts(count: int, ranks: int) -> list[int]:
    """Heads of each rank, as `torch.tensor_split` cuts: equally many, or one less for the last ranks."""
    return [count // ranks + (rank < count % ranks) for rank in range(ranks)]


def ulysses_of(model: nn.Module, places: Iterable[Site]) -> Ulysses | None:
    """How diffusers' `enable_parallelism` has spread a model; None if it has not.

    Raises:
        ParallelismError: Not by Ulysses alone, or attention does not take part.
    """
    config = getattr(model, "_parallel_config", None)
    configs = {place.name: getattr(place.attention.processor, "_parallel_config", None) for place in places}
    if config is None:
        config = next((one for one in configs.values() if one is not None), None)
    if config is None:
        return None
    if getattr(config, "tensor_parallel_config", None) is not None:
        raise ParallelismError("a model with a plan must be spread by ulysses_degree, got tensor parallelism")
    context: Any = getattr(config, "context_parallel_config", None)
    if context is None:
        raise ParallelismError(f"a model with a plan must be spread by ulysses_degree, got {type(config).__name__}")
    if context.ring_degree > 1:
        raise ParallelismError(
            "a model with a plan must be spread by ulysses_degree alone (a ring shows a rank some keys at a time, a "
            f"plan's heads are of all keys), got ring_degree {context.ring_degree}"
        )
    if deaf := [name for name, one in configs.items() if one is not config]:
        raise ParallelismError(
            f"self-attention of {type(model).__name__} must take part in context parallelism, got processors without "
            f"the model's parallel config at {', '.join(deaf)}"
        )
    group = context._ulysses_mesh.get_group()
    return Ulysses(group, context._ulysses_local_rank, group.size(), bool(getattr(context, "ulysses_anything", False)))
