"""Queues hold what is alive: sequences that ended leave them, whatever stands before them."""

from __future__ import annotations

from core.sampling.params import SamplingParams
from core.scheduler.sequence import Request, Sequence, Status
from core.scheduler.waiting import Deadlines, WaitingQueue


def sequence(number: int, deadline: float | None = None) -> Sequence:
    request = Request(request_id=str(number), prompt_ids=(1,), params=SamplingParams(), deadline=deadline)
    return Sequence(request, 0, (0, number, 0))


def test_aborted_sequences_behind_a_stuck_head_are_let_go() -> None:
    queue = WaitingQueue()
    queue.push(sequence(0))
    for number in range(1, 5000):
        gone = sequence(number)
        queue.push(gone)
        gone.status = Status.FINISHED
        queue.forget()
    assert len(queue) == 1 and len(queue._heap) < 200
    head = queue.peek()
    assert head is not None and head.request.request_id == "0"


def test_the_order_is_kept_when_others_are_let_go() -> None:
    queue = WaitingQueue()
    kept = [sequence(n) for n in range(0, 1000, 10)]
    for one in reversed(kept):
        queue.push(one)
    for number in range(1001, 2000):
        gone = sequence(number)
        queue.push(gone)
        gone.status = Status.FINISHED
        queue.forget()
    assert [queue.pop() for _ in range(len(queue))] == kept


def test_deadlines_of_ended_sequences_are_let_go() -> None:
    deadlines = Deadlines()
    alive = sequence(0, deadline=50.0)
    deadlines.add(alive)
    for number in range(1, 5000):
        gone = sequence(number, deadline=1000.0)
        deadlines.add(gone)
        gone.status = Status.FINISHED
    assert len(deadlines._heap) < 300
    assert list(deadlines.expired(60.0)) == [alive]
