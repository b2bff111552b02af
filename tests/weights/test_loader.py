"""The loader refuses a checkpoint that is not the model's, before anything is packed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core.contract.errors import WeightError
from core.contract.types import PackRequest
from core.executor.rank import read_model
from core.weights.checkpoint import open_checkpoint
from core.weights.loader import load_model
from tests.models.conftest import tiny_folder

__all__ = ["tiny_folder"]

Tensors = dict[str, Any]


def drop(tensors: Tensors) -> None:
    del tensors["model.layers.1.mlp.down_proj.weight"]


def widen(tensors: Tensors) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = np.concatenate([tensors[name]] * 2)


def add(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.extra.weight"] = np.zeros((2, 2), np.float32)


def flatten(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][None]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, r"no tensor 'model\.layers\.1\.mlp\.down_proj\.weight' of shape"),
        (widen, r"'model\.layers\.0\.self_attn\.q_proj\.weight' has shape .* wants"),
        (add, r"1 tensors that LlamaForCausalLM does not use, first 'model\.layers\.0\.self_attn\.extra"),
        (flatten, r"'model\.norm\.weight' has shape \(1, 64\)"),
    ],
)
def test_a_checkpoint_that_is_not_the_models_is_refused_before_packing(
    change: Callable[[Tensors], None], words: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    refused(tiny_folder("llama"), change, words, tmp_path)


def test_a_tensor_of_which_only_a_part_would_be_read_is_refused(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    def double(tensors: Tensors) -> None:
        name = next(n for n in tensors if n.endswith("in_proj_qkv.weight"))
        tensors[name] = np.concatenate([tensors[name]] * 2)

    refused(tiny_folder("qwen3_5_text"), double, "in_proj_qkv", tmp_path)


def refused(folder: Path, change: Callable[[Tensors], None], words: str, tmp_path: Path) -> None:
    tensors: Tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())))
    checkpoint = open_checkpoint(tmp_path)
    definition, c = read_model(checkpoint)
    packed: list[PackRequest] = []
    with pytest.raises(WeightError, match=words):
        load_model(definition, c, checkpoint, packed.append, dtype="float32", max_length=32)
    checkpoint.close()
    assert not packed
