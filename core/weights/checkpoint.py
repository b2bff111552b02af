"""Checkpoint: named tensors and a configuration, whatever the files are."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from core.contract.errors import ConfigError, WeightError
from core.weights.kinds import is_gguf, not_a_model

Index = tuple[slice, ...]
"""One slice per dimension, step 1."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, before anything is decoded.

    Attributes:
        name: in the file. array: its values, or uint8 [blocks, block bytes]; a view of the mapped file.
        kind: what the array holds: "values", "e8m0" (scales that are exponents), or blocks, by the name that
            GGUF has for their type.
        limit: values beyond this magnitude are as wrong as infinite ones.
    """

    file: Path
    name: str
    array: npt.NDArray[Any]
    kind: str = "values"
    limit: float = inf


class Checkpoint(Protocol):
    """Tensors under the names and in the orientation ([out, in] for linear layers) of Hugging Face.

    Which tensors a model needs is the caller's affair: a checkpoint says what it holds.
    """

    @property
    def path(self) -> Path:
        """The file or folder, for messages."""

    def names(self) -> Collection[str]:
        """Every tensor, such as `model.layers.0.self_attn.q_proj.weight`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; () for a scalar."""

    def dtype(self, name: str) -> np.dtype[Any]:
        """What `read` gives: the stored dtype (bfloat16 and float8 as in ml_dtypes); float32 for blocks of
        quantized values.
        """

    def nbytes(self, name: str) -> int:
        """Bytes that the whole tensor takes once read."""

    def read(self, name: str, index: Index | None = None) -> npt.NDArray[Any]:
        """A tensor, or the part that `index` cuts out; no other part of the file is touched.

        The array may be a read-only view of the mapped file, and stays valid after `close`. An empty slice
        gives an empty array.

        Raises:
            WeightError: there is no such tensor, or `index` has another number of dimensions. So do `shape`,
            `dtype` and `nbytes` for a missing tensor.
        """

    def stored(self, names: Collection[str]) -> Iterator[StoredTensor]:
        """What the files hold of these tensors, as it is stored, each once; nothing of it is read."""

    def source(self, name: str) -> Path:
        """The file that holds a tensor, for messages."""

    def config(self) -> dict[str, Any]:
        """The model's configuration in the form of Hugging Face's config.json; a new copy at each call."""

    def close(self) -> None:
        """Let go of the files. Idempotent; `read` raises WeightError afterwards."""


BLOCKS = {"q4_0": (32, 18), "q4_1": (32, 20), "q8_0": (32, 34)}
"""Elements and bytes of a block, by scheme."""


@runtime_checkable
class PackedCheckpoint(Checkpoint, Protocol):
    """A checkpoint whose tensors may be quantized in blocks that a backend can keep as they are."""

    def scheme(self, name: str) -> str:
        """The tensor's quantization scheme as `PackRequest.scheme` names it; "" = it has none to keep."""

    def read_blocks(self, name: str, index: Index) -> npt.NDArray[np.uint8]:
        """The part that `index` cuts out as the file has it: uint8 [..., row bytes].

        Raises:
            WeightError: the tensor has no scheme, or the last slice cuts through a block; and as `read`.
        """


_FP8 = ("fp8", "fbgemm_fp8", "compressed-tensors")
_FLOAT_FORMATS = ("float-quantized", "naive-quantized")


def open_checkpoint(path: str | Path, load_format: str = "auto") -> Checkpoint:
    """Open a folder with config.json and safetensors, or a .gguf file. Headers are checked, no tensor is
    read. With `load_format` "dummy", random weights for a folder's config.json.

    Raises:
        ConfigError: the path is not there, or is neither of these.
        WeightError: a file is truncated, names an absent file or tensor, or its header contradicts itself.
    """
    path = Path(path)
    if load_format == "dummy" and path.exists():
        from core.weights.dummy import dummy_checkpoint

        return dummy_checkpoint(path)
    if path.is_dir():
        from core.weights.safetensors import SafetensorsCheckpoint

        return _unpacked(SafetensorsCheckpoint(path))
    if is_gguf(path):
        from core.weights.gguf import GGUFCheckpoint

        return GGUFCheckpoint(path)
    raise not_a_model(path)


def _unpacked(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, with tensors of a quantization that is undone at load in their plain form.

    Raises:
        ConfigError: another quantization.
    """
    quantization = checkpoint.config().get("quantization_config") or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else ""
    if not isinstance(quantization, dict) or not (method is None or isinstance(method, str)):
        raise ConfigError(
            f"{checkpoint.path / 'config.json'}: the config's quantization_config is {quantization!r:.200}, "
            "but it must be a JSON object with quant_method, a text; check that the config is that of this "
            "model"
        )
    if method == "mxfp4":
        from core.weights.mxfp4 import Mxfp4Checkpoint

        return Mxfp4Checkpoint(checkpoint)
    if method == "compressed-tensors" and quantization.get("format") not in _FLOAT_FORMATS:
        method = f"{method} in format {quantization.get('format')}"
    if method in _FP8:
        from core.weights.fp8 import Fp8Checkpoint

        return Fp8Checkpoint(checkpoint)
    if method is not None:
        raise ConfigError(
            f"{checkpoint.path}: quant_method is {method!r}; read are mxfp4, {', '.join(_FP8)}: take a "
            "checkpoint that is not quantized, or a .gguf file"
        )
    return checkpoint


def check_index(path: Path, name: str, shape: tuple[int, ...], index: Index | None) -> Index:
    """`index`, or the whole tensor, with start and stop filled in and cut to the shape.

    Raises:
        WeightError: another number of dimensions than the tensor's, or a step.
    """
    if index is None:
        return tuple(slice(0, n) for n in shape)
    if len(index) != len(shape) or any(s.step not in (None, 1) for s in index):
        raise WeightError(f"{path}: tensor {name!r} has shape {shape}; it cannot be cut by {index}")
    bounds = [s.indices(n) for s, n in zip(index, shape, strict=True)]
    return tuple(slice(start, max(start, stop)) for start, stop, _ in bounds)
