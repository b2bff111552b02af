"""What every model definition shares: the shape of a definition, parameter trees, rotary tables.

A definition is a module with these functions, read top to bottom:

- `config(hf)`: the checkpoint's configuration -> ModelConfig;
- `params(c)`: the tree of `Param` and `Constant`, global shapes, in the nesting that `forward` reads;
- `cache_layers(c, dtype)`: one CacheLayerSpec per layer, local shapes;
- `attention_specs(c)`: what the backend's attention must be able to do;
- `forward(ops, c, w, caches, step)`: hidden state of every token, and the caches;
- `head(ops, c, w, h, step)`: logits of the sampled rows.

`c` in the last four is local to the rank. Trees are frozen dataclasses and tuples whose leaves are Param or
Constant in `params` and packed arrays in `forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from core.contract.batch import Step
from core.contract.ops import Ops
from core.contract.types import Array, CacheHandle, CacheLayerSpec, Param, Part
from core.models.config import ModelConfig, RopeConfig


class ModelDefinition(Protocol):
    """A module of this package that defines a family."""

    ARCHITECTURES: tuple[str, ...]

    def config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """ModelConfig from a Hugging Face configuration. Raises ConfigError."""

    def adapt(self, c: ModelConfig, names: Collection[str]) -> ModelConfig:
        """The configuration, completed by how this checkpoint names its tensors."""

    def ignored(self, c: ModelConfig, name: str) -> bool:
        """Whether a checkpoint may hold this tensor though the model does not use it."""

    def params(self, c: ModelConfig) -> Any:
        """Tree of Param and Constant, global shapes."""

    def cache_layers(self, c: ModelConfig, dtype: str) -> tuple[CacheLayerSpec, ...]:
        """One per layer, local shapes; `dtype` of KV entries."""

    def attention_specs(self, c: ModelConfig) -> tuple[object, ...]:
        """The distinct records that `forward` gives to attention, which a backend must be able to do."""

    def forward(
        self, ops: Ops, c: ModelConfig, w: Any, caches: tuple[CacheHandle, ...], step: Step
    ) -> tuple[Array, tuple[CacheHandle, ...]]:
        """Hidden state [T, D] and the caches."""

    def head(self, ops: Ops, c: ModelConfig, w: Any, h: Array, step: Step) -> Array:
        """Logits, float32 [R, V]."""


@dataclass(frozen=True)
class Constant:
    """A table computed at load time, float64: the rotary table [max_length, rotary_size]."""

    name: str
    rope: RopeConfig


def map_tree(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `function` to every leaf of a tree of dataclasses, named tuples and tuples; None stays None."""
    if tree is None:
        return None
    if isinstance(tree, Param | Constant):
        return function(tree)
    if isinstance(tree, tuple):
        items = [map_tree(function, x) for x in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: map_tree(function, getattr(tree, f.name)) for f in fields(tree)})
    raise TypeError(
        f"a parameter tree holds {type(tree).__name__}; expected Param, Constant, tuple or dataclass"
    )


def leaves(tree: Any) -> tuple[Param | Constant, ...]:
    """Distinct leaves in reading order; a tied parameter appears once."""
    found: dict[Param | Constant, None] = {}
    map_tree(lambda leaf: found.setdefault(leaf), tree)
    return tuple(found)


def norm_param(name: str, size: int, *, zero_centred: bool = False, axis: str = "embed") -> Param:
    """A norm's weight [size]; `zero_centred` ones are stored as weight - 1."""
    transform = "add_one" if zero_centred else "none"
    return Param((Part(name, (size,), (axis,), transform=transform),), ("norm",))  # type: ignore[arg-type]


def weight(
    name: str, out: int, out_axis: str, into: int, into_axis: str, *, unit: int = 1, into_unit: int = 1
) -> Part:
    """A matrix [out, into] named `name`.weight; units of rows and columns stay together when cut."""
    return Part(f"{name}.weight", (out, into), (out_axis, into_axis), unit=(unit, into_unit))


def linear_param(*parts: Part) -> Param:
    """Matrices that read the same input, stacked along their outputs."""
    return Param(parts, ("linear",))


def bias_param(*parts: tuple[str, int, str, int]) -> Param:
    """Biases (name, size, axis, unit) stacked like the matrices they belong to."""
    return Param(
        tuple(Part(f"{n}.bias", (size,), (axis,), unit=(unit,)) for n, size, axis, unit in parts), ("bias",)
    )


def rope_table(rope: RopeConfig, length: int) -> npt.NDArray[np.float64]:
    """Cosines, then sines, of every position: [length, rotary_size].

    A cache holds keys that were rotated, so all sequences share the frequencies of the longest that may come:
    "longrope" takes its long factors, and "dynamic" its larger base, where `length` exceeds the original one.
    """
    half = np.arange(0, rope.rotary_size, 2, dtype=np.float64) / rope.rotary_size
    frequencies = _scaled_frequencies(rope, _base(rope, length) ** -half, length)
    angles = np.arange(length, dtype=np.float64)[:, None] * frequencies
    table: npt.NDArray[np.float64] = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    table *= rope.attention_factor
    return table


def _base(rope: RopeConfig, length: int) -> float:
    if rope.scaling != "dynamic" or length <= rope.original_length:
        return rope.theta
    growth = rope.factor * length / rope.original_length - (rope.factor - 1)
    return float(rope.theta * growth ** (rope.rotary_size / (rope.rotary_size - 2)))


def _scaled_frequencies(
    rope: RopeConfig, frequencies: npt.NDArray[np.float64], length: int
) -> npt.NDArray[np.float64]:
    if rope.scaling in ("none", "dynamic"):
        return frequencies
    if rope.scaling == "longrope":
        factors = rope.long_factors if length > rope.original_length else rope.short_factors
        divided: npt.NDArray[np.float64] = frequencies / np.array(factors)
        return divided
    slowed = frequencies / rope.factor
    if rope.scaling == "linear":
        return slowed
    waves = rope.original_length * frequencies / (2 * np.pi)
    if rope.scaling == "llama3":
        keep = np.clip((waves - rope.low) / (rope.high - rope.low), 0.0, 1.0)
        return slowed * (1 - keep) + frequencies * keep
    # YaRN ramps over the pair's index between those that turn `high` and `low` times within the original
    # length.
    first, last = (_pair_of_waves(rope, waves_wanted) for waves_wanted in (rope.high, rope.low))
    if rope.truncate:
        first, last = np.floor(first), np.ceil(last)
    first, last = max(first, 0.0), min(last, rope.rotary_size - 1.0)
    ramp = np.clip((np.arange(len(frequencies)) - first) / max(last - first, 0.001), 0.0, 1.0)
    blended: npt.NDArray[np.float64] = slowed * ramp + frequencies * (1 - ramp)
    return blended


def _pair_of_waves(rope: RopeConfig, waves: float) -> float:
    ratio = np.log(rope.original_length / (waves * 2 * np.pi)) / np.log(rope.theta)
    return float(rope.rotary_size * ratio / 2)
