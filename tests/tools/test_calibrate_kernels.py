"""The Triton kernels of calibration in Triton's interpreter, in a Python of its own: it is chosen at import."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

CODE = """
import torch
from calibatt.plans import Blocks
from calibatt.tools.calibrate import effects, kernels
from calibatt.tools.calibrate.gradients import AttentionCall

HEADS, MASKS = 2, 19
effects.ROUNDED_STRIDE = 1
# Blocks of one row and several, partial ones, head sizes that are no power of two or below what a tile takes; with
# tokens before the video and after it.
CASES = (
    (100, 16, Blocks(16, 32), slice(None)), (77, 24, Blocks(32, 16), slice(None)), (13, 8, Blocks(16, 16), slice(None)),
    (64, 40, Blocks(32, 32), slice(None)), (49, 32, Blocks(16, 16), slice(None)),
    (100, 16, Blocks(16, 32), slice(37, 91)), (77, 24, Blocks(32, 16), slice(0, 60)),
    (64, 16, Blocks(16, 16), slice(16, 64)),
)
for number, (tokens, channels, blocks, video) in enumerate(CASES):
    drawn = torch.Generator().manual_seed(number)
    # Strided, as models hand them over.
    q, k, v, g = torch.randn(4, tokens, HEADS, channels, generator=drawn).transpose(1, 2)
    scores = 2 * q @ k.mT * channels**-0.5
    call = AttentionCall(0, 2 * q, k, v, scores.softmax(-1) @ v, scores.logsumexp(-1), [g], 0.5, video)
    length = call.span[1] - call.span[0]
    shape = blocks.q_blocks(length), blocks.k_blocks(length)
    keeps = torch.rand(MASKS, HEADS, *shape, generator=drawn) < 0.5
    keeps[..., 0] = True
    for masks in (1, MASKS):
        for some in (keeps[:masks], keeps[:masks, :1]):
            words = effects.mask_words(some).expand(HEADS, -1, -1)
            exact = effects._block_effects(call, g, words, masks, blocks)
            found = kernels.block_effects(call, g, words, masks, blocks)
            for ours, theirs in zip(found, exact, strict=True):
                assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            for ours, theirs in zip(found[:2], exact[:2], strict=True):
                # The only block of a row has all the mass: what is left, rounding, is divided by LEAST_REST.
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 if shape[1] > 1 else 1e-2)
    # Rounded are multiples of the largest probability so far: of the largest of all, where that comes first.
    call.q.mul_(0.25)
    call.q[..., 0], call.k[..., 0], call.k[:, call.span[0], 0] = 4.0, 0.0, 5.0
    scores = call.q @ call.k.mT * channels**-0.5
    first = AttentionCall(0, call.q, call.k, v, scores.softmax(-1) @ v, scores.logsumexp(-1), [g], 0.5, video)
    assert (scores[:, video].argmax(-1) == call.span[0]).all()
    large = 100 * g
    exact, found = (of(first, large, words, masks, blocks)[2] for of in (effects._block_effects, kernels.block_effects))
    assert exact.abs().max() > 0.1, exact
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)
    # The first block is far below all others: its probabilities are 0, and so is what rounding does to them.
    call.q[..., 0], call.k[..., 0], call.k[:, call.span[0] + blocks.block_k :, 0] = 40.0, 0.0, 40.0
    scores = call.q @ call.k.mT * channels**-0.5
    far = AttentionCall(0, call.q, call.k, v, scores.softmax(-1) @ v, scores.logsumexp(-1), [g], 0.5, video)
    for ours in kernels.block_effects(far, g, words, masks, blocks):
        assert ours.isfinite().all()
    for stride in (1, 3, 8):
        exact = effects.block_statistics(call.q, k, v, blocks, stride, video)
        found = kernels.block_statistics(call.q, k, v, blocks, stride, video)
        for ours, theirs in zip(found, exact, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

for name, arguments in (
    ("block_statistics", (q, k, v, Blocks(256, 16), 1)), ("block_effects", (call, g, words, 1, Blocks(16, 256))),
):
    try:
        getattr(kernels, name)(*arguments)
    except ValueError as error:
        assert "must be at most 128 tokens to be measured on a GPU, got Blocks(block_q=" in str(error), error
    else:
        raise AssertionError(name)
"""


def test_triton_agrees_with_pytorch():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
