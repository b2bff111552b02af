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
from core.models.config import ModelConfig
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
    _check_figures(c, path)


def _check_figures(c: ModelConfig, path: Path) -> None:
    """Figures that are no counts, and those of routing."""
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
    if c.moe is None:
        return
    route = c.moe.route
    if not 1 <= route.top_k <= route.num_experts:
        raise ConfigError(
            f"{path}: the config takes {route.top_k} experts of {route.num_experts} for a token; 1 to all "
            "are wanted"
        )
    if route.num_groups < 1 or route.num_experts % route.num_groups:
        raise ConfigError(
            f"{path}: the config has {route.num_experts} experts in {route.num_groups} groups, which do not "
            "divide them"
        )
    if not 1 <= route.top_groups <= route.num_groups:
        raise ConfigError(
            f"{path}: the config takes {route.top_groups} of {route.num_groups} groups; take 1 to all"
        )
    if c.moe.limit is not None and not c.moe.limit > 0:
        raise ConfigError(f"{path}: the config's swiglu_limit is {c.moe.limit}, but it must be positive")


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
