"""What a caller says of a request reaches the scheduler; an interrupted wait can be taken up again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from core.contract.errors import EngineDead
from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.sampling.params import SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


class Clock:
    """Time as the test sets it."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(tiny_folder: Callable[[str], Path], clock: Clock) -> Iterator[Engine]:
    config = EngineConfig(
        model=tiny_folder("llama"),
        backend="null",
        dtype="float32",
        max_model_len=64,
        max_requests=1,
        policy="priority",
        overlap=1,
    )
    engine = Engine(config, clock=clock)
    yield engine
    engine.close()


def drain(engine: Engine) -> list[tuple[str, str | None]]:
    """(request, reason) of each end, in order."""
    ends = []
    while engine.has_work:
        for event in engine.step():
            if event.finished:
                ends.append((event.sequence.request.request_id, event.sequence.finish_reason))
    return ends


def test_a_lower_priority_goes_first(engine: Engine) -> None:
    for name, priority in (("late", 5), ("early", -1), ("middle", 0)):
        engine.add(name, [5, 6], PARAMS, priority=priority)
    assert [name for name, _ in drain(engine)] == ["early", "middle", "late"]


@pytest.mark.parametrize("kind", ["timeout_s", "queue_timeout_s"])
def test_deadlines_count_from_the_arrival(engine: Engine, clock: Clock, kind: str) -> None:
    limits: dict[str, Any] = {kind: 10.0}
    engine.add("running", [5, 6], PARAMS)
    engine.step()
    engine.add("waiting", [5, 6], PARAMS, **limits)
    clock.now += 10.5
    assert ("waiting", "deadline") in drain(engine)
    engine.add("in time", [5, 6], PARAMS, **limits)
    assert drain(engine) == [("in time", "length")]


def test_a_running_request_may_outlast_its_time_in_the_queue_but_not_its_total(
    engine: Engine, clock: Clock
) -> None:
    engine.add("a", [5, 6], PARAMS, queue_timeout_s=10.0)
    engine.step()
    clock.now += 20
    assert drain(engine) == [("a", "length")]
    engine.add("b", [5, 6], PARAMS, timeout_s=10.0)
    engine.step()
    clock.now += 20
    assert drain(engine) == [("b", "deadline")]


def test_prefixes_are_shared_within_a_salt_only(engine: Engine) -> None:
    prompt = list(range(3, 40))
    cached = []
    for name, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        request = engine.add(name, prompt, PARAMS, salt=salt)
        sequence = engine.scheduler._requests[request.request_id][0]
        drain(engine)
        cached.append(sequence.cached_tokens)
    assert cached[:2] == [0, 0] and cached[2] > 0


def test_a_request_without_a_seed_gets_one_of_its_own(engine: Engine) -> None:
    seeds = {engine.add(str(i), [5, 6], PARAMS).seed for i in range(20)}
    assert len(seeds) == 20 and 0 not in seeds
    assert engine.add("given", [5], SamplingParams(seed=7, max_tokens=1)).seed == 7


def test_an_interrupted_wait_is_taken_up_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.add("a", [5, 6], PARAMS)
    runner = engine._executor._worker.runner  # type: ignore[attr-defined]
    submit = runner.submit

    class Interrupted:
        """Tokens whose first wait is interrupted."""

        def __init__(self, tokens: Any) -> None:
            self.tokens, self.calls = tokens, 0

        def get(self) -> Any:
            self.calls += 1
            if self.calls == 1:
                raise KeyboardInterrupt
            return self.tokens.get()

    def wrapped(batch: Any, *rest: Any) -> None:
        submit(batch, *rest)
        pending = runner._pending[batch.step_id]
        pending.tokens = Interrupted(pending.tokens)

    monkeypatch.setattr(runner, "submit", wrapped)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.setattr(runner, "submit", submit)
    assert drain(engine) == [("a", "length")]


def test_an_interrupted_submission_ends_the_engine_with_its_reason(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.add("a", [5, 6], PARAMS)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._executor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    with pytest.raises(EngineDead, match="interrupted while a step was being submitted"):
        engine.step()


def test_an_engine_closes_after_an_interrupt_took_its_state(tiny_folder: Callable[[str], Path]) -> None:
    engine = Engine(EngineConfig(model=tiny_folder("llama"), backend="cpu_reference", max_model_len=64))
    engine.add("a", [5, 6], PARAMS)
    engine.step()
    runner = engine._executor._worker.runner  # type: ignore[attr-defined]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for program in runner._programs.values():
        program._fn = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.close()
