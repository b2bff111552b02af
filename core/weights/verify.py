"""Whether a checkpoint's values are numbers, before a byte of them is on a device.

All bytes that the model uses are read once, as they are stored: of quantized blocks the scales alone can be
wrong. Loading finds the files in the page cache afterwards.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import inf
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from core.contract.errors import WeightError
from core.contract.types import Param
from core.models.base import ModelDefinition, leaves
from core.models.config import ModelConfig
from core.weights.checkpoint import Checkpoint, StoredTensor
from core.weights.loader import LoadState, Progress
from core.weights.mxfp4 import LARGEST_SCALE as LARGEST_E8M0

_PIECE = 1 << 18
"""Elements looked at together: what is made of them stays in a cache."""
_TASK = 1 << 26
"""Bytes of a thread's task."""
_MOST_THREADS = 8

_EXPONENTS: dict[np.dtype[Any], tuple[type[np.unsignedinteger[Any]], int]] = {
    np.dtype(np.float64): (np.uint64, 0x7FF0 << 48),
    np.dtype(np.float32): (np.uint32, 0x7F80 << 16),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
    np.dtype(ml_dtypes.float8_e5m2): (np.uint8, 0x7C),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, 0x7F),
}
"""An integer of a float's size, and the bits that are all set in NaN and Inf and only there."""

_SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "MXFP4": (0,),
}
"""Where a block of a GGUF type has its scales, in bytes: float16, of MXFP4 an exponent."""


def verify_values(
    definition: ModelDefinition, c: ModelConfig, checkpoint: Checkpoint, progress: Progress | None = None
) -> None:
    """Look at every value that the model reads.

    Raises:
        WeightError: one is NaN or infinite; names file, tensor and how many there are.
    """
    params = [leaf for leaf in leaves(definition.params(c)) if isinstance(leaf, Param)]
    names = dict.fromkeys(part.name for param in params for part in param.parts)
    verify(checkpoint, names, progress)


def verify(checkpoint: Checkpoint, names: Collection[str], progress: Progress | None = None) -> None:
    """Look at every value of these tensors. Raises as `verify_values`."""
    tensors = list(checkpoint.stored(names))
    start, total = time.monotonic(), sum(t.array.nbytes for t in tensors)
    tasks = [task for i, t in enumerate(tensors) for task in _tasks(i, t)]
    left = [sum(1 for i, *_ in tasks if i == n) for n in range(len(tensors))]
    bad = [0] * len(tensors)
    done, finished = 0, left.count(0)
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        try:
            for i, size, found in pool.map(lambda task: (task[0], task[1], task[2]()), tasks):
                bad[i] += found
                left[i] -= 1
                done, finished = done + size, finished + (not left[i])
                if bad[i] and not left[i]:
                    raise _error(tensors[i], bad[i])
                if progress is not None:
                    seconds = time.monotonic() - start
                    progress(LoadState(done, total, finished, len(tensors), seconds, "checking"))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _tasks(i: int, t: StoredTensor) -> Iterator[tuple[int, int, Callable[[], int]]]:
    """(number of the tensor, bytes, what counts its wrong values) of parts of a tensor."""
    array = t.array if t.array.ndim else t.array[None]
    rows = max(1, _TASK * len(array) // max(array.nbytes, 1))
    for at in range(0, len(array), rows):
        part = array[at : at + rows]
        yield i, part.nbytes, lambda part=part: _count_bad(part, t.kind, t.limit)  # type: ignore[misc]


def _count_bad(array: npt.NDArray[Any], kind: str, limit: float) -> int:
    if kind == "e8m0":
        return int(np.count_nonzero(array > limit))
    if kind == "MXFP4":
        return int(np.count_nonzero(array[:, 0] > LARGEST_E8M0))
    if kind in _SCALES:
        pairs = np.concatenate([array[:, o : o + 2] for o in _SCALES[kind]], axis=1)
        return _count_infinite(np.ascontiguousarray(pairs).view("<f2"))
    bad = _count_infinite(array)
    if limit != inf and array.size:
        bad += int(np.count_nonzero(np.abs(array.astype(np.float64)) > limit))
    return bad


def _count_infinite(array: npt.NDArray[Any]) -> int:
    """Comparing integers is several times as quick as asking each float."""
    if array.dtype not in _EXPONENTS:
        return 0
    integer, bits = _EXPONENTS[array.dtype]
    words = array.view(integer).reshape(-1)
    found = 0
    for at in range(0, words.size, _PIECE):
        piece = words[at : at + _PIECE]
        found += int(np.count_nonzero((piece & bits) == bits))
    return found


def _error(t: StoredTensor, bad: int) -> WeightError:
    size, what = t.array.size, "values" if t.kind == "values" else "scales"
    if t.kind in _SCALES:
        size = len(_SCALES[t.kind]) * t.array.size // t.array.shape[-1]
    wrong = "NaN or infinite" if t.limit == inf else f"NaN or beyond {t.limit:g}"
    return WeightError(
        f"{t.file}: tensor {t.name!r} has {bad} {what} of {size} that are {wrong}, but all must be finite; "
        "download the file again"
    )
