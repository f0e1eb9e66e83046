"""The demo model: diffusers' own Wan transformer, small, in pixel space, and a prompt encoder of ours."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from calibatt.tools.demo import world

WEIGHTS = Path(__file__).with_name("weights.safetensors")
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
STEPS = 8
SHIFT = 3.0


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
    """

    def __init__(self, config: dict | None = None):
        super().__init__()
        self.config = config or CONFIG
        self.transformer = WanTransformer3DModel(**self.config)
        self.encoder = PromptEncoder(self.config["text_dim"])

    def forward(self, video: Tensor, time: Tensor, words: Tensor) -> Tensor:
        """``(n, 3, F, H, W)`` noisy video, ``(n,)`` time in [0, 1], word numbers: the velocity, like the video."""
        text = self.encoder(words)
        return self.transformer(video, time * TRAIN_TIMESTEPS, text, return_dict=False)[0]

    def save(self, path: Path, **notes: object) -> None:
        """Writes bfloat16 weights with the configuration."""
        tensors = {name: p.detach().to(torch.bfloat16).contiguous().cpu() for name, p in self.state_dict().items()}
        save_file(tensors, path, metadata={"config": json.dumps(self.config), "notes": json.dumps(notes)})

    @classmethod
    def load(cls, path: Path = WEIGHTS, device: str | torch.device = "cpu") -> DemoModel:
        """The trained model in float32, ready to run."""
        with safe_open(path, "pt") as file:
            model = cls(json.loads(file.metadata()["config"]))
            model.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})
        return model.to(device).eval().requires_grad_(False)


def times(steps: int = STEPS, shift: float = SHIFT) -> Tensor:
    """Denoising times of an Euler schedule, float32 ``(steps + 1,)`` from 1 to 0, shifted towards noise."""
    even = torch.linspace(1, 0, steps + 1)
    return shift * even / (1 + (shift - 1) * even)


def noise(seeds: list[int]) -> Tensor:
    """One starting video per seed, ``(n, 3, FRAMES, PIXELS, PIXELS)``; the same on every machine."""
    size = (3, world.FRAMES, world.PIXELS, world.PIXELS)
    return torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def generate(model: DemoModel, prompts: list[str], seeds: list[int], steps: int = STEPS) -> Tensor:
    """Videos for prompts, one seed each, float32 ``(n, 3, FRAMES, PIXELS, PIXELS)`` in about [-1, 1]."""
    device = next(model.parameters()).device
    grid, words = times(steps).tolist(), world.words(prompts).to(device)
    video = noise(seeds).to(device)
    for now, then in itertools.pairwise(grid):
        velocity = model(video, torch.full((len(video),), now, device=video.device), words)
        video = video + (then - now) * velocity.float()
    return video
