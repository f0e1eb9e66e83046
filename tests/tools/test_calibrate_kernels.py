"""The Triton statistics in Triton's interpreter, in a Python of its own: interpretation is chosen at import."""

import os
import subprocess
import sys

CODE = """
import torch
from calibatt.plans import Blocks
from calibatt.tools.calibrate import kernels, statistics

for tokens, blocks, stride in ((100, Blocks(16, 32), 1), (77, Blocks(32, 16), 4), (13, Blocks(16, 16), 3)):
    q, k, v = (torch.randn(3, tokens, 16, generator=torch.Generator().manual_seed(s)) for s in range(3))
    exact = statistics.block_statistics(2 * q, k, v, blocks, stride)
    found = kernels.block_statistics(2 * q, k, v, blocks, stride)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
for wrong, rule in ((dict(blocks=Blocks(256, 16)), "at most 128"), (dict(q=q[..., :12]), "head_dim must be one of")):
    try:
        kernels.block_statistics(**(dict(q=q, k=k, values=v, blocks=Blocks(16, 16), stride=1) | wrong))
    except ValueError as error:
        assert rule in str(error), error
    else:
        raise AssertionError(wrong)
"""


def test_triton_agrees_with_pytorch():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
