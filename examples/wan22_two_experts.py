"""Wan 2.2 A14B: its two experts are two models, each with a plan of its own. Run in this folder, on a CUDA GPU:

calibatt-calibrate --model wan22_two_experts:high --steps 15 --device cuda -o stats_high/
calibatt-calibrate --model wan22_two_experts:low --steps 15 --device cuda -o stats_low/
calibatt-compile stats_high/ -o high.plan
calibatt-compile stats_low/ -o low.plan
python wan22_two_experts.py high.plan low.plan
"""

import sys
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

import calibatt

MODEL = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
SIZE = {"height": 480, "width": 832, "num_frames": 81}


def pipeline() -> WanPipeline:
    """Both experts; the one that is not at work waits in the host's memory."""
    pipe = WanPipeline.from_pretrained(MODEL, torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    return pipe


def high(steps: int | None, device: str) -> calibatt.PipelineSampler:
    """The expert that begins, where there is much noise."""
    return calibatt.PipelineSampler(pipeline(), num_inference_steps=steps or 40, **SIZE)


def low(steps: int | None, device: str) -> calibatt.PipelineSampler:
    """The expert that finishes."""
    return calibatt.PipelineSampler(pipeline(), transformer="transformer_2", num_inference_steps=steps or 40, **SIZE)


def planned(pipe: Any, high_plan: str, low_plan: str, **call: Any) -> np.ndarray:
    """A video by both plans, float ``(frames, height, width, 3)`` in [0, 1]."""
    plans = {"transformer": calibatt.load_plan(high_plan), "transformer_2": calibatt.load_plan(low_plan)}
    with calibatt.attach(pipe, plans) as attachment:
        video = pipe(**call, generator=torch.Generator().manual_seed(0), output_type="np").frames[0]
        print(attachment.explain())
    return video


if __name__ == "__main__":
    video = planned(pipeline(), *sys.argv[1:3], prompt="a boat on a lake at sunset", num_inference_steps=40, **SIZE)
    export_to_video(video, "planned.mp4", fps=16)
