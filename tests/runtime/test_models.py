"""Every family of the adapter table: tiny random models of diffusers, dense, sparse, compiled and put back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from support.masked import masked
from support.schedules import random_schedule

from calibatt.plans import Blocks, PlanFile, Segment, StoredLayers, TokenGrid
from calibatt.runtime import InterceptionLostError, Plan, PlanMismatchError, ops
from calibatt.runtime import schedule as runtime_schedule
from calibatt.runtime.adapters import ADAPTERS, adapter_for

diffusers = pytest.importorskip("diffusers")
transformer_kandinsky = pytest.importorskip("diffusers.models.transformers.transformer_kandinsky")
# Mochi's own code turns autocast to float32 on, which a CPU warns that it does not know.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported")

GRID = TokenGrid(frames=3, height=4, width=6)
BLOCKS = Blocks(16, 16)
SEGMENTS = (Segment(0.0, 0.5, 0.25), Segment(0.5, 1.0, 0.75))
LAYERS, HEADS, HEAD_DIM = 2, 2, 16


@dataclass(frozen=True)
class Family:
    """How a model is made, and the arguments of a forward at a time; text tokens in the sequence of attention."""

    make: Callable[[], Any]
    arguments: Callable[..., dict[str, Any]]
    text: int = 0
    padding: tuple[int, ...] = (0, 0)
    """Text tokens at the end of each sample that are padding."""
    fullgraph: bool = True
    """Whether the model itself can be compiled as one graph."""
    apart: bool = False
    """Whether attention is called for each sample, without its padding."""


def wan(kind: str = "Wan", **config: Any) -> Any:
    return getattr(diffusers, f"{kind}Transformer3DModel")(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, rope_max_seq_len=32, **{"in_channels": 4, "num_layers": LAYERS, **config},
    )  # fmt: skip


def wan_arguments(time: float, batch: int, channels: int = 4) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, channels, 3, 8, 12),
        "timestep": torch.tensor([round(time * 1000)] * batch),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
    }


def wan_i2v_arguments(time: float, batch: int) -> dict[str, Any]:
    found = wan_arguments(time, batch, 9)
    return {**found, "encoder_hidden_states_image": torch.randn(batch, 5, 24)}


def wan_ti2v_arguments(time: float, batch: int) -> dict[str, Any]:
    """A time for each token; those of the first frame are clean."""
    found = wan_arguments(time, batch)
    times = torch.full((batch, GRID.tokens), time * 1000)
    times[:, : GRID.height * GRID.width] = 0
    return {**found, "timestep": times}


def vace_arguments(time: float, batch: int) -> dict[str, Any]:
    return {**wan_arguments(time, batch), "control_hidden_states": torch.randn(batch, 6, 3, 8, 12)}


FACES = {
    "latent_channels": 4, "in_channels": 12, "image_dim": None, "motion_encoder_channel_sizes": {"4": 8, "8": 8},
    "motion_encoder_size": 8, "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8,
    "face_encoder_hidden_dim": 8, "face_encoder_num_heads": 2,
}  # fmt: skip


def animate_arguments(time: float, batch: int) -> dict[str, Any]:
    return {
        **wan_arguments(time, batch, 12),
        "pose_hidden_states": torch.randn(batch, 4, 2, 8, 12),
        "face_pixel_values": torch.randn(batch, 3, 5, 8, 8),
    }


def skyreels_arguments(time: float, batch: int) -> dict[str, Any]:
    """Diffusion forcing: each frame has a time of its own."""
    times = torch.tensor([0, round(time * 900), round(time * 1000)]).expand(batch, -1)
    return {**wan_arguments(time, batch), "timestep": times, "enable_diffusion_forcing": True}


def ltx() -> Any:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, cross_attention_dim=32,
        num_layers=LAYERS, caption_channels=16,
    )  # fmt: skip


def ltx_arguments(time: float, batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, 7)
    mask[0, 4:] = 0
    return {
        "hidden_states": torch.randn(batch, GRID.tokens, 4),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "timestep": torch.tensor([time * 1000.0] * batch),
        "encoder_attention_mask": mask,
        "num_frames": GRID.frames,
        "height": GRID.height,
        "width": GRID.width,
    }


def ltx2() -> Any:
    return diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, cross_attention_dim=32,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=HEADS, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, num_layers=LAYERS, caption_channels=16,
    )  # fmt: skip


def ltx2_arguments(time: float, batch: int) -> dict[str, Any]:
    """A picture for a later frame, after the video."""
    model, size = ltx2(), (GRID.height, GRID.width)
    coords = [model.rope.prepare_video_coords(batch, frames, *size, "cpu") for frames in (GRID.frames, 1)]
    times = torch.full((batch, GRID.tokens + 24), time * 1000.0)
    times[:, GRID.tokens :] = 0
    return {
        **{key: x for key, x in ltx_arguments(time, batch).items() if "mask" not in key},
        "hidden_states": torch.randn(batch, GRID.tokens + 24, 4),
        "timestep": times,
        "video_coords": torch.cat(coords, 2),
        "audio_hidden_states": torch.randn(batch, 9, 4),
        "audio_encoder_hidden_states": torch.randn(batch, 7, 16),
        "audio_timestep": torch.full((batch,), time * 900.0),
        "audio_num_frames": 9,
    }


def cogvideox(**config: Any) -> Any:
    """2B adds positions to the latents; 5B rotates queries and keys; 1.5 also has patches in time."""
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=LAYERS, sample_width=12, sample_height=8, sample_frames=9, max_text_seq_length=7,
        **config,
    )  # fmt: skip


def cogvideox_arguments(
    time: float, batch: int, text: int = 7, *, rotary: bool, frames: int = GRID.frames
) -> dict[str, Any]:
    angles = torch.randn(GRID.tokens, HEAD_DIM)
    return {
        "hidden_states": torch.randn(batch, frames, 4, 8, 12),
        "encoder_hidden_states": torch.randn(batch, text, 16),
        "timestep": torch.tensor([round(time * 1000)] * batch),
        "image_rotary_emb": (angles.cos(), angles.sin()) if rotary else None,
    }


def mochi() -> Any:
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=LAYERS, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=7,
    )  # fmt: skip
    with torch.no_grad():
        model.pos_frequencies.normal_()
    return model


TEXT = 20
PADDING = (3, 13)


def text_mask(text: int, *padding: int) -> torch.Tensor:
    return torch.arange(text) < text - torch.tensor(padding)[:, None]


def mochi_arguments(time: float, batch: int, text: int = TEXT) -> dict[str, Any]:
    """Time runs the other way."""
    return {
        "hidden_states": torch.randn(batch, 4, 3, 8, 12),
        "encoder_hidden_states": torch.randn(batch, text, 16),
        "timestep": torch.tensor([(1 - time) * 1000] * batch),
        "encoder_attention_mask": text_mask(text, *PADDING[:batch]),
    }


def hunyuan(**config: Any) -> Any:
    """One block of each kind: two streams, then one."""
    return diffusers.HunyuanVideoTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=1, num_single_layers=LAYERS - 1,
        num_refiner_layers=1, patch_size=2, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
        **{"in_channels": 4, "out_channels": 4, **config},
    )  # fmt: skip


def hunyuan_arguments(time: float, batch: int, text: int = TEXT) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 3, 8, 12),
        "encoder_hidden_states": torch.randn(batch, text, 16),
        "timestep": torch.tensor([time * 1000.0] * batch),
        "encoder_attention_mask": text_mask(text, *PADDING[:batch]),
        "pooled_projections": torch.randn(batch, 8),
        "guidance": torch.tensor([6000.0] * batch),
    }


def hunyuan15() -> Any:
    return diffusers.HunyuanVideo15Transformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=4, num_layers=LAYERS,
        num_refiner_layers=1, patch_size=2, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip


def hunyuan15_arguments(time: float, batch: int, image: bool = True) -> dict[str, Any]:
    """Text of 12 tokens with the padding, 3 of another, 5 of the image, which counts as padding where there is none."""
    return {
        "hidden_states": torch.randn(batch, 4, 3, 8, 12),
        "timestep": torch.tensor([time * 1000.0] * batch),
        "encoder_hidden_states": torch.randn(batch, 12, 16),
        "encoder_attention_mask": torch.arange(12) < 12 - torch.tensor((2, 11)[:batch])[:, None],
        "encoder_hidden_states_2": torch.randn(batch, 3, 8),
        "encoder_attention_mask_2": torch.arange(3) < 3 - torch.tensor((1, 2)[:batch])[:, None],
        "image_embeds": torch.randn(batch, 5, 8) * image,
    }


def kandinsky(number: int, **config: Any) -> Any:
    model = getattr(diffusers, f"Kandinsky{number}Transformer3DModel")(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, model_dim=HEADS * HEAD_DIM,
        ff_dim=32, num_text_blocks=1, num_visual_blocks=LAYERS, axes_dims=(4, 6, 6), **config,
    )  # fmt: skip
    for name, weight in model.named_parameters():
        if "modulation" in name:  # zeros at first, so that blocks do nothing
            torch.nn.init.normal_(weight, std=0.2)
    return model


def kandinsky5_arguments(time: float, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, GRID.frames, 8, 12, 4),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "timestep": torch.tensor([time * 1000.0] * batch),
        "pooled_projections": torch.randn(batch, 8),
        "visual_rope_pos": [torch.arange(size) for size in (GRID.frames, GRID.height, GRID.width)],
        "text_rope_pos": torch.arange(7),
    }


def kandinsky6_arguments(time: float, batch: int) -> dict[str, Any]:
    """A picture that is given, after the video."""
    found = kandinsky5_arguments(time, batch)
    del found["visual_rope_pos"], found["text_rope_pos"]
    frames = GRID.frames + 1
    return {
        **found,
        "hidden_states": torch.randn(batch, frames, 8, 12, 9),
        "audio_hidden_states": torch.randn(batch, 9, 4),
        "visual_token_type_ids": (torch.arange(frames) == GRID.frames).long().expand(batch, -1),
    }


def h3() -> Any:
    return diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, hidden_size=32, num_layers=LAYERS,
        num_refiner_layers=1, ffn_dim=32, in_channels=4, audio_in_channels=4, text_dim=16, freq_dim=16,
        time_embed_hidden_dim=16, time_embed_dim=16, rope_freq_dim=2,
    )  # fmt: skip


def h3_arguments(time: float, batch: int, text: int = 7) -> dict[str, Any]:
    """Text, a picture that the video starts from, stereo sound, of another length with other texts, and the video, as
    its own pipeline lays them out.
    """
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep as Layout

    positions, tags, video, audio, words, *_ = Layout.build_packed_sequence(
        torch.ones(text), GRID.frames, 8, 12, 5 if text == 7 else 5 + text % 4, (1, 2, 2), audio_channels=2,
        audio_tag=2, video_tag=0, keyframe_anchors=("first",),
    )  # fmt: skip
    return {
        "hidden_states": torch.randn(batch, len(video), 16),
        "audio_hidden_states": torch.randn(batch, len(audio), 4),
        "encoder_hidden_states": torch.randn(batch, len(words), 16),
        "timestep": torch.tensor([1 - time, 1 - time / 2, 0.999]),
        "timestep_indices": torch.where(tags == 2, 1, 0),
        "position_ids": positions,
        "token_tags": tags,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": words,
    }


FAMILIES = {
    "Wan T2V": Family(wan, wan_arguments),
    "Wan I2V": Family(lambda: wan(in_channels=9, image_dim=24, added_kv_proj_dim=32), wan_i2v_arguments),
    "Wan TI2V": Family(wan, wan_ti2v_arguments),
    "Wan VACE": Family(lambda: wan("WanVACE", num_layers=1, vace_layers=[0], vace_in_channels=6), vace_arguments),
    "Wan Animate": Family(lambda: wan("WanAnimate", inject_face_latents_blocks=2, **FACES), animate_arguments),
    "SkyReels-V2": Family(lambda: wan("SkyReelsV2"), skyreels_arguments),
    "LTX": Family(ltx, ltx_arguments),
    "LTX-2": Family(ltx2, ltx2_arguments, 24),
    "CogVideoX 2B": Family(cogvideox, lambda *a: cogvideox_arguments(*a, rotary=False), 7),
    "CogVideoX 5B": Family(
        lambda: cogvideox(use_rotary_positional_embeddings=True),
        lambda *a: cogvideox_arguments(*a, rotary=True),
        7,
    ),
    "CogVideoX 1.5": Family(
        lambda: cogvideox(use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False),
        lambda *a: cogvideox_arguments(*a, rotary=True, frames=2 * GRID.frames),
        7,
    ),
    "Mochi": Family(mochi, mochi_arguments, TEXT, PADDING, apart=True),
    "HunyuanVideo": Family(hunyuan, hunyuan_arguments, TEXT, PADDING),
    "HunyuanVideo I2V": Family(
        lambda: hunyuan(image_condition_type="token_replace", guidance_embeds=False),
        hunyuan_arguments,
        TEXT,
        PADDING,
    ),
    "HunyuanVideo 1.5 I2V": Family(hunyuan15, hunyuan15_arguments, TEXT, PADDING, fullgraph=False),
    "HunyuanVideo 1.5": Family(
        hunyuan15, lambda *a: hunyuan15_arguments(*a, image=False), TEXT, (8, 18), fullgraph=False
    ),
    "Kandinsky 5": Family(lambda: kandinsky(5), kandinsky5_arguments),
    "Kandinsky 6": Family(
        lambda: kandinsky(6, in_audio_dim=4, out_audio_dim=4, visual_token_type_num_embeddings=2),
        kandinsky6_arguments,
        24,
    ),
    "MiniMax-H3": Family(h3, h3_arguments, 7 + 24 + 10),
}


PADDED = ["Mochi", "HunyuanVideo", "HunyuanVideo I2V"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(autouse=True)
def setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` is the oracle; nothing is compiled yet; no model rounds queries and keys, which magnifies rounding."""
    exact = ModuleType("torch")
    vars(exact).update({**vars(torch), "bfloat16": torch.float32})
    monkeypatch.setattr(transformer_kandinsky, "torch", exact)
    monkeypatch.setattr(ops, "AUTO", ("reference",))
    torch._dynamo.reset()


def model_of(family: Family) -> Any:
    torch.manual_seed(0)
    return family.make().eval().requires_grad_(False)


def plan_for(model: Any, dense: bool, grid: TokenGrid = GRID) -> Plan:
    rng = np.random.default_rng(0)
    heads = {"dense_heads": range(HEADS)} if dense else {"anchored_heads": (HEADS - 1,)}
    schedules = tuple(
        tuple(random_schedule(rng, grid, BLOCKS, HEADS, 0.4, **heads) for _ in range(LAYERS)) for _ in SEGMENTS
    )
    return Plan(PlanFile(adapter_for(model).signature(model), grid, BLOCKS, SEGMENTS, StoredLayers.of(schedules)))


def run(model: Any, family: Family, time: float = 0.9, batch: int = 2, *text: int) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return torch.cat([x.flatten() for x in model(**family.arguments(time, batch, *text), return_dict=False)])


def expected_calls(family: Family) -> list[tuple[int, int]]:
    """(queries, keys) of the planned attention calls of a forward with two samples."""
    tokens = GRID.tokens + family.text
    lengths = [tokens - padding for padding in family.padding] if family.apart else [tokens]
    return [(length, length) for _ in range(LAYERS) for length in lengths]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(queries, keys) of every planned attention call."""
    seen = []
    attend = ops.attend

    def spy(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((q.shape[2], k.shape[2]))
        return attend(q, k, v, *args, **kwargs)

    monkeypatch.setattr(ops, "attend", spy)
    return seen


def test_a_dense_plan_changes_nothing_and_detach_everything_back(family: Family, calls: list) -> None:
    model = model_of(family)
    plain = run(model, family)
    with plan_for(model, True).attach(model):
        torch.testing.assert_close(run(model, family), plain, rtol=1e-4, atol=1e-5)
    assert calls == expected_calls(family), "every self-attention once, no cross-attention"
    assert torch.equal(run(model, family), plain)


@pytest.mark.parametrize("time", [0.9, 0.3])
def test_a_sparse_plan_is_the_stock_code_with_masks(family: Family, time: float) -> None:
    model = model_of(family)
    plan = plan_for(model, False)
    with masked(model, plan):
        expected = run(model, family, time)
    with plan.attach(model):
        found = run(model, family, time)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, run(model, family, time), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "HunyuanVideo 1.5"], indirect=True)
def test_compiled_once_for_all_times(family: Family, calls: list) -> None:
    model = model_of(family)
    with plan_for(model, False).attach(model):
        expected = [run(model, family, time) for time in (0.9, 0.3)]
        calls.clear()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=family.fullgraph)
        found = [run(compiled, family, time) for time in (0.9, 0.3)]
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    assert calls == expected_calls(family) * 2
    if family.fullgraph:
        assert counter.frame_count <= 2, "the hook and the forward"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Wan T2V", "LTX", "LTX-2", "HunyuanVideo", "HunyuanVideo 1.5", "MiniMax-H3"])
def test_compiled_block_by_block(name: str, calls: list) -> None:
    """What diffusers calls regional compilation; CogVideoX and Mochi do not offer it."""
    family = FAMILIES[name]
    model = model_of(family)
    with plan_for(model, False).attach(model):
        expected = [run(model, family, time) for time in (0.9, 0.3)]
        calls.clear()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        model.compile_repeated_blocks(backend=counter, fullgraph=True)
        found = [run(model, family, time) for time in (0.9, 0.3)]
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    assert calls == expected_calls(family) * 2
    assert counter.frame_count == len(model._repeated_blocks), "one graph for all layers of a kind, and all times"


def with_padding(family: Family, *padding: int) -> dict[str, Any]:
    """Arguments whose samples have so many text tokens of padding."""
    torch.manual_seed(1)
    mask = text_mask(family.text, *padding)
    return {**family.arguments(0.9, len(padding)), "encoder_attention_mask": mask, "return_dict": False}


@pytest.mark.slow
@pytest.mark.parametrize("name", PADDED)
def test_prompts_of_any_length(name: str, calls: list) -> None:
    """Compiled once, whatever is padding; and samples do not see each other."""
    family = FAMILIES[name]
    model, text = model_of(family), family.text
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with plan_for(model, False).attach(model), torch.no_grad():
        for padding in ((3, 13), (0, 5), (text - 1, 1), (0, 0), (7, 7)):
            arguments = with_padding(family, *padding)
            together = model(**arguments)[0]
            torch.testing.assert_close(compiled(**arguments)[0], together, rtol=1e-4, atol=1e-5)
            for sample in range(2):
                alone = {key: x[sample, None] if torch.is_tensor(x) else x for key, x in arguments.items()}
                calls.clear()
                torch.testing.assert_close(model(**alone)[0], together[sample, None], rtol=1e-4, atol=1e-5)
                tokens = GRID.tokens + text - (padding[sample] if family.apart else 0)
                assert calls == [(tokens, tokens)] * LAYERS
    assert counter.frame_count <= 2


LENGTHS = (37, 300, 1001, 300)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CogVideoX 5B", "Mochi", "HunyuanVideo", "MiniMax-H3"])
def test_one_plan_for_text_of_every_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the model's own code with masks; no array is made twice, and nothing is compiled that the model would not."""
    bound = []
    bind = runtime_schedule.bound_to
    monkeypatch.setattr(runtime_schedule, "bound_to", lambda core, *args: bound.append(core) or bind(core, *args))
    family = FAMILIES[name]
    model = model_of(family)
    plan = plan_for(model, False)
    with masked(model, plan):
        expected = [run(model, family, 0.9, 2, text) for text in LENGTHS]

    def compiled(backend: str) -> tuple[list[torch.Tensor], int]:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
        called = torch.compile(model, backend=counter, fullgraph=True)
        return [run(called, family, 0.9, 2, text) for text in LENGTHS], counter.frame_count

    _, alone = compiled("eager")  # only counted
    with plan.attach(model):
        eager = [run(model, family, 0.9, 2, text) for text in LENGTHS]
        planned, frames = compiled("aot_eager")
    assert len(bound) == LAYERS * len(SEGMENTS), "every array once, for the segment at work and the next"
    assert frames <= alone + 2, "the hook, for one length and for any"
    for found in (eager, planned):
        for mine, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PADDED)
def test_another_video_is_another_grid(name: str) -> None:
    """Unless asked to, nothing runs dense; and dense is what the model itself computes."""
    family = FAMILIES[name]
    model = model_of(family)
    plan = plan_for(model, False, TokenGrid(2, 4, 6))
    plain = run(model, family)
    with plan.attach(model), pytest.raises(PlanMismatchError, match=r"grid must be .*frames=2, .*, got .*frames=3, "):
        run(model, family)
    with plan.attach(model, on_mismatch="dense"), pytest.warns(UserWarning, match="run the model's own attention"):
        torch.testing.assert_close(run(model, family), plain, rtol=1e-4, atol=1e-5)


def test_fusing_cogvideox_replaces_its_processors() -> None:
    """Before attach that is all right; afterwards the plan would be ignored, and the next forward says so."""
    family = FAMILIES["CogVideoX 5B"]
    model = model_of(family)
    plan = plan_for(model, False)
    with plan.attach(model):
        expected = run(model, family)
        model.fuse_qkv_projections()
        with pytest.raises(InterceptionLostError, match=r"transformer_blocks\.0\.attn1, transformer_blocks\.1\.attn1$"):
            run(model, family)
    with plan.attach(model):
        torch.testing.assert_close(run(model, family), expected, rtol=1e-4, atol=1e-5)


def test_every_row_of_the_table_is_tested_here() -> None:
    made = {type(family.make()).__name__ for family in FAMILIES.values()}
    assert made == {row.architecture for row in ADAPTERS}
