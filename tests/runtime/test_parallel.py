"""Plans in models whose sequence is spread over ranks: the same result as in one process, or an error."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support.ranks import run_ranks
from support.schedules import random_schedule

from calibatt.plans import PRECISIONS, Blocks, ModelSignature, PlanFile, Segment, StoredLayers, TokenGrid, write_plan
from calibatt.runtime import ParallelismError, Plan, PlanMismatchError, load_plan, resident
from calibatt.runtime import schedule as runtime_schedule
from calibatt.runtime.adapters import adapter_for
from calibatt.runtime.intercept import Interception
from calibatt.runtime.parallel import Share, Ulysses, divide, even_counts, slowest_rank
from calibatt.runtime.schedule import ListedSchedule, StoredSchedule

diffusers = pytest.importorskip("diffusers")

GRID = TokenGrid(frames=3, height=4, width=6)
BLOCKS = Blocks(16, 16)
SEGMENTS = (Segment(0.0, 0.3, 0.2), Segment(0.3, 0.6, 0.5), Segment(0.6, 1.0, 0.75))
LAYERS, HEADS, HEAD_DIM = 2, 4, 16
TIMES = (0.9, 0.4, 0.1, 0.8)


def wan(heads: int = HEADS) -> Any:
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=LAYERS, rope_max_seq_len=32,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def wan_arguments(time: float, height: int = GRID.height) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, GRID.frames, 2 * height, 2 * GRID.width),
        "timestep": torch.tensor([round(time * 1000)] * 2),
        "encoder_hidden_states": torch.randn(2, 7, 16),
    }


def ti2v_arguments(time: float) -> dict[str, Any]:
    """A time for each token; those of the first frame, all that rank 0 of 4 has, are clean."""
    times = torch.full((2, GRID.tokens), time * 1000)
    times[:, : GRID.height * GRID.width] = 0
    return {**wan_arguments(time), "timestep": times}


def ltx() -> Any:
    torch.manual_seed(0)
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM,
        cross_attention_dim=HEADS * HEAD_DIM, num_layers=LAYERS, caption_channels=16,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def ltx_arguments(time: float) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, GRID.tokens, 4),
        "encoder_hidden_states": torch.randn(2, 8, 16),
        "timestep": torch.tensor([time * 1000.0] * 2),
        "encoder_attention_mask": None,  # with one, diffusers' own cross-attention fails where the model is spread
        "num_frames": GRID.frames,
        "height": GRID.height,
        "width": GRID.width,
    }


def plan_for(model: Any, seed: int = 0, dense: bool = False, grid: TokenGrid = GRID) -> Plan:
    """Heads of very different work; the last one has anchor rows."""
    rng, heads = np.random.default_rng(seed), model.config.num_attention_heads
    every = range(heads) if dense else (0,)
    schedules = tuple(
        tuple(
            random_schedule(
                rng, grid, BLOCKS, heads, 0.3, dense_heads=every, anchored_heads=() if dense else (heads - 1,)
            )
            for _ in range(LAYERS)
        )
        for _ in SEGMENTS
    )
    return Plan(PlanFile(adapter_for(model).signature(model), grid, BLOCKS, SEGMENTS, StoredLayers.of(schedules)))


def run(model: Any, arguments: Callable[..., dict[str, Any]] = wan_arguments, time: float = 0.9, **more: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(**arguments(time, **more), return_dict=False)[0]


def spread(model: Any, **config: Any) -> None:
    model.enable_parallelism(config=diffusers.ContextParallelConfig(**config))


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@contextmanager
def counted_shares() -> Any:
    """The heads of every share that is put on a device."""
    made: list[int] = []
    original = runtime_schedule.bound_to
    runtime_schedule.bound_to = lambda core, *args: made.append(core.heads) or original(core, *args)
    try:
        yield made
    finally:
        runtime_schedule.bound_to = original


def attach_then_spread() -> None:
    model = wan()
    plan, dense, stock = plan_for(model), run(model), dict(model.attn_processors)
    with plan.attach(model):
        wanted = [run(model, time=time) for time in TIMES]
        spread(model, ulysses_degree=dist.get_world_size())
        for time, value in zip(TIMES, wanted, strict=True):
            same(run(model, time=time), value)
    assert (wanted[0] - dense).abs().max() > 1e-3
    assert all(model.attn_processors[name] is processor for name, processor in stock.items())
    same(run(model), dense)


def spread_then_attach() -> None:
    model = wan()
    plans, dense = [plan_for(model, seed) for seed in (1, 2)], run(model)
    wanted = []
    for plan in plans:
        with plan.attach(model):
            wanted.append([run(model, time=time) for time in TIMES])
    other = run(model, height=6)
    spread(model, ulysses_degree=dist.get_world_size())
    same(run(model), dense)
    for plan, values in zip(plans, wanted, strict=True):
        with counted_shares() as made, plan.attach(model, on_mismatch="dense") as attachment:
            for time, value in zip(TIMES, values, strict=True):
                same(run(model, time=time), value)
            share = [even_counts(HEADS, dist.get_world_size())[dist.get_rank()]]
            assert made == share * LAYERS * len(SEGMENTS), "each share is made once, and nothing else"
            assert f"rank {dist.get_rank()} of {dist.get_world_size()}" in attachment.explain()
            with pytest.warns(UserWarning, match="the model's own attention"):
                same(run(model, height=6), other)
    with plan_for(model, dense=True).attach(model):
        same(run(model), dense)
    same(run(model), dense)


def a_loaded_plan_is_let_go_and_comes_again() -> None:
    model = wan()
    with TemporaryDirectory() as folder:
        write_plan(Path(folder) / "a.plan", plan_for(model).file)
        plan = load_plan(Path(folder) / "a.plan")
        with plan.attach(model):
            wanted = [run(model, time=time) for time in TIMES]
        for segment in range(len(SEGMENTS)):
            for schedule in plan.layers(segment):
                schedule.unbind()
        spread(model, ulysses_degree=dist.get_world_size())
        kept, resident.RESIDENT_BYTES = resident.RESIDENT_BYTES, 0
        with plan.attach(model) as attachment:
            for time, value in zip(TIMES * 2, wanted * 2, strict=True):
                same(run(model, time=time), value)
                shares = attachment._session.shares[plan]
                bound = [any(each.bound_bytes for each in shares.layers(segment)) for segment in range(len(SEGMENTS))]
                assert sum(bound) == 2, "the segment at work and the next one"
        resident.RESIDENT_BYTES = kept
        assert not any(each.bound_bytes for segment in range(len(SEGMENTS)) for each in plan.layers(segment))


def the_whole_sequence_decides_the_time() -> None:
    model = wan()
    with plan_for(model).attach(model):
        wanted = run(model, ti2v_arguments)
        spread(model, ulysses_degree=dist.get_world_size())
        same(run(model, ti2v_arguments), wanted)


def other_families_work() -> None:
    model = ltx()
    dense = run(model, ltx_arguments)
    with plan_for(model).attach(model):
        wanted = [run(model, ltx_arguments, time) for time in TIMES]
        spread(model, ulysses_degree=dist.get_world_size())
        for time, value in zip(TIMES, wanted, strict=True):
            same(run(model, ltx_arguments, time), value)
    same(run(model, ltx_arguments), dense)


def an_uneven_number_of_heads_works_where_diffusers_lets_it() -> None:
    model = wan(heads=5)
    plan = plan_for(model)
    with plan.attach(model):
        wanted = run(model)
    spread(model, ulysses_degree=dist.get_world_size(), ulysses_anything=True)
    with plan.attach(model):
        same(run(model), wanted)


def exchanges_undo_each_other() -> None:
    """Also parts of uneven length, which gloo cannot gather where diffusers puts the sequence together again."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    ulysses = Ulysses(dist.group.WORLD, rank, ranks, uneven=True)
    heads = [torch.tensor(some) for some in divide([3, 1, 4, 1, 5, 9], ranks)]
    for tokens in (24, 23, 21):
        whole = torch.arange(3 * 2 * tokens * 6 * 4.0).view(3, 2, tokens, 6, 4)
        mine = [x.tensor_split(ranks, dim=1)[rank] for x in whole]
        assert ulysses.lengths(tokens)[rank] == mine[0].shape[1]
        found = ulysses.tokens_to_heads(*mine, heads, tokens)
        assert all(torch.equal(one, x[:, :, heads[rank]]) for one, x in zip(found, whole, strict=True))
        assert all(torch.equal(ulysses.heads_to_tokens(one, heads), x) for one, x in zip(found, mine, strict=True))


def what_cannot_be_spread_is_refused() -> None:
    ranks = dist.get_world_size()
    spreads = [({"ring_degree": ranks}, HEADS, f"got ring_degree {ranks}$")]
    if ranks == 4:
        spreads.append(({"ring_degree": 2, "ulysses_degree": 2}, HEADS, "got ring_degree 2$"))
    spreads.append(({"ulysses_degree": ranks}, 5, f"heads must be a multiple of the {ranks} ranks .* got 5$"))
    for config, heads, message in spreads:
        model = wan(heads)
        plan, touched = plan_for(model), []
        model.patch_embedding.register_forward_hook(lambda *_, touched=touched: touched.append(1))
        with plan.attach(model):
            spread(model, **config)
            with pytest.raises(ParallelismError, match=message):
                run(model)
        with pytest.raises(ParallelismError, match=message):
            plan.attach(model)
        assert not touched, "refused before any work"
        assert not any(hasattr(processor, "beneath") for processor in model.attn_processors.values())


CHECKS = (
    attach_then_spread,
    spread_then_attach,
    a_loaded_plan_is_let_go_and_comes_again,
    the_whole_sequence_decides_the_time,
    other_families_work,
    an_uneven_number_of_heads_works_where_diffusers_lets_it,
    exchanges_undo_each_other,
    what_cannot_be_spread_is_refused,
)


def all_checks() -> None:
    for check in CHECKS:
        check()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_compute_what_one_process_does(ranks: int, tmp_path: Path) -> None:
    """All in one start of the processes, which takes longer than the checks."""
    run_ranks(all_checks, ranks, tmp_path)


@pytest.mark.gpu
@pytest.mark.timeout(180)
def test_ranks_with_a_gpu_each(tmp_path: Path) -> None:
    """Through NCCL, and whichever kernels `auto` takes there."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    run_ranks(all_checks, 2, tmp_path, backend="nccl")


class Config:
    """What diffusers hangs on models and processors, as far as it is looked at."""

    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


def test_what_is_no_context_parallelism_is_refused() -> None:
    model = wan()
    for config, message in (
        (Config(tensor_parallel_config=object()), "must be spread by ulysses_degree, got tensor parallelism"),
        (Config(), "must be spread by ulysses_degree, got Config"),
        (
            Config(context_parallel_config=Config(ring_degree=1)),
            r"WanTransformer3DModel must take part .* without the model's parallel config at blocks\.0\.attn1, ",
        ),
    ):
        model._parallel_config = config
        with pytest.raises(ParallelismError, match=message):
            plan_for(model).attach(model)


def test_attention_over_a_part_of_the_sequence_is_refused() -> None:
    """Someone splits the tokens by means that nothing tells of."""
    model = wan()

    def half(module: Any, arguments: tuple[Any, ...]) -> Any:
        return arguments[0][:, : GRID.tokens // 2], *arguments[1:3], [x[:, : GRID.tokens // 2] for x in arguments[3]]

    model.blocks[0].register_forward_pre_hook(half)
    with (
        plan_for(model).attach(model),
        pytest.raises(
            PlanMismatchError, match="attention of layer 0 must get at least 72 tokens of 4 heads, got 36 of 4"
        ),
    ):
        run(model)


def test_who_did_not_ask_for_parts_of_sequences_gets_none() -> None:
    """Such as calibration, which would take a part for the whole."""
    model = wan()
    interception = Interception(model, adapter_for(model), lambda q, k, v, site, context: q)
    model.blocks[0].attn1.processor._parallel_config = object()
    with pytest.raises(NotImplementedError, match="must be called without parallel_config, got object"):
        run(model)
    interception.detach()


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_heads_are_spread_evenly_by_work(work: list[int], ranks: int) -> None:
    ranks = min(ranks, len(work))
    found = divide(work, ranks)
    assert sorted(head for heads in found for head in heads) == list(range(len(work)))
    assert [len(heads) for heads in found] == even_counts(len(work), ranks)
    assert even_counts(len(work), ranks) == [len(part) for part in torch.zeros(len(work)).tensor_split(ranks)]
    assert found == divide(work, ranks)


@given(st.lists(st.sampled_from(list(PRECISIONS)), min_size=3, max_size=5), st.integers(0, 1))
def test_a_share_keeps_the_precision_of_its_heads(precisions: list[int], rank: int) -> None:
    """And names those of all ranks, so that all choose the same backend; packed as a file's or not."""
    grid, heads = TokenGrid(2, 3, 13), len(precisions)
    core = random_schedule(np.random.default_rng(1), grid, BLOCKS, heads, 0.5, precisions=precisions)
    plan = PlanFile(ModelSignature("M", 1, heads, 8), grid, BLOCKS, (Segment(0, 1, 0),), StoredLayers.of([[core]]))
    for whole in (ListedSchedule(core), StoredSchedule(plan.schedules, 0, 0)):
        share = Share(whole, Ulysses(None, rank, 2, uneven=True))  # type: ignore[arg-type]  # nobody is asked
        mine = share.divided[rank]
        assert share.bind("cpu").core.head_precision.tolist() == [precisions[head] for head in mine]
        assert share.precisions == whole.precisions == set(precisions)


def test_much_work_is_not_left_to_one_rank() -> None:
    assert divide([9, 9, 1, 1], 2) == [[0, 2], [1, 3]]
    assert divide([1, 9, 5, 5, 4, 2], 2) == [[0, 1, 4], [2, 3, 5]]


def test_spreading_by_work_gains_on_the_demo_plan() -> None:
    """Four heads: two ranks have a choice, four have none."""
    plan = load_plan(resources.files("calibatt.plans") / "demo.plan")
    works = [schedule.work for segment in range(len(plan.segments)) for schedule in plan.layers(segment)]
    divided, in_order = slowest_rank(works, 2)
    assert 1 <= divided < 0.98 * in_order
    divided, in_order = slowest_rank(works, 4)
    assert 1 < divided == in_order
    assert slowest_rank([[3, 3, 1, 1]] * 2, 2) == (1.0, 1.5)
