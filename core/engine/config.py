"""EngineConfig: what a user may set, and its resolution against backend, model and memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from core.contract.errors import ConfigError, UnsupportedError
from core.contract.spec import BackendSpec
from core.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of an engine; None = chosen from model, backend and memory.

    Attributes:
        model: folder or .gguf file. backend: name, or "auto". device: index of the backend's device.
        dtype: "auto" = the checkpoint's if the backend computes in it, else the backend's first.
        max_model_len: prompt and output tokens of a sequence at most.
        max_requests: sequences running at once at most. max_batch_tokens: tokens in one step at most.
        block_size: tokens per KV block. num_blocks: KV blocks, in place of a budget.
        kv_cache_bytes: memory for the KV cache. prefix_cache: share blocks between requests with equal
            beginnings.
        policy: order of waiting requests. max_waiting: refuse requests beyond this many waiting.
        overlap: steps in flight; None = what the backend declares. tensor_parallel: ranks that share each
            layer.
        num_threads: host threads for the backend. warm_up: compile before the first request what a backend
            of fixed shapes needs to decode; one of static shapes compiles everything then in any case.
        backend_options: passed to the backend as they are.
    """

    model: Path
    backend: str = "auto"
    device: int = 0
    dtype: str = "auto"
    max_model_len: int | None = None
    max_requests: int = 64
    max_batch_tokens: int = 2048
    block_size: int | None = None
    num_blocks: int | None = None
    kv_cache_bytes: int | None = None
    prefix_cache: bool = True
    policy: Literal["fcfs", "priority"] = "fcfs"
    max_waiting: int | None = None
    overlap: int | None = None
    tensor_parallel: int = 1
    num_threads: int | None = None
    warm_up: bool = False
    backend_options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_batch_tokens", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_model_len", "block_size", "num_blocks", "kv_cache_bytes", "overlap", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if self.max_requests > self.max_batch_tokens:
            raise ConfigError(
                f"max_requests is {self.max_requests}, but a step has {self.max_batch_tokens} tokens at "
                "most and each "
                "running request takes one; raise max_batch_tokens or lower max_requests"
            )


def resolve_dtype(spec: BackendSpec, wanted: str, checkpoint: str) -> str:
    """The compute dtype.

    Raises:
        UnsupportedError: the backend does not compute in the wanted dtype.
    """
    if wanted == "auto":
        return checkpoint if checkpoint in spec.dtypes else spec.dtypes[0]
    if wanted not in spec.dtypes:
        raise UnsupportedError(
            f"backend {spec.name!r} does not compute in {wanted!r}; choose from {', '.join(spec.dtypes)}"
        )
    return wanted


def resolve_length(wanted: int | None, model: ModelConfig) -> int:
    """The maximum model length.

    Raises:
        ConfigError: longer than the model's own.
    """
    if wanted is not None and wanted > model.max_position:
        raise ConfigError(
            f"max_model_len is {wanted}, but the model was made for {model.max_position} positions; lower it"
        )
    return wanted or min(model.max_position, 8192)
