"""Queueing: what may be said of how a request waits, beside what it asks for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from numbers import Integral, Real

from core.contract.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Queueing:
    """How a request waits, and what it shares. Checked when made.

    Attributes:
        priority: lower goes first under the policy "priority"; no other policy looks at it.
        queue_timeout_s, timeout_s: it ends as "deadline" where it has not begun, not ended, by then; None =
            no limit.
        salt: blocks of the prefix cache are shared only with requests of the same salt.

    Raises:
        RequestError: a value is of another kind or out of range; names it and the range.
    """

    priority: int = 0
    queue_timeout_s: float | None = None
    timeout_s: float | None = None
    salt: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.priority, Integral):
            raise RequestError(f"priority is {self.priority!r}; it must be a whole number")
        for name in ("queue_timeout_s", "timeout_s"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and isfinite(value) and value >= 0):
                raise RequestError(f"{name} is {value!r}; it must be 0 or more seconds, or None for no limit")
        if not isinstance(self.salt, str):
            raise RequestError(f"salt is {self.salt!r}; it must be a text")


def queueing_of(
    count: int,
    priority: int | Iterable[int],
    queue_timeout_s: float | None,
    timeout_s: float | None,
    salt: str,
) -> list[Queueing]:
    """One record for each of `count` requests; `priority`: for all of them, or one each.

    Raises:
        RequestError: as `Queueing`, or another number of priorities.
    """
    each = list(priority) if isinstance(priority, Iterable) else [priority] * count
    if len(each) != count:
        raise RequestError(f"{len(each)} priorities were given for {count} prompts; give one, or one each")
    return [
        Queueing(priority=one, queue_timeout_s=queue_timeout_s, timeout_s=timeout_s, salt=salt)
        for one in each
    ]
