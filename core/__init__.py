"""core: an inference engine for large language models whose hardware support is made of plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.engine.llm import LLM
    from core.engine.outputs import CompletionOutput, RequestOutput
    from core.sampling.params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]
__version__ = "0.1.0"

_HOMES = {
    "LLM": "core.engine.llm",
    "CompletionOutput": "core.engine.outputs",
    "RequestOutput": "core.engine.outputs",
    "SamplingParams": "core.sampling.params",
}


def __getattr__(name: str) -> Any:
    """Public names are imported at first use, so that `import core` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'core' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
