"""Calibration's Triton kernels in Triton's interpreter, in a Python of its own: it is chosen at import."""

import os
import subprocess
import sys

CODE = """
import torch
from calibatt.plans import Blocks
from calibatt.tools.calibrate import effects, kernels
from calibatt.tools.calibrate.gradients import AttentionCall

for tokens, blocks, stride in ((100, Blocks(16, 32), 1), (77, Blocks(32, 16), 4), (13, Blocks(16, 16), 3)):
    q, k, v = (torch.randn(3, tokens, 16, generator=torch.Generator().manual_seed(s)) for s in range(3))
    exact = effects.block_statistics(2 * q, k, v, blocks, stride)
    found = kernels.block_statistics(2 * q, k, v, blocks, stride)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    call = AttentionCall(0, q, k, v, out, (q @ k.mT / 4).logsumexp(-1), [grad])
    shape = 2, 3, blocks.q_blocks(tokens), blocks.k_blocks(tokens)
    words = effects.mask_words(torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.6)
    exact = effects._block_effects(call, grad, words, 2, blocks)
    found = kernels.block_effects(call, grad, words, 2, blocks)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-3)  # of a block that holds all mass, noise
try:
    kernels.block_statistics(q, k, v, Blocks(256, 16), 1)
except ValueError as error:
    assert "at most 128" in str(error), error
else:
    raise AssertionError("blocks of 256")
"""


def test_triton_agrees_with_pytorch():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
