"""Whether a checkpoint is the model that its configuration describes.

`check_checkpoint` reads headers and, for a tied head, a few rows; it runs before a device is opened.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

from core.contract.errors import ConfigError, WeightError
from core.contract.types import Param, Part
from core.models.base import ModelDefinition, leaves
from core.models.config import ModelConfig, MoeConfig
from core.weights.checkpoint import Checkpoint

_FLOATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)))
"""Dtypes that weights may be stored in."""
_LISTED = 3
_TIED_ROWS = 64


def check_checkpoint(definition: ModelDefinition, c: ModelConfig, checkpoint: Checkpoint) -> None:
    """Hold the checkpoint against the model's parameters.

    Raises:
        WeightError: a tensor is missing, has the wrong shape or dtype, or is not the model's; names file,
        tensor, found, wanted.
    """
    names = set(checkpoint.names())
    params = [leaf for leaf in leaves(definition.params(c)) if isinstance(leaf, Param)]
    parts = list(dict.fromkeys(part for param in params for part in param.parts))
    missing = [part for part in parts if part.name not in names]
    if missing:
        raise WeightError(
            f"{checkpoint.path} has no tensor {missing[0].name!r} of shape {missing[0].shape}"
            f"{_others([p.name for p in missing[1:]])}, which {c.architecture} with {c.num_layers} layers "
            f"wants{_untied(c, missing[0])}; check that config.json belongs to these weights"
        )
    for part in parts:
        found = checkpoint.shape(part.name)
        if not _fits(part, found):
            raise WeightError(
                f"{checkpoint.source(part.name)}: tensor {part.name!r} has shape {found}, but the config "
                f"wants {part.shape}{f' from {part.start}' if part.start else ''}; check that config.json "
                "belongs to these weights"
            )
        _check_dtype(checkpoint, part.name)
    _check_whole(parts, c, checkpoint)
    used = {part.name for part in parts}
    _check_surplus(definition, c, checkpoint, names - used)
    _check_tied(params, c, checkpoint, names - used)


def check_sizes(c: ModelConfig, path: Path) -> None:
    """Refuse a configuration whose counts contradict each other.

    Raises:
        ConfigError: names the count.
    """
    counts = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_size,
        "intermediate_size": c.mlp_size,
        "max_position_embeddings": c.max_position,
    }
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{path}: the config's {name} is {count}, but it must be at least 1")
    if c.num_heads % c.num_kv_heads:
        raise ConfigError(
            f"{path}: the config has {c.num_heads} attention heads, which {c.num_kv_heads} KV heads do not "
            "divide; check that it belongs to these weights"
        )
    for i in c.eos_token_ids:
        if not 0 <= i < c.vocab_size:
            raise ConfigError(
                f"{path}: eos_token_id is {i} in the config or generation_config.json, but the vocabulary "
                f"has {c.vocab_size} ids; set it to the id that ends a text"
            )
    for count in (len(c.layer_kinds), len(c.windows) or c.num_layers):
        if count != c.num_layers:
            raise ConfigError(
                f"{path}: the config's layer_types has {count} entries, but {c.num_layers} layers are wanted"
            )
    _check_figures(c, path)
    _check_rope(c, path)
    if c.moe is not None:
        _check_experts(c.moe, path)


def _check_figures(c: ModelConfig, path: Path) -> None:
    """Figures that are no counts."""
    positive = {
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope.theta,
        "rope scaling's factor": c.rope.factor,
    }
    caps = {"attn_logit_softcapping": c.attention_soft_cap, "final_logit_softcapping": c.logit_soft_cap}
    positive |= {name: cap for name, cap in caps.items() if cap is not None}
    for name, value in positive.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"{path}: the config's {name} is {value}, but it must be positive and finite")
    if c.linear is not None and c.linear.num_v_heads % c.linear.num_k_heads:
        raise ConfigError(
            f"{path}: the config's linear_num_value_heads is {c.linear.num_v_heads}, which "
            f"{c.linear.num_k_heads} key heads (linear_num_key_heads) do not divide"
        )


def _check_rope(c: ModelConfig, path: Path) -> None:
    for rope in (c.rope, c.local_rope or c.rope):
        most = c.latent.rope_size if c.latent is not None else c.head_size
        if rope.rotary_size % 2 or not 2 <= rope.rotary_size <= most:
            raise ConfigError(
                f"{path}: {rope.rotary_size} elements of heads of {most} are rotated (head_dim or "
                "qk_rope_head_dim, times partial_rotary_factor), but an even number from 2 on is wanted"
            )
        if rope.scaling == "llama3" and not rope.low < rope.high:
            raise ConfigError(
                f"{path}: rope scaling's low_freq_factor is {rope.low} and high_freq_factor {rope.high}, but "
                "the former must be smaller"
            )
        if rope.scaling == "dynamic" and rope.rotary_size < 4:
            raise ConfigError(
                f"{path}: {rope.rotary_size} elements of a head are rotated, but rope scaling 'dynamic' "
                "wants 4 or more"
            )


def _check_experts(moe: MoeConfig, path: Path) -> None:
    """Sizes and routing of experts."""
    route = moe.route
    if moe.mlp_size < 1:
        raise ConfigError(
            f"{path}: the config's moe_intermediate_size is {moe.mlp_size}; 1 or more is wanted"
        )
    if not 1 <= route.top_k <= route.num_experts:
        raise ConfigError(
            f"{path}: the config takes {route.top_k} experts of {route.num_experts} for a token "
            "(num_experts_per_tok); 1 to all are wanted"
        )
    if route.num_groups < 1 or route.num_experts % route.num_groups:
        raise ConfigError(
            f"{path}: the config has {route.num_experts} experts in {route.num_groups} groups (n_group), "
            "which do not divide them"
        )
    if not 1 <= route.top_groups <= route.num_groups:
        raise ConfigError(
            f"{path}: the config takes {route.top_groups} of {route.num_groups} groups (topk_group); take "
            "1 to all"
        )
    size = route.num_experts // route.num_groups
    if route.top_k > route.top_groups * size:
        raise ConfigError(
            f"{path}: the config takes {route.top_k} experts for a token (num_experts_per_tok), but "
            f"{route.top_groups} groups (topk_group) of {size} have {route.top_groups * size}; lower it"
        )
    if route.num_groups > 1 and route.group_score == "top2_sum" and size < 2:
        raise ConfigError(
            f"{path}: the config's groups (n_group) have {size} expert, but they score by their best two; "
            "2 or more are wanted"
        )
    if moe.limit is not None and not moe.limit > 0:
        raise ConfigError(f"{path}: the config's swiglu_limit is {moe.limit}, but it must be positive")


def _check_dtype(checkpoint: Checkpoint, name: str) -> None:
    found = checkpoint.dtype(name)
    if found in _FLOATS:
        return
    remedy = "take a checkpoint that is not quantized, or one in a form that is read (docs/models.md)"
    if found.name.startswith("float8"):
        wanted = f"a scale beside it ({name}_scale_inv or {name}_scale) or a wider float"
    else:
        wanted = "float32, float16 or bfloat16"
    raise WeightError(
        f"{checkpoint.source(name)}: tensor {name!r} is {found.name}, but {wanted} is wanted; {remedy}"
    )


def _check_whole(parts: list[Part], c: ModelConfig, checkpoint: Checkpoint) -> None:
    """Refuse a tensor that holds more than the regions which the model reads of it."""
    held: dict[str, int] = {}
    for part in parts:
        held[part.name] = held.get(part.name, 0) + prod(part.shape)
    for name, size in held.items():
        shape = checkpoint.shape(name)
        if prod(shape) != size:
            raise WeightError(
                f"{checkpoint.source(name)}: tensor {name!r} has shape {shape}, of which {c.architecture} "
                f"reads {size} of {prod(shape)} elements; check that config.json belongs to these weights"
            )


def _fits(part: Part, found: tuple[int, ...]) -> bool:
    """Whether a stored tensor of shape `found` is, or holds, this part."""
    shape = stored_shape(part)
    if len(found) != len(shape):
        return False
    if part.start is None:
        return found == shape
    return all(s + n <= f for s, n, f in zip(part.start, shape, found, strict=True))


def stored_shape(part: Part) -> tuple[int, ...]:
    """A part's shape in its tensor, with the rows in between that it does not pick."""
    if part.pick is None:
        return part.shape
    period, _, size = part.pick
    at = part.pick_axis
    return (*part.shape[:at], part.shape[at] // size * period, *part.shape[at + 1 :])


def _check_surplus(
    definition: ModelDefinition, c: ModelConfig, checkpoint: Checkpoint, unused: Collection[str]
) -> None:
    surplus = sorted(n for n in unused if not definition.ignored(c, n) or _is_layer_beyond(c, n, unused))
    if surplus:
        raise WeightError(
            f"{checkpoint.source(surplus[0])}: tensor {surplus[0]!r}{_others(surplus[1:])} is not one of "
            f"{c.architecture} with {c.num_layers} layers; check that config.json belongs to these weights"
        )


def _is_layer_beyond(c: ModelConfig, name: str, unused: Collection[str]) -> bool:
    """Whether an ignored tensor is of an ordinary layer that the config leaves out.

    Layers that predict further tokens follow the last one, and are known by a product of their own.
    """
    layer = re.match(rf"{re.escape(c.prefix)}layers\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= c.num_layers and f"{layer[0]}eh_proj.weight" not in unused


def _check_tied(params: list[Param], c: ModelConfig, checkpoint: Checkpoint, unused: Collection[str]) -> None:
    """Refuse a head of its own beside a tied embedding, unless it is a copy: some rows are compared."""
    heads = [n for n in unused if n.endswith("lm_head.weight")]
    embeddings = [p.parts[0].name for p in params if "embed" in p.uses]
    if not c.tied_head or not heads or len(embeddings) != 1:
        return
    head, embedding = heads[0], embeddings[0]
    shapes = checkpoint.shape(head), checkpoint.shape(embedding)
    if shapes[0] == shapes[1]:
        step = max(1, shapes[0][0] // _TIED_ROWS)
        at = [slice(row, row + 1) for row in range(0, shapes[0][0], step)]
        cuts = [(row, slice(0, shapes[0][1])) for row in at]
        if all(np.array_equal(checkpoint.read(head, i), checkpoint.read(embedding, i)) for i in cuts):
            return
    raise WeightError(
        f"{checkpoint.source(head)}: tensor {head!r} of shape {shapes[0]} differs from {embedding!r} of "
        "shape "
        f"{shapes[1]}, but the config says that they are one (tie_word_embeddings); set it to false if this "
        "model's head is its own"
    )


def _untied(c: ModelConfig, part: Part) -> str:
    is_head = part.name.endswith("lm_head.weight")
    return " as its config does not set tie_word_embeddings" if is_head and not c.tied_head else ""


def _others(names: list[str]) -> str:
    """How many more there are, and the first of them."""
    if not names:
        return ""
    listed = ", ".join(repr(n) for n in names[:_LISTED])
    return f" (and {len(names)} more: {listed}{', ...' if len(names) > _LISTED else ''})"
