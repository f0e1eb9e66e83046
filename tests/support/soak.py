"""Hours of the demo model with plans, threads, LoRAs and exceptions, at random:

    cd tests && python -m support.soak --minutes 60 --seed 1 --out soak.json

On a GPU the model is in bfloat16, so that our kernels run the plans. Each round attaches one of several plans, or none,
with the LoRA for four steps switched on or off, and calls the model at random times from one thread or from several,
eagerly. Some rounds break a forward in the midst of a block, leave an attachment undetached by an exception of the
caller's own, load a plan anew, or copy the attached model. Every output is compared with what the model's own code
gives with explicit masks (without a plan: bit by bit). What is left behind is looked at after every round: hooks and
attributes of modules, open files, threads, and the memory of the process, whose growth is a line fitted over the second
half of the rounds. ``--out`` adds this run to the runs of a file, so that hours can be made of many short holds of a
machine, each with another ``--seed``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import calibatt
from calibatt.runtime import Plan
from calibatt.tools.demo_model import world
from calibatt.tools.demo_model.model import FEW_STEPS, DemoModel, noise
from calibatt.tools.demo_model.sampler import training_prompts
from support.masked import masked

DEMO_PLAN = Path(__file__).parents[2] / "plans" / "demo.plan"
TIMES = (1.0, 0.9, 0.6, 0.2)
MOST_ERROR = {"cpu": 1e-3, "cuda": 0.05}
"""Of an output, relative to its norm, against explicit masks: fp32 on a CPU, the kernels' 16 bits on a GPU."""
THREADS = 4


class Broken(Exception):
    """What is thrown into a forward, or by a caller."""


def plans(model: nn.Module) -> dict[str, Callable[[], Plan]]:
    """Plans by name, each made or loaded anew when asked for."""
    stored = calibatt.load_plan(DEMO_PLAN)
    grid, blocks, signature = stored.grid, stored.blocks, stored.signature
    shape = (signature.layers, signature.heads, blocks.q_blocks(grid.tokens), blocks.k_blocks(grid.tokens))
    keep = np.random.default_rng(0).random(shape) < 0.3
    keep[..., 0] = True
    return {
        "demo.plan": lambda: calibatt.load_plan(DEMO_PLAN),
        "demo.plan, unpacked later": lambda: calibatt.load_plan(DEMO_PLAN, prove=False),
        "own masks": lambda: calibatt.plan_from_masks(keep, grid, blocks, model=model),
    }


def left_behind(model: nn.Module) -> dict[str, int]:
    """What an attachment could leave: hooks, attributes of instances, open files, threads."""
    hooks = sum(
        len(hooked)
        for module in model.modules()
        for hooked in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )
    return {
        "hooks": hooks,
        "attributes": sum(len(vars(module)) for module in model.modules()),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


def resident_mb() -> float:
    """Memory of the process, and of the GPU where there is one."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    used = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    return (pages * os.sysconf("SC_PAGE_SIZE") + used) / 1e6


class Soak:
    """The model, what it must give, and what was done so far.

    Args:
        device: Where the model runs.
        seed: Of all that is random.
    """

    def __init__(self, device: str, seed: int) -> None:
        self.device, self.random, self.done = device, random.Random(seed), Counter[str]()
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.demo = DemoModel.load(device=device, dtype=dtype).load_lora(FEW_STEPS)
        self.model = self.demo.transformer
        self.plans = plans(self.model)
        self.backends = {name: self.backend(plan()) for name, plan in self.plans.items()}
        self.video = noise([3]).to(device)
        self.words = world.words(training_prompts(1, 0)).to(device)
        self.expected: dict[tuple[str, bool, float], Tensor] = {}
        self.largest_error = 0.0

    def backend(self, plan: Plan) -> str:
        """What `explain` says of who runs a plan: on a GPU it must be our kernels."""
        with calibatt.attach(self.model, plan) as attachment:
            said = next(line for line in attachment.explain().splitlines() if line.startswith("backend on "))
        assert self.device == "cpu" or ": torch" not in said, f"on a GPU our kernels are to run plans, got {said}"
        return said

    def forward(self, now: float) -> Tensor:
        with torch.no_grad():
            return self.demo(self.video, torch.full((1,), now, device=self.device), self.words)

    def lora(self, on: bool) -> None:
        self.model.enable_adapters() if on else self.model.disable_adapters()

    def truth(self, name: str, on: bool, now: float) -> Tensor:
        """The model's own code, with the plan's masks."""
        if (name, on, now) not in self.expected:
            if name == "none":
                self.expected[name, on, now] = self.forward(now)
            else:
                with masked(self.model, self.plans[name]()):
                    self.expected[name, on, now] = self.forward(now)
                dense = self.truth("none", on, now)
                assert not torch.equal(self.expected[name, on, now], dense), f"{name}: masks that change nothing"
        return self.expected[name, on, now]

    def check(self, name: str, on: bool, now: float, found: Tensor) -> None:
        expected = self.expected[name, on, now]
        if name == "none":
            assert torch.equal(found, expected), f"without a plan, LoRA {on}, time {now}: another output"
            return
        error = float((found - expected).norm() / expected.norm())
        self.largest_error = max(self.largest_error, error)
        assert error <= MOST_ERROR[self.device], f"{name}, LoRA {on}, time {now}: {error} of the output is wrong"

    def round(self) -> None:
        """Attaches, calls, breaks, detaches; every output is compared."""
        pick = self.random
        name, on, kind = pick.choice([*self.plans, "none"]), pick.random() < 0.5, pick.choice(KINDS)
        self.done[kind] += 1
        self.lora(on)
        times = [pick.choice(TIMES) for _ in range(THREADS if kind == "threads" else 2)]
        for which in (name, "none"):
            for now in times:
                self.truth(which, on, now)
        if name == "none":
            for now in times:
                self.check(name, on, now, self.forward(now))
            return
        plan = self.plans[name]()
        if kind == "caller throws":
            try:
                with calibatt.attach(self.model, plan):
                    self.check(name, on, times[0], self.forward(times[0]))
                    raise Broken
            except Broken:
                pass
        else:
            with calibatt.attach(self.model, plan):
                getattr(self, kind.replace(" ", "_"))(name, on, times)
        self.check("none", on, times[0], self.forward(times[0]))

    def forwards(self, name: str, on: bool, times: list[float]) -> None:
        for now in times:
            self.check(name, on, now, self.forward(now))

    def threads(self, name: str, on: bool, times: list[float]) -> None:
        found: dict[int, Tensor] = {}
        workers = [
            threading.Thread(target=lambda i=i, now=now: found.__setitem__(i, self.forward(now)))
            for i, now in enumerate(times)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(found) == len(times), f"{len(times) - len(found)} threads of {len(times)} ended without an output"
        for i, now in enumerate(times):
            self.check(name, on, now, found[i])

    def block_throws(self, name: str, on: bool, times: list[float]) -> None:
        def throw(*_: Any) -> None:
            raise Broken

        handle = self.random.choice(list(self.model.blocks)).register_forward_pre_hook(throw)
        try:
            self.forward(times[0])
        except Broken:
            pass
        else:
            raise AssertionError("an exception in a block did not reach the caller")
        finally:
            handle.remove()
        self.forwards(name, on, times[1:])

    def lora_toggled(self, name: str, on: bool, times: list[float]) -> None:
        self.forwards(name, on, times[:1])
        self.lora(not on)
        self.forward(times[0])
        self.lora(on)
        self.forwards(name, on, times[1:])

    def copied(self, name: str, on: bool, times: list[float]) -> None:
        """A copy of an attached model is one without a plan."""
        self.demo.transformer = copy.deepcopy(self.model)
        try:
            self.check("none", on, times[0], self.forward(times[0]))
        finally:
            self.demo.transformer = self.model
        self.forwards(name, on, times[:1])


KINDS = ("forwards", "threads", "caller throws", "block throws", "lora toggled", "copied")


def soak(minutes: float, seed: int, device: str, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Rounds until the time is up; raises at the first wrong output, or where something is left behind.

    cuDNN's attention, which the model's cross-attention would take on a GPU, is switched off: PyTorch keeps a cache of
    it for every thread that ever called it (`getMHAGraphCache_` in aten/src/ATen/native/cudnn/MHA.cpp).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    work = Soak(device, seed)
    work.round()
    gc.collect()
    before, began, sizes = left_behind(work.model), time.monotonic(), []
    while time.monotonic() - began < 60 * minutes:
        work.round()
        gc.collect()
        after = left_behind(work.model)
        assert after == before, f"round {sum(work.done.values())}: left behind {after}, before it was {before}"
        sizes.append(resident_mb())
        if len(sizes) % 50 == 0:
            report(f"{(time.monotonic() - began) / 60:.1f} min  {len(sizes)} rounds  {sizes[-1]:.0f} MB")
    half = sizes[len(sizes) // 2 :]
    growth = float(np.polyfit(np.arange(len(half)), half, 1)[0]) * 1000 if len(half) > 1 else 0.0
    return {
        "command": f"cd tests && python -m support.soak --minutes {minutes:g} --seed {seed} --device {device}",
        "minutes": round((time.monotonic() - began) / 60, 1),
        "rounds": dict(work.done),
        "backends": work.backends,
        "largest_error": work.largest_error,
        "left_behind": before,
        "first_mb": round(sizes[0], 1),
        "last_mb": round(sizes[-1], 1),
        "growth_mb_a_thousand_rounds": round(growth, 2),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "date": date.today().isoformat(),
        "versions": {name: metadata.version(name) for name in ("torch", "diffusers", "peft")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = soak(options.minutes, options.seed, options.device)
    print(json.dumps(result, indent=1))
    if options.out:
        runs = json.loads(options.out.read_text("utf-8")) if options.out.exists() else []
        options.out.write_text(json.dumps([*runs, result], indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
