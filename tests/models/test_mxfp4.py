"""gpt-oss with experts in MXFP4, as published, against transformers with the same experts in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.models.forced import forced_logits
from tests.models.harness import SHORT, model_logits
from tests.models.test_logits import ENGINE, FLOAT32, IDS, ORACLE, PROMPT, relative_error
from tests.models.test_sharded import sharded_logits
from tests.models.tiny import reference_logits

Folder = Callable[[str], Path]
Folders = tuple[Path, Path]


@pytest.fixture(scope="module")
def folders(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The model with random MXFP4 experts, and the one that transformers makes of it."""
    base, root = tiny_folder("gpt_oss"), tmp_path_factory.mktemp("mxfp4")
    config = json.loads((base / "config.json").read_text())
    packed: dict[str, Any] = load_file(base / "model.safetensors")
    plain = dict(packed)
    random = np.random.default_rng(0)
    for name in [n for n in packed if n.endswith(("gate_up_proj", "down_proj"))]:
        E, inputs, outputs = packed.pop(name).shape
        blocks = random.integers(0, 256, (E, outputs, inputs // 32, 16), np.uint8)
        scales = random.integers(122, 126, (E, outputs, inputs // 32), np.uint8)
        values = convert_moe_packed_tensors(
            torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32
        )
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = values.numpy()
    for name, tensors in (("packed", packed), ("plain", plain)):
        (root / name).mkdir()
        save_file(tensors, root / name / "model.safetensors", metadata={"format": "pt"})
        extra = {"quantization_config": {"quant_method": "mxfp4"}} if name == "packed" else {}
        (root / name / "config.json").write_text(json.dumps({**config, **extra}))
    return root / "packed", root / "plain"


@pytest.fixture(scope="module")
def wanted(folders: Folders) -> np.ndarray:
    return reference_logits(folders[1], IDS)


@pytest.mark.parametrize(
    ("backend", "dtype", "bound"),
    [("cpu_reference", "float64", ORACLE), ("cpu", "float32", FLOAT32), ("tpu", "float32", FLOAT32)],
)
def test_equals_transformers(
    backend: str, dtype: str, bound: float, folders: Folders, wanted: np.ndarray
) -> None:
    assert wanted.std() >= 1.0
    found = model_logits(folders[0], IDS, backend, dtype)
    assert relative_error(found, np.concatenate([wanted, wanted[:SHORT]])) <= bound


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_rank_reads_less_than_a_block_of_inputs(
    world_size: int, folders: Folders, wanted: np.ndarray
) -> None:
    """An expert's width is one block, so that every rank's share of `down_proj` ends within it."""
    for found in sharded_logits(folders[0], world_size):
        assert relative_error(found, np.concatenate([wanted, wanted[:SHORT]])) <= ORACLE


def test_the_engine_gives_these_logits(
    folders: Folders, wanted: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = forced_logits(monkeypatch, folders[0], IDS, PROMPT, "cpu_reference", "float64")
    assert relative_error(found, wanted[PROMPT - 1 : -1]) <= ENGINE
