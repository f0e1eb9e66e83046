"""Models that cannot be calibrated are refused before any work, with the reason and the remedy in a line."""

from __future__ import annotations

import importlib.util

import accelerate
import diffusers
import peft
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from support import adjoint, quantised, wan
from support.plans import plan_for_model
from torch import nn

from calibatt.runtime.adapters import adapter_for
from calibatt.tools.calibrate.checks import CheckError, check_gradients, check_model

pytestmark = pytest.mark.usefixtures("one_thread")
