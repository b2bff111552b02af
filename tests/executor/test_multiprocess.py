"""A rank that fails ends the engine with its own sentence, and leaves no process behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from core.contract.errors import EngineDead
from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.executor.multiprocess import MultiprocessExecutor
from core.sampling.params import SamplingParams
from tests.models.conftest import tiny_folder

__all__ = ["tiny_folder"]


def start(folder: Path, ranks: int) -> Engine:
    return Engine(
        EngineConfig(
            model=folder,
            backend="cpu",
            dtype="float32",
            max_model_len=64,
            max_requests=2,
            tensor_parallel=ranks,
        )
    )


def generate(engine: Engine) -> list[int]:
    engine.add("a", [5, 6, 7, 8], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [event.token for event in engine.step() if event.token >= 0]
    return tokens


def processes(engine: Engine) -> list[int]:
    executor = engine._executor
    assert isinstance(executor, MultiprocessExecutor)
    return [p.pid for p in executor._processes if p.pid is not None]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_two_processes_generate_what_one_does_and_a_killed_rank_is_named(
    tiny_folder: Callable[[str], Path],
) -> None:
    folder = tiny_folder("llama")
    inline = start(folder, 1)
    wanted = generate(inline)
    inline.close()

    engine = start(folder, 2)
    pids = processes(engine)
    assert generate(engine) == wanted
    os.kill(pids[1], signal.SIGKILL)
    engine.add("b", [5, 6, 7], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    with pytest.raises(EngineDead, match="rank"):
        while engine.has_work:
            engine.step()
    engine.close()
    engine.close()
    assert not any(is_alive(pid) for pid in pids)
