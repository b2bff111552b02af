"""The header of a GGUF file: metadata, and where each tensor is.

The gguf package's reader makes several numpy arrays per metadata item, which takes seconds for a vocabulary;
this one takes a tenth of that, and its messages name file and tensor. Format: docs/gguf.md of the ggml
project (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from core.contract.errors import WeightError
from core.weights.gguf_metadata import Metadata
from core.weights.kinds import GGUF, WANTED, kind_of

ARRAY, STRING = 9, 8
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MAX_DIMENSIONS = 4

QUANTIZED = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"),
)
SUPPORTED = ("F32", "F16", "BF16", *QUANTIZED)
# Texts of tokens that end a turn, for files that do not name theirs by key. In order: the first found is it.
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor: shape outermost dimension first, type by name, first byte in the file, and its row's layout.

    The innermost dimension is stored in blocks: `block_size` elements in `block_bytes` bytes.
    """

    shape: tuple[int, ...]
    type: str
    offset: int
    block_size: int
    block_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) // self.block_size * self.block_bytes


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Parse and check the header; nothing else of the file is touched.

    Raises:
        WeightError: not GGUF, another version or byte order, truncated, self-contradicting, a key or a tensor
        twice, or a tensor of a type that is not in `SUPPORTED`.
    """
    with path.open("rb") as f:
        magic = f.read(len(GGUF))
    if magic != GGUF[: len(magic)]:
        what, remedy = kind_of(path)
        raise WeightError(f"{path} begins with {magic!r}, not {GGUF!r}: it is {what}; {WANTED}: {remedy}")
    if path.stat().st_size < 24:
        raise WeightError(f"{path} has {path.stat().st_size} bytes; it is truncated: download it again")
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Cursor(path, data).header()


class _Cursor:
    """A position in the header that moves on with every value read."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._at = 0

    def header(self) -> Header:
        self._take(len(GGUF))
        version = self._scalar("I")
        if version not in (2, 3):
            wanted = "little-endian versions 2 and 3 are read: convert the model again"
            raise WeightError(f"{self._path} has GGUF version {version:#x}; {wanted}")
        num_tensors, num_items = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_items):
            key = self._string()
            if key in metadata:
                raise WeightError(self._twice("metadata", key))
            metadata[key] = self._value(self._scalar("I"))
        found = [self._tensor() for _ in range(num_tensors)]
        typed = Metadata(self._path, metadata)
        alignment = typed.count("general.alignment", 32)
        if alignment <= 0 or alignment & (alignment - 1):
            raise typed.wrong("general.alignment", "a power of two")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in found:
            if name in tensors:
                raise WeightError(self._twice("tensor", name))
            tensors[name] = self._check(name, shape, kind, start + offset)
        self._check_places(tensors, start, alignment)
        return Header(metadata, tensors)

    def _twice(self, what: str, name: str) -> str:
        # Readers differ in which of both they take.
        return f"{self._path} has {what} {name!r} twice, but once is wanted; convert the model again"

    def _check_places(self, tensors: dict[str, TensorInfo], start: int, alignment: int) -> None:
        """Refuse tensors that share bytes, and bytes that belong to none and align nothing."""
        end, last = start, "the header"
        for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
            wanted = -(-end // alignment) * alignment
            if info.offset != wanted:
                what = "shares bytes with" if info.offset < end else "does not follow"
                raise WeightError(
                    f"{self._path}: tensor {name!r} begins at byte {info.offset}, but byte {wanted} was "
                    f"wanted: it {what} {last}; download the file again"
                )
            end = info.offset + info.num_bytes
            last = f"tensor {name!r}"
        if len(self._data) - end >= alignment:
            raise WeightError(
                f"{self._path} has {len(self._data)} bytes, but {last} ends at byte {end}; the rest belongs "
                "to no tensor: download it again"
            )

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise WeightError(
                f"{self._path}: the header wants {count} bytes at byte {self._at}, but the file has "
                f"{len(self._data)}; it is truncated: download it again"
            )
        self._at += count
        return self._data[self._at - count : self._at]

    def _scalar(self, kind: str) -> Any:
        kind = "<" + kind
        return struct.unpack(kind, self._take(struct.calcsize(kind)))[0]

    def _string(self) -> str:
        return self._take(self._scalar("Q")).decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._scalar(SCALARS[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise WeightError(f"{self._path}: metadata of kind {kind} at byte {self._at} is not known")
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind in SCALARS:
            dtype = np.dtype(SCALARS[kind]).newbyteorder("<")
            return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()
        if kind != STRING:
            raise WeightError(
                f"{self._path}: a metadata array of kind {kind} at byte {self._at} is not known"
            )
        return [self._string() for _ in range(count)]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dimensions = self._string(), self._scalar("I")
        if num_dimensions > MAX_DIMENSIONS:
            raise WeightError(
                f"{self._path}: tensor {name!r} has {num_dimensions} dimensions, {MAX_DIMENSIONS} at most"
            )
        shape = tuple(self._scalar("Q") for _ in range(num_dimensions))
        return name, shape[::-1], self._scalar("I"), self._scalar("Q")

    def _check(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        known = {t.value: t for t in GGMLQuantizationType}
        type_name = known[kind].name if kind in known else f"number {kind}"
        if type_name not in SUPPORTED:
            raise WeightError(
                f"{self._path}: tensor {name!r} has type {type_name}; read are {', '.join(SUPPORTED)}: "
                "take a file quantized in one of them"
            )
        block_size, block_bytes = GGML_QUANT_SIZES[known[kind]]
        row = shape[-1] if shape else 1
        if row % block_size:
            raise WeightError(
                f"{self._path}: tensor {name!r} of type {type_name} has rows of {row} elements, but blocks "
                f"of {block_size} are wanted"
            )
        end = offset + prod(shape) // block_size * block_bytes
        if end > len(self._data):
            raise WeightError(
                f"{self._path}: tensor {name!r} ends at byte {end}, but the file has {len(self._data)}; "
                "it is truncated: download it again"
            )
        return TensorInfo(shape, type_name, offset, block_size, block_bytes)


def end_ids(metadata: Metadata) -> tuple[int, ...]:
    """Token ids that end a text, a turn or a message, without repeats, in that order.

    Where the file names no end of a turn, it is found by its text, as most files leave it out.

    Raises:
        WeightError: metadata of another kind than wanted.
    """
    named = {k: metadata.whole(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot", "eom")}
    found = [i for i in named.values() if i is not None]
    tokens = metadata.texts("tokenizer.ggml.tokens") or []
    kinds = metadata.wholes("tokenizer.ggml.token_type") or []
    # In harmony's format <|end|> ends one message of several, and <|return|> the turn.
    if named["eot"] is None and "<|return|>" not in tokens:
        special = {t: i for i, (t, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind != 1}
        found += [special[t] for t in TURN_ENDS if t in special][:1]
    return tuple(dict.fromkeys(found))
