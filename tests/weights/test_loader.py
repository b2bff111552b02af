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
from core.contract.types import PackRequest, Param, Part
from core.executor.rank import read_model
from core.parallel.sharding import Shard
from core.weights.checkpoint import open_checkpoint
from core.weights.loader import load_model, read_param, read_part
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
        (add, r"'model\.layers\.0\.self_attn\.extra\.weight' is not one of LlamaForCausalLM"),
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


class Memory:
    """A checkpoint of arrays; keeps the indices that were read."""

    def __init__(self, **arrays: Any) -> None:
        self.arrays, self.reads = arrays, []

    def read(self, name: str, index: Any = None) -> Any:
        self.reads.append(index)
        return self.arrays[name][index]


@pytest.mark.parametrize("transform", ["none", "transpose"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_columns_that_take_turns_are_told_apart_and_cut(rank: int, transform: Any) -> None:
    E, D, F, ranks = 2, 4, 6, 3
    stored = np.arange(E * D * 2 * F).reshape(E, D, 2 * F)
    checkpoint: Any = Memory(x=stored)
    share = slice(rank * F // ranks, (rank + 1) * F // ranks)
    for first in (0, 1):
        part = Part(
            "x",
            (E, D, F),
            ("expert", "embed", "mlp"),
            pick=(2, first, 1),
            pick_axis=2,
            transform=transform,
        )
        found = read_part(checkpoint, part, Shard(rank, ranks).ranges(part))
        wanted = stored[:, :, first::2][:, :, share]
        assert checkpoint.reads[-1][2] == slice(2 * share.start, 2 * share.stop)
        np.testing.assert_array_equal(found, wanted if transform == "none" else wanted.transpose(0, 2, 1))


def test_a_transposed_matrix_is_contiguous_and_its_joined_parts_are_stacked_by_outputs() -> None:
    E, D, F = 2, 3, 4
    stored = np.arange(E * D * 2 * F).reshape(E, D, 2 * F)
    parts = tuple(
        Part("x", (E, D, F), ("expert", "embed", "mlp"), start=(0, 0, at), transform="transpose")
        for at in (0, F)
    )
    checkpoint: Any = Memory(x=stored)
    assert read_part(checkpoint, parts[0], Shard().ranges(parts[0])).flags.c_contiguous
    found = read_param(checkpoint, Param(parts, ("experts",), join=1), Shard())
    np.testing.assert_array_equal(found, stored.transpose(0, 2, 1))
