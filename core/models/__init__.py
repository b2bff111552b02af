"""Model definitions, each family once, and the table that maps architecture names to them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

from core.contract.errors import ConfigError
from core.models.base import ModelDefinition

__all__ = ["ARCHITECTURES", "ModelDefinition", "definition"]

ARCHITECTURES: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "llama",
    "Qwen3ForCausalLM": "llama",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen3_5ForCausalLM": "qwen3_5",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5MoeForCausalLM": "qwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5",
    "DeepseekV2ForCausalLM": "deepseek",
    "DeepseekV3ForCausalLM": "deepseek",
    "MixtralForCausalLM": "mixtral",
    "Gemma2ForCausalLM": "gemma",
    "Gemma3ForCausalLM": "gemma",
    "Gemma3ForConditionalGeneration": "gemma",
    "GptOssForCausalLM": "gpt_oss",
    "Phi3ForCausalLM": "phi3",
    "Llama4ForCausalLM": "llama4",
    "Llama4ForConditionalGeneration": "llama4",
    "Glm4MoeForCausalLM": "glm4_moe",
}
"""Hugging Face's architecture name -> module of this package."""


def definition(hf: Mapping[str, Any]) -> ModelDefinition:
    """The definition for a Hugging Face configuration.

    Raises:
        ConfigError: the architecture is missing or not known; names those that are.
    """
    names = hf.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return cast(ModelDefinition, import_module(f"core.models.{ARCHITECTURES[name]}"))
    found = ", ".join(names) or "none"
    raise ConfigError(
        f"the model's architecture is {found}; supported are {', '.join(sorted(ARCHITECTURES))}"
    )
