"""DummyCheckpoint: the same values however they are read."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from core.contract.errors import WeightError
from core.weights.dummy import ROWS, DummyCheckpoint

SHAPES: dict[str, tuple[int, ...]] = {
    "a.weight": (3 * ROWS + 5, 7),
    "b.weight": (3 * ROWS + 5, 7),
    "model.norm.weight": (ROWS,),
    "cube": (4, 5, 6),
    "scalar": (),
    "empty": (0, 3),
}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_slice_equals_that_slice_of_the_whole(dtype: type) -> None:
    found = DummyCheckpoint(SHAPES, seed=3, dtype=dtype)
    for name, index in [
        ("a.weight", (slice(ROWS - 1, 2 * ROWS + 1), slice(2, 4))),
        ("a.weight", (slice(3 * ROWS, None), slice(None))),
        ("a.weight", (slice(9, 9), slice(None))),
        ("model.norm.weight", (slice(5, 9),)),
        ("cube", (slice(1, 3), slice(0, 2), slice(5, 6))),
        ("empty", (slice(0, 4), slice(1, 2))),
        ("scalar", ()),
    ]:
        part, whole = found.read(name, index), found.read(name)
        assert part.shape == whole[index].shape and part.dtype == whole.dtype == np.dtype(dtype)
        assert np.array_equal(part, whole[index]), name


def test_values_depend_on_seed_and_name_alone() -> None:
    first, again, other = (DummyCheckpoint(SHAPES, seed=s) for s in (1, 1, 2))
    again.read("b.weight")
    assert np.array_equal(first.read("a.weight"), again.read("a.weight"))
    assert not np.array_equal(first.read("a.weight"), other.read("a.weight"))
    assert not np.array_equal(first.read("a.weight"), first.read("b.weight"))
    rows = first.read("a.weight")
    assert len({r.tobytes() for r in rows}) == len(rows)


def test_values_have_the_mean_and_deviation_asked_for() -> None:
    found = DummyCheckpoint({"w": (512, 64), "x.norm.weight": (4096,)}, std=0.5)
    assert abs(found.read("w").mean()) < 0.02 and abs(found.read("w").std() - 0.5) < 0.02
    assert abs(found.read("x.norm.weight").mean() - 1) < 0.05


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(WeightError, match="no tensor 'x'"):
        DummyCheckpoint(SHAPES).read("x")
