"""DummyCheckpoint: random weights of given shapes, for tests and for timing models that are not on disk.

Rows are windows of one pool of random values, each beginning at another place, so that a model is made at the
speed of copying and any part of a tensor without the rest of it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.contract.errors import ConfigError, WeightError
from core.contract.types import Param
from core.models import read_config
from core.models.base import leaves
from core.models.config import checkpoint_dtype
from core.weights.checkpoint import Index, StoredTensor, check_index
from core.weights.checks import check_sizes, stored_shape

# A prime, so that steps of any length come to every place of the pool before they return to the first.
_POOL = (1 << 22) - 3
# The pool's beginning follows its end again, so that windows up to this width need no second copy.
_WIDEST = 1 << 17
_NARROW = 64


class DummyCheckpoint:
    """Normal values of mean 0, or 1 for tensors named `*norm.weight`, so that activations keep their size.

    Values depend on seed, name and shape alone: not on the order of reads, nor on how a tensor is cut.

    Args:
        shapes: of every tensor. dtype: floating. std: standard deviation.
        config: what `config` gives. centres: means of tensors that have another one.
        path: the folder of the configuration, for messages.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        seed: int = 0,
        dtype: npt.DTypeLike = np.float32,
        std: float = 0.02,
        config: Mapping[str, Any] | None = None,
        centres: Mapping[str, float] | None = None,
        path: Path = Path("dummy"),
    ) -> None:
        self._shapes = dict(shapes)
        self._seed = seed
        self._dtype: np.dtype[Any] = np.dtype(dtype)
        self._std = std
        self._config = dict(config or {})
        self._centres = dict(centres or {})
        self._path = path

    @property
    def path(self) -> Path:
        """See `Checkpoint`."""
        return self._path

    def names(self) -> Collection[str]:
        """See `Checkpoint`."""
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        if name not in self._shapes:
            raise WeightError(f"{self._path} has no tensor {name!r}; it has {len(self._shapes)} others")
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
        ranges = check_index(self._path, name, shape, index)
        wanted = tuple(r.stop - r.start for r in ranges)
        if 0 in wanted:
            return np.empty(wanted, self._dtype)
        centre = self._centres.get(name, 1.0 if name.endswith("norm.weight") else 0.0)
        pool = _pool(self._seed, self._std, centre, self._dtype)
        key = sha256(f"{self._seed}\0{name}".encode()).digest()
        first, step = (int.from_bytes(key[at : at + 8], "little") % (_POOL - 1) for at in (0, 8))
        starts = (first + _row_numbers(shape, ranges) * (1 + step)) % _POOL
        columns = ranges[-1] if ranges else slice(0, 1)
        return _windows(pool, starts, columns).reshape(wanted)

    def stored(self, names: Collection[str]) -> Iterator[StoredTensor]:
        """See `Checkpoint`. Nothing is stored."""
        return iter(())

    def source(self, name: str) -> Path:
        """See `Checkpoint`: there is no file."""
        self.shape(name)
        return self._path

    def config(self) -> dict[str, Any]:
        """See `Checkpoint`."""
        return json.loads(json.dumps(self._config))  # type: ignore[no-any-return]

    def close(self) -> None:
        """Nothing to let go of."""


def dummy_checkpoint(path: Path, seed: int = 0) -> DummyCheckpoint:
    """Random weights for the model that a config.json describes, in its dtype and of its `initializer_range`.

    Args:
        path: a folder with config.json, or the file itself.

    Raises:
        ConfigError: there is none, or its architecture or values are not known.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        hf = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(
            f"{file} cannot be read as JSON ({e}); dummy weights want a folder with the model's config.json"
        ) from None
    if not isinstance(hf, dict):
        raise ConfigError(f"{file} holds a {type(hf).__name__}; dummy weights want the model's config.json")
    model, c = read_config(hf, (), file)
    check_sizes(c, file)
    params = [leaf for leaf in leaves(model.params(c)) if isinstance(leaf, Param)]
    shapes: dict[str, tuple[int, ...]] = {}
    centres: dict[str, float] = {}
    for part in (part for param in params for part in param.parts):
        begin = part.start or (0,) * len(part.shape)
        ends = tuple(s + n for s, n in zip(begin, stored_shape(part), strict=True))
        shapes[part.name] = tuple(map(max, ends, shapes.get(part.name, ends)))
        if part.transform == "add_one":
            centres[part.name] = 0.0
    text = hf.get("text_config") or hf
    std = float(text.get("initializer_range") or 0.02)
    return DummyCheckpoint(shapes, seed, checkpoint_dtype(hf), std, hf, centres, path)


@lru_cache(maxsize=4)
def _pool(seed: int, std: float, centre: float, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    generator = np.random.Generator(np.random.Philox(key=seed))
    values = (centre + std * generator.standard_normal(_POOL, np.float32)).astype(dtype)
    found: npt.NDArray[Any] = np.concatenate([values, values[:_WIDEST]])
    found.flags.writeable = False
    return found


def _row_numbers(shape: tuple[int, ...], ranges: Index) -> npt.NDArray[np.int64]:
    """Numbers of the wanted rows, int64 [rows]; a row is what the last dimension holds."""
    rows = np.zeros(1, np.int64)
    for size, r in zip(shape[:-1], ranges[:-1], strict=True):
        rows = (rows[:, None] * size + np.arange(r.start, r.stop)).reshape(-1)
    return rows


def _windows(pool: npt.NDArray[Any], starts: npt.NDArray[np.int64], columns: slice) -> npt.NDArray[Any]:
    """Windows of the pool from `starts` on, and of each these columns: [rows, columns]."""
    width = columns.stop - columns.start
    if width <= _NARROW or columns.stop > _WIDEST:
        places = starts[:, None] + np.arange(columns.start, columns.stop)
        return pool[places % _POOL]
    found = np.empty((len(starts), width), pool.dtype)
    for row, start in zip(found, (starts + columns.start).tolist(), strict=True):
        row[:] = pool[start : start + width]
    return found
