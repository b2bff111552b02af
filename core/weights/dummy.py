"""DummyCheckpoint: random weights of given shapes, for tests and for timing models that are not on disk."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.contract.errors import WeightError
from core.weights.checkpoint import Index, check_index

# Rows that share a generator: a slice costs at most this many rows more than it has.
ROWS = 64


class DummyCheckpoint:
    """Normal values of mean 0 (1 for tensors named `*norm.weight`, so that activations keep their size).

    Values depend on seed, name and shape alone: not on the order of reads, nor on how a tensor is cut.

    Args:
        shapes: of every tensor. dtype: floating. std: standard deviation.
        config: what `config` gives.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        seed: int = 0,
        dtype: npt.DTypeLike = np.float32,
        std: float = 0.02,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._shapes = dict(shapes)
        self._seed = seed
        self._dtype: np.dtype[Any] = np.dtype(dtype)
        self._std = std
        self._config = dict(config or {})

    @property
    def path(self) -> Path:
        """No file: a name for messages."""
        return Path("dummy")

    def names(self) -> Collection[str]:
        """See `Checkpoint`."""
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        if name not in self._shapes:
            raise WeightError(f"dummy has no tensor {name!r}; it has {len(self._shapes)} others")
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype[Any]:
        """See `Checkpoint`."""
        self.shape(name)
        return self._dtype

    def nbytes(self, name: str) -> int:
        """See `Checkpoint`."""
        return prod(self.shape(name)) * self._dtype.itemsize

    def read(self, name: str, index: Index | None = None) -> npt.NDArray[Any]:
        """See `Checkpoint`; the result is a new array."""
        shape = self.shape(name)
        ranges = check_index(self.path, name, shape, index)
        if not shape:
            return self._chunk(name, 0, ()).reshape(())
        first, last = ranges[0].start // ROWS, -(-ranges[0].stop // ROWS)
        chunks = [
            self._chunk(name, i, (min(ROWS, shape[0] - i * ROWS), *shape[1:])) for i in range(first, last)
        ]
        if not chunks:
            return np.empty((0, *shape[1:]), self._dtype)[(slice(None), *ranges[1:])]
        rows = slice(ranges[0].start - first * ROWS, ranges[0].stop - first * ROWS)
        return np.concatenate([c[(slice(None), *ranges[1:])] for c in chunks])[rows]

    def config(self) -> dict[str, Any]:
        """See `Checkpoint`."""
        return json.loads(json.dumps(self._config))  # type: ignore[no-any-return]

    def close(self) -> None:
        """Nothing to let go of."""

    def _chunk(self, name: str, i: int, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        key = sha256(f"{self._seed}\0{i}\0{name}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        return (mean + self._std * generator.standard_normal(shape, np.float32)).astype(self._dtype)
