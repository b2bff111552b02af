"""Plugins' observers hear of every step and of every end of a sequence, and cannot hurt the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from core_test_plugins.null import NullBackend

from core.contract import CONTRACT
from core.contract.hookspecs import hookimpl
from core.contract.requests import ObserverRequest
from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.plugins import Plugins
from core.sampling.params import SamplingParams


class Heard:
    """Notes what it is told; raises at a step where that is asked of it."""

    def __init__(self, fail_at: int = -1) -> None:
        self.steps: list[tuple[int, int, int]] = []
        self.ends: list[tuple[str, str, int]] = []
        self._fail_at = fail_at

    def on_step(self, step_id: int, num_tokens: int, num_requests: int, duration_s: float) -> None:
        if step_id == self._fail_at:
            raise RuntimeError("no more")
        assert duration_s >= 0
        self.steps.append((step_id, num_tokens, num_requests))

    def on_request_finished(self, request_id: str, reason: str, num_output_tokens: int) -> None:
        self.ends.append((request_id, reason, num_output_tokens))


class Addon:
    """Offers observers."""

    CONTRACT = CONTRACT

    def __init__(self, *observers: Any) -> None:
        self.observers = observers

    @hookimpl
    def core_observer(self, request: ObserverRequest) -> Sequence[Any]:
        """See `core.contract.hookspecs`."""
        return self.observers


def run(folder: Path, *observers: Heard) -> None:
    plugins = Plugins()
    plugins.register_backend(NullBackend(), "null")
    plugins.register_addon(Addon(*observers), "watcher")
    config = EngineConfig(model=folder, backend="null", dtype="float32", max_model_len=64, overlap=2)
    engine = Engine(config, plugins=plugins)
    for name, count in (("a", 2), ("b", 3)):
        engine.add(name, [5, 6, 7], SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
    while engine.has_work:
        engine.step()
    engine.close()


def test_steps_and_ends_are_told(tiny_folder: Callable[[str], Path]) -> None:
    heard = Heard()
    run(tiny_folder("llama"), heard)
    assert heard.steps[:3] == [(0, 6, 2), (1, 2, 2), (2, 1, 1)]
    assert heard.ends == [("a", "length", 2), ("b", "length", 3)]


def test_an_observer_that_raises_is_told_of_and_let_go(
    tiny_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = Heard(fail_at=1), Heard()
    run(tiny_folder("llama"), bad, good)
    assert len(bad.steps) == 1 and bad.ends == []
    assert len(good.steps) >= 3 and len(good.ends) == 2
    assert capsys.readouterr().err.count("observer Heard raised RuntimeError: no more") == 1
