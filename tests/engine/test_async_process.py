"""The engine's process from start to end: how it fails, and that nothing of it stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest

from core.contract.errors import ConfigError, CoreError, EngineDead
from core.engine.async_llm import AsyncLLM
from core.engine.engine import Engine
from core.engine.metrics import EngineMetrics
from core.sampling.params import SamplingParams
from tests.engine.serving import ENDLESS, ROOT, config, endless, last, serving, until


def group_members(group: int) -> list[int]:
    """Processes of a group that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, IndexError):
            continue
        if entry.name.isdigit() and int(fields[2]) == group and fields[0] not in "ZX":
            found.append(int(entry.name))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"model": Path("no-such-model")},
        {"backend": "abacus"},
        {"backend_options": {"beads": "7"}},
        {"dtype": "int3"},
        {"kv_cache_bytes": 1},
    ],
    ids=lambda o: next(iter(o)),
)
def test_a_start_that_fails_raises_what_the_engine_raises(folder: Path, options: dict[str, Any]) -> None:
    wrong = replace(config(folder), **options)
    with pytest.raises(CoreError) as direct:
        Engine(wrong)

    async def start() -> None:
        with pytest.raises(CoreError) as found:
            await AsyncLLM.start(wrong)
        assert type(found.value) is type(direct.value)
        assert str(found.value) == str(direct.value)

    asyncio.run(start())


def test_a_model_without_a_tokenizer_does_not_start(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = spied_children(monkeypatch)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        asyncio.run(AsyncLLM.start(config(tiny_folder("llama"))))
    assert len(started) == 1 and group_members(started[0]) == []


def test_a_start_that_is_cancelled_leaves_no_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = spied_children(monkeypatch)

    async def start() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(AsyncLLM.start(config(folder)), 0.05)

    asyncio.run(start())
    assert len(started) == 1 and group_members(started[0]) == []


def spied_children(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ids of the processes that are started from now on."""
    from core.engine import async_llm

    pids: list[int] = []

    class Spied(async_llm.Child):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            pids.append(self.pid)

    monkeypatch.setattr(async_llm, "Child", Spied)
    return pids


def test_a_failed_step_is_told_to_every_stream_with_its_phase(folder: Path) -> None:
    options = replace(config(folder), backend_options={"fail_step": "20"})

    async def body(llm: AsyncLLM) -> None:
        params = SamplingParams(max_tokens=100, ignore_eos=True)
        found = await asyncio.gather(
            *(last(llm.generate([5 + i], params)) for i in range(12)), return_exceptions=True
        )
        for error in found:
            assert isinstance(error, EngineDead)
            assert "while serving, after" in str(error)
            assert "the null device fails at step 20, as its options say" in str(error)
            assert type(error.__cause__).__name__ == "DeviceError"
        assert not llm.is_alive and "fails at step 20" in str(llm.failure)
        with pytest.raises(EngineDead, match="fails at step 20"):
            await last(llm.generate([5], params))
        assert not await llm.drain(1)

    serving(options, body)


def test_a_killed_engine_ends_every_stream_and_leaves_no_process(folder: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        pid = llm._child.pid
        tasks = [asyncio.create_task(last(llm.generate([5 + i], ENDLESS))) for i in range(12)]
        await until(lambda: llm.metrics().num_running == 8)
        os.kill(pid, signal.SIGKILL)
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, EngineDead) and "signal 9" in str(error)
        assert not llm.is_alive
        assert group_members(pid) == []

    serving(endless(folder), body)


@pytest.mark.parametrize("how", ["close", "kill"])
def test_ranks_end_with_the_engine(folder: Path, how: str) -> None:
    async def body(llm: AsyncLLM) -> None:
        pid = llm._child.pid
        assert (await last(llm.generate([5, 6], SamplingParams(max_tokens=3, ignore_eos=True)))).finished
        assert len(group_members(pid)) >= 3
        if how == "kill":
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not llm.is_alive)
        await llm.close()
        await until(lambda: group_members(pid) == [])

    serving(config(folder, backend="cpu", tensor_parallel=2, max_requests=2), body)


PARENT = """
import asyncio, sys
from pathlib import Path
from core.engine.async_llm import AsyncLLM
from core.engine.config import EngineConfig

async def main():
    config = EngineConfig(model=Path(sys.argv[1]), backend="null", dtype="float32", max_model_len=128)
    llm = await AsyncLLM.start(config)
    print(llm._child.pid, llm._link.folder, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent_takes_the_engine_with_it(folder: Path, number: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        pid, sockets = parent.stdout.readline().split()
        assert group_members(int(pid)) == [int(pid)]
        parent.send_signal(number)
        start = time.monotonic()
        while group_members(int(pid)) and time.monotonic() - start < 5:
            time.sleep(0.02)
        assert time.monotonic() - start < 2
        assert not Path(sockets).exists()


def test_signals_to_the_group_are_the_parent_s_to_act_on(folder: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(llm._child.pid, number)
        assert (await last(llm.generate([5], SamplingParams(max_tokens=3, ignore_eos=True)))).finished

    serving(config(folder), body)


def test_messages_that_are_no_commands_do_not_hurt_the_engine(folder: Path) -> None:
    def record(name: str, *values: Any) -> bytes:
        packed: bytes = msgpack.packb({"~record": [name, list(values)]})
        return packed

    hostile = [
        b"",
        b"\xc1",
        b"\x80\x04cposix\nsystem\n.",
        os.urandom(4096),
        msgpack.packb(["close"]),
        msgpack.packb({"~array": ["|O", [1], b"12345678"]}),
        record("Engine"),
        record("EngineConfig", "m"),
        record("AbortRequest", ["x"]),
        record("EndChoice", "x", "y"),
        record("AddRequest", "x", [5], None, 0, None, None, ""),
        record("AddRequest", "x", ["5"], {"~record": ["SamplingParams", []]}, 0, None, None, ""),
        record("Close", 1),
    ]

    async def body(llm: AsyncLLM) -> None:
        task = asyncio.create_task(last(llm.generate([5], SamplingParams(max_tokens=100, ignore_eos=True))))
        for message in hostile:
            llm._link._commands.send(message)
            await asyncio.sleep(0.005)
        assert len((await task).outputs[0].token_ids) == 100
        assert len((await last(llm.generate([5], SamplingParams(max_tokens=3)))).outputs[0].token_ids) == 3
        assert llm.is_alive

    serving(config(folder), body)


def test_the_sockets_are_this_user_s_alone(folder: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        assert stat.S_IMODE(llm._link.folder.stat().st_mode) == 0o700
        where.append(llm._link.folder)

    where: list[Path] = []
    serving(config(folder), body)
    assert not where[0].exists()


def test_closing_ends_what_runs_and_can_be_repeated(folder: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        pid = llm._child.pid
        task = asyncio.create_task(last(llm.generate([5], ENDLESS)))
        await until(lambda: llm.metrics().num_running == 1)
        await asyncio.gather(llm.close(), llm.close())
        with pytest.raises(EngineDead, match="was closed"):
            await task
        with pytest.raises(EngineDead, match="was closed"):
            await last(llm.generate([5], ENDLESS))
        assert not llm.is_alive and llm.failure is None
        assert group_members(pid) == []

    serving(endless(folder), body)


def test_tokenizing_a_long_prompt_does_not_hold_the_others_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(llm: AsyncLLM) -> None:
        def slow(tokenizer: object, text: str, add_special_tokens: bool = True) -> list[int]:
            time.sleep(0.3)
            return [5, 6, 7]

        monkeypatch.setattr(type(llm.tokenizer), "encode", slow)
        start, ticks = time.monotonic(), 0
        task = asyncio.create_task(last(llm.generate("XYZ " * 1000, SamplingParams(max_tokens=1))))
        while not task.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert time.monotonic() - start >= 0.3
        assert ticks >= 15

    serving(config(folder), body)


def test_a_slow_reader_gets_the_newest_state(folder: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        counts = []
        async for output in llm.generate([5], SamplingParams(max_tokens=100, ignore_eos=True)):
            counts.append(len(output.outputs[0].token_ids))
            if len(counts) == 1:
                await until(lambda: llm.metrics().generated_tokens == 100)
        assert len(counts) == 2 and counts[-1] == 100

    serving(config(folder), body)


def test_figures_are_there_before_the_first_step(folder: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        assert llm.metrics() == EngineMetrics(blocks_total=llm.metrics().blocks_total)
        assert llm.metrics().blocks_total > 0
        assert (llm.model.vocab_size, llm.max_model_len, llm.model.backend) == (256, 128, "null")

    serving(config(folder), body)


def test_only_an_asynchronous_engine_needs_the_extra() -> None:
    code = (
        "import sys, asyncio, pathlib\nsys.modules['zmq'] = None\n"
        "import core.engine.llm\n"
        "from core.engine.async_llm import AsyncLLM\nfrom core.engine.config import EngineConfig\n"
        "try: asyncio.run(AsyncLLM.start(EngineConfig(model=pathlib.Path('m'))))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("ConfigError") and "core[server]" in done.stdout
