"""Video transformers at their published sizes with random weights: for speed, never for claims of quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calibatt.plans import TokenGrid
from calibatt.runtime.adapters import adapter_for

NOISIEST = 999
"""The timestep of a forward that is measured alone."""


@dataclass(frozen=True)
class Published:
    """A model, and the sizes at which it is measured.

    Args:
        architecture: Its class in diffusers.
        config: What the class is made with, all layers.
        sizes: Latents by name: (frames, height, width) before they are cut into patches.
        text_tokens: Of the embedded prompt.
        block: Tokens of a query or key block.
        dtype: Of the weights that are not kept in float32.
        what: What it stands for, for people.
        text_mask: Whether a forward takes a mask of the text tokens; none of them is padding here.
        rising: Whether its timesteps rise from the noise, 0, to the video, 1000; others fall.
    """

    architecture: str
    config: Mapping[str, Any]
    sizes: Mapping[str, tuple[int, int, int]]
    text_tokens: int
    block: int
    dtype: torch.dtype
    what: str
    text_mask: bool = False
    rising: bool = False

    @property
    def layers(self) -> int:
        """As published."""
        return int(self.config["num_layers"])

    @property
    def repeats(self) -> bool:
        """Whether diffusers compiles its blocks one by one."""
        import diffusers

        return bool(getattr(diffusers, self.architecture)._repeated_blocks)

    def timestep(self, now: Tensor) -> Tensor:
        """What the model calls a time that falls from 1000, the noise, to 0."""
        return 1000 - now if self.rising else now

    def make(self, layers: int, device: torch.device, seed: int = 0) -> Any:
        """The model on a device, weights drawn there: `dtype`, but float32 where diffusers keeps it when it loads.

        Args:
            layers: How many of the layers.
            device: Where it is made; the CPU never holds it.
            seed: Of the weights.
        """
        import diffusers

        torch.manual_seed(seed)
        with _default_dtype(self.dtype), device:
            model = getattr(diffusers, self.architecture)(**{**self.config, "num_layers": layers})
        kept = set(model._keep_in_fp32_modules or ())
        for name, parameter in model.named_parameters():
            if kept & set(name.split(".")):
                parameter.data = parameter.data.float()
            if name == "pos_frequencies":  # Mochi makes them zeros
                parameter.data.normal_()
        return model.eval().requires_grad_(False)

    def inputs(self, size: str, device: torch.device, seed: int = 1) -> dict[str, Any]:
        """Arguments of one forward: one sample of noise at `NOISIEST` and a random prompt."""
        generator = torch.Generator(device).manual_seed(seed)
        noise = partial(torch.randn, generator=generator, device=device, dtype=self.dtype)
        text_dim = self.config["text_embed_dim" if "text_embed_dim" in self.config else "text_dim"]
        found = {
            "hidden_states": noise(1, self.config["in_channels"], *self.sizes[size]),
            # As pipelines make it: code is compiled for it.
            "timestep": self.timestep(torch.tensor(NOISIEST, device=device)).expand(1),
            "encoder_hidden_states": noise(1, self.text_tokens, text_dim),
            "return_dict": False,
        }
        if self.text_mask:
            found["encoder_attention_mask"] = torch.ones(1, self.text_tokens, dtype=torch.bool, device=device)
        return found


class Packed(Published):
    """MiniMax-H3: one sequence of text, audio and video, in that order; of its timesteps 0 is noise and 1 the video."""

    def timestep(self, now: Tensor) -> Tensor:
        return 1 - now / 1000

    def inputs(self, size: str, device: torch.device, seed: int = 1) -> dict[str, Any]:
        """As of `Published`, with the sound that belongs to so many frames; all of it is at one time."""
        from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

        generator = torch.Generator(device).manual_seed(seed)
        noise = partial(torch.randn, 1, generator=generator, device=device, dtype=self.dtype)
        frames, height, width = self.sizes[size]
        pictures = 17 * (frames - 2) // 5 + 5
        sound, patch = round(pictures / 24 * 40), (1, 2, 2)  # 24 pictures and 40 latents of each channel a second
        tags = {"audio_channels": 2, "audio_tag": 2, "video_tag": 0}
        layout = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
            torch.ones(self.text_tokens), frames, height, width, sound, patch, **tags
        )
        positions, kinds, video, audio, text = (x.to(device) for x in layout[:5])
        return {
            "hidden_states": noise(len(video), self.config["in_channels"] * 4),
            "audio_hidden_states": noise(len(audio), self.config["audio_in_channels"]),
            "encoder_hidden_states": noise(len(text), self.config["text_dim"]),
            "timestep": self.timestep(torch.tensor(NOISIEST, device=device)).expand(1),
            "timestep_indices": torch.zeros_like(kinds),
            "token_tags": kinds,
            "position_ids": positions,
            "video_indices": video,
            "audio_indices": audio,
            "text_indices": text,
            "return_dict": False,
        }


def token_grid(model: nn.Module, inputs: Mapping[str, Any]) -> TokenGrid:
    """The video tokens of a forward with these arguments."""
    return adapter_for(model).token_grid(model, inputs)


def _wan(heads: int, ffn_dim: int, layers: int) -> dict[str, Any]:
    return {
        "patch_size": (1, 2, 2), "num_attention_heads": heads, "attention_head_dim": 128, "in_channels": 16,
        "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": ffn_dim, "num_layers": layers,
    }  # fmt: skip


WAN_SIZES = {"480p": (21, 60, 104), "720p": (21, 90, 160)}
"""Latents of 81 frames at 832 x 480 and 1280 x 720."""
MOCHI = {
    "patch_size": 2, "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 48, "in_channels": 12,
    "pooled_projection_dim": 1536, "text_embed_dim": 4096, "time_embed_dim": 256, "max_sequence_length": 256,
}  # fmt: skip
H3 = {
    "num_attention_heads": 56, "attention_head_dim": 128, "hidden_size": 5376, "num_layers": 50, "ffn_dim": 14336,
    "in_channels": 24, "audio_in_channels": 32, "text_dim": 5120,
}  # fmt: skip
H3_SIZES = {"5s": (37, 48, 84), "10s": (72, 48, 84), "15s": (107, 48, 84)}
"""Latents of 124, 243 and 362 frames at 1344 x 768: with sound 37,710, 73,386 and 109,062 tokens, text apart."""
TINY = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32,
}  # fmt: skip
TINY_MOCHI = {
    "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "in_channels": 4,
    "pooled_projection_dim": 16, "text_embed_dim": 16, "time_embed_dim": 8, "max_sequence_length": 7,
}  # fmt: skip
TINY_H3 = {
    "num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 32, "num_layers": 3, "num_refiner_layers": 1,
    "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 4, "text_dim": 16, "freq_dim": 16,
    "time_embed_hidden_dim": 16, "time_embed_dim": 16, "rope_freq_dim": 2,
}  # fmt: skip

MODELS = {
    "wan-14b": Published(
        "WanTransformer3DModel", _wan(40, 13824, 40), WAN_SIZES, 512, 128, torch.bfloat16,
        "Wan 2.1 14B (and one expert of Wan 2.2 A14B), 81 frames",
    ),
    "wan-1.3b": Published(
        "WanTransformer3DModel", _wan(12, 8960, 30), WAN_SIZES, 512, 128, torch.bfloat16, "Wan 2.1 1.3B, 81 frames"
    ),
    "mochi": Published(
        "MochiTransformer3DModel", MOCHI, {"480p": (28, 60, 106)}, 256, 128, torch.bfloat16,
        "Mochi 1, 163 frames of 848 x 480", text_mask=True, rising=True,
    ),
    "h3": Packed(
        "MiniMaxH3Transformer3DModel", H3, H3_SIZES, 300, 128, torch.bfloat16,
        "MiniMax-H3, 124 to 362 frames of 1344 x 768 with sound",
    ),
    "tiny": Published(
        "WanTransformer3DModel", TINY, {"small": (4, 16, 16), "smaller": (3, 16, 12)}, 7, 16, torch.float32,
        "A Wan that a CPU runs in no time: proves that the command works",
    ),
    "tiny-mochi": Published(
        "MochiTransformer3DModel", TINY_MOCHI, {"small": (4, 16, 16)}, 7, 16, torch.float32,
        "The same of Mochi", text_mask=True, rising=True,
    ),
    "tiny-h3": Packed(
        "MiniMaxH3Transformer3DModel", TINY_H3, {"small": (7, 16, 16)}, 7, 16, torch.float32, "The same of MiniMax-H3"
    ),
}  # fmt: skip
"""By the names of the command line; the runtime's table of adapters has a row for each."""


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
