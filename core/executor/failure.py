"""Errors that cross a process boundary: type, sentence and traceback as a plain record, and back again."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

from core.contract import errors
from core.contract.errors import CoreError, OutOfMemoryError


@dataclass(frozen=True)
class Failure:
    """An exception of another process.

    Attributes:
        kind: name of its type. sentence: its message, after the type's name unless it is a CoreError.
        memory: of an OutOfMemoryError, what was to be allocated, its bytes and the free bytes; else ().
        trace: the traceback. phase: what was being done, such as "loading".
    """

    kind: str
    sentence: str
    memory: tuple[str, int, int | None] | tuple[()]
    trace: str
    phase: str

    @classmethod
    def of(cls, error: BaseException, phase: str = "") -> Failure:
        """The record of an exception."""
        is_plain = isinstance(error, CoreError)
        memory: tuple[str, int, int | None] | tuple[()] = ()
        if isinstance(error, OutOfMemoryError):
            memory = (error.what, error.wanted_bytes, error.free_bytes)
        return cls(
            kind=type(error).__name__,
            sentence=str(error) if is_plain else f"{type(error).__name__}: {error}",
            memory=memory,
            trace="".join(traceback.format_exception(error)),
            phase=phase,
        )

    def error(self, otherwise: type[CoreError]) -> CoreError:
        """The exception again, with the traceback as a note; `otherwise` where its type is not of the
        contract.
        """
        known = getattr(errors, self.kind, None)
        found: CoreError
        if known is OutOfMemoryError and self.memory:
            found = OutOfMemoryError(*self.memory)
        elif isinstance(known, type) and issubclass(known, CoreError) and known is not OutOfMemoryError:
            found = known(self.sentence)
        else:
            found = otherwise(self.sentence)
        found.add_note(f"in another process, {self.phase or 'at work'}:\n{self.trace}")
        return found
