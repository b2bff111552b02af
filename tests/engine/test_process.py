"""The loop of the engine's process, step by step, between sockets that a test writes and reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.engine.config import EngineConfig
from core.engine.messages import AbortRequest, AddRequest, Close, EndChoice, Ended, Ready, Refused, StepEvents
from core.engine.process import EngineProcess
from core.executor.wire import decode, encode
from core.sampling.params import SamplingParams

LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)


class Sockets:
    """Both ends: commands that arrive once so many step messages were sent, and everything that was sent."""

    def __init__(self, *script: tuple[int, object]) -> None:
        self._script = list(script)
        self.sent: list[Any] = []

    @property
    def steps(self) -> list[StepEvents]:
        """The step messages."""
        return [message for message in self.sent if isinstance(message, StepEvents)]

    def poll(self, _: int) -> int:
        """Whether a command has arrived."""
        return int(bool(self._script) and self._script[0][0] <= len(self.steps))

    def recv(self) -> bytes:
        """The next command: a loop without work waits for it."""
        assert self._script, "the loop waits although nothing will come"
        return encode(self._script.pop(0)[1])

    def send(self, message: bytes) -> None:
        """Take what the process says."""
        self.sent.append(decode(message))


@pytest.fixture
def config(tiny_folder: Callable[[str], Path]) -> EngineConfig:
    return EngineConfig(
        model=tiny_folder("llama"), backend="null", dtype="float32", max_model_len=128, max_requests=4
    )


def add(name: str, length: int, params: SamplingParams = LONG) -> AddRequest:
    return AddRequest(request_id=name, prompt_ids=tuple(range(5, 5 + length)), params=params)


def run(config: EngineConfig, *script: tuple[int, object]) -> Sockets:
    """All that a process says to a script that ends with `Close`."""
    sockets = Sockets(*script, (10**6, Close()))
    assert EngineProcess(sockets, sockets).run(config) == 0
    return sockets


@pytest.mark.parametrize("end", [AbortRequest("a"), EndChoice("a", 0)], ids=["abort", "stop-text"])
def test_blocks_of_an_ended_request_are_free_within_two_steps(config: EngineConfig, end: object) -> None:
    sockets = run(config, (0, add("a", 80)), (0, add("b", 17)), (10, end))
    used = [message.metrics.blocks_used for message in sockets.steps]
    # Prompts and up to ten tokens: 80 to 91 of a are 6 blocks of 16, 17 to 28 of b are 2.
    assert used[9] == 8
    assert used[11] == 2
    assert used[-1] == 0
    reasons = {e.request_id: e.finish_reason for m in sockets.steps for e in m.events if e.finish_reason}
    assert reasons == {"a": "abort" if isinstance(end, AbortRequest) else "stop", "b": "length"}


def test_a_request_that_ended_says_nothing_more(config: EngineConfig) -> None:
    sockets = run(config, (0, add("a", 8)), (10, AbortRequest("a")), (10, AbortRequest("a")))
    events = [event for message in sockets.steps for event in message.events]
    assert [e.finish_reason for e in events] == [None] * (len(events) - 1) + ["abort"]


def test_commands_that_came_together_share_a_step(config: EngineConfig) -> None:
    sockets = run(config, *((0, add(str(i), 8, SamplingParams(max_tokens=1))) for i in range(4)))
    first = next(message for message in sockets.steps if message.events)
    assert {event.request_id for event in first.events} == {"0", "1", "2", "3"}


def test_a_refused_request_is_answered_by_its_id(config: EngineConfig) -> None:
    sockets = run(config, (0, add("long", 200)), (0, add("a", 5)), (3, add("a", 5)))
    refused = [m for m in sockets.sent if isinstance(m, Refused)]
    assert [m.request_id for m in refused] == ["long", "a"]
    assert [m.failure.kind for m in refused] == ["RequestError"] * 2
    assert "200 tokens" in refused[0].failure.sentence
    assert sum(len(m.events) for m in sockets.steps) == 101


def test_the_first_message_tells_the_facts_and_the_last_the_failure(config: EngineConfig) -> None:
    good = run(config)
    ready = next(m for m in good.sent if isinstance(m, Ready))
    assert (ready.model.max_model_len, ready.model.max_requests, ready.model.backend) == (128, 4, "null")

    sockets = Sockets()
    assert EngineProcess(sockets, sockets).run(EngineConfig(model=Path("none"), backend="null")) == 1
    assert isinstance(sockets.sent[-1], Ended)
    assert (sockets.sent[-1].failure.kind, sockets.sent[-1].failure.phase) == ("ConfigError", "starting")
