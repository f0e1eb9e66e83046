"""Which scores reach which register of a product's first operand, read from PTX: a layout trick proved without a GPU.

A warpgroup's product has its scores in registers S[0], S[1], ... and takes probabilities as words A[0], A[1], ... of
two 16-bit values. In the layouts of kernels.hopper word A[n] must be made of S[2n], in its low half, and S[2n + 1].
"""

from __future__ import annotations

import re
from collections import defaultdict

INPUTS = {"ex2": 1, "mov": 1, "sub": 1, "fma": 2, "mul": 2, "selp": 2}
"""How many of an instruction's first inputs a score may come through on its way to a probability."""


def wrong_operands(ptx: str, block_k: int) -> tuple[int, list[str]]:
    """How many words of operands were traced to packed pairs of scores, and those that are made of others.

    Args:
        ptx: Of a kernel with 16-bit probabilities.
        block_k: Keys of a block; an instruction multiplies 16 of them.
    """
    made: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    scores: dict[str, set[int]] = defaultdict(set)
    products: list[list[str]] = []
    for line in ptx.splitlines():
        text = re.sub(r"^@!?%p\d+\s+", "", line.strip().rstrip(";"))
        if found := re.match(r"wgmma\.mma_async\S*\s+\{([^}]*)\},\s*(?:\{([^}]*)\})?", text):
            if found[2]:
                products.append(found[2].split(","))
            else:
                for index, register in enumerate(found[1].split(",")):
                    scores[register.strip()].add(index)
        elif found := re.match(r"(\S+)\s+(%\w+)\s*,\s*(.*)$", text):
            made[found[2]].append((found[1], [each.strip() for each in found[3].split(",")]))

    def sources(register: str) -> set[int]:
        found, waiting, seen = set(), [register], set()
        while waiting:
            if (at := waiting.pop()) in seen:
                continue
            seen.add(at)
            found |= scores[at]
            for name, inputs in made[at]:
                waiting += inputs[: INPUTS.get(name.split(".")[0], 0)]
        return found

    def words(register: str, seen: frozenset[str] = frozenset()) -> list[tuple[set[int], set[int]]]:
        found = []
        for name, inputs in made[register] if register not in seen else []:
            if name.startswith("mov"):
                found += words(inputs[0], seen | {register})
            elif name.startswith("cvt.rn") and "x2" in name:
                found.append((sources(inputs[1]), sources(inputs[0])))
        return found

    traced, wrong = 0, []
    for number, registers in enumerate(products):
        for index, register in enumerate(registers):
            place = number % (block_k // 16) * len(registers) + index
            for low, high in words(register.strip()):
                traced += 1
                if (low, high) != ({2 * place}, {2 * place + 1}):
                    wrong.append(f"word {place}: {low}, {high}")
    return traced, wrong
