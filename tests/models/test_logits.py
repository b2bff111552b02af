"""Every family's logits against transformers, on tiny random models, through the whole engine on every
backend.

The reference runs transformers' own code in float64. The oracle's logits leave the engine as float32, which
is all that
separates the two.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from core.contract.errors import WeightError
from core.models import definition
from core.models.base import ModelDefinition
from core.models.config import ModelConfig
from core.weights.checkpoint import open_checkpoint
from tests.models.forced import forced_logits
from tests.models.tiny import FAMILIES, FEATURES, Feature, reference_logits, tokens, with_old_config, without

NAMES = tuple(f.name for f in FAMILIES)
PROMPT = 40
ORACLE, PUBLISHED, FLOAT32 = 1e-6, 1e-5, 1e-4
IDS = tokens()

Folder = Callable[[str], Path]
Float64 = npt.NDArray[np.float64]


@cache
def reference(folder: Path) -> Float64:
    return reference_logits(folder, IDS)


def relative_error(found: Float64, wanted: Float64) -> float:
    """Largest difference over the largest logit, position by position; the worst position counts."""
    error = np.abs(found - wanted).max(-1) / np.abs(wanted).max(-1)
    return float(error.max())


def wanted(folder: Path, prompt: int) -> Float64:
    return reference(folder)[prompt - 1 : -1]


@pytest.mark.parametrize("name", NAMES)
def test_oracle_equals_transformers(name: str, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(name)
    found = forced_logits(monkeypatch, folder, IDS, PROMPT, "cpu_reference", "float64")
    assert relative_error(found, wanted(folder, PROMPT)) <= ORACLE
    published = reference_logits(folder, IDS, as_published=True)[PROMPT - 1 : -1]
    assert relative_error(found, published) <= PUBLISHED


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
@pytest.mark.parametrize("name", NAMES)
def test_float32_backends_match_transformers(
    name: str, backend: str, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(name)
    found = forced_logits(monkeypatch, folder, IDS, PROMPT, backend, "float32")
    assert relative_error(found, wanted(folder, PROMPT)) <= FLOAT32


@pytest.mark.parametrize("name", ["llama", "qwen3_5", "deepseek_v3"])
def test_every_position_from_the_second_on_by_decoding(
    name: str, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(name)
    found = forced_logits(monkeypatch, folder, IDS, 1, "cpu_reference", "float64")
    assert len(found) == len(IDS) - 1
    assert relative_error(found, wanted(folder, 1)) <= ORACLE


@pytest.mark.parametrize("name", ["llama3_rope", "deepseek_v3", "qwen2"])
def test_old_and_new_rope_keys_mean_the_same(
    name: str, tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(name)
    old = with_old_config(folder, tmp_path / "old")
    found = forced_logits(monkeypatch, old, IDS, PROMPT, "cpu_reference", "float64")
    assert relative_error(found, wanted(folder, PROMPT)) <= ORACLE


REMOVABLE = [(n, f) for n in NAMES for f in FEATURES[n] if f.removable]
OURS = [(n, f) for n in NAMES for f in FEATURES[n] if not f.removable]


@pytest.mark.parametrize(("name", "feature"), REMOVABLE, ids=[f"{n}-{f.name}" for n, f in REMOVABLE])
def test_removing_a_feature_from_the_checkpoint_shows(
    name: str, feature: Feature, tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(name)
    lacking = without(folder, feature, tmp_path / "lacking")
    found = forced_logits(monkeypatch, lacking, IDS, PROMPT, "cpu_reference", "float64")
    assert relative_error(found, wanted(folder, PROMPT)) > FLOAT32
    assert relative_error(found, reference_logits(lacking, IDS)[PROMPT - 1 : -1]) <= ORACLE


@pytest.mark.parametrize(("name", "feature"), OURS, ids=[f"{n}-{f.name}" for n, f in OURS])
def test_switching_a_feature_off_in_the_engine_shows(
    name: str, feature: Feature, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(name)
    _switch_off(feature.name, folder, monkeypatch)
    if feature.name == "tied head":
        with pytest.raises(WeightError, match="lm_head"):
            forced_logits(monkeypatch, folder, IDS, PROMPT, "cpu_reference", "float64")
        return
    found = forced_logits(monkeypatch, folder, IDS, PROMPT, "cpu_reference", "float64")
    assert relative_error(found, wanted(folder, PROMPT)) > FLOAT32


def _switch_off(feature: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(folder)
    model: ModelDefinition = definition(checkpoint.config())
    checkpoint.close()
    if feature == "value_head_groups":
        _ungroup_value_heads(monkeypatch)
        return
    adapt = model.adapt

    def changed(c: ModelConfig, names: Collection[str]) -> ModelConfig:
        c = adapt(c, names)
        if feature == "attention_gate":
            return replace(c, attention_gate=False)
        if feature == "tied head":
            return replace(c, tied_head=False)
        assert feature == "norm_topk" and c.moe is not None
        return replace(c, moe=replace(c.moe, route=replace(c.moe.route, normalize=False)))

    monkeypatch.setattr(model, "adapt", changed)


def _ungroup_value_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Value head n reads key head n modulo their number, in place of its group's."""
    from backends.cpu_reference.ops import ReferenceOps

    scan = ReferenceOps.state_scan

    def wrong(self: Any, q: Any, k: Any, *rest: Any) -> Any:
        spec = rest[-1]
        heads = np.arange(spec.num_v_heads) % spec.num_k_heads
        return scan(self, q[:, heads], k[:, heads], *rest[:-1], replace(spec, num_k_heads=spec.num_v_heads))

    monkeypatch.setattr(ReferenceOps, "state_scan", wrong)
