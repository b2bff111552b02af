"""Values are looked at before anything is packed, as they are stored; which bytes of a block decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from core.contract.errors import WeightError
from core.weights.checkpoint import StoredTensor, open_checkpoint
from core.weights.gguf_header import QUANTIZED
from core.weights.loader import LoadState
from core.weights.verify import _SCALES, verify

from .raw import save


class Held:
    """A checkpoint of one tensor."""

    def __init__(self, array: Any, kind: str) -> None:
        self._found = StoredTensor(Path("m"), "x", array, kind)

    def stored(self, names: Any) -> Any:
        return iter([self._found])


def check(array: Any, kind: str = "values") -> None:
    verify(Held(array, kind), ["x"])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_the_scales_of_a_block_decide_whether_it_is_finite(kind: str) -> None:
    type_ = GGMLQuantizationType[kind]
    block_bytes = GGML_QUANT_SIZES[type_][1]
    rng = np.random.default_rng(3)
    fine = rng.integers(0, 256, (64, block_bytes), np.uint8)
    for at in _SCALES[kind]:
        if kind == "MXFP4":
            fine[:, at] = rng.integers(0, 253, 64)
        else:
            fine[:, at : at + 2] = rng.normal(size=64).astype("<f2").view(np.uint8).reshape(64, 2)
    with np.errstate(all="ignore"):
        assert np.isfinite(dequantize(fine, type_)).all(), "something beside the scales can be wrong"
    check(fine, kind)
    for at in _SCALES[kind]:
        wrong = fine.copy()
        if kind == "MXFP4":
            wrong[7, at] = 255
        else:
            wrong[7, at : at + 2] = np.array([np.nan], "<f2").view(np.uint8)
        with pytest.raises(WeightError, match=f"has 1 scales of {64 * len(_SCALES[kind])} that are"):
            check(wrong, kind)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_found_wherever_it_is(dtype: Any, value: float) -> None:
    array = np.full((3, 700, 300), np.finfo(np.float16).max, dtype)
    check(array)
    for at in ((0, 0, 0), (1, 437, 11), (2, 699, 299)):
        wrong = array.copy()
        wrong[at] = value
        with pytest.raises(
            WeightError, match="m: tensor 'x' has 1 values of 630000 that are NaN or infinite"
        ):
            check(wrong)


def test_a_scalar_and_nothing_are_looked_at() -> None:
    check(np.float32(1.0).reshape(()))
    check(np.zeros((0, 5), np.float32))
    with pytest.raises(WeightError, match="1 values of 1 "):
        check(np.float32(np.nan).reshape(()))


def test_the_first_wrong_tensor_is_named_and_progress_is_told(tmp_path: Path) -> None:
    tensors = {f"t{i}": np.ones((64, 32), np.float32) for i in range(9)}
    save(tmp_path, tensors)
    (tmp_path / "config.json").write_text("{}")
    told: list[LoadState] = []
    verify(open_checkpoint(tmp_path), list(tensors), told.append)
    assert [(s.tensors_done, s.bytes_done, s.phase) for s in told] == [
        (i, i * 8192, "checking") for i in range(1, 10)
    ]
    assert told[-1].bytes_total == 9 * 8192 and told[-1].tensors_total == 9
    for i in (7, 4):
        tensors[f"t{i}"][3, 3] = np.nan
    save(tmp_path, tensors)
    with pytest.raises(WeightError, match="tensor 't4' has 1 values of 2048"):
        verify(open_checkpoint(tmp_path), list(tensors))
