"""`support.fuzz` with changes chosen by the code that they reach, where atheris is installed (it is no dependency):

cd tests && python -m support.fuzz_guided --seconds 600 --seed 1 --out fuzz.json
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["calibatt.plans"]):
    from support import fuzz


class Bytes(random.Random):
    """Choices that are bits of the fuzzer's input, and zeros after its end."""

    def __init__(self, data: bytes) -> None:
        self._bits = iter(data)
        super().__init__()

    def getrandbits(self, count: int) -> int:
        value = 0
        for _ in range(-(-count // 8)):
            value = value << 8 | next(self._bits, 0)
        return value & (1 << count) - 1

    def random(self) -> float:
        return self.getrandbits(16) / 65536


def main() -> None:
    chosen = fuzz.options().parse_args()
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    with fuzz.memory_folder() as folder:
        run = fuzz.Run("plans", Path(folder), chosen.seed, chosen.out.parent)
        run.limit_memory()
        start = time.monotonic()

        def one(data: bytes) -> None:
            run.once(Bytes(data))
            if (took := time.monotonic() - start) > chosen.seconds:
                fuzz.save(run, chosen.out, took, guided=f"atheris {fuzz.metadata.version('atheris')}")
                os._exit(run.findings.total() > 0)  # libFuzzer does not return

        atheris.Setup([sys.argv[0], "-max_len=256", "-len_control=0", f"-seed={chosen.seed + 1}", "-verbosity=0"], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
