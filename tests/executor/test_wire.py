"""Records cross a pipe as they were, and nothing else crosses at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.block_manager import BlockCopy
from core.contract.types import Bucket, Outputs, SamplingBatch
from core.engine.config import EngineConfig
from core.executor.wire import decode, encode

BUCKET = Bucket(
    tokens=4, requests=4, widths=(2, 0), kind="decode", max_query=1, max_seq=32, outputs=Outputs()
)


@pytest.mark.parametrize(
    "value",
    [
        None,
        -1,
        2**63,
        0.5,
        "text",
        b"bytes",
        (1, (2, 3)),
        Path("a/b"),
        BUCKET,
        BlockCopy(0, 1, 2),
        EngineConfig(model=Path("m"), backend_options={"delay": "1"}),
    ],
    ids=lambda v: type(v).__name__,
)
def test_values_come_back_equal(value: Any) -> None:
    found = decode(encode(value))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.uint64])
def test_arrays_come_back_equal(dtype: Any) -> None:
    array = np.arange(6, dtype=dtype).reshape(2, 3)
    found = decode(encode(array))
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_sampling_parameters_cross() -> None:
    zeros = np.zeros(2, np.float32)
    batch = SamplingBatch(
        temperature=zeros,
        top_k=zeros,
        top_p=zeros,
        min_p=zeros,
        seed=np.array([1, 2**64 - 1], np.uint64),
        position=zeros,
        choice=zeros,
    )
    np.testing.assert_array_equal(decode(encode(batch)).seed, batch.seed)


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, test_values_come_back_equal], ids=["object", "set", "function"]
)
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be sent to another process"):
        encode(value)
