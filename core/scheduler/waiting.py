"""Sequences that wait for a slot, and the clock times at which something must happen to a sequence."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count

from core.scheduler.sequence import Sequence, Status

_SLACK = 64
"""Entries of finished sequences that a heap may hold beside as many as it has live ones."""


class WaitingQueue:
    """Waiting sequences by key. Sequences that were finished meanwhile are dropped when they come up."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, int], Sequence]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, sequence: Sequence) -> None:
        """Add a sequence with status WAITING."""
        heapq.heappush(self._heap, (sequence.key, sequence))
        self._size += 1

    def peek(self) -> Sequence | None:
        """The first waiting sequence, or None."""
        while self._heap and self._heap[0][1].status is not Status.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Sequence:
        """Remove the first waiting sequence; there must be one."""
        self.peek()
        self._size -= 1
        return heapq.heappop(self._heap)[1]

    def forget(self) -> None:
        """A waiting sequence was finished; its entry goes when it comes up, or with all others like it."""
        self._size -= 1
        if len(self._heap) > 2 * self._size + _SLACK:
            self._heap = [e for e in self._heap if e[1].status is Status.WAITING]
            heapq.heapify(self._heap)


class Deadlines:
    """Sequences by the clock time at which they must have started or ended."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, bool, Sequence]] = []
        self._order = count()
        self._limit = _SLACK

    def add(self, sequence: Sequence) -> None:
        """Watch a sequence's deadlines."""
        request = sequence.request
        for time, is_queue in ((request.queue_deadline, True), (request.deadline, False)):
            if time is not None:
                heapq.heappush(self._heap, (time, next(self._order), is_queue, sequence))
        if len(self._heap) > self._limit:
            self._heap = [e for e in self._heap if e[3].status is not Status.FINISHED]
            heapq.heapify(self._heap)
            self._limit = 2 * len(self._heap) + _SLACK

    def expired(self, now: float) -> Iterator[Sequence]:
        """Sequences whose time is up at `now`; each deadline is given once."""
        while self._heap and self._heap[0][0] <= now:
            _, _, is_queue, sequence = heapq.heappop(self._heap)
            if sequence.status is not Status.FINISHED and not (is_queue and sequence.has_started):
                yield sequence
