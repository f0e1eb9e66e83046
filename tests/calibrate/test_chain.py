"""A chain of links differentiated apart against autograd of the same computation whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibatt.tools.calibrate.chain import Chain, ChainError, Cotangents, Given, Traced, floating, plain, replaced

pytestmark = pytest.mark.usefixtures("one_thread")

Function = Callable[..., list[Tensor]]


def linked(chain: Chain, name: str, run: Function, inputs: list[Tensor], log: list[str] | None = None) -> list[Tensor]:
    """Runs a function as a link; its own derivatives are taken apart, when they are asked for."""
    needed = [x.requires_grad for x in inputs]
    given = [plain(x).detach() for x in inputs]

    def pull(cotangents: Cotangents) -> Cotangents:
        if log is not None:
            log.append(name)
        leaves = [x.detach().requires_grad_(need) for x, need in zip(given, needed, strict=True)]
        wanted = [x for x in leaves if x.requires_grad]
        if not wanted:
            return [[] for _ in cotangents]
        with torch.enable_grad():
            outputs = run(*leaves)
        return [list(torch.autograd.grad(outputs, wanted, some, retain_graph=True)) for some in cotangents]

    with torch.no_grad():
        outputs = run(*given)
    return chain.add(name, [x for x in inputs if x.requires_grad], outputs, pull)


def network(*inputs: Tensor) -> list[Tensor]:
    """Something nonlinear of any number of tensors, with two outputs."""
    total = sum(x.tanh() * (1 + index) for index, x in enumerate(inputs))
    return [total.sin(), total * inputs[0]]


@settings(max_examples=30)
@given(st.data())
def test_any_chain_is_differentiated_as_a_whole(data: st.DataObject):
    """Links take what earlier links returned, as it is or after arithmetic, and sources; several vectors at once."""
    drawn = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    vectors = data.draw(st.integers(1, 3))
    sources = [torch.randn(4, generator=drawn, dtype=torch.float64).requires_grad_() for _ in range(2)]
    chain, log = Chain(), []
    ours, theirs = list(sources), list(sources)
    for number in range(data.draw(st.integers(1, 5))):
        picked = data.draw(st.lists(st.integers(0, len(ours) - 1), min_size=1, max_size=3))
        picked.append(len(ours) - 1)  # so that nothing is left behind
        arithmetic = data.draw(st.booleans())
        mine, whole = (
            [of[index] * 2 + of[0] if arithmetic else of[index] for index in picked] for of in (ours, theirs)
        )
        ours += linked(chain, str(number), network, mine, log)
        theirs += network(*whole)
    drawn_ends = [ours[-1] + ours[-2].exp(), ours[-1]]
    true_ends = [theirs[-1] + theirs[-2].exp(), theirs[-1]]
    cotangents = [[torch.randn(4, generator=drawn, dtype=torch.float64) for _ in range(2)] for _ in range(vectors)]
    found = chain.pull(drawn_ends, cotangents, sources)
    for some, mine in zip(cotangents, found, strict=True):
        true = torch.autograd.grad(true_ends, sources, some, retain_graph=True, allow_unused=True)
        for ours_grad, grad in zip(mine, true, strict=True):
            torch.testing.assert_close(ours_grad, torch.zeros(4, dtype=torch.float64) if grad is None else grad)
    assert log == [str(number) for number in reversed(range(len(chain.links)))]


def test_a_link_that_nothing_depends_on_is_named():
    chain = Chain()
    x = torch.ones(3, requires_grad=True)
    first = linked(chain, "the first forward", network, [x])
    second = linked(chain, "the second forward", network, [first[0].detach() + x])
    with pytest.raises(ChainError, match="what comes after the first forward must depend on it by differentiation"):
        chain.pull([second[0]], [[torch.ones(3)]], [x])
    third = linked(chain, "the third forward", network, [second[0], first[0]])
    with pytest.raises(ChainError, match="what comes after the third forward must depend on it"):
        chain.pull([second[0]], [[torch.ones(3)]], [x])
    assert torch.isfinite(chain.pull([third[0]], [[torch.ones(3)]], [x])[0][0]).all()


def test_what_depends_on_no_link_has_zeros():
    chain, source = Chain(), torch.ones(3, requires_grad=True)
    out = linked(chain, "a", network, [torch.zeros(3)])
    (found,) = chain.pull([out[0] * 2], [[torch.ones(3)]], [source])[0]
    assert torch.equal(found, torch.zeros(3))


def test_outputs_are_not_kept_where_they_go_straight_into_a_link():
    chain = Chain()
    x = torch.ones(3, requires_grad=True)
    (first,) = linked(chain, "a", lambda x: [x * 2], [x])
    (second,) = linked(chain, "b", lambda x: [x * 3], [first])
    assert chain.links[0].outputs[0]() is first
    del first
    assert chain.links[0].outputs[0]() is None
    assert torch.equal(chain.pull([second], [[torch.ones(3)]], [x])[0][0], torch.full((3,), 6.0))


def test_gradients_have_the_dtype_of_what_they_are_of():
    """Links may compute in another dtype than the arithmetic between them."""
    chain = Chain()
    x = torch.linspace(0, 1, 4, requires_grad=True)
    (low,) = linked(chain, "low", lambda x: [x * 2], [x.bfloat16()])
    end = low.float() * 3 + x
    ((found,),) = chain.pull([end], [[torch.ones(4, dtype=torch.float64)]], [x])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full((4,), 7.0))


def traced(*sizes: int) -> tuple[Tensor, Tensor]:
    """A leaf, and the traced tensor that a recording makes of it."""
    leaf = torch.randn(*sizes, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.enable_grad():
        return leaf, leaf.clone().as_subclass(Traced)


def in_place(x: Tensor) -> Tensor:
    x *= 2
    x[1:].add_(x[:1] * 3)
    x[0] = x[1] * 5
    return x


def cut_and_joined(x: Tensor) -> Tensor:
    a, b = x.chunk(2)
    first, *_ = x.unbind(0)
    return torch.cat([b * 2, torch.stack([first, a[0] + b[0]]), torch.zeros(1, 3)])


def cast(x: Tensor) -> Tensor:
    return (x.double() / 3).to(torch.float32).type_as(x) + x.half().float()


def into_a_buffer(x: Tensor) -> Tensor:
    """As schedulers and pipelines do that fill tensors made before."""
    buffer = torch.zeros(4, 3)
    buffer[:2] = x[:2] * 2
    buffer[2:].copy_(x[2:])
    other = torch.ones(4, 3)
    other.mul_(x)
    return buffer * 3 + other * buffer


def with_constants(x: Tensor) -> Tensor:
    steps = torch.linspace(1, 0, 4)
    weight = np.float32(0.5)
    return steps[:, None] * x + x * float(steps[1]) - torch.lerp(x, torch.ones(4, 3), 0.3) * weight


def solved(x: Tensor) -> Tensor:
    """As UniPC does for its coefficients."""
    return torch.einsum("ij,jk->ik", torch.linalg.solve(torch.eye(4) * 2, torch.ones(4, 4)), x) + torch.where(
        x > 0, x, -x
    )


@pytest.mark.parametrize("arithmetic", [in_place, cut_and_joined, cast, into_a_buffer, with_constants, solved])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_arithmetic_is_recorded_where_pipelines_run(arithmetic: Callable[[Tensor], Tensor], grad: bool):
    leaf, x = traced(4, 3)
    with torch.set_grad_enabled(grad):
        out = arithmetic(x)
    assert isinstance(out, Traced)
    assert out.requires_grad
    other = leaf.detach().requires_grad_()
    with torch.enable_grad():
        truth = arithmetic(other * 1)
    assert torch.equal(plain(out), truth.detach())
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), z)[0] for y, z in ((out, leaf), (truth, other))))


def test_a_traced_tensor_can_be_looked_at():
    leaf, x = traced(4, 3)
    with torch.no_grad():
        assert np.array_equal(x.numpy(), leaf.detach().numpy())
        assert np.array_equal(np.asarray(x), leaf.detach().numpy())
        assert x.tolist() == leaf.tolist()
        assert x.cpu().numpy().shape == (4, 3)
        assert float(x.max().item()) == float(leaf.detach().max())
        assert bool((x == leaf).all())
        assert f"{x.shape}" == "torch.Size([4, 3])"
        assert "grad_fn" in repr(x)
        assert torch.randn_like(x).shape == x.shape
    ordinary = plain(x)
    assert type(ordinary) is Tensor
    assert not ordinary.requires_grad
    assert plain(3) == 3


def test_inference_mode_is_refused():
    _, x = traced(4, 3)
    with torch.inference_mode(), pytest.raises(ChainError, match=r"must run without torch.inference_mode \(torch.no_g"):
        x * 2


def test_arguments_are_given_again_as_they_were():
    leaf, x = traced(2, 3)
    constant, quiet = torch.ones(2), plain(traced(2, 3)[1]).as_subclass(Traced)
    with torch.inference_mode():
        made = torch.ones(3)
    found, inputs = Given.of((x, 5), {"a": {"b": [constant, None]}, "c": "text", "d": leaf, "e": quiet, "f": made})
    assert [id(each) for each in inputs] == [id(x), id(leaf)]
    assert found.wanted == [0, 5]
    assert not any(each.requires_grad or each.is_inference() for each in found.flat if isinstance(each, Tensor))
    assert not any(isinstance(each, Traced) for each in found.flat)

    def run(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs

    args, kwargs = found.call(run)
    assert args[1] == 5
    assert kwargs["a"]["b"][0] is constant
    assert kwargs["a"]["b"][1] is None
    assert torch.equal(args[0], leaf.detach())
    args, kwargs = found.call(run, list(range(8)))
    assert args == (0, 1)
    assert kwargs == {"a": {"b": [2, 3]}, "c": 4, "d": 5, "e": 6, "f": 7}


def test_results_of_any_shape_are_rebuilt():
    found = {"x": torch.ones(2), "ids": torch.arange(3), "more": (torch.zeros(1), None, "text")}
    assert [tuple(x.shape) for x in floating(found)] == [(2,), (1,)]
    made = replaced(found, [torch.full((2,), 5.0), torch.full((1,), 6.0)])
    assert made["x"][0] == 5
    assert made["more"][0][0] == 6
    assert made["ids"] is found["ids"]
    assert made["more"][1:] == (None, "text")


def test_what_is_written_over_is_differentiated_as_it_was():
    leaf = torch.arange(1.0, 5.0).requires_grad_()
    latents = leaf.clone().as_subclass(Traced)
    part = latents[2:].square().sum()
    latents[:2] = 0
    whole = latents.square().sum()
    latents *= 2
    for found in (part, whole):
        assert plain(torch.autograd.grad(found, leaf)[0]).tolist() == [0, 0, 6, 8]
