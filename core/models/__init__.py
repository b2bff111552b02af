"""Model definitions, each family once, and the table that maps architecture names to them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from core.contract.errors import ConfigError, UnsupportedError
from core.models.base import ModelDefinition
from core.models.config import ModelConfig
from core.models.fields import check_fields, config_file, without_nulls

__all__ = ["ARCHITECTURES", "ModelDefinition", "definition", "read_config"]

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


def read_config(
    hf: Mapping[str, Any], names: Collection[str], path: Path
) -> tuple[ModelDefinition, ModelConfig]:
    """The definition for a Hugging Face configuration, and what that makes of it.

    Args:
        names: of the checkpoint's tensors, where there are any. path: of the model, for messages.

    Raises:
        ConfigError: a field is not what it may be, or the architecture or an option is not known; names the
            model. How the fields fit together is not looked at.
    """
    file = config_file(path)
    check_fields(hf, file)
    hf = without_nulls(hf)
    try:
        model = definition(hf)
        return model, model.adapt(model.config(hf), names)
    except (ConfigError, UnsupportedError) as e:
        raise type(e)(f"{file}: {e}") from None
    except KeyError as e:
        raise ConfigError(
            f"{file}: the config has no {e.args[0]}, which {hf['architectures'][0]} wants; check that it is "
            "that of a complete model"
        ) from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
        raise ConfigError(
            f"{file}: the config cannot be read as that of {hf['architectures'][0]} "
            f"({type(e).__name__}: {e}); check config.json"
        ) from None
