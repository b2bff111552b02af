"""What the fields of a model's config.json may hold, whichever family reads them.

A configuration is held against this table once, before a family reads it, so that the families need no checks
of their own: what could not be multiplied, divided by or counted in a step is refused by its name. A field
that is null counts as left out, as in transformers. How fields must fit together is checked on the
ModelConfig that they come to (`core.weights.checks.check_sizes`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from core.contract.errors import ConfigError
from core.values import is_number, is_whole

_MOST = 2**31
_NESTED = ("text_config", "rope_scaling", "rope_parameters", "full_attention", "sliding_attention")
"""Fields that hold fields."""


@dataclass(frozen=True)
class Kind:
    """A kind of value: in words, and the test for it."""

    wanted: str
    holds: Callable[[Any], bool]


def _is_integer(value: Any) -> bool:
    """JSON does not tell 8 from 8.0."""
    return is_whole(value) or (isinstance(value, float) and value.is_integer())


def _number(value: Any) -> bool:
    return is_number(value) and isfinite(value)


def _all(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, list | tuple) and all(holds(value) for value in values)


def _is_index(value: Any) -> bool:
    return _is_integer(value) and 0 <= value < _MOST


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


COUNT = Kind("a whole number from 1 to 2^31", lambda v: _is_index(v) and v >= 1)
WHOLE = Kind("a whole number from 0 to 2^31", _is_index)
# Each has parameters of its own, so a wild number would fill the memory before a file is missed.
LAYERS = Kind("a whole number from 1 to 4096", lambda v: _is_index(v) and 1 <= v <= 4096)
EXPERTS = Kind("a whole number from 0 to 65536", lambda v: _is_index(v) and v <= 65536)
WHOLES = Kind("a list of whole numbers from 0 on", _all(_is_index))
IDS = Kind("a token id or a list of them", lambda v: _is_index(v) or _all(_is_index)(v))
POSITIVE = Kind("positive and finite", lambda v: _number(v) and v > 0)
POSITIVES = Kind("a list of positive, finite numbers", _all(lambda v: _number(v) and v > 0))
SCALE = Kind("a finite number, 0 or more", lambda v: _number(v) and v >= 0)
BASE = Kind("a finite number above 1", lambda v: _number(v) and v > 1)
SHARE = Kind("a number above 0, 1 at most", lambda v: _number(v) and 0 < v <= 1)
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
FLAGS = Kind("a list of zeros and ones", _all(lambda v: v in (0, 1)))
SWITCH = Kind("true, false or a whole number", lambda v: isinstance(v, bool) or _is_index(v))
TEXT = Kind("a text", _is_text)
_DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
DTYPE = Kind(
    f"one of {', '.join(_DTYPES)}", lambda v: isinstance(v, str) and v.removeprefix("torch.") in _DTYPES
)
TEXTS = Kind("a list of texts", _all(_is_text))
FIELDS_OF = Kind("a JSON object", lambda v: isinstance(v, Mapping))

_BY_KIND: Mapping[Kind, tuple[str, ...]] = {
    COUNT: (
        *("vocab_size", "hidden_size", "intermediate_size", "intermediate_size_mlp"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
        *("original_max_position_embeddings", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"),
        *("v_head_dim", "n_group", "topk_group", "decoder_sparse_step", "full_attention_interval"),
        *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
        *("linear_conv_kernel_dim", "attention_chunk_size", "interleave_moe_layer_step", "floor_scale"),
        *("no_rope_layer_interval", "sliding_window_pattern", "_sliding_window_pattern"),
    ),
    LAYERS: ("num_hidden_layers",),
    # Dense models of families that may have experts say so by zeros.
    EXPERTS: ("num_experts", "num_local_experts", "n_routed_experts"),
    WHOLE: (
        *("num_experts_per_tok", "n_shared_experts"),
        *("moe_intermediate_size", "shared_expert_intermediate_size", "first_k_dense_replace"),
        *("sliding_window", "max_window_layers", "q_lora_rank"),
    ),
    WHOLES: ("mlp_only_layers", "moe_layers"),
    IDS: ("eos_token_id",),
    POSITIVE: (
        *("rms_norm_eps", "factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor"),
        *("high_freq_factor", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        *("routed_scaling_factor", "swiglu_limit", "swiglu_alpha"),
    ),
    POSITIVES: ("short_factor", "long_factor"),
    SCALE: ("mscale", "mscale_all_dim", "attn_scale", "initializer_range"),
    BASE: ("rope_theta", "rope_local_base_freq"),
    SHARE: ("partial_rotary_factor",),
    FLAG: (
        *("tie_word_embeddings", "attention_bias", "mlp_bias", "norm_topk_prob", "use_sliding_window"),
        *("use_qk_norm", "rope_interleave", "truncate", "use_bidirectional_attention"),
    ),
    FLAGS: ("no_rope_layers",),
    # Published files count here what became a flag later.
    SWITCH: ("attn_temperature_tuning",),
    TEXT: ("hidden_act", "hidden_activation", "topk_method", "rope_type", "type"),
    DTYPE: ("dtype", "torch_dtype"),
    TEXTS: ("architectures", "layer_types"),
    FIELDS_OF: _NESTED,
}
KINDS: Mapping[str, Kind] = {name: kind for kind, names in _BY_KIND.items() for name in names}
"""What each field that a family reads may hold."""


_NULL_MEANS_NONE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")


def without_nulls(found: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration, and what is nested in it, without the fields that are null and so count as left out.

    They stay where null says that the model has no such thing, and leaving them out something else.
    """
    return {
        name: without_nulls(value) if name in _NESTED and isinstance(value, Mapping) else value
        for name, value in found.items()
        if value is not None or name in _NULL_MEANS_NONE or name not in KINDS
    }


def config_file(path: Path) -> Path:
    """The file that holds a model's configuration: config.json of a folder, else the file itself."""
    return path / "config.json" if path.is_dir() else path


def check_fields(
    found: Mapping[str, Any], path: Path, within: str = "", kinds: Mapping[str, Kind] = KINDS
) -> None:
    """Hold a configuration, and what is nested in it, against the table. Other fields are left alone.

    Args:
        path: of the file or folder, for messages. within: names of the fields that it is nested in.
        kinds: the table.

    Raises:
        ConfigError: names the field, what it is and what was wanted.
    """
    for name, value in found.items():
        kind = kinds.get(name)
        if kind is None or value is None:
            continue
        if not kind.holds(value):
            raise ConfigError(
                f"{path}: the config's {within}{name} is {value!r:.200}, but it must be {kind.wanted}; check "
                "that the config is that of this model"
            )
        if name in _NESTED and kinds is KINDS:
            check_fields(value, path, f"{within}{name}.")
