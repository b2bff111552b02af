"""tokenizer.model files of SentencePiece: the few fields that a BPE vocabulary is made of.

Format: protocol buffers, with the numbers of sentencepiece_model.proto in the SentencePiece project.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.contract.errors import ConfigError

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_BPE = 2
_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
_RANKS = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


@dataclass(frozen=True)
class SentencePieceModel:
    """A vocabulary: pieces by id, with scores and kinds (1 normal, 2 unknown, 3 control, 4 user-defined,
    5 unused, 6 byte).

    Attributes:
        prefixed: a space is put before a text. unk_id, bos_id, eos_id: -1 = none.
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    prefixed: bool
    unk_id: int
    bos_id: int
    eos_id: int


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a file.

    Raises:
        ConfigError: it is no such file, is truncated, or is not BPE.
    """
    data = path.read_bytes()
    if _RANKS.match(data):
        raise ConfigError(
            f"{path} is a table of ranks (tiktoken), which does not say how texts are cut; put the model's "
            "tokenizer.json beside it"
        )
    try:
        return _read(path, data)
    except (IndexError, ValueError, struct.error, TypeError) as e:
        raise ConfigError(
            f"{path} is no SentencePiece model, or truncated ({e}); download it again, or put the model's "
            "tokenizer.json beside it"
        ) from None


def _read(path: Path, data: bytes) -> SentencePieceModel:
    pieces, scores, kinds = [], [], []
    trainer: dict[int, object] = {}
    normalizer: dict[int, object] = {}
    for number, value in _fields(data):
        if number == _PIECES:
            piece = dict(_fields(_bytes(value)))
            pieces.append(_bytes(piece[1]).decode("utf-8") if 1 in piece else "")
            scores.append(struct.unpack("<f", _bytes(piece[2]))[0] if 2 in piece else 0.0)
            kinds.append(_int(piece.get(3, 1)))
        elif number == _TRAINER:
            trainer = dict(_fields(_bytes(value)))
        elif number == _NORMALIZER:
            normalizer = dict(_fields(_bytes(value)))
    kind = _int(trainer.get(3, 1))
    if not pieces:
        raise ValueError("it has no pieces")
    if kind != _BPE:
        raise ConfigError(
            f"{path} is a SentencePiece model of kind {_MODEL_TYPES.get(kind, kind)}; BPE is read: put the "
            "model's tokenizer.json beside it"
        )
    return SentencePieceModel(
        pieces=tuple(pieces),
        scores=tuple(scores),
        kinds=tuple(kinds),
        prefixed=bool(normalizer.get(3, True)),
        unk_id=_signed(trainer.get(40, 0)),
        bos_id=_signed(trainer.get(41, 1)),
        eos_id=_signed(trainer.get(42, 2)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, object]]:
    """Numbers and values of a message: int for variable length, else bytes.

    Raises:
        ValueError: it is truncated or malformed.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind} at byte {at}")
        if size > len(data) - at:
            raise ValueError(f"{size} bytes are wanted at byte {at}, but {len(data) - at} are left")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits ends at byte {at}")


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("a number is where bytes are wanted")
    return value


def _int(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError("bytes are where a number is wanted")
    return value


def _signed(value: object) -> int:
    number = _int(value)
    return number - (1 << 64) if number >= 1 << 63 else number
