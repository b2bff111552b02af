"""The scheduler under constraint profiles: it starves nobody, breaks no declared rule, and gives everything
back.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from core.block_manager import BlockManager
from core.runner.builder import BatchBuilder
from core.scheduler import Scheduler, SlotTable
from tests.scheduler.profiles import PROFILES, Profile
from tests.scheduler.simulator import MAX_LEN, World

KINDS = {
    "full": ("paged",),
    "full and window": ("paged", "window"),
    "full and state": ("paged", "state"),
    "all": ("paged", "window", "state"),
}


def run(
    profile: Profile, seed: int, kinds: tuple[str, ...], *, requests: int = 24, tight: bool = False
) -> World:
    """A world with random arrivals and aborts, run to its end."""
    per_request = -(-MAX_LEN // profile.spec.cache.block_sizes[0])
    world = World(profile, seed, blocks=1 + per_request * (2 if tight else 8), kinds=kinds)
    arrived, idle = 0, False
    while arrived < requests or not idle:
        if arrived < requests and world.random.random() < 0.5:
            world.arrive()
            arrived += 1
        if arrived and world.random.random() < 0.03:
            world.disturb()
        idle = not world.step()
        if world.steps % 7 == 0:
            world.blocks.check_integrity()
        assert world.now < 20_000, "the requests do not end"
    world.check_end()
    return world


@pytest.mark.parametrize("tight", [False, True], ids=["roomy", "tight"])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
def test_random_load_keeps_every_rule(profile: Profile, kinds: tuple[str, ...], tight: bool) -> None:
    for seed in range(3):
        world = run(profile, seed, kinds, tight=tight)
        assert world.longest_wait <= 20, "a running sequence was passed over for too long"


def test_tight_pools_preempt_and_prefixes_are_shared() -> None:
    tight = run(PROFILES[0], 1, KINDS["full"], tight=True)
    assert tight.scheduler.counters.preemptions > 0
    roomy = run(PROFILES[0], 1, KINDS["full"])
    assert roomy.scheduler.counters.preemptions == 0
    assert roomy.scheduler.counters.cached_tokens > 0


def _without_epochs(patch: pytest.MonkeyPatch) -> None:
    close = SlotTable.close

    def wrong(self: SlotTable, slot: int) -> None:
        close(self, slot)
        self.epoch[slot] -= 1

    patch.setattr(SlotTable, "close", wrong)


def _without_fences(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "_newest_step", property(lambda self: None))


def _early_commit(patch: pytest.MonkeyPatch) -> None:
    submit = Scheduler._submit

    def wrong(self: Scheduler, *args: object) -> object:
        plan = submit(self, *args)  # type: ignore[arg-type]
        self._confirm(self._in_flight[-1])
        return plan

    patch.setattr(Scheduler, "_submit", wrong)


def _lost_copies(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "take_copies", lambda self: [])


def _wrong_source(patch: pytest.MonkeyPatch) -> None:
    fill = BatchBuilder._fill_decode

    def wrong(self: BatchBuilder, v: dict[str, np.ndarray], step: object) -> None:
        fill(self, v, step)  # type: ignore[arg-type]
        n = len(step.decode)  # type: ignore[attr-defined]
        v["token_source"][:n] = np.roll(v["token_source"][:n], 1)

    patch.setattr(BatchBuilder, "_fill_decode", wrong)


def _stale_window(patch: pytest.MonkeyPatch) -> None:
    trim = BlockManager.trim_window
    patch.setattr(
        BlockManager, "trim_window", lambda self, slot, n, fence=None: trim(self, slot, n + 16, fence)
    )


def _budget_off_by_one(patch: pytest.MonkeyPatch) -> None:
    pick = Scheduler._pick_prefills
    patch.setattr(Scheduler, "_pick_prefills", lambda self, tokens, rows: pick(self, tokens + 1, rows))


@pytest.mark.parametrize(
    "plant",
    [_without_epochs, _early_commit, _lost_copies, _wrong_source, _stale_window, _budget_off_by_one],
    ids=lambda f: f.__name__.strip("_").replace("_", " "),
)
def test_a_planted_bug_is_noticed(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017  which check speaks first depends on the bug
        for seed in range(6):
            run(PROFILES[0], seed, KINDS["full and window"], tight=seed % 2 == 1)
