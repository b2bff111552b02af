"""A rank that fails ends the engine with its own sentence, and leaves no process behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
from core_test_plugins.null import SPEC, NullBackend

from core.contract.errors import EngineDead, OutOfMemoryError, PluginError, UnsupportedError
from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.executor.failure import Failure
from core.executor.multiprocess import MultiprocessExecutor
from core.executor.wire import encode
from core.plugins import Plugins
from core.sampling.params import SamplingParams
from tests.executor import registered
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
    pids = engine.rank_processes
    assert generate(engine) == wanted
    os.kill(pids[1], signal.SIGKILL)
    engine.add("b", [5, 6, 7], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    with pytest.raises(EngineDead, match="rank 1 ended without an answer"):
        while engine.has_work:
            engine.step()
    engine.close()
    engine.close()
    assert not any(is_alive(pid) for pid in pids)


def test_the_rank_that_failed_is_heard_though_another_still_waits_for_it() -> None:
    executor = MultiprocessExecutor.__new__(MultiprocessExecutor)
    ours, theirs = zip(*(Pipe() for _ in range(2)), strict=True)
    executor._pipes, executor._processes = list(ours), []
    failure = Failure.of(OutOfMemoryError("the cache", 10, 5))
    theirs[1].send_bytes(encode(("error", failure)))
    with pytest.raises(OutOfMemoryError, match="the cache needs"):
        executor._call("wait", 0)
    for pipe in (*ours, *theirs):
        pipe.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"collectives": ("all_reduce",)}, "does not declare all_gather"),
        ({"process_model": "single_controller"}, "drives all devices from one process"),
        ({"max_world_size": 1}, "runs 1 ranks at most"),
    ],
)
def test_ranks_that_the_backend_does_not_run_are_refused(
    tiny_folder: Callable[[str], Path], change: dict[str, Any], words: str
) -> None:
    plugins = Plugins()
    plugins.register_backend(NullBackend(replace(SPEC, name="some", **change)), "some")
    config = EngineConfig(model=tiny_folder("llama"), backend="some", max_model_len=64, tensor_parallel=2)
    with pytest.raises(UnsupportedError, match=words):
        Engine(config, plugins=plugins)


def test_ranks_of_a_registered_backend_find_it_by_its_place(tiny_folder: Callable[[str], Path]) -> None:
    config = EngineConfig(
        model=tiny_folder("llama"), backend="other", dtype="float32", max_model_len=64, tensor_parallel=2
    )
    tokens = []
    for place in ("tests.executor.registered:backend", ""):
        plugins = Plugins()
        plugins.register_backend(registered.backend, "other", place)
        if not place:
            with pytest.raises(PluginError, match="registered in this process alone"):
                Engine(config, plugins=plugins)
            continue
        engine = Engine(config, plugins=plugins)
        try:
            tokens = generate(engine)
        finally:
            engine.close()
    assert len(tokens) == 8
