"""MXFP4 tensors: every value, the slices that a rank reads, and what is refused."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from core.contract.errors import ConfigError, WeightError
from core.weights.checkpoint import Index, open_checkpoint
from core.weights.mxfp4 import Mxfp4Checkpoint, dequantize
from core.weights.safetensors import SafetensorsCheckpoint
from core.weights.verify import verify

NAME = "model.layers.0.mlp.experts.gate_up_proj"
E, OUT, GROUPS = 3, 10, 4
IN = GROUPS * 32


def random_pair(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (E, OUT, GROUPS, 16), np.uint8)
    return blocks, random.integers(110, 140, (E, OUT, GROUPS), np.uint8)


def write(folder: Path, tensors: dict[str, Any], method: str = "mxfp4") -> Path:
    save_file(tensors, folder / "model.safetensors")
    config = {"quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def pair(blocks: np.ndarray, scales: np.ndarray) -> dict[str, Any]:
    return {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}


def e2m1(code: int) -> Fraction:
    """A four-bit float by its definition: exponent bias 1, subnormal where the exponent is 0."""
    exponent, mantissa = code >> 1 & 3, code & 1
    size = Fraction(mantissa, 2) if exponent == 0 else (1 + Fraction(mantissa, 2)) * 2 ** (exponent - 1)
    return -size if code & 8 else size


def test_every_value_under_every_scale_is_the_definitions() -> None:
    """Each code in the low and in the high half of a byte; scales whose largest product bfloat16 holds."""
    codes = np.arange(16, dtype=np.uint8)
    blocks = (codes | codes[::-1] << 4)[None, None]  # [1, 1, 16]
    for scale in range(253):
        found = dequantize(blocks, np.array([[scale]], np.uint8))
        assert found.dtype == ml_dtypes.bfloat16
        wanted = [e2m1(int(c)) for pair in zip(codes, codes[::-1], strict=True) for c in pair]
        factor = Fraction(2) ** (scale - 127)
        assert [Fraction(float(x)) for x in found[0].astype(np.float64)] == [w * factor for w in wanted]


def test_equals_transformers(tmp_path: Path) -> None:
    blocks, scales = random_pair()
    wanted = convert_moe_packed_tensors(
        torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32
    )
    checkpoint = open_checkpoint(write(tmp_path, pair(blocks, scales)))
    assert set(checkpoint.names()) == {NAME}
    assert checkpoint.shape(NAME) == (E, IN, OUT)
    found = checkpoint.read(NAME)
    assert found.dtype == checkpoint.dtype(NAME)
    assert found.nbytes == checkpoint.nbytes(NAME)
    np.testing.assert_array_equal(found.astype(np.float32), wanted.numpy())


class Watched(SafetensorsCheckpoint):
    """Keeps what was read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reads: list[tuple[str, Index | None]] = []

    def read(self, name: str, index: Index | None = None) -> Any:
        self.reads.append((name, index))
        return super().read(name, index)


@pytest.mark.parametrize(
    ("index", "groups"),
    [
        ((slice(1, 2), slice(0, IN), slice(2, 7)), slice(0, 4)),
        ((slice(0, 3), slice(32, 96), slice(0, OUT)), slice(1, 3)),
        ((slice(2, 3), slice(40, 65), slice(9, 10)), slice(1, 3)),
        ((slice(0, 2), slice(33, 34), slice(0, 1)), slice(1, 2)),
        ((slice(1, 1), slice(0, 5), slice(0, 1)), slice(0, 1)),
        ((slice(0, 1), slice(5, 5), slice(0, 1)), slice(0, 1)),
    ],
)
def test_a_slice_reads_its_own_experts_outputs_and_blocks(
    index: Index, groups: slice, tmp_path: Path
) -> None:
    inner = Watched(write(tmp_path, pair(*random_pair())))
    checkpoint = Mxfp4Checkpoint(inner)
    whole = checkpoint.read(NAME)
    inner.reads.clear()
    np.testing.assert_array_equal(checkpoint.read(NAME, index), whole[index])
    read = (index[0], index[2], groups)
    assert inner.reads == [(f"{NAME}_blocks", (*read, slice(0, 16))), (f"{NAME}_scales", read)]


def test_other_tensors_are_as_they_were(tmp_path: Path) -> None:
    other = np.arange(6, dtype=np.float32).reshape(2, 3)
    checkpoint = open_checkpoint(write(tmp_path, {**pair(*random_pair()), "other": other}))
    assert set(checkpoint.names()) == {NAME, "other"}
    assert (checkpoint.shape("other"), checkpoint.dtype("other")) == ((2, 3), np.float32)
    np.testing.assert_array_equal(checkpoint.read("other", (slice(1, 2), slice(0, 3))), other[1:])


def test_a_checkpoint_that_does_not_say_mxfp4_keeps_its_halves(tmp_path: Path) -> None:
    folder = write(tmp_path, pair(*random_pair()))
    (folder / "config.json").write_text("{}")
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.names()) == {f"{NAME}_blocks", f"{NAME}_scales"}


def test_a_quantization_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quant_method is 'other'; read are mxfp4, "):
        open_checkpoint(write(tmp_path, pair(*random_pair()), "other"))


def _short(t: dict[str, Any]) -> None:
    t[f"{NAME}_scales"] = t[f"{NAME}_scales"][:, :-1]


def _narrow(t: dict[str, Any]) -> None:
    t[f"{NAME}_blocks"] = t[f"{NAME}_blocks"][..., :8]


def _flat(t: dict[str, Any]) -> None:
    t[f"{NAME}_blocks"] = t[f"{NAME}_blocks"].reshape(E, OUT, -1)


def _signed(t: dict[str, Any]) -> None:
    t[f"{NAME}_scales"] = t[f"{NAME}_scales"].astype(np.int16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{NAME}_scales"), "no tensor '.*gate_up_proj_scales'"),
        (lambda t: t.pop(f"{NAME}_blocks"), "no tensor '.*gate_up_proj_blocks'"),
        (_short, r"has shape \(3, 10, 4, 16\) and .*_scales' \(3, 9, 4\)"),
        (_narrow, r"has shape \(3, 10, 4, 8\)"),
        (_flat, r"has shape \(3, 10, 64\)"),
        (_signed, "_scales' is int16, but MXFP4 wants uint8"),
    ],
)
def test_halves_that_do_not_belong_together_are_refused(change: Any, words: str, tmp_path: Path) -> None:
    tensors = pair(*random_pair())
    change(tensors)
    with pytest.raises(WeightError, match=words):
        open_checkpoint(write(tmp_path, {k: np.ascontiguousarray(v) for k, v in tensors.items()}))


@pytest.mark.parametrize("scale", [252, 253, 254, 255])
def test_scales_that_may_make_a_value_infinite_are_refused(scale: int, tmp_path: Path) -> None:
    blocks, scales = random_pair()
    blocks[1, 4, 2], scales[1, 4, 2] = 0x77, scale
    checkpoint = open_checkpoint(write(tmp_path, pair(blocks, scales)))
    is_finite = bool(np.isfinite(checkpoint.read(NAME).astype(np.float32)).all())
    assert is_finite == (scale == 252)
    if is_finite:
        verify(checkpoint, [NAME])
        return
    with pytest.raises(
        WeightError, match=f"_scales' has 1 scales of {scales.size} that are NaN or beyond 252"
    ):
        verify(checkpoint, [NAME])
