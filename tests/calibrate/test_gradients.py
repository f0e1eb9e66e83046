"""Gradients of one forward, block by block, against autograd of the whole model, on models as libraries leave them."""

from __future__ import annotations

import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import peft
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from support import adjoint, batched, quantised, text_after, wan
from support.backward import Found, arguments_of, by_block, cotangents_of, whole
from torch import Tensor, nn

from calibatt.runtime.adapters import Adapter, adapter_for
from calibatt.tools.calibrate import gradients
from calibatt.tools.calibrate.chain import ChainError, Given
from calibatt.tools.calibrate.gradients import AttentionCall, Transformer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported"),
]

FAMILIES = {
    "wan": adjoint.small_wan,
    "wan_guided": lambda: adjoint.small_wan(guidance_scale=5.0),
    "ltx": lambda: batched.ltx(4.0),
    "cogvideox": lambda: batched.cogvideox(4.0),
    "mochi": lambda: batched.mochi(4.0),
    "hunyuan": lambda: text_after.hunyuan(None, "cpu"),
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small() -> tuple[dict[str, Any], list[list[Tensor]], Found]:
    """Arguments of a forward of Wan, gradients of its output, and what autograd says of them."""
    sampler = adjoint.small_wan()
    arguments = arguments_of(sampler)
    drawn = cotangents_of(arguments, sampler.transformer)
    return arguments, drawn, whole(sampler.transformer, arguments, drawn)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_model(family: str):
    """Of every sample, without its padding; the last block of Mochi passes the text on as it is."""
    sampler = FAMILIES[family]()
    model, arguments = sampler.transformer, arguments_of(sampler)
    drawn = cotangents_of(arguments, model)
    calls: list[AttentionCall] = []
    found = by_block(model, arguments, drawn, calls)
    assert found.error(whole(model, arguments, drawn)) < 1e-6
    samples = len(arguments["hidden_states"])
    assert [call.layer for call in calls] == [layer for layer in (1, 0) for _ in range(samples)]
    lengths = adapter_for(model).lengths(model.config, arguments)
    if family == "mochi":
        lengths = arguments["encoder_attention_mask"].sum(1) + 5 * 8 * 12
    start = {"cogvideox": batched.TEXT}.get(family, 0)
    expected = [start + sampler.grid.tokens] * samples if lengths is None else lengths.tolist()
    assert all(call.span == (start, start + sampler.grid.tokens) for call in calls)
    assert [call.q.shape[1] for call in calls] == 2 * expected
    for call in calls:
        shape = (2, call.q.shape[1], 16)
        assert all(x.shape == shape for x in (call.q, call.k, call.v, call.out, *call.grads))
        assert len(call.grads) == 2
        scores = call.q.double() @ call.k.double().mT * 16**-0.5
        torch.testing.assert_close(scores.softmax(-1) @ call.v.double(), call.out.double(), rtol=1e-4, atol=1e-5)
        inputs = [x.double().requires_grad_() for x in (call.q, call.k, call.v)]
        out = nn.functional.scaled_dot_product_attention(*inputs)
        for grad, of_inputs in zip(call.grads, call.input_grads, strict=True):
            expected_grads = torch.autograd.grad(out, inputs, grad.double(), retain_graph=True)
            for ours, theirs in zip(of_inputs, expected_grads, strict=True):
                assert (ours.double() - theirs).norm() <= 1e-4 * theirs.norm()


def test_a_model_is_left_as_it_was(small: Any):
    model = wan.transformer(1)
    model.blocks[0].attn1.to_q.weight.requires_grad_(False)
    needed = [p.requires_grad for p in model.parameters()]
    processors = [block.attn1.processor for block in model.blocks]
    by_block(model, *small[:2])
    assert [p.requires_grad for p in model.parameters()] == needed
    assert all(p.grad is None for p in model.parameters())
    assert [block.attn1.processor for block in model.blocks] == processors
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_first_forward_needs_no_gradient_of_its_arguments(small: Any):
    """Attention has gradients all the same: its latents are noise, from which the video does depend."""
    arguments, drawn, truth = small
    for positional in (False, True):
        order = ("hidden_states", "timestep", "encoder_hidden_states")
        rest = {key: value for key, value in arguments.items() if not positional or key not in order}
        given, inputs = Given.of([arguments[key] for key in order] if positional else (), rest)
        assert not inputs
        model, calls = wan.transformer(1), []
        assert Transformer(model, adapter_for(model)).pull(given, drawn, calls.append) == [[], []]
        for call, grad in zip(reversed(calls), truth.attention, strict=True):
            torch.testing.assert_close(torch.stack(call.grads), grad, rtol=1e-5, atol=1e-8)


class Block(nn.Module):
    """A block of two streams that is called with keywords and returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.q, self.attn.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.attn.processor = Processor()

    def forward(self, *, stream: dict[str, Tensor], factors: list[Tensor]) -> dict[str, Any]:
        found = self.attn.processor(self.attn, stream["video"])
        return {"text": stream["text"] * factors[0], "video": stream["video"] + found * stream["text"].mean(), "n": 3}


class Processor:
    def __call__(self, attn: nn.Module, x: Tensor) -> Tensor:
        q = attn.q(x).unflatten(-1, (2, 8))
        return attn.out(dispatch(q, q.roll(1, 1), q * 2).flatten(2))


def dispatch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class OwnModel(nn.Module):
    """A user's own model; nothing of it has diffusers' names but `hidden_states`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace()
        self.parts = nn.ModuleList(Block() for _ in range(3))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        found = {"video": hidden_states, "text": hidden_states[:, :4]}
        for block in self.parts:
            found = block(stream=found, factors=[found["video"][:, :4].detach() + 1])
        return (found["video"] * found["text"].mean(),)


OWN = Adapter(
    "OwnModel", (("parts", "attn"),), "dispatch", heads=lambda _: (2, 8), grid=lambda *_: (1, 4, 6, 0, 0),
    time=lambda _: torch.tensor(0.5, dtype=torch.float64),
)  # fmt: skip


def test_blocks_may_be_called_with_keywords_and_return_what_they_like():
    model, drawn = OwnModel(), torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 24, 16, generator=drawn, requires_grad=True)
    out = model(hidden)[0]
    cotangent = torch.randn(out.shape, generator=drawn)
    (truth,) = torch.autograd.grad(out, hidden, cotangent)
    given, _ = Given.of((hidden,), {})
    calls: list[AttentionCall] = []
    ((found,),) = Transformer(model, OWN).pull(given, [[cotangent]], calls.append)
    torch.testing.assert_close(found, truth)
    assert [call.layer for call in calls] == [2, 2, 1, 1, 0, 0]


def test_a_model_whose_blocks_do_not_run_is_refused(small: Any):
    model = wan.transformer(1)
    model.forward = lambda hidden_states, **_: (hidden_states * 2,)
    with pytest.raises(ChainError, match="a forward of WanTransformer3DModel must run its blocks, got none"):
        by_block(model, *small[:2])


def test_a_block_without_a_gradient_is_named(small: Any):
    model = wan.transformer(1)
    model.blocks[1].forward = lambda hidden_states, *_: torch.ones_like(hidden_states)
    with pytest.raises(
        ChainError, match=r"blocks\.1 must depend on its inputs by differentiation, got outputs without"
    ):
        by_block(model, *small[:2])
    model.forward = partial(severed, model.forward)
    with pytest.raises(ChainError, match=r"what comes after blocks\.1 must depend on it by differentiation"):
        by_block(model, *small[:2])


def severed(run: Any, **arguments: Any) -> tuple[Tensor]:
    return (run(**arguments)[0].detach() * arguments["hidden_states"],)


def test_a_gradient_that_is_not_finite_is_refused(small: Any):
    arguments, drawn, _ = small
    with pytest.raises(ChainError, match="gradient of self-attention 1 must be finite, got NaN or infinity"):
        by_block(wan.transformer(1), arguments, [[x * torch.nan for x in some] for some in drawn])


def test_outputs_of_blocks_are_kept_once(small: Any, monkeypatch: pytest.MonkeyPatch):
    """When the model has run, one tensor of the hidden states' size lives for every block, and no other one."""
    arguments, drawn, _ = small
    model, size = wan.transformer(1), 72 * 32
    kept: list[int] = []
    pull = gradients.Chain.pull

    def counted(chain: Any, *rest: Any) -> Any:
        storages = {}
        for link in chain.links:
            given = next(x.cell_contents for x in link.pull.__closure__ if isinstance(x.cell_contents, Given))
            alive = [*given.flat, *(x for x in link.inputs if isinstance(x, Tensor)), *(x() for x in link.outputs)]
            storages |= {
                x.untyped_storage().data_ptr(): x for x in alive if isinstance(x, Tensor) and x.numel() == size
            }
        kept.append(len(storages))
        return pull(chain, *rest)

    monkeypatch.setattr(gradients.Chain, "pull", counted)
    by_block(model, arguments, drawn)
    assert kept == [3]  # what enters the two blocks, and what the last one returned


def test_nothing_is_left_of_a_forward(small: Any):
    """What a forward held is freed when it has been differentiated: sampling by sampling memory stays the same."""
    model, seen = wan.transformer(1), []
    model.blocks[0].register_forward_hook(lambda block, args, out: seen.append(weakref.ref(args[0])))
    by_block(model, *small[:2])
    assert seen
    assert all(ref() is None for ref in seen)


def test_only_what_is_a_blocks_own_goes_to_the_cpu(small: Any, monkeypatch: pytest.MonkeyPatch):
    """Rotations are shared by all blocks: a copy for each block would be larger than its input."""
    moved: list[torch.Size] = []
    monkeypatch.setattr(gradients, "_to_cpu", lambda x: moved.append(x.shape) or x)
    found = by_block(wan.transformer(1), *small[:2], inputs_on_cpu=True)
    assert moved == [torch.Size([1, 72, 32])] * 2
    assert found.error(small[2]) == 0


@pytest.mark.parametrize("checkpointed", [False, True])
def test_checkpointing_changes_nothing(small: Any, checkpointed: bool):
    model = wan.transformer(1)
    if checkpointed:
        model.enable_gradient_checkpointing()
    assert by_block(model, *small[:2]).error(small[2]) == 0


def test_a_lora_beside_the_weights_is_the_fused_one(small: Any):
    found = []
    for fused in (False, True):
        model = wan.transformer(1)
        torch.manual_seed(2)
        targets = ["to_q", "to_k", "to_v", "to_out.0", "proj"]
        model.add_adapter(peft.LoraConfig(r=8, lora_alpha=8, target_modules=targets, init_lora_weights=False))
        if fused:
            model.fuse_lora()
        found.append(by_block(model, *small[:2]))
    assert found[0].error(found[1]) < 1e-5
    assert found[0].error(small[2]) > 0.1


def test_sequential_offloading_changes_nothing(small: Any):
    model = wan.transformer(1)
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    accelerate.cpu_offload(model, execution_device=CPU)
    assert by_block(model, *small[:2]).error(small[2]) == 0
    assert {name: p.requires_grad for name, p in model.named_parameters()} == needed
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Weights that group offloading has put away are NaN, as memory that was freed may be; says what happened."""
    log: list[str] = []
    put_away: dict[int, Tensor] = {}
    onload, offload = ModuleGroup.onload_, ModuleGroup.offload_

    def tensors(group: ModuleGroup) -> list[Tensor]:
        own = [x for module in group.modules for x in (*module.parameters(), *module.buffers())]
        return [*own, *group.parameters, *group.buffers]

    def onload_(group: ModuleGroup) -> None:
        for x in tensors(group):
            if id(x) in put_away:
                x.data = put_away.pop(id(x))
        onload(group)
        log.append("on")

    def offload_(group: ModuleGroup) -> None:
        offload(group)
        for x in tensors(group):
            put_away.setdefault(id(x), x.data)
            x.data = torch.full_like(x.data, torch.nan)
        log.append("off")

    monkeypatch.setattr(ModuleGroup, "onload_", onload_)
    monkeypatch.setattr(ModuleGroup, "offload_", offload_)
    return log


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("blocks", [1, 2, None], ids=["one_block", "two_blocks", "leaves"])
def test_group_offloading_changes_nothing(
    small: Any, blocks: int | None, disk: bool, poisoned: list[str], tmp_path: Path
):
    """The backward runs on weights that are there, also those around the blocks, and puts all away in the end."""
    model = wan.transformer(1)
    kind = {"offload_type": "leaf_level"} if blocks is None else {"num_blocks_per_group": blocks}
    apply_group_offloading(model, CPU, CPU, offload_to_disk_path=str(tmp_path) if disk else None, **kind)
    poisoned.clear()
    assert by_block(model, *small[:2]).error(small[2]) < 1e-6
    assert {"on", "off"} == set(poisoned)
    assert all(x.isnan().all() for x in model.parameters())
    assert by_block(model, *small[:2]).error(small[2]) < 1e-6


def test_layers_that_are_cast_for_each_use_keep_what_they_used(small: Any):
    stored, plain = wan.transformer(1), wan.transformer(1)
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv3d) and "condition" not in name and "patch" not in name:
            for weight in layer.parameters():
                weight.data = weight.data.to(torch.float8_e4m3fn).float()
    stored.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    names = [name for name, weight in stored.named_parameters() if weight.dtype == torch.float8_e4m3fn]
    assert "blocks.1.ffn.net.2.weight" in names
    for name, weight in plain.named_parameters():
        if name not in names:
            weight.data = stored.get_parameter(name).data.clone()
        else:
            weight.data = stored.get_parameter(name).data.float()
    assert by_block(stored, *small[:2]).error(whole(plain, *small[:2])) < 1e-6


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_quantised_layers_have_the_gradients_of_the_same_weights_plain(kind: str):
    quantised.require(kind)
    model = quantised.model(kind)
    plain = quantised.plain(model)
    arguments = arguments_of(adjoint.small_wan())
    drawn = cotangents_of(arguments, plain)
    most = 0.05 if kind == "int8" else 1e-5
    assert by_block(model, arguments, drawn).error(whole(plain, arguments, drawn)) < most


class StraightThrough(nn.Linear):
    """As LLM.int8 computes on a GPU: inputs are rounded to 8 bits a row, the backward knows nothing of it."""

    def forward(self, x: Tensor) -> Tensor:
        step = x.detach().abs().amax(-1, keepdim=True) / 127
        return super().forward(x + ((x.detach() / step).round() * step - x.detach()))


def test_a_forward_of_steps_has_the_gradient_of_the_plain_model_to_5_percent(small: Any):
    model = wan.transformer(1)
    for layer in model.blocks.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = StraightThrough
    found = by_block(model, *small[:2])
    assert 1e-4 < found.error(small[2]) < 0.05


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 0.01), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("size", [1.0, 1e-7])
def test_half_precision_agrees_within_rounding(dtype: torch.dtype, most: float, size: float):
    """Also where gradients are below fp16's smallest number."""
    sampler = adjoint.small_wan()
    arguments, model = arguments_of(sampler), sampler.transformer
    drawn = [[size * x for x in some] for some in cotangents_of(arguments, model)]
    truth = whole(model, arguments, drawn)
    halves = {key: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for key, x in arguments.items()}
    found = by_block(model.to(dtype), halves, drawn)
    assert found.error(truth) < most


def test_an_overflow_in_half_precision_is_scaled_away(small: Any, monkeypatch: pytest.MonkeyPatch):
    """The scale begins far too high; every call is handed on once, by the first scale at which it is finite."""
    arguments, drawn, truth = small
    model = wan.transformer(1).to(torch.float16)
    halves = {key: x.half() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in arguments.items()}
    monkeypatch.setattr(gradients, "HALF_EXPONENT", 17)
    calls: list[AttentionCall] = []
    assert by_block(model, halves, drawn, calls).error(truth) < 0.01
    assert [call.layer for call in calls] == [1, 0]
    assert all(call.scale < 2.0**15 and torch.stack(call.grads).isfinite().all() for call in calls)
    monkeypatch.setattr(gradients, "HALF_EXPONENT", 60)
    with pytest.raises(
        ChainError, match=r"gradients in fp16 must be finite, got an overflow at a scale of 2\^\d+; use"
    ):
        by_block(model, halves, drawn)


def test_a_scale_of_one_is_watched_too(small: Any, monkeypatch: pytest.MonkeyPatch):
    arguments, drawn, _ = small
    model = wan.transformer(1).to(torch.float16)
    halves = {key: x.half() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in arguments.items()}
    large = [[x * 2.0**15 / max(float(y.abs().max()) for y in some) for x in some] for some in drawn]
    monkeypatch.setattr(gradients, "HALF_EXPONENT", 16)  # 2 ** 15 has the exponent 16: a scale of 1
    found = by_block(model, halves, large)
    assert found.error(whole(wan.transformer(1), arguments, large)) < 0.01
