"""Wan 2.1 1.3B: calibrated, compiled, and one video dense and by the plan. Run in this folder, on a CUDA GPU:

calibatt-calibrate --model wan:sampler --steps 15 --device cuda -o stats/    # --dry-run says what it will cost
calibatt-compile stats/ -o wan.plan
python wan.py wan.plan
"""

import sys
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

import calibatt

MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
SIZE = {"height": 480, "width": 832, "num_frames": 81}


def sampler(steps: int | None, device: str) -> calibatt.PipelineSampler:
    """What ``calibatt-calibrate --model wan:sampler`` calls."""
    pipe = WanPipeline.from_pretrained(MODEL, torch_dtype=torch.bfloat16).to(device)
    return calibatt.PipelineSampler(pipe, num_inference_steps=steps or 30, **SIZE)


def dense_and_planned(pipe: Any, plan: str, **call: Any) -> tuple[np.ndarray, np.ndarray]:
    """One video twice from the same noise, float ``(frames, height, width, 3)`` in [0, 1]."""

    def generate() -> np.ndarray:
        return pipe(**call, generator=torch.Generator().manual_seed(0), output_type="np").frames[0]

    dense = generate()
    with calibatt.attach(pipe, calibatt.load_plan(plan)) as attachment:
        planned = generate()
        print(attachment.explain())
    print(f"PSNR {-10 * np.log10(np.mean((planned - dense) ** 2)):.1f} dB")
    return dense, planned


if __name__ == "__main__":
    wan = WanPipeline.from_pretrained(MODEL, torch_dtype=torch.bfloat16).to("cuda")
    videos = dense_and_planned(wan, sys.argv[1], prompt="a boat on a lake at sunset", num_inference_steps=30, **SIZE)
    for name, video in zip(("dense.mp4", "planned.mp4"), videos, strict=True):
        export_to_video(video, name, fps=16)
