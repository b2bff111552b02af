"""Metadata of a GGUF file, changed in its bytes: values that no writer would write."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY, ALIGNMENT = 8, 9, 32


def with_metadata(raw: bytes, changes: Mapping[str, Any]) -> bytes:
    """The file with these values in place of its own, or added."""
    items, end = _items(raw)
    items |= {key: _kind_and_value(value) for key, value in changes.items()}
    infos_end = _end_of_infos(raw, end)
    header = raw[:16] + struct.pack("<Q", len(items))
    header += b"".join(_text(key) + value for key, value in items.items()) + raw[end:infos_end]
    return _padded(header) + raw[len(_padded(raw[:infos_end])) :]


def _padded(header: bytes) -> bytes:
    return header + bytes(-len(header) % ALIGNMENT)


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _kind_and_value(value: Any) -> bytes:
    kind, packed = _packed(value)
    return struct.pack("<I", kind) + packed


def _packed(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 11, struct.pack("<q", value)
    if isinstance(value, float):
        return 12, struct.pack("<d", value)
    if isinstance(value, str):
        return STRING, _text(value)
    inner = [_packed(v) for v in value]
    head = struct.pack("<IQ", inner[0][0] if inner else 5, len(inner))
    return ARRAY, head + b"".join(packed for _, packed in inner)


def _items(raw: bytes) -> tuple[dict[str, bytes], int]:
    """Kind and value of every key, and where they end."""
    at, found = 24, {}
    for _ in range(struct.unpack_from("<Q", raw, 16)[0]):
        start = _skip_text(raw, at)
        key = raw[at + 8 : start].decode()
        at = _skip(raw, start + 4, struct.unpack_from("<I", raw, start)[0])
        found[key] = raw[start:at]
    return found, at


def _skip_text(raw: bytes, at: int) -> int:
    return int(at + 8 + struct.unpack_from("<Q", raw, at)[0])


def _skip(raw: bytes, at: int, kind: int) -> int:
    if kind == STRING:
        return _skip_text(raw, at)
    if kind != ARRAY:
        return at + SIZES[kind]
    inner, count = struct.unpack_from("<IQ", raw, at)
    at += 12
    for _ in range(count):
        at = _skip(raw, at, inner)
    return at


def _end_of_infos(raw: bytes, at: int) -> int:
    for _ in range(struct.unpack_from("<Q", raw, 8)[0]):
        at = _skip_text(raw, at)
        at += 4 + 8 * struct.unpack_from("<I", raw, at)[0] + 4 + 8
    return at
