"""EngineConfig: every option of an engine, what it means, and what it means when it is not given.

The table of options in the documentation, the options of the command line and `EngineConfig.of` are made from
the fields here. What an option that was not given comes to is decided in `core.engine.resolve`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from core.contract.errors import ConfigError

MAX_WAITING = 1024
"""Sequences that may wait in a server where the configuration does not say."""


def option(default: Any, meaning: str, otherwise: str = "") -> Any:
    """A field with its meaning; `otherwise` = what is taken where it is None."""
    return field(default=default, metadata={"meaning": meaning, "otherwise": otherwise})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of an engine. None = chosen from the model, the backend and the memory there is."""

    model: Path = field(metadata={"meaning": "folder with safetensors, or a .gguf file", "otherwise": ""})
    backend: str = option("auto", "backend by name; auto = the best that finds a device")
    device: int = option(0, "index of the backend's device; that of the first rank")
    dtype: str = option("auto", "compute dtype; auto = the checkpoint's where the backend computes in it")
    load_format: Literal["auto", "dummy"] = option(
        "auto",
        "where weights come from: auto = the model's files; dummy = seeded random values, for which "
        "config.json is enough",
    )
    quantized: Literal["auto", "packed", "dequantized"] = option(
        "auto",
        "quantized weights of a .gguf file: packed = as they are, where the backend can; dequantized = "
        "in the "
        "compute dtype, larger and faster; auto = dequantized where they leave room for the KV cache",
    )
    max_model_len: int | None = option(
        None,
        "tokens of prompt and output of a sequence at most",
        "the model's own, 8192 or what memory holds",
    )
    max_requests: int = option(64, "sequences that run at once at most")
    max_batch_tokens: int = option(2048, "tokens of one step at most")
    block_size: int | None = option(None, "tokens of a KV block", "the backend's preferred size")
    num_blocks: int | None = option(None, "KV blocks, in place of a budget", "what the budget buys")
    kv_cache_bytes: int | None = option(
        None, "device memory for the KV cache of a rank, in bytes", "60 % of what the weights leave free"
    )
    prefix_cache: bool = option(True, "requests with equal beginnings share KV blocks")
    policy: Literal["fcfs", "priority"] = option("fcfs", "order of waiting requests: fcfs or priority")
    max_waiting: int | None = option(
        None, "requests beyond this many waiting are refused", "no limit; in a server 1024"
    )
    overlap: int | None = option(None, "steps in flight", "what the backend declares")
    tensor_parallel: int = option(1, "ranks that share each layer")
    num_threads: int | None = option(None, "host threads of a rank", "the cores there are, divided by ranks")
    warm_up: bool = option(
        False,
        "compile decode shapes before the first request; all shapes of a static backend are in any case",
    )
    backend_options: Mapping[str, str] = field(
        default_factory=dict,
        metadata={"meaning": "options of the backend's own, passed on as they are", "otherwise": ""},
    )

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_batch_tokens", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        optional = ("max_model_len", "block_size", "num_blocks", "kv_cache_bytes", "overlap", "num_threads")
        for name in (*optional, "max_waiting"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if self.policy not in ("fcfs", "priority"):
            raise ConfigError(f"policy is {self.policy!r}; choose fcfs or priority")
        if self.load_format not in ("auto", "dummy"):
            raise ConfigError(f"load_format is {self.load_format!r}; choose auto or dummy")
        if self.quantized not in ("auto", "packed", "dequantized"):
            raise ConfigError(f"quantized is {self.quantized!r}; choose auto, packed or dequantized")
        if self.max_requests > self.max_batch_tokens:
            raise ConfigError(
                f"max_requests is {self.max_requests}, but a step has {self.max_batch_tokens} tokens at "
                "most and each running request takes one; raise max_batch_tokens or lower max_requests"
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> EngineConfig:
        """A configuration from options by name.

        Raises:
            ConfigError: a name that is no option; names the nearest one.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {nearest[0]!r}" if nearest else f"the options are {', '.join(known)}"
                raise ConfigError(f"there is no option {name!r}; {hint}")
        if "model" not in options:
            raise ConfigError("no model is given; set 'model' to a folder or a .gguf file")
        return cls(**options)
