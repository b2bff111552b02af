"""Every family's logits against transformers, on tiny random models, on every backend.

The reference runs transformers' own code in float64 with its float32 steps taken out; the oracle differs from
it by the order of sums alone. `PUBLISHED` is the room that those float32 steps need.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.contract.errors import WeightError
from core.models import definition
from core.models.base import ModelDefinition, norm_param
from core.models.config import ModelConfig
from core.weights.checkpoint import open_checkpoint
from tests.models.forced import forced_logits
from tests.models.harness import SHORT, Float64, model_logits
from tests.models.tiny import FAMILIES, FEATURES, Feature, reference_logits, tokens, with_old_config, without

NAMES = tuple(f.name for f in FAMILIES)
ORACLE, PUBLISHED, FLOAT32 = 1e-9, 1e-5, 1e-4
# The engine's logits cross the waist in float32.
ENGINE, PROMPT = 1e-6, 40
IDS = tokens()

Folder = Callable[[str], Path]


@cache
def reference(folder: Path) -> Float64:
    """Logits of a shared folder: float64 [T, V]."""
    return reference_logits(folder, IDS)


def relative_error(found: Float64, wanted: Float64) -> float:
    """Largest difference over the largest logit, position by position; the worst position counts."""
    assert found.shape == wanted.shape
    error = np.abs(found - wanted).max(-1) / np.abs(wanted).max(-1)
    return float(error.max())


def of_both(logits: Float64) -> Float64:
    """What `model_logits` gives where the whole sequence has these logits."""
    return np.concatenate([logits, logits[:SHORT]])


def oracle(folder: Path) -> Float64:
    return model_logits(folder, IDS, "cpu_reference", "float64")


@pytest.mark.parametrize("name", NAMES)
def test_oracle_equals_transformers(name: str, tiny_folder: Folder) -> None:
    folder = tiny_folder(name)
    found = oracle(folder)
    assert relative_error(found, of_both(reference(folder))) <= ORACLE
    published = reference_logits(folder, IDS, as_published=True)
    assert relative_error(found, of_both(published)) <= PUBLISHED


READ_OTHERWISE = {
    "gemma3",
    "llama3_rope",
    "llama4_text",
    "llama_bias",
    "mistral",
    "qwen3_5_moe_split",
    "qwen3_5_text",
    "qwen3_one_kv_head",
}
"""Written or scaled otherwise than a family that is here too: to a backend the same ops, compiled anew."""


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, backend, marks=[pytest.mark.slow] * (backend == "tpu" and name in READ_OTHERWISE))
        for name in NAMES
        for backend in ("cpu", "tpu")
    ],
)
def test_float32_backends_match_transformers(name: str, backend: str, tiny_folder: Folder) -> None:
    folder = tiny_folder(name)
    found = model_logits(folder, IDS, backend, "float32")
    assert relative_error(found, of_both(reference(folder))) <= FLOAT32


@pytest.mark.parametrize("prompt", [1, PROMPT])
@pytest.mark.parametrize(
    "name", ["llama", "qwen2_window", "gemma2", "gemma3", "qwen3_5_moe", "deepseek_v3", "gpt_oss", "llama4"]
)
def test_the_engine_gives_these_logits(
    name: str, prompt: int, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(name)
    found = forced_logits(monkeypatch, folder, IDS, prompt, "cpu_reference", "float64")
    assert relative_error(found, reference(folder)[prompt - 1 : -1]) <= ENGINE


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "tpu"])
@pytest.mark.parametrize("name", NAMES)
def test_the_engine_gives_these_logits_in_float32(
    name: str, backend: str, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(name)
    found = forced_logits(monkeypatch, folder, IDS, PROMPT, backend, "float32")
    assert relative_error(found, reference(folder)[PROMPT - 1 : -1]) <= FLOAT32


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("qwen3_5")])
def test_old_and_new_rope_keys_mean_the_same(name: str, tiny_folder: Folder, tmp_path: Path) -> None:
    folder = tiny_folder(name)
    old = with_old_config(folder, tmp_path / "old")
    assert relative_error(oracle(old), of_both(reference(folder))) <= ORACLE


REMOVABLE = [(n, f) for n in NAMES for f in FEATURES[n] if f.removable]
OURS = [(n, f) for n in NAMES for f in FEATURES[n] if not f.removable]


@pytest.mark.parametrize(("name", "feature"), REMOVABLE, ids=[f"{n}-{f.name}" for n, f in REMOVABLE])
def test_removing_a_feature_from_the_checkpoint_shows(
    name: str, feature: Feature, tiny_folder: Folder, tmp_path: Path
) -> None:
    folder = tiny_folder(name)
    lacking = without(folder, feature, tmp_path / "lacking")
    found = oracle(lacking)
    assert relative_error(found, of_both(reference(folder))) > FLOAT32
    assert relative_error(found, of_both(reference_logits(lacking, IDS))) <= ORACLE


@pytest.mark.parametrize(("name", "feature"), OURS, ids=[f"{n}-{f.name}" for n, f in OURS])
def test_switching_a_feature_off_in_the_definition_shows(
    name: str, feature: Feature, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(name)
    _switch_off(feature.name, folder, monkeypatch)
    if feature.name == "tied head":
        with pytest.raises(WeightError, match="lm_head"):
            oracle(folder)
        return
    assert relative_error(oracle(folder), of_both(reference(folder))) > FLOAT32


ROUTING: dict[str, dict[str, Any]] = {
    "norm_topk": {"normalize": False},
    "group_score": {"group_score": "max"},
    "sigmoid routing": {"scoring": "softmax"},
    "softmax_topk": {"scoring": "softmax"},
}
"""Features of `RouteSpec`, and what it says without them."""


def _switch_off(feature: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if feature == "value_head_groups":
        _ungroup_value_heads(monkeypatch)
        return
    if feature == "alpha":
        _set_slope_to_one(monkeypatch)
        return
    if feature == "norms around zero":
        from core.models import gemma

        monkeypatch.setattr(gemma, "norm_param", lambda name, size, zero_centred: norm_param(name, size))
        return
    checkpoint = open_checkpoint(folder)
    model: ModelDefinition = definition(checkpoint.config())
    checkpoint.close()
    adapt = model.adapt

    def changed(c: ModelConfig, names: Collection[str]) -> ModelConfig:
        c = adapt(c, names)
        if feature == "attention_gate":
            return replace(c, attention_gate=False)
        if feature == "tied head":
            return replace(c, tied_head=False)
        if feature == "partial_rotary":
            return replace(
                c, rope=replace(c.rope, rotary_size=16, long_factors=(*c.rope.long_factors, 1.0, 1.0))
            )
        if feature == "long factors":
            return replace(c, rope=replace(c.rope, long_factors=c.rope.short_factors))
        if feature == "gelu":
            return replace(c, activation="silu")
        if feature == "embedding scale":
            return replace(c, embed_scale=1.0)
        assert c.moe is not None
        if feature == "weights_on_input":
            return replace(c, moe=replace(c.moe, weights_on_input=False))
        return replace(c, moe=replace(c.moe, route=replace(c.moe.route, **ROUTING[feature])))

    monkeypatch.setattr(model, "adapt", changed)


def _set_slope_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clamped swiglu with an ordinary sigmoid."""
    from backends.cpu_reference import experts

    def wrong(x: Any, activation: str, limit: float) -> Any:
        gate, up = np.split(x, 2, -1)
        gate = np.minimum(gate, limit)
        return (np.clip(up, -limit, limit) + 1) * gate / (1 + np.exp(-gate))

    monkeypatch.setattr(experts, "glu", wrong)


def _ungroup_value_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Value head n reads key head n modulo their number, in place of its group's."""
    from backends.cpu_reference.ops import ReferenceOps

    scan = ReferenceOps.state_scan

    def wrong(self: Any, q: Any, k: Any, *rest: Any) -> Any:
        spec = rest[-1]
        heads = np.arange(spec.num_v_heads) % spec.num_k_heads
        return scan(self, q[:, heads], k[:, heads], *rest[:-1], replace(spec, num_k_heads=spec.num_v_heads))

    monkeypatch.setattr(ReferenceOps, "state_scan", wrong)
