"""A hybrid resumed from a state checkpoint continues with the same bits; a wrong checkpoint is noticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from core.block_manager import BlockManager
from tests.engine.recorder import Ask, Record, prompt, run

BLOCK = 8
SHARED = prompt(32, 3)
FIRST = Ask("first", SHARED + prompt(5, 4), seed=4)
SECOND = Ask("second", SHARED + prompt(9, 5), seed=5)


@pytest.fixture
def model(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("qwen3_5")


def resumed(monkeypatch: pytest.MonkeyPatch, model: Path, chunk: int) -> Record:
    """FIRST, then SECOND, which finds SHARED in the cache; chunks of `chunk` tokens."""
    return run(
        monkeypatch, model, [[FIRST], [SECOND]], max_requests=1, max_batch_tokens=chunk, block_size=BLOCK
    )


def alone(monkeypatch: pytest.MonkeyPatch, model: Path) -> Record:
    return run(monkeypatch, model, [[SECOND]], prefix_cache=False, block_size=BLOCK)


@pytest.mark.parametrize("chunk", [7, 8, 9, 31, 32, 33, 37])
def test_resuming_from_a_checkpoint_equals_computing_all(
    chunk: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunks of the request that writes the checkpoint are cut before, at and after it."""
    hit = resumed(monkeypatch, model, chunk)
    assert hit.cached_tokens >= BLOCK
    alone(monkeypatch, model).assert_same(hit)


def test_the_longest_checkpoint_is_used(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resumed(monkeypatch, model, 32).cached_tokens == 32


def assert_noticed(monkeypatch: pytest.MonkeyPatch, model: Path, chunk: int = 32) -> None:
    """The fault is in place now; computing all is not touched by it."""
    wrong = resumed(monkeypatch, model, chunk)
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="draw"):
        alone(monkeypatch, model).assert_same(wrong)


@pytest.mark.parametrize("early", [BLOCK, 3], ids=["one block stale", "inside a chunk"])
def test_a_checkpoint_of_the_wrong_token_is_noticed(
    early: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = BlockManager.checkpoint_for

    def wrong(self: BlockManager, slot: int, start: int, end: int, group: int) -> tuple[int, int] | None:
        found = right(self, slot, start, end, group)
        return None if found is None or found[0] <= early else (found[0] - early, found[1])

    monkeypatch.setattr(BlockManager, "checkpoint_for", wrong)
    assert_noticed(monkeypatch, model)


def test_a_slot_reused_without_reset_is_noticed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = BlockManager.state_source

    def wrong(self: BlockManager, slot: int, group: int, start: int) -> int:
        return int(self.state_slots[group][slot]) if start == 0 else right(self, slot, group, start)

    def both(patch: pytest.MonkeyPatch) -> Record:
        return run(patch, model, [[FIRST], [SECOND]], max_requests=1, max_batch_tokens=64, prefix_cache=False)

    whole = alone(monkeypatch, model)
    with monkeypatch.context() as patch:
        patch.setattr(BlockManager, "state_source", wrong)
        faulty = both(patch)
    with pytest.raises(AssertionError):
        whole.assert_same(faulty)


def test_a_checkpoint_evicted_apart_from_its_blocks_is_no_hit(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no slot to keep checkpoints in, blocks alone are worth nothing to a hybrid, and nothing breaks."""
    monkeypatch.setattr(BlockManager, "checkpoint_for", lambda *_: None)
    without = resumed(monkeypatch, model, 32)
    monkeypatch.undo()
    assert without.cached_tokens == 0
    alone(monkeypatch, model).assert_same(without)
