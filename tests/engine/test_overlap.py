"""Overlapped stepping on the null backend, whose completions come late: every interleaving of stop, abort,
preempt, cancel.

The null device tells its tokens beforehand and notes every step that reads or writes a block, slot or buffer
that is not its
own any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest
from core_test_plugins.null_device import NullDevice, null_token

from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.sampling.params import SamplingParams
from core.scheduler import Event

BLOCK, MAX_TOKENS, EOS, EOS_EVERY = 4, 9, 7, 16
PROMPTS = {"a": tuple(range(20, 29)), "b": tuple(range(40, 46))}
MOMENTS = range(7)
ACTIONS = ("abort a", "cancel a", "abort b", "cancel b")
ROOMY, TIGHT = 64, 7
"""Blocks in the pool; in a tight one the two requests cannot both reach their end."""


@dataclass
class Outcome:
    """What one request gave."""

    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    preemptions: int = 0


def expected(name: str) -> list[int]:
    """All tokens of a request that nobody disturbs."""
    tokens: list[int] = []
    for position in range(len(PROMPTS[name]), len(PROMPTS[name]) + MAX_TOKENS):
        tokens.append(null_token(position, 256, EOS, EOS_EVERY))
        if tokens[-1] == EOS:
            break
    return tokens


def device_of(engine: Engine) -> NullDevice:
    device = engine._executor._worker.device  # type: ignore[attr-defined]
    assert isinstance(device, NullDevice)
    return device


@pytest.fixture(
    params=[(d, b) for d in (1, 2, 3) for b in (ROOMY, TIGHT)], ids=lambda p: f"depth {p[0]}, {p[1]} blocks"
)
def engine(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> Iterator[Engine]:
    depth, blocks = request.param
    engine = Engine(
        EngineConfig(
            model=tiny_folder("llama"),
            backend="null",
            max_model_len=32,
            max_requests=2,
            max_batch_tokens=8,
            block_size=BLOCK,
            num_blocks=blocks,
            overlap=depth,
            backend_options={
                "delay": str(depth - 1),
                "vocab": "256",
                "eos": str(EOS),
                "eos_every": str(EOS_EVERY),
            },
        )
    )
    yield engine
    engine.close()


def play(engine: Engine, script: dict[int, list[str]]) -> dict[str, Outcome]:
    """Run both requests; `script` says what is done to them before which call of `step`."""
    outcomes = {name: Outcome() for name in PROMPTS}
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, stop_token_ids=(EOS,))
    sequences = {}
    for name, ids in PROMPTS.items():
        engine.add(name, ids, params)
        sequences[name] = engine.scheduler._requests[name][0]

    def take(events: list[Event]) -> None:
        for event in events:
            outcome = outcomes[event.sequence.request.request_id]
            assert outcome.reason is None, "an event came after the end"
            if event.token >= 0:
                outcome.tokens.append(event.token)
            if event.finished:
                outcome.reason = event.sequence.finish_reason

    moment = 0
    while engine.has_work:
        for action in script.get(moment, ()):
            verb, name = action.split()
            if verb == "abort":
                engine.abort(name)
            else:
                engine.scheduler.finish(sequences[name], "deadline")
        take(engine.step())
        engine.blocks.check_integrity()
        moment += 1
        assert moment < 200, "the requests do not end"
    for name, sequence in sequences.items():
        outcomes[name].preemptions = sequence.num_preemptions
    return outcomes


def check(engine: Engine, outcomes: dict[str, Outcome]) -> None:
    """Nothing surplus was given, cached, or left behind."""
    for name, outcome in outcomes.items():
        whole = expected(name)
        assert outcome.tokens == whole[: len(outcome.tokens)]
        if outcome.reason in ("stop", "length"):
            assert outcome.tokens == whole
        else:
            assert outcome.reason in ("abort", "deadline")
        # A sequence's last token was never an input, unless of a surplus step.
        computed = len(PROMPTS[name]) + max(len(outcome.tokens) - 1, 0)
        ids = [*PROMPTS[name], *whole, *([EOS] * BLOCK)]
        assert engine.blocks.lookup(ids).num_tokens <= computed
    assert engine.metrics().blocks_used == 0
    assert device_of(engine).violations == []
    engine.blocks.reset_prefix_cache()


def test_undisturbed_requests_end_by_themselves(engine: Engine) -> None:
    outcomes = play(engine, {})
    check(engine, outcomes)
    assert outcomes["a"].reason == "stop"
    assert outcomes["b"].reason == "length"
    is_tight = engine.cache.plan.groups[0].num_blocks == TIGHT
    assert is_tight == any(outcome.preemptions for outcome in outcomes.values())


def test_every_interleaving_of_two_disturbances(engine: Engine) -> None:
    for (first, second), (one, other) in product(product(ACTIONS, repeat=2), product(MOMENTS, repeat=2)):
        script: dict[int, list[str]] = {}
        script.setdefault(one, []).append(first)
        script.setdefault(other, []).append(second)
        check(engine, play(engine, script))
