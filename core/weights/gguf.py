"""GGUF files under Hugging Face's names, order and configuration."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.contract.errors import WeightError
from core.weights.checkpoint import BLOCKS, Index, StoredTensor, check_index
from core.weights.gguf_config import config_of
from core.weights.gguf_header import QUANTIZED, Header, read_header
from core.weights.gguf_metadata import Metadata
from core.weights.gguf_names import FAMILIES, ROPE_FACTORS, family_name, views
from core.weights.gguf_tensors import Bytes, Stored, View


class GGUFCheckpoint:
    """One GGUF file, mapped. Quantized tensors are read as float32, only the rows and blocks wanted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        header = read_header(path)
        metadata = Metadata(path, header.metadata)
        name = family_name(metadata)
        if name not in FAMILIES:
            raise WeightError(
                f"{path} has architecture {name!r}; GGUF files are read of {', '.join(FAMILIES)}: take the "
                "model's safetensors folder"
            )
        if metadata.count("split.count", 1) > 1:
            raise WeightError(f"{path} is one part of several; merge them into one file")
        self._header = header
        self._data: Bytes | None = np.memmap(path, np.uint8, mode="r")
        self._config = config_of(path, header, name, self._factors(header))
        self._tensors = views(path, header, FAMILIES[name], self._config["head_dim"])

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def names(self) -> Collection[str]:
        """See `Checkpoint`."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        return self._find(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """See `Checkpoint`."""
        return self._find(name).dtype

    def nbytes(self, name: str) -> int:
        """See `Checkpoint`."""
        return prod(self.shape(name)) * self.dtype(name).itemsize

    def read(self, name: str, index: Index | None = None) -> npt.NDArray[Any]:
        """See `Checkpoint`."""
        found = self._find(name)
        ranges = check_index(self._path, name, found.shape, index)
        if any(r.start == r.stop for r in ranges):
            return np.empty(tuple(r.stop - r.start for r in ranges), found.dtype)
        return found.read(self._open(), ranges)

    def scheme(self, name: str) -> str:
        """See `PackedCheckpoint`. A type's scheme is called as the type, in lower case."""
        found = self._find(name)
        kept = isinstance(found, Stored) and not found.shift and len(found.shape) > 1
        return found.type.lower() if kept and found.type.lower() in BLOCKS else ""

    def read_blocks(self, name: str, index: Index) -> npt.NDArray[np.uint8]:
        """See `PackedCheckpoint`."""
        found, scheme = self._find(name), self.scheme(name)
        if not isinstance(found, Stored) or not scheme:
            raise WeightError(f"{self._path}: tensor {name!r} of type {found.type} has no blocks to keep")
        ranges, size = check_index(self._path, name, found.shape, index), BLOCKS[scheme][0]
        if ranges[-1].start % size or ranges[-1].stop % size:
            raise WeightError(
                f"{self._path}: tensor {name!r} is cut at {ranges[-1]}, through a block of {size}; read "
                "it decoded"
            )
        return found.blocks(self._open(), ranges)

    def stored(self, names: Collection[str]) -> Iterator[StoredTensor]:
        """See `Checkpoint`. Every tensor of the file, by the file's own names."""
        data = self._open()
        for name, info in self._header.tensors.items():
            whole = Stored(info)
            ranges = tuple(slice(0, n) for n in info.shape)
            if info.type in QUANTIZED:
                blocks = whole.blocks(data, ranges).reshape(-1, info.block_bytes)
                yield StoredTensor(self._path, name, blocks, info.type)
            else:
                yield StoredTensor(self._path, name, whole.read(data, ranges))

    def source(self, name: str) -> Path:
        """See `Checkpoint`."""
        self._find(name)
        return self._path

    def config(self) -> dict[str, Any]:
        """See `Checkpoint`."""
        return json.loads(json.dumps(self._config))  # type: ignore[no-any-return]

    def close(self) -> None:
        """See `Checkpoint`."""
        self._data = None

    def _find(self, name: str) -> View:
        found = self._tensors.get(name)
        if found is None:
            raise WeightError(f"{self._path} has no tensor {name!r}; it has {len(self._tensors)} others")
        return found

    def _open(self) -> Bytes:
        if self._data is None:
            raise WeightError(f"{self._path} was closed; open the checkpoint again")
        return self._data

    def _factors(self, header: Header) -> dict[str, npt.NDArray[np.float64]]:
        """Rotary factors, which are stored as tensors."""
        found = {n: Stored(header.tensors[n]) for n in ROPE_FACTORS if n in header.tensors}
        whole = {n: tuple(slice(0, size) for size in view.shape) for n, view in found.items()}
        return {n: view.read(self._open(), whole[n]).astype(np.float64) for n, view in found.items()}
