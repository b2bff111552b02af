"""Safetensors folders: config.json with model.safetensors, or shards under model.safetensors.index.json.

The header is read here rather than with the safetensors package, because numpy arrays in bfloat16 and float8
need ml_dtypes and because a message has to name file and tensor. Format, from the safetensors package's
README: the header's length in 8 little-endian bytes, a JSON header, the data.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from core.contract.errors import ConfigError, WeightError
from core.weights.checkpoint import Index, StoredTensor, check_index

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}


@dataclass(frozen=True)
class _Tensor:
    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int


class SafetensorsCheckpoint:
    """A folder. Files are mapped, and pages are read when a slice touches them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._config = _read_json(path / "config.json", ConfigError)
        self._tensors = _tensors(path)
        self._maps: dict[Path, np.memmap[Any, Any]] = {}
        self._closed = False

    @property
    def path(self) -> Path:
        """The folder."""
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
        found = self._find(name)
        return prod(found.shape) * found.dtype.itemsize

    def read(self, name: str, index: Index | None = None) -> npt.NDArray[Any]:
        """See `Checkpoint`."""
        found = self._find(name)
        ranges = check_index(self._path, name, found.shape, index)
        if self._closed:
            raise WeightError(f"{self._path} was closed; open the checkpoint again to read {name!r}")
        if 0 in found.shape:
            return np.empty(found.shape, found.dtype)[ranges]
        data = self._maps.get(found.file)
        if data is None:
            data = self._maps[found.file] = np.memmap(found.file, np.uint8, mode="r")
        # The format does not align tensors, and ndarray takes any offset.
        return np.ndarray(found.shape, found.dtype, buffer=data, offset=found.offset)[ranges]

    def stored(self, names: Collection[str]) -> Iterator[StoredTensor]:
        """See `Checkpoint`."""
        for name in names:
            yield StoredTensor(self.source(name), name, self.read(name))

    def source(self, name: str) -> Path:
        """See `Checkpoint`."""
        return self._find(name).file

    def config(self) -> dict[str, Any]:
        """See `Checkpoint`."""
        return json.loads(json.dumps(self._config))  # type: ignore[no-any-return]

    def close(self) -> None:
        """See `Checkpoint`."""
        self._closed = True
        self._maps.clear()

    def _find(self, name: str) -> _Tensor:
        found = self._tensors.get(name)
        if found is None:
            raise WeightError(f"{self._path} has no tensor {name!r}; it has {len(self._tensors)} others")
        return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of a key that is there twice, other readers may take the other value."""
    found = dict(pairs)
    if len(found) != len(pairs):
        [(twice, count)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has {twice!r} {count} times")
    return found


def _parse(text: str | bytes) -> Any:
    """A JSON value. Raises ValueError, also for what is nested too deep."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _read_json(path: Path, error: type[Exception]) -> dict[str, Any]:
    try:
        found = _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path.parent} has no {path.name}; give a complete model folder") from None
    except (OSError, ValueError) as e:
        raise error(f"{path} cannot be read as JSON ({e}); download the model again") from None
    if not isinstance(found, dict):
        raise error(f"{path} holds a {type(found).__name__}, not a JSON object; download the model again")
    return found


def _tensors(folder: Path) -> dict[str, _Tensor]:
    single, index = (folder / SINGLE).is_file(), folder / INDEX
    if not single and not index.is_file():
        raise WeightError(
            f"{folder} has neither {SINGLE} nor {INDEX}; give a folder with safetensors weights"
        )
    where = _weight_map(index) if index.is_file() else {}
    files = _shards(folder, where)
    if single:
        # An index beside it is not needed, but one that names absent files is that of another model.
        return _read_header(folder / SINGLE)
    tensors: dict[str, _Tensor] = {}
    for file in files:
        for name, found in _read_header(file).items():
            if name in tensors:
                raise WeightError(
                    f"{file} has tensor {name!r}, which {tensors[name].file.name} has too; one was wanted: "
                    "download the model again"
                )
            tensors[name] = found
    for name, file_name in where.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise WeightError(
                f"{folder / file_name} has no tensor {name!r}, but {INDEX} places it there; download both "
                "again"
            )
    return tensors


def _weight_map(index: Path) -> dict[str, Any]:
    found = _read_json(index, WeightError).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise WeightError(
            f"{index}: weight_map is {found!r:.200}, but an object with the file of each tensor is wanted; "
            "download the index again"
        )
    return found


def _shards(folder: Path, where: dict[str, Any]) -> list[Path]:
    """The files of an index, each once.

    Raises:
        WeightError: one is not there, or not in this folder.
    """
    found: dict[Any, Path] = {}
    for name, file in where.items():
        if not _is_shard(folder, file):
            raise WeightError(
                f"{folder / INDEX} places tensor {name!r} in {file!r:.200}, which is not a file of {folder}, "
                "but the name of one is wanted; download that shard, or delete an index of other files"
            )
        found.setdefault(file, folder / file)
    return list(found.values())


def _is_shard(folder: Path, file: Any) -> bool:
    try:
        return isinstance(file, str) and Path(file).name == file and (folder / file).is_file()
    except OSError:  # a name that is too long
        return False


def _read_header(file: Path) -> dict[str, _Tensor]:
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise WeightError(
                    f"{file} has {size} bytes, but wants a header of {length} bytes after the first 8; it is "
                    "truncated or no safetensors file: download it again"
                )
            text = f.read(length)
    except OSError as e:
        raise WeightError(f"{file} cannot be read ({e}); check its permissions and the disk") from None
    try:
        header = _parse(text)
    except ValueError as e:
        raise WeightError(f"{file}: the header is not JSON ({e}); download the file again") from None
    if not isinstance(header, dict):
        raise WeightError(f"{file}: the header is not a JSON object; download the file again")
    header.pop("__metadata__", None)
    found = {name: _tensor(file, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_places(file, found, 8 + length, size)
    return found


def _tensor(file: Path, name: str, entry: Any, start: int, size: int) -> _Tensor:
    try:
        shape = tuple(_whole(n) for n in entry["shape"])
        first, last = (_whole(n) for n in entry["data_offsets"])
        kind = str(entry["dtype"])
    except (TypeError, KeyError, ValueError):
        raise WeightError(
            f"{file}: tensor {name!r} has header entry {entry!r:.200}, but dtype, shape and data_offsets are "
            "wanted; download the file again"
        ) from None
    if kind not in DTYPES:
        raise WeightError(f"{file}: tensor {name!r} has dtype {kind!r}; known are {', '.join(DTYPES)}")
    wanted = prod(shape) * DTYPES[kind].itemsize
    if min(shape, default=0) < 0 or first < 0 or last - first != wanted:
        raise WeightError(
            f"{file}: tensor {name!r} of shape {shape} in {kind} takes {wanted} bytes, but its offsets "
            f"{first} to {last} span {last - first}; download the file again"
        )
    if start + last > size:
        raise WeightError(
            f"{file}: tensor {name!r} ends at byte {start + last}, but the file has {size}; it is truncated: "
            "download it again"
        )
    return _Tensor(file, shape, DTYPES[kind], start + first)


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value


def _check_places(file: Path, tensors: dict[str, _Tensor], start: int, size: int) -> None:
    """Refuse tensors that share bytes, and bytes that no tensor has: the format knows neither."""
    spans = [(t.offset, t.offset + prod(t.shape) * t.dtype.itemsize, name) for name, t in tensors.items()]
    spans = sorted(span for span in spans if span[0] < span[1])
    ends = [start, *(last for _, last, _ in spans)]
    before = ["the header", *(f"tensor {name!r}" for *_, name in spans)]
    for what, wrong in (("shares bytes with", int.__lt__), ("leaves a gap after", int.__gt__)):
        for (first, _, name), end, last in zip(spans, ends, before, strict=False):
            if wrong(first, end):
                raise WeightError(
                    f"{file}: tensor {name!r} begins at byte {first}, but byte {end} was wanted: it {what} "
                    f"{last}; download the file again"
                )
    if ends[-1] != size:
        raise WeightError(
            f"{file} has {size} bytes, but {before[-1]} ends at byte {ends[-1]}; the rest belongs to no "
            "tensor: download it again"
        )
