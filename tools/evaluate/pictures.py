"""Videos and figures as pictures that an HTML page can hold."""

from __future__ import annotations

import base64
import html
import io

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from calibatt.plans.page import Html

SHOWN_PIXELS = 192
"""About how many pixels wide one video is shown."""
FRAME_MS = 180
DIFFERENCE_GAIN = 4
GAP_PIXELS = 2


def animation(videos: list[Tensor]) -> bytes:
    """Videos ``(3, F, H, W)`` in [-1, 1] side by side as an animated PNG, each about `SHOWN_PIXELS` wide."""
    small = [_shrunk(video.float().cpu().clamp(-1, 1)) for video in videos]
    shown = [torch.nn.functional.pad(video, (GAP_PIXELS,) * 4, value=1.0) for video in small]
    frames = ((torch.cat(shown, 3) + 1) * 127.5).byte().permute(1, 2, 3, 0)
    scale = max(1, SHOWN_PIXELS // small[0].shape[3])
    frames = frames.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    pictures = [Image.fromarray(frame.numpy()) for frame in frames]
    out = io.BytesIO()
    pictures[0].save(
        out, "PNG", save_all=True, append_images=pictures[1:], duration=FRAME_MS, loop=0, default_image=False
    )
    return out.getvalue()


def _shrunk(video: Tensor) -> Tensor:
    """A video more than twice as wide as it is shown, averaged down."""
    by = video.shape[3] // SHOWN_PIXELS
    return torch.nn.functional.avg_pool2d(video.transpose(0, 1), by).transpose(0, 1) if by > 1 else video


def side_by_side(dense: Tensor, planned: Tensor) -> bytes:
    """Two videos and their difference, enlarged `DIFFERENCE_GAIN` times around grey."""
    difference = (planned.clamp(-1, 1) - dense.clamp(-1, 1)) * DIFFERENCE_GAIN / 2
    return animation([dense, planned, difference])


def embedded(picture: bytes, alt: str, kind: str = "") -> Html:
    """A PNG as an HTML element that needs no file; ``drawing`` is the kind of pictures with a white ground."""
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    return Html(f'<img alt="{html.escape(alt)}" src="{source}" class="{kind}">')


def drawn(figure: Figure) -> bytes:
    """A figure as PNG."""
    FigureCanvasAgg(figure)
    out = io.BytesIO()
    figure.savefig(out, dpi=130, facecolor="white", format="png")
    return out.getvalue()
