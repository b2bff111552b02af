"""Observers: the callbacks that plugins gave, called after each step and each end of a request."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from core.contract.interfaces import Observer
from core.scheduler import Event, StepPlan


class Observers:
    """Calls every observer. One that raises is told of once, and not called again."""

    def __init__(self, observers: Sequence[Observer], clock: Callable[[], float] = time.perf_counter) -> None:
        self._observers = list(observers)
        self._clock = clock
        self._begun: dict[int, tuple[StepPlan, float]] = {}

    def step_begun(self, plan: StepPlan) -> None:
        """A step is about to be submitted."""
        if self._observers:
            self._begun[plan.step_id] = (plan, self._clock())

    def step_done(self, step_id: int, events: Sequence[Event]) -> None:
        """A step was waited for, and this is what it brought."""
        if not self._observers:
            return
        plan, start = self._begun.pop(step_id)
        duration = self._clock() - start
        self._call(lambda o: o.on_step(step_id, plan.num_tokens, plan.num_requests, duration))
        for event in events:
            if event.finished:
                s = event.sequence
                self._call(
                    lambda o, s=s: o.on_request_finished(  # type: ignore[misc]
                        s.request.request_id, s.finish_reason or "", len(s.output_ids)
                    )
                )

    def _call(self, tell: Callable[[Observer], None]) -> None:
        for observer in list(self._observers):
            try:
                tell(observer)
            except Exception as error:
                self._observers.remove(observer)
                name = type(observer).__name__
                sys.stderr.write(
                    f"core: observer {name} raised {type(error).__name__}: {error}; it is not called again\n"
                )
