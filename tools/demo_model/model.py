"""The demo model: diffusers' own Wan transformer, small, in pixel space, and a prompt encoder of ours.

The model has learned the world at several grids (`world.CLIPS`). Two things follow the grid, so that little is to be
learned anew on a finer one. Positions of tokens are told in tokens of the small clip, so that the same place of the
picture and the same moment have the same rotary angles everywhere. And the schedule is shifted further towards noise:
where n times as many tokens show the same, noise of one level hides less, by the square root of n.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from calibatt.plans import TokenGrid
from calibatt.tools.demo_model import world
from calibatt.tools.demo_model.world import SMALL, Clip

WEIGHTS = Path(__file__).with_name("weights.safetensors")
GROWN = Path(__file__).parent / "grown" / "weights.safetensors"
"""Of the medium and the large clip; in the repository, not in the wheel."""
FEW_STEPS = Path(__file__).with_name("few_steps.safetensors")
"""A LoRA for `WEIGHTS`, which then sample in `FEW` steps."""
LORA = "few_steps"
"""The adapter's name in a transformer."""
CONFIG = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 64,
    "freq_dim": 256,
    "ffn_dim": 1024,
    "num_layers": 6,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 64,
}
TRAIN_TIMESTEPS = 1000
STEPS, FEW = 8, 4
SHIFT = 3.0
"""Of the small clip."""


class PromptEncoder(nn.Module):
    """Word vectors plus place vectors; the transformer's own text projection does the rest."""

    def __init__(self, dim: int):
        super().__init__()
        self.words = nn.Embedding(len(world.WORDS), dim)
        self.places = nn.Embedding(world.MAX_WORDS, dim)

    def forward(self, words: Tensor) -> Tensor:
        """``(n, MAX_WORDS)`` word numbers to ``(n, MAX_WORDS, dim)``."""
        return self.words(words) + self.places.weight


class DemoModel(nn.Module):
    """Predicts the velocity noise - video of a rectified flow.

    Args:
        config: Arguments of `WanTransformer3DModel`; `CONFIG` by default.
        clip: The videos that it is to make; `set_clip` changes it.
        shift: Of the schedule at this clip; that of its tokens by default.
    """

    def __init__(self, config: dict | None = None, clip: Clip = SMALL, shift: float | None = None):
        super().__init__()
        self.config = config or CONFIG
        self.transformer = WanTransformer3DModel(**self.config)
        self.encoder = PromptEncoder(self.config["text_dim"])
        self.steps = STEPS
        self.set_clip(clip, shift)

    def set_clip(self, clip: Clip, shift: float | None = None) -> None:
        """Makes it a model of other videos: their grid, the angles of its positions, the shift of its schedule."""
        frames, rows, columns = self.config["patch_size"]
        self.clip = clip
        self.grid = TokenGrid(clip.frames // frames, clip.pixels // rows, clip.pixels // columns)
        small = SMALL.frames // frames * (SMALL.pixels // rows) * (SMALL.pixels // columns)
        self.shift = shift or SHIFT * (self.grid.tokens / small) ** 0.5
        rope = self.transformer.rope
        axes = (rope.t_dim, clip.pace), (rope.h_dim, 1 / clip.scale), (rope.w_dim, 1 / clip.scale)
        places = torch.arange(rope.max_seq_len, dtype=torch.float64)
        tables = [
            get_1d_rotary_pos_embed(
                dim, places * step, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64
            )
            for dim, step in axes
        ]
        for name, parts in zip(("freqs_cos", "freqs_sin"), zip(*tables, strict=True), strict=True):
            setattr(rope, name, torch.cat(parts, 1).to(getattr(rope, name)))

    def forward(self, video: Tensor, time: Tensor, words: Tensor) -> Tensor:
        """``(n, 3, F, H, W)`` noisy video, ``(n,)`` time in [0, 1], word numbers: the velocity, like the video."""
        text = self.encoder(words)
        video = video.to(self.transformer.patch_embedding.weight.dtype)
        return self.transformer(video, time * TRAIN_TIMESTEPS, text, return_dict=False)[0]

    def times(self, steps: int | None = None) -> Tensor:
        """The denoising times of its schedule, of its own number of steps if absent; see `times`."""
        return times(steps or self.steps, self.shift)

    @classmethod
    def load(
        cls,
        path: Path = WEIGHTS,
        device: str | torch.device = "cpu",
        clip: Clip | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> DemoModel:
        """The trained model, ready to run.

        Args:
            path: Weights.
            device: Where it runs.
            clip: The videos that it is to make; those that the weights were last trained on if absent.
            dtype: Of the weights, but for those that diffusers keeps in float32.

        Raises:
            ValueError: The file holds no weights of a demo model.
        """
        try:
            with safe_open(path, "pt") as file:
                about = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            if "config" not in about:
                raise ValueError("no configuration")
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"{path} must hold weights of a demo model, got {error}") from None
        with safe_open(path, "pt") as file:
            model = cls(about["config"], Clip(**about["clip"]) if "clip" in about else SMALL, about.get("shift"))
            model.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})
        if clip is not None and clip != model.clip:
            model.set_clip(clip)
        exact = set(WanTransformer3DModel._keep_in_fp32_modules)
        for name, parameter in model.named_parameters():
            if not exact & set(name.split(".")):
                parameter.data = parameter.data.to(dtype)
        return model.to(device).eval().requires_grad_(False)

    def load_lora(self, path: Path) -> DemoModel:
        """Loads a LoRA for `FEW` steps beside the weights of the transformer, as diffusers does; the model itself.

        Raises:
            ValueError: The file is no LoRA of a transformer.
        """
        import peft  # noqa: F401  which diffusers needs; said at once where it is missing

        tensors = load_file(path)
        if not tensors or not all(name.startswith("transformer.") and ".lora_" in name for name in tensors):
            raise ValueError(f"{path} must hold a LoRA of a transformer, got {next(iter(tensors), 'nothing')}")
        tensors = {name: tensor.to(self.transformer.dtype) for name, tensor in tensors.items()}
        self.transformer.load_lora_adapter(tensors, prefix="transformer", adapter_name=LORA)
        self.steps = FEW
        return self.eval().requires_grad_(False)


def trained(name: str, device: str | torch.device = "cpu") -> tuple[DemoModel, list[Path]]:
    """A trained model and the files that it was loaded from.

    Args:
        name: ``demo``; ``demo-medium`` or ``demo-large``, which are in bfloat16 on a GPU; or ``demo-few-steps``.
        device: Where it runs.

    Raises:
        ValueError: A file is not here.
    """
    size = name.removeprefix("demo-")
    if size in world.CLIPS:
        if not GROWN.exists():
            raise ValueError(f"weights of the {size} demo model must be in {GROWN}, which is in the repository alone")
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        return DemoModel.load(GROWN, device, world.CLIPS[size], dtype), [GROWN]
    model = DemoModel.load(WEIGHTS, device)
    if name == "demo":
        return model, [WEIGHTS]
    if not FEW_STEPS.exists():
        raise ValueError(f"the LoRA for few steps must be in {FEW_STEPS}: python -m calibatt.tools.studies.distill")
    return model.load_lora(FEW_STEPS), [WEIGHTS, FEW_STEPS]


def times(steps: int = STEPS, shift: float = SHIFT) -> Tensor:
    """Denoising times of an Euler schedule, float32 ``(steps + 1,)`` from 1 to 0, shifted towards noise."""
    even = torch.linspace(1, 0, steps + 1)
    return shift * even / (1 + (shift - 1) * even)


def noise(seeds: list[int], clip: Clip = SMALL) -> Tensor:
    """One starting video per seed, ``(n, 3, frames, pixels, pixels)``; the same on every machine."""
    return next(_noises(seeds, clip))


def _noises(seeds: list[int], clip: Clip) -> Iterator[Tensor]:
    """One video of noise per seed after the other, ``(n, 3, frames, pixels, pixels)``."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = (3, clip.frames, clip.pixels, clip.pixels)
    while True:
        yield torch.stack([torch.randn(size, generator=generator) for generator in generators])


@torch.no_grad()
def generate(
    model: DemoModel, prompts: list[str], seeds: list[int], steps: int | None = None, *, new_noise: bool = False
) -> Tensor:
    """Videos for prompts, one seed each, float32 ``(n, 3, frames, pixels, pixels)`` in about [-1, 1].

    Args:
        model: The model.
        prompts: Sentences of the world.
        seeds: Of the noise.
        steps: Of the schedule; the model's own if absent.
        new_noise: Every step predicts the video and adds new noise, as diffusers' `FlowMatchLCMScheduler` does for
            distilled models; otherwise it goes on along the velocity.
    """
    device = next(model.parameters()).device
    grid, words = model.times(steps).tolist(), world.words(prompts).to(device)
    noises = _noises(seeds, model.clip)
    video = next(noises).to(device)
    for now, then in itertools.pairwise(grid):
        velocity = model(video, torch.full((len(video),), now, device=video.device), words).float()
        if new_noise:
            video = (1 - then) * (video - now * velocity) + then * next(noises).to(device)
        else:
            video = video + (then - now) * velocity
    return video
