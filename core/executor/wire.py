"""Records between processes: msgpack of plain values, arrays, and the dataclasses in a fixed table.

Nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from core.block_manager import BlockCopy
from core.contract.types import (
    Bucket,
    CacheGroupSpec,
    CacheLayerSpec,
    CachePlan,
    Outputs,
    SampledTokens,
    SamplingBatch,
    StatePart,
)
from core.engine.config import EngineConfig
from core.engine.memory import CacheBudget
from core.engine.messages import MESSAGES
from core.engine.metrics import EngineMetrics
from core.engine.resolve import Choice, Resolution
from core.executor.failure import Failure
from core.executor.rank import RankPlace, RankReport
from core.runner.runner import StepResult
from core.sampling.params import SamplingParams
from core.scheduler import PromptRow
from core.weights.loader import LoadState

_RECORDS: Mapping[str, type[Any]] = {
    record.__name__: record
    for record in (
        BlockCopy,
        Bucket,
        CacheBudget,
        CacheGroupSpec,
        CacheLayerSpec,
        CachePlan,
        Choice,
        EngineConfig,
        EngineMetrics,
        Failure,
        LoadState,
        Outputs,
        PromptRow,
        RankPlace,
        RankReport,
        Resolution,
        SampledTokens,
        SamplingBatch,
        SamplingParams,
        StatePart,
        StepResult,
        *MESSAGES,
    )
}


def encode(value: Any) -> bytes:
    """A message.

    Raises:
        TypeError: a value of a type that is not in the table.
    """
    packed: bytes = msgpack.packb(value, default=_encode, strict_types=True)
    return packed


def decode(message: bytes | memoryview) -> Any:
    """The value of a message; sequences come back as tuples. Whatever is not such a message raises."""
    return msgpack.unpackb(message, object_hook=_decode, use_list=False, strict_map_key=False)


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, np.ndarray):
        return {"~array": [value.dtype.str, list(value.shape), value.tobytes()]}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return {"~path": str(value)}
    name = type(value).__name__
    if is_dataclass(value) and _RECORDS.get(name) is type(value):
        return {"~record": [name, [getattr(value, f.name) for f in fields(value)]]}
    raise TypeError(f"{type(value).__name__} cannot be sent to another process; add it to core.executor.wire")


def _decode(found: dict[str, Any]) -> Any:
    if "~array" in found:
        dtype, shape, data = found["~array"]
        return np.frombuffer(data, np.dtype(dtype)).reshape(shape)
    if "~path" in found:
        return Path(found["~path"])
    if "~record" in found:
        name, values = found["~record"]
        record = _RECORDS[name]
        return record(**{f.name: v for f, v in zip(fields(record), values, strict=True)})
    return found
