"""Without a GPU the triton kernels run in triton's interpreter, which has to be asked for before they are defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
