"""EngineConfig: every option of an engine, what it means, and what it means when it is not given.

The table of options in the documentation, the options of the command line and `EngineConfig.of` are made from
the fields here. What an option that was not given comes to is decided in `core.engine.resolve`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from core.contract.errors import ConfigError
from core.values import is_number, is_whole

SERVED_MAX_WAITING = 1024
"""Sequences that may wait where many clients share an engine and the configuration does not say."""


def option(default: Any, meaning: str, otherwise: str = "") -> Any:
    """A field with its meaning; `otherwise` = what is taken where it is None."""
    return field(default=default, metadata={"meaning": meaning, "otherwise": otherwise})


def check_types(options: Any) -> None:
    """Hold each field of a record of options against its annotation. Whole numbers become Python's.

    Raises:
        ConfigError: names the option, what it is and what was wanted.
    """
    hints = get_type_hints(type(options))
    for f in fields(options):
        value, kinds = getattr(options, f.name), (hints[f.name],)
        if get_origin(kinds[0]) not in (Literal, Mapping, None):
            kinds = get_args(kinds[0])
        if not any(_is_of(value, kind) for kind in kinds):
            wanted = " or ".join(_wanted(kind) for kind in kinds)
            raise ConfigError(f"{f.name} is {value!r:.200}; it must be {wanted}")
        if is_whole(value) and int in kinds:
            object.__setattr__(options, f.name, int(value))


def _is_of(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind is int or kind is float:
        return is_whole(value) if kind is int else is_number(value)
    if kind == Mapping[str, str]:
        return isinstance(value, Mapping) and all(isinstance(x, str) for pair in value.items() for x in pair)
    return isinstance(value, kind)


def _wanted(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    names: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        Path: "a path (pathlib.Path)",
        Mapping[str, str]: "texts by name",
    }
    return names.get(kind, "left out")


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
        "in the compute dtype, larger and faster; auto = dequantized where they leave room for the KV "
        "cache",
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
        None,
        "requests beyond this many waiting are refused",
        f"{SERVED_MAX_WAITING} for `core serve` and AsyncLLM, no limit for LLM",
    )
    overlap: int | None = option(None, "steps in flight", "what the backend declares")
    tensor_parallel: int = option(1, "ranks that share each layer")
    num_threads: int | None = option(None, "host threads of a rank", "the cores there are, divided by ranks")
    batch_invariant: bool = option(
        False, "start only where a request's tokens never depend on its neighbours, bit for bit"
    )
    warm_up: bool = option(
        False,
        "compile decode shapes before the first request; all shapes of a static backend are in any case",
    )
    backend_options: Mapping[str, str] = field(
        default_factory=dict,
        metadata={"meaning": "options of the backend's own, passed on as they are", "otherwise": ""},
    )

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("max_requests", "max_batch_tokens", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        optional = ("max_model_len", "block_size", "num_blocks", "kv_cache_bytes", "overlap", "num_threads")
        for name in (*optional, "max_waiting"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if self.device < 0:
            raise ConfigError(f"device is {self.device}; it must be 0 or more")
        if self.max_requests > self.max_batch_tokens:
            raise ConfigError(
                f"max_requests is {self.max_requests}, but a step has {self.max_batch_tokens} tokens at "
                "most and each running request takes one; raise max_batch_tokens or lower max_requests"
            )

    @property
    def served_max_waiting(self) -> int:
        """`max_waiting` where many clients share an engine: there it always has a limit."""
        return SERVED_MAX_WAITING if self.max_waiting is None else self.max_waiting

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Refuse a name that is no option.

        Raises:
            ConfigError: there is one; names the nearest option.
        """
        known = [f.name for f in fields(cls)]
        for name in names:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {nearest[0]!r}" if nearest else f"the options are {', '.join(known)}"
                raise ConfigError(f"there is no option {name!r}; {hint}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> EngineConfig:
        """A configuration from options by name.

        Raises:
            ConfigError: a name that is no option; names the nearest one.
        """
        cls.check_names(options)
        if "model" not in options:
            raise ConfigError("no model is given; set 'model' to a folder or a .gguf file")
        return cls(**options)
