"""On the oracle, a request's logits are the same bits alone, batched, chunked, preempted and after a hit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.recorder import Ask, prompt, run

FAMILIES = ("llama", "qwen3_5")
"""A dense model, and a hybrid with state layers."""

FIRST = Ask("first", prompt(37, 1), seed=1)
OTHERS = tuple(Ask(f"other-{i}", prompt(5 + 9 * i, 10 + i), seed=10 + i) for i in range(4))


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder(request.param)


def test_alone_equals_batched(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run(monkeypatch, model, [[FIRST]])
    batched = run(monkeypatch, model, [[*OTHERS[:2], FIRST, *OTHERS[2:]]])
    assert len(alone.logits) == FIRST.max_tokens
    alone.assert_same(batched)


@pytest.mark.parametrize("chunk", [1, 7, 8])
def test_whole_prompt_equals_chunks(model: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(monkeypatch, model, [[FIRST]])
    chunked = run(monkeypatch, model, [[FIRST]], max_requests=1, max_batch_tokens=chunk)
    whole.assert_same(chunked)


def test_uninterrupted_equals_preempted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = [Ask(f"r{i}", prompt(20, 50 + i), seed=50 + i, max_tokens=30) for i in range(3)]
    roomy = run(monkeypatch, model, [asks])
    tight = run(monkeypatch, model, [asks], num_blocks=17)
    assert roomy.preemptions == 0
    assert tight.preemptions > 0
    roomy.assert_same(tight)


def test_prefix_hit_equals_miss(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = Ask("longer", FIRST.prompt[:32] + prompt(11, 77), seed=77)
    miss = run(monkeypatch, model, [[longer]], prefix_cache=False)
    hit = run(monkeypatch, model, [[FIRST], [longer]])
    assert hit.cached_tokens >= 24
    miss.assert_same(hit)


def test_arrival_in_the_middle_changes_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run(monkeypatch, model, [[FIRST]])
    staggered = run(monkeypatch, model, [[OTHERS[0]], [FIRST], list(OTHERS[1:])], arrive_after=3)
    alone.assert_same(staggered)
