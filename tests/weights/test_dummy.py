"""DummyCheckpoint: the same values however they are read; and a model from nothing but its config.json."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from core import LLM, SamplingParams
from core.contract.errors import ConfigError, WeightError
from core.contract.types import Param
from core.executor.rank import read_model
from core.models.base import leaves
from core.parallel.sharding import Shard
from core.weights.checkpoint import open_checkpoint
from core.weights.checks import check_checkpoint
from core.weights.dummy import DummyCheckpoint
from core.weights.loader import read_param
from tests.models.conftest import tiny_folder
from tests.models.tiny import FAMILIES

__all__ = ["tiny_folder"]

SHAPES: dict[str, tuple[int, ...]] = {
    "a.weight": (197, 70),
    "b.weight": (197, 70),
    "narrow.weight": (197, 7),
    "model.norm.weight": (64,),
    "cube": (4, 5, 6),
    "wide": (2, 150_000),
    "scalar": (),
    "empty": (0, 3),
}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_slice_equals_that_slice_of_the_whole(dtype: type) -> None:
    found = DummyCheckpoint(SHAPES, seed=3, dtype=dtype)
    for name, index in [
        ("a.weight", (slice(63, 129), slice(2, 4))),
        ("a.weight", (slice(192, None), slice(None))),
        ("a.weight", (slice(9, 9), slice(None))),
        ("narrow.weight", (slice(3, 9), slice(2, 7))),
        ("model.norm.weight", (slice(5, 9),)),
        ("cube", (slice(1, 3), slice(0, 2), slice(5, 6))),
        ("wide", (slice(1, 2), slice(10, 100_000))),
        ("wide", (slice(0, 2), slice(140_000, 150_000))),
        ("empty", (slice(0, 4), slice(1, 2))),
        ("scalar", ()),
    ]:
        part, whole = found.read(name, index), found.read(name)
        assert part.shape == whole[index].shape and part.dtype == whole.dtype == np.dtype(dtype)
        assert np.array_equal(part, whole[index]), name


def test_values_depend_on_seed_and_name_alone() -> None:
    first, again, other = (DummyCheckpoint(SHAPES, seed=s) for s in (1, 1, 2))
    again.read("b.weight")
    assert np.array_equal(first.read("a.weight"), again.read("a.weight"))
    assert not np.array_equal(first.read("a.weight"), other.read("a.weight"))
    assert not np.array_equal(first.read("a.weight"), first.read("b.weight"))


def test_no_row_of_a_large_vocabulary_is_there_twice() -> None:
    rows = DummyCheckpoint({"embed": (150_000, 16)}, dtype=ml_dtypes.bfloat16).read("embed")
    assert len({row.tobytes() for row in rows}) == len(rows)


def test_values_have_the_mean_and_deviation_asked_for() -> None:
    shapes = {"w": (512, 640), "x.norm.weight": (4096,), "y.norm.weight": (4096,)}
    found = DummyCheckpoint(shapes, std=0.5, centres={"y.norm.weight": 0.0})
    assert abs(found.read("w").mean()) < 0.02 and abs(found.read("w").std() - 0.5) < 0.02
    assert abs(found.read("x.norm.weight").mean() - 1) < 0.05
    assert abs(found.read("y.norm.weight").mean()) < 0.05


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(WeightError, match="no tensor 'x'"):
        DummyCheckpoint(SHAPES).read("x")


def bare(folder: Path, to: Path, **changes: Any) -> Path:
    """A folder with nothing but config.json."""
    to.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to


@pytest.mark.parametrize("family", [f.name for f in FAMILIES])
def test_every_family_has_all_its_tensors_and_ranks_share_them(
    family: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(bare(tiny_folder(family), tmp_path / "bare"), "dummy")
    definition, c = read_model(checkpoint)
    check_checkpoint(definition, c, checkpoint)
    for param in (leaf for leaf in leaves(definition.params(c)) if isinstance(leaf, Param)):
        whole = [checkpoint.read(part.name) for part in param.parts]
        read_param(checkpoint, param, Shard())
        for rank in range(2):
            shard = Shard(rank, 2)
            share = read_param(checkpoint, param, shard)
            if len(param.parts) > 1 or param.parts[0].pick or param.parts[0].transform != "none":
                continue
            start = param.parts[0].start or (0,) * share.ndim
            at = [
                slice(s + r.start, s + r.stop)
                for s, r in zip(start, shard.ranges(param.parts[0]), strict=True)
            ]
            assert np.array_equal(share, whole[0][tuple(at)])


def test_a_model_runs_from_its_config_alone(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = bare(tiny_folder("llama"), tmp_path / "bare", vocab_size=300)
    options: dict[str, Any] = {"load_format": "dummy", "max_model_len": 64, "show_progress": False}
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    found = []
    for backend in ("cpu_reference", "cpu"):
        with LLM(folder, backend=backend, dtype="float32", **options) as llm:
            assert llm.tokenizer.encode("aé") == [97, 0xC3, 0xA9]
            found.append(llm.generate("Hello", params)[0].outputs[0])
    assert len(found[0].token_ids) == 5 and found[0].token_ids == found[1].token_ids


def test_large_tensors_come_at_the_speed_of_copying() -> None:
    checkpoint = DummyCheckpoint({"w": (8192, 8192)}, dtype=ml_dtypes.bfloat16)
    checkpoint.read("w", (slice(0, 1), slice(0, 8192)))
    start = time.process_time()
    assert checkpoint.read("w").nbytes == 2**27
    # Drawing as many normal values takes ten times as long.
    assert time.process_time() - start < 0.5


def test_a_folder_without_config_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json cannot be read .* dummy weights want"):
        open_checkpoint(tmp_path, "dummy")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ConfigError, match="lacks vocab_size"):
        open_checkpoint(tmp_path, "dummy")
