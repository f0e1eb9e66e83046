"""What a stranger may do to a document or to arrays before the digests are made right again."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from hypothesis import strategies as st

NUMBERS = (0, -1, 3, 2**31, 2**40, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"))
OTHERS = (None, True, "", "x", "\x1b[2J", [], [[]], [0.5], ["x"], [1, 2, 3], {}, {"x": 1}, {"kind": "box"})
ODD = st.sampled_from((*NUMBERS, *OTHERS)).map(copy.deepcopy)
"""What is put in the place of a value."""


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of a document but the whole."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way for key, each in inner for way in ((*path, key), *nodes(each, (*path, key)))]


@st.composite
def documents(draw: st.DrawFn, value: Any) -> Any:
    """The document with a few values replaced, removed, renamed or given twice."""
    found = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        if not (ways := nodes(found)):
            break
        *outer, last = draw(st.sampled_from(ways))
        place = found
        for key in outer:
            place = place[key]
        act = draw(st.sampled_from(("replace", "replace", "remove", "more")))
        if act == "replace":
            place[last] = draw(ODD)
        elif act == "remove":
            del place[last]
        elif isinstance(place, list):
            place.append(copy.deepcopy(place[last]))
        else:
            place[draw(st.sampled_from(("x", "radii", "kind")))] = place.pop(last)
    return found


@st.composite
def arrays(draw: st.DrawFn, array: np.ndarray) -> np.ndarray:
    """The array with an element changed, or cut, longer, of another dtype or of another shape."""
    act = draw(st.sampled_from(("element", "element", "element", "cut", "longer", "dtype", "shape")))
    if act == "element" and array.size:
        found = array.copy()
        at = draw(st.integers(0, array.size - 1))
        if array.dtype.kind == "f":
            found.flat[at] = draw(st.sampled_from([0.0, -1.0, 1e38, float("nan"), float("inf")]))
        else:
            low, high = np.iinfo(array.dtype).min, np.iinfo(array.dtype).max
            near = st.integers(-2, 2).map(lambda step: int(array.flat[at]) + step)
            value = draw(st.one_of(near, st.sampled_from([low, -1, 0, high])))
            found.flat[at] = min(max(value, low), high)
        return found
    if act == "cut" and array.ndim:
        return array[: draw(st.integers(0, len(array)))]
    if act == "longer" and array.ndim:
        return np.concatenate([array, array[: draw(st.integers(0, 3))]])
    if act == "dtype":
        with np.errstate(invalid="ignore"):
            return array.astype(draw(st.sampled_from(["uint8", "int32", "int64", "uint16"])))
    return array.reshape(draw(st.sampled_from([(-1, 1), (1, -1)]))) if array.size else array
