"""Float8 checkpoints are read as products with their scales; what has none is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from core.contract.errors import ConfigError, WeightError
from core.weights.checkpoint import Checkpoint, open_checkpoint
from core.weights.verify import verify

from .raw import save

E4M3 = ml_dtypes.float8_e4m3fn
ROWS, COLUMNS = 300, 200


def write(folder: Path, tensors: dict[str, Any], quantization: dict[str, Any], dtype: str) -> Checkpoint:
    """A folder with one file."""
    save(folder, tensors)
    (folder / "config.json").write_text(json.dumps({"dtype": dtype, "quantization_config": quantization}))
    return open_checkpoint(folder)


def matrix(seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(E4M3)


def scales(*shape: int) -> Any:
    return np.random.default_rng(1).uniform(0.5, 2, shape).astype(np.float32)


def by_blocks(values: Any, scale: Any, block: tuple[int, int]) -> Any:
    """Each block times its scale, by loops."""
    found = values.astype(np.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            found[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] *= scale[i, j]
    return found


@pytest.mark.parametrize(
    ("scale", "suffix", "quantization", "block"),
    [
        (scales(3, 2), "_scale_inv", {"quant_method": "fp8", "weight_block_size": [128, 128]}, (128, 128)),
        (scales(3, 2), "_scale_inv", {"quant_method": "fp8"}, (128, 128)),
        (scales(10, 4), "_scale_inv", {"quant_method": "fp8", "weight_block_size": [32, 64]}, (32, 64)),
        (
            scales(ROWS, 1),
            "_scale",
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
            (1, 200),
        ),
        (scales(ROWS), "_scale", {"quant_method": "fbgemm_fp8"}, (1, 200)),
        (scales(1), "_scale", {"quant_method": "fp8"}, (300, 200)),
        (scales(), "_scale", {"quant_method": "fp8"}, (300, 200)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_matrix_is_its_values_times_its_scales(
    tmp_path: Path, scale: Any, suffix: str, quantization: dict[str, Any], block: Any, dtype: str
) -> None:
    tensors = {"a.weight": matrix(), f"a.weight{suffix}": scale, "a.input_scale": scales(1), "b": scales(3)}
    found = write(tmp_path, tensors, quantization, dtype)
    assert set(found.names()) == {"a.weight", "b"}
    grid = scale.reshape(-(-ROWS // block[0]), -(-COLUMNS // block[1]))
    wanted = by_blocks(tensors["a.weight"], grid, block).astype(found.dtype("a.weight"))
    assert found.dtype("a.weight").name == dtype
    assert np.array_equal(found.read("a.weight"), wanted)
    for cut in ((slice(100, 260), slice(3, 197)), (slice(290, 300), slice(60, 70)), (slice(5, 5), slice(0))):
        assert np.array_equal(found.read("a.weight", cut), wanted[cut])
    assert np.array_equal(found.read("b"), tensors["b"])


def test_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for scale in (scales(3, 3), scales(2, 2, 2), scales(7), scales(3, 2).astype(np.int32)):
        with pytest.raises(WeightError, match=r"model\.safetensors: tensor 'a\.weight_scale_inv'"):
            write(
                tmp_path,
                {"a.weight": matrix(), "a.weight_scale_inv": scale},
                {"quant_method": "fp8"},
                "float32",
            )
    with pytest.raises(WeightError, match="weight_block_size is 'x'"):
        write(tmp_path, {"a": scales(1)}, {"quant_method": "fp8", "weight_block_size": "x"}, "float32")


def test_a_scale_that_is_no_number_is_named(tmp_path: Path) -> None:
    bad = scales(3, 2)
    bad[1, 1] = np.nan
    found = write(tmp_path, {"a": matrix(), "a_scale_inv": bad}, {"quant_method": "fp8"}, "float32")
    with pytest.raises(WeightError, match="'a_scale_inv' has 1 values of 6 that are NaN"):
        verify(found, ["a"])
    bad[1, 1] = 1e36
    found = write(tmp_path, {"a": matrix(), "a_scale_inv": bad}, {"quant_method": "fp8"}, "float32")
    with pytest.raises(WeightError, match=r"'a_scale_inv' has 1 values of 6 that are NaN or beyond 7\.59"):
        verify(found, ["a"])


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_a_value_that_is_no_number_is_named(tmp_path: Path, dtype: Any) -> None:
    values = np.ones((256, 256), dtype)
    found = write(tmp_path, {"a": values, "a_scale_inv": scales(2, 2)}, {"quant_method": "fp8"}, "float32")
    verify(found, ["a"])
    values[3, 5] = np.nan
    found = write(tmp_path, {"a": values, "a_scale_inv": scales(2, 2)}, {"quant_method": "fp8"}, "float32")
    with pytest.raises(WeightError, match="'a' has 1 values of 65536 that are NaN"):
        verify(found, ["a"])


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "awq"}, "'awq'"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "pack-quantized"),
    ],
)
def test_another_quantization_is_named(tmp_path: Path, quantization: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        write(tmp_path, {"a": scales(1)}, quantization, "float32")
