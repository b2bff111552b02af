"""The ground truth itself: large enough logits, nothing neutral, nothing rounded, every feature felt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.overrides import TorchFunctionMode

from . import tiny

NAMES = [family.name for family in tiny.FAMILIES]
REMOVABLE = [(name, feature) for name in NAMES for feature in tiny.FEATURES[name] if feature.removable]
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def logits(tiny_folder: Folder) -> Callable[[str], np.ndarray]:
    known: dict[str, np.ndarray] = {}

    def of(name: str) -> np.ndarray:
        if name not in known:
            known[name] = tiny.reference_logits(tiny_folder(name), tiny.tokens())
        return known[name]

    return of


class _Float32Seen(TorchFunctionMode):
    """Collects the functions that return a tensor with fewer bits than float64."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype in (torch.float32, torch.complex64):
            self.functions.add(str(func))
        return result


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_finite_float64_and_spread_by_at_least_one(
    logits: Callable[[str], np.ndarray], name: str
) -> None:
    found = logits(name)
    assert found.dtype == np.float64
    assert found.shape == (tiny.LENGTH, tiny.VOCAB)
    assert np.isfinite(found).all()
    assert found.std() >= 1.0


@pytest.mark.parametrize("name", NAMES)
def test_same_name_and_seed_give_the_same_bits_and_another_seed_does_not(
    tiny_folder: Folder, logits: Callable[[str], np.ndarray], name: str, tmp_path: Path
) -> None:
    again = tiny.make_folder(name, tmp_path / "again")
    other = tiny.make_folder(name, tmp_path / "other", seed=1)
    file = "model.safetensors"
    assert (again / file).read_bytes() == (tiny_folder(name) / file).read_bytes()
    assert np.array_equal(tiny.reference_logits(again, tiny.tokens()), logits(name))
    assert not np.allclose(tiny.reference_logits(other, tiny.tokens()), logits(name))


@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_of_a_checkpoint_is_neutral(tiny_folder: Folder, name: str) -> None:
    weights = load_file(tiny_folder(name) / "model.safetensors")
    for key, value in weights.items():
        assert value.dtype == np.float32, key
        assert (value != 0).all(), key
        assert (value != 1).all(), key


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_has_a_head_exactly_when_it_is_not_tied(tiny_folder: Folder, name: str) -> None:
    weights = load_file(tiny_folder(name) / "model.safetensors")
    tied = json.loads((tiny_folder(name) / "config.json").read_text())["tie_word_embeddings"]
    assert any(key.endswith("lm_head.weight") for key in weights) == (not tied)
    assert ("tied head" in {feature.name for feature in tiny.FEATURES[name]}) == tied


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_the_exact_reference_is_rounded_to_float32(tiny_folder: Folder, name: str) -> None:
    model = tiny._load(tiny_folder(name), False)
    with _Float32Seen() as seen:
        tiny._logits(model, tiny.tokens(), False)
    assert seen.functions == set()


@pytest.mark.parametrize("name", NAMES)
def test_the_exact_reference_is_the_published_code_but_for_float32_rounding(
    tiny_folder: Folder, logits: Callable[[str], np.ndarray], name: str
) -> None:
    """A rotary angle near LENGTH is rounded by LENGTH * 2^-24 radians: the largest of the float32 steps."""
    published = tiny.reference_logits(tiny_folder(name), tiny.tokens(), as_published=True)
    largest_step = tiny.LENGTH * 2.0**-24
    assert 0.0 < np.abs(published - logits(name)).max() < 4 * largest_step * np.abs(logits(name)).max()


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_causal_and_looks_further_back_than_a_window(
    tiny_folder: Folder, logits: Callable[[str], np.ndarray], name: str
) -> None:
    changed = tiny.tokens()
    changed[0] = (changed[0] + 1) % tiny.VOCAB
    moved = np.abs(tiny.reference_logits(tiny_folder(name), changed) - logits(name)).max(axis=1)
    assert moved[-1] > 1e-6
    changed = tiny.tokens()
    changed[-1] = (changed[-1] + 1) % tiny.VOCAB
    moved = np.abs(tiny.reference_logits(tiny_folder(name), changed) - logits(name)).max(axis=1)
    assert moved[:-1].max() < 1e-12
    assert moved[-1] > 1e-3


@pytest.mark.parametrize(("name", "feature"), REMOVABLE, ids=[f"{n}-{f.name}" for n, f in REMOVABLE])
def test_the_logits_move_when_a_feature_is_removed(
    tiny_folder: Folder, logits: Callable[[str], np.ndarray], tmp_path: Path, name: str, feature: tiny.Feature
) -> None:
    removed = tiny.without(tiny_folder(name), feature, tmp_path / "without")
    found = tiny.reference_logits(removed, tiny.tokens())
    assert np.abs(found - logits(name)).max() > 1e-3 * logits(name).std()


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("qwen3_5")])
def test_the_old_form_of_a_config_means_the_same_model(
    tiny_folder: Folder, logits: Callable[[str], np.ndarray], tmp_path: Path, name: str
) -> None:
    old = tiny.with_old_config(tiny_folder(name), tmp_path / "old")
    assert "rope_parameters" not in json.loads((old / "config.json").read_text())
    assert np.array_equal(tiny.reference_logits(old, tiny.tokens()), logits(name))


def test_experts_are_stored_stacked_in_one_family_and_one_by_one_in_another(tiny_folder: Folder) -> None:
    stacked = load_file(tiny_folder("qwen3_5_moe") / "model.safetensors")
    split = load_file(tiny_folder("qwen3_5_moe_split") / "model.safetensors")
    assert stacked["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape == (8, 2 * 32, 64)
    assert stacked["model.language_model.layers.0.mlp.experts.down_proj"].shape == (8, 64, 32)
    assert split["model.layers.0.mlp.experts.7.gate_proj.weight"].shape == (32, 64)
    assert not [key for key in split if key.endswith("gate_up_proj")]


def test_a_feature_with_no_off_value_is_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither an off value nor a tensor"):
        tiny.without(tiny_folder("llama3_rope"), tiny.Feature("tied head"), tmp_path / "without")


@pytest.mark.parametrize("name", ["llama", "qwen3_5", "deepseek_v3"])
def test_greedy_appends_the_most_likely_token_each_time(tiny_folder: Folder, name: str) -> None:
    prompt = tiny.tokens(12)
    out = tiny.reference_greedy(tiny_folder(name), prompt, 4)
    rows = tiny.reference_logits(tiny_folder(name), np.array([*prompt, *out]))
    assert out == rows[11:15].argmax(axis=1).tolist()
