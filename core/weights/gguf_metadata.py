"""Metadata: the values of a GGUF file's header, each asked for by its kind.

A file may hold any kind of value under any key, so nothing is read of it but through these getters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from core.contract.errors import WeightError
from core.values import is_number, is_whole

T = TypeVar("T")

MOST = 2**31
_LARGEST = float(np.finfo(np.float32).max)
_KINDS: Mapping[type, str] = {bool: "a flag", int: "a whole number", float: "a fraction", str: "a text"}


class Metadata:
    """Metadata of one file, by key.

    Every getter takes a key and gives None where the file lacks it, unless `default` is given.

    Args:
        path: of the file, for messages. found: the values. prefix: what every key asked for begins with.
    """

    def __init__(self, path: Path, found: Mapping[str, Any], prefix: str = "") -> None:
        self.path = path
        self._found = found
        self._prefix = prefix

    def has(self, key: str) -> bool:
        """Whether the key is there."""
        return self._value(key) is not None

    def whole(self, key: str, default: int | None = None, *, least: int = 0, most: int = MOST) -> int | None:
        """A whole number from `least` to `most`; of one per layer, that of all of them.

        Raises:
            WeightError: it is something else, or differs by layer.
        """
        value = self._value(key)
        if value is None:
            return default
        wanted = f"a whole number from {least} to {most}"
        one = self._one(key, value, wanted)
        if not is_whole(one) or not least <= one <= most:
            raise self.wrong(key, wanted)
        return int(one)

    def count(self, key: str, default: int | None = None, *, least: int = 0, most: int = MOST) -> int:
        """As `whole`, of a key that must be there where no default is given.

        Raises:
            WeightError: as `whole`, or it is missing.
        """
        found = self.whole(key, default, least=least, most=most)
        return self._need(key, found)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, as its shortest decimal: 1e-05, where a float32 widens to 9.99999975e-06.

        Raises:
            WeightError: it is something else, differs by layer, or is missing and has no default.
        """
        value = self._value(key)
        if value is None:
            return self._need(key, default)
        wanted = "a finite number within float32"
        one = self._one(key, value, wanted)
        if not is_number(one) or not -_LARGEST <= one <= _LARGEST:
            raise self.wrong(key, wanted)
        return float(str(np.float32(one)))

    def flag(self, key: str, default: bool) -> bool:
        """True or false.

        Raises:
            WeightError: it is something else.
        """
        value = self._value(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str) -> str | None:
        """A text.

        Raises:
            WeightError: it is something else.
        """
        value = self._value(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def texts(self, key: str) -> list[str] | None:
        """A list of texts; `wholes` and `numbers` likewise.

        Raises:
            WeightError: it is something else.
        """
        found: list[str] | None = self._list(key, (str,), "a list of texts")
        return found

    def wholes(self, key: str) -> list[int] | None:
        """See `texts`."""
        found: list[int] | None = self._list(key, (int,), "a list of whole numbers")
        return found

    def numbers(self, key: str) -> list[float] | None:
        """See `texts`."""
        found: list[float] | None = self._list(key, (int, float), "a list of numbers")
        return found

    def wrong(self, key: str, wanted: str) -> WeightError:
        """The error for a value of the file: what it is, what is wanted, what to do."""
        value = self._value(key)
        kind = f"a list of {len(value)}" if isinstance(value, list) else _KINDS.get(type(value), "nothing")
        shown = f"{value[:4] if isinstance(value, list) else value!r:.100} ({kind})"
        return WeightError(
            f"{self.path}: metadata {self._prefix}{key} is {shown}, but {wanted} is wanted; convert the "
            "model again"
        )

    def _value(self, key: str) -> Any:
        return self._found.get(self._prefix + key)

    def _need(self, key: str, value: T | None) -> T:
        if value is None:
            raise WeightError(f"{self.path} has no metadata {self._prefix}{key}; convert the model again")
        return value

    def _one(self, key: str, value: Any, wanted: str) -> Any:
        """The value itself, or the one that all entries of a list are."""
        if not isinstance(value, list):
            return value
        if not value or any(type(v) is not type(value[0]) or v != value[0] for v in value):
            raise self.wrong(key, f"{wanted}, or a list of the same one for every layer,")
        return value[0]

    def _list(self, key: str, kinds: tuple[type, ...], wanted: str) -> Any:
        value = self._value(key)
        if value is not None and not (isinstance(value, list) and {type(v) for v in value} <= set(kinds)):
            raise self.wrong(key, wanted)
        return value
