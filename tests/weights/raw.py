"""Safetensors files written byte by byte: not every writer knows float8."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.weights.safetensors import DTYPES

KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


def save(folder: Path, tensors: Mapping[str, Any]) -> None:
    """model.safetensors in a folder, which is made."""
    folder.mkdir(exist_ok=True)
    header, at = {}, 0
    for name, array in tensors.items():
        span = [at, at + array.nbytes]
        header[name] = {"dtype": KINDS[array.dtype], "shape": array.shape, "data_offsets": span}
        at += array.nbytes
    text = json.dumps(header).encode()
    data = b"".join(a.tobytes() for a in tensors.values())
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
