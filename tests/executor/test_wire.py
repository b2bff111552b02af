"""Records cross a pipe as they were, and nothing else crosses at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.block_manager import BlockCopy
from core.contract.types import Bucket, Outputs, SamplingBatch
from core.engine.config import EngineConfig
from core.engine.messages import AddRequest, StepEvents
from core.engine.metrics import EngineMetrics
from core.engine.stream import StreamEvent
from core.executor.wire import decode, encode
from core.sampling.params import SamplingParams

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
        SamplingParams(n=2, seed=2**64 - 1, stop=("a", "b"), stop_token_ids=(3,), max_tokens=None),
        EngineMetrics(steps=3, finished={"stop": 2}),
        AddRequest(request_id="1", prompt_ids=(5, 6), params=SamplingParams(seed=1), timeout_s=0.5),
        StepEvents((StreamEvent("1", 0, 7), StreamEvent("1", 0, -1, 16, "stop", 3, 1)), EngineMetrics()),
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
    "field",
    [
        {"request_id": 1},
        {"prompt_ids": "abc"},
        {"prompt_ids": (1, 2.0)},
        {"prompt_ids": (True,)},
        {"params": None},
        {"priority": "first"},
        {"timeout_s": "soon"},
        {"salt": None},
    ],
    ids=lambda f: next(iter(f)),
)
def test_a_request_with_a_value_of_another_type_is_not_made(field: dict[str, Any]) -> None:
    good = AddRequest(request_id="1", prompt_ids=(5,), params=SamplingParams())
    with pytest.raises(TypeError):
        replace(good, **field)


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, test_values_come_back_equal], ids=["object", "set", "function"]
)
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be sent to another process"):
        encode(value)
