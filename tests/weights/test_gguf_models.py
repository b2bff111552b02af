"""A GGUF file gives the tensors and the configuration of the model that it was made from."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig

from core.contract.errors import WeightError
from core.executor.rank import read_model
from core.models import ARCHITECTURES
from core.models.config import ModelConfig
from core.weights import open_checkpoint
from core.weights.gguf import GGUFCheckpoint
from core.weights.gguf_names import FAMILIES

from . import gguf_models as models

Made = tuple[Any, models.Tensors, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """The original's configuration and tensors, and a GGUF file of it, by the name of a case."""
    found: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            config, tensors = models.original(name, folder)
            models.to_gguf(folder / "m.gguf", name, config, tensors)
            found[name] = config, tensors, folder
        return found[name]

    return get


def test_every_architecture_has_a_case() -> None:
    assert {case.prefix for case in models.CASES.values()} == set(FAMILIES) - {"mixtral"}


@pytest.mark.parametrize("name", models.CASES)
def test_tensors_are_those_of_the_original(name: str, made: Callable[[str], Made]) -> None:
    _, tensors, folder = made(name)
    found = open_checkpoint(folder / "m.gguf")
    assert set(found.names()) == set(tensors)
    for hf, array in tensors.items():
        assert found.shape(hf) == array.shape
        shift = 1e-6 if name.startswith("gemma") and hf.endswith("norm.weight") else 0
        assert np.abs(found.read(hf) - array).max() <= shift, hf


@pytest.mark.parametrize("name", models.CASES)
def test_a_slice_is_that_slice_of_the_whole(name: str, made: Callable[[str], Made]) -> None:
    found = open_checkpoint(made(name)[2] / "m.gguf")
    rng = random.Random(0)
    for hf in found.names():
        whole = found.read(hf)
        for _ in range(3):
            index = tuple(slice(*sorted((rng.randint(0, n), rng.randint(0, n)))) for n in whole.shape)
            part = found.read(hf, index)
            assert part.dtype == found.dtype(hf) and np.array_equal(part, whole[index]), (hf, index)


@pytest.mark.parametrize("name", models.CASES)
def test_the_configuration_is_that_of_the_original(name: str, made: Callable[[str], Made]) -> None:
    """Both as transformers reads them: it fills in and renames what configurations of any age lack."""
    config, _, folder = made(name)
    ours = open_checkpoint(folder / "m.gguf").config()
    assert ours["architectures"] == [config.architectures[0]]
    read = AutoConfig.for_model(**ours).to_dict()
    wanted = config.to_dict()
    # `use_sliding_window` and such are transformers' own defaults on both sides.
    differing = {
        k: (v, wanted[k])
        for k, v in read.items()
        if k in wanted and v != wanted[k] and k not in ("transformers_version", "pad_token_id", "dtype")
    }
    if name == "phi3":  # which length the factors are for is said in another place
        differing.pop("original_max_position_embeddings", None)
    assert not differing


@pytest.mark.parametrize(
    "name", [n for n, case in models.CASES.items() if case.architecture in ARCHITECTURES]
)
def test_core_reads_the_same_model_from_both(name: str, made: Callable[[str], Made]) -> None:
    _, _, folder = made(name)

    def model(path: Path) -> ModelConfig:
        return read_model(open_checkpoint(path))[1]

    assert model(folder / "m.gguf") == model(folder)


def test_kv_b_proj_may_be_stored_whole(made: Callable[[str], Made], tmp_path: Path) -> None:
    config, tensors, _ = made("deepseek_v2")
    models.to_gguf(tmp_path / "m.gguf", "deepseek_v2", config, tensors, whole_kv_b=True)
    assert b"blk.0.attn_kv_b.weight" in (tmp_path / "m.gguf").read_bytes()
    found = open_checkpoint(tmp_path / "m.gguf")
    assert all(np.array_equal(found.read(hf), array) for hf, array in tensors.items())


def test_half_of_a_pair_is_refused(made: Callable[[str], Made], tmp_path: Path) -> None:
    config, tensors, _ = made("gpt_oss")
    models.to_gguf(tmp_path / "m.gguf", "gpt_oss", config, tensors)
    raw = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(raw.replace(b"blk.1.ffn_up_exps.weight", b"blk.1.ffn_xx_exps.weight"))
    with pytest.raises(WeightError, match=r"blk\.1\.ffn_gate_exps\.weight' but not 'blk\.1\.ffn_up_exps"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "llama"])
def test_blocks_of_packable_types_are_given_undecoded(
    name: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    """Decoded by hand, the blocks of any part are the values that `read` gives of it."""
    from gguf.quants import dequantize

    config, tensors, _ = made(name)
    models.to_gguf(tmp_path / "m.gguf", name, config, tensors, Kind.Q4_1)
    found = open_checkpoint(tmp_path / "m.gguf")
    assert isinstance(found, GGUFCheckpoint)
    packed = [n for n in found.names() if found.scheme(n)]
    assert any("expert" in n for n in packed) or name == "llama"
    assert any("q_proj" in n for n in packed)
    for hf in packed:
        rows = slice(1, found.shape(hf)[0] - 2)
        for columns in (slice(0, 32), slice(32, found.shape(hf)[1])):
            if columns.start == columns.stop:
                continue
            blocks = found.read_blocks(hf, (rows, columns))
            values = dequantize(np.ascontiguousarray(blocks), Kind.Q4_1)
            assert np.array_equal(values, found.read(hf, (rows, columns)))
        with pytest.raises(WeightError, match="through a block of 32"):
            found.read_blocks(hf, (rows, slice(16, 32)))
    with pytest.raises(WeightError, match="no blocks to keep"):
        found.read_blocks("model.norm.weight", (slice(0, 32),))
