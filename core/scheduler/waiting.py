"""Sequences that wait for a slot, and the clock times at which something must happen to a sequence."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count

from core.scheduler.sequence import Sequence, Status


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
        """A waiting sequence was finished; its entry goes when it comes up."""
        self._size -= 1


class Deadlines:
    """Sequences by the clock time at which they must have started or ended."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, bool, Sequence]] = []
        self._order = count()

    def add(self, sequence: Sequence) -> None:
        """Watch a sequence's deadlines."""
        request = sequence.request
        for time, is_queue in ((request.queue_deadline, True), (request.deadline, False)):
            if time is not None:
                heapq.heappush(self._heap, (time, next(self._order), is_queue, sequence))

    def expired(self, now: float) -> Iterator[Sequence]:
        """Sequences whose time is up at `now`; each deadline is given once."""
        while self._heap and self._heap[0][0] <= now:
            _, _, is_queue, sequence = heapq.heappop(self._heap)
            if sequence.status is not Status.FINISHED and not (is_queue and sequence.has_started):
                yield sequence
