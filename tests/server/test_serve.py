"""`core serve` as a process: sockets, the official client, clients that leave, ends of the server."""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
import openai
import pytest

from core.contract.errors import DeviceError
from core.server.client import Client
from tests.models.tiny import VOCAB
from tests.tokenizer.small import byte_level, write_folder

LONG = 30_000
COMMAND = [sys.executable, "-c", "from core.cli import main; main()", "serve"]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model for many positions, with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("served") / "tiny"
    shutil.copytree(tiny_folder("llama"), path)
    write_folder(path, byte_level(VOCAB))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": LONG}))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


class Server:
    """A server's process and its address."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def next_line(self) -> str:
        """The next line on its standard output, which must come soon."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 10)
        assert ready, "the server says nothing"
        return self.process.stdout.readline()

    def last_words(self) -> str:
        """What the server says at its end, which must be an orderly one."""
        assert self.process.wait(30) == 0 and self.process.stdout is not None
        return self.process.stdout.read().splitlines()[-1]


@contextmanager
def serving(folder: Path, *options: str, errors: IO[str] | None = None) -> Iterator[Server]:
    """A server of the null backend on a free port; `errors` gets its standard error."""
    arguments = [str(folder), "--backend", "null", "--dtype", "float32", "--port", "0"]
    arguments += [
        "--max-model-len",
        str(LONG),
        "--num-blocks",
        "8000",
        "--backend-option",
        f"memory={1 << 30}",
    ]
    process = subprocess.Popen(
        [*COMMAND, *arguments, *options], stdout=subprocess.PIPE, stderr=errors, text=True
    )
    try:
        assert process.stdout is not None
        url = ""
        for line in process.stdout:
            if line.startswith("serving "):
                url = line.split()[-1]
                break
        assert url, f"the server ended with status {process.wait()}"
        yield Server(process, url)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder, "--max-requests", "64", "--served-model-name", "tiny") as found:
        yield found


def run(body: Awaitable[None]) -> None:
    async def within() -> None:
        async with asyncio.timeout(60):
            await body

    asyncio.run(within())


async def figures(server: Server) -> dict[str, float]:
    async with Client(server.url) as client:
        return await client.metrics()


def test_the_official_client_streams_64_concurrent_chats(server: Server) -> None:
    async def body() -> None:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:

            async def chat(i: int) -> tuple[str, str | None, int]:
                text, reason, tokens = "", None, 0
                stream = await client.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": "a b c " * (1 + i % 9)}],
                    max_tokens=20,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body={"ignore_eos": True},
                )
                async for chunk in stream:
                    if chunk.usage is not None:
                        tokens = chunk.usage.completion_tokens
                    for choice in chunk.choices:
                        text += choice.delta.content or ""
                        reason = choice.finish_reason or reason
                return text, reason, tokens

            found = await asyncio.gather(*map(chat, range(64)))
            whole = await client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "a b c "}],
                max_tokens=20,
                extra_body={"ignore_eos": True},
            )
        assert {(reason, tokens) for _, reason, tokens in found} == {("length", 20)}
        assert found[0][0] == whole.choices[0].message.content != ""

    run(body())


def test_the_official_client_gets_typed_errors(server: Server) -> None:
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="temperature is -1"):
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.completions.create(model="other", prompt="x")
    assert [m.id for m in client.models.list()] == ["tiny"]
    client.close()


def test_blocks_of_a_client_that_left_are_free_within_two_steps(folder: Path) -> None:
    async def leaves(server: Server, stream: bool) -> None:
        async with httpx.AsyncClient(base_url=server.url.removesuffix("/v1")) as client:
            request = {"prompt": "a b c", "max_tokens": LONG - 100, "ignore_eos": True, "stream": stream}
            before = (await figures(server)).get("core_generation_tokens_total", 0)
            async with asyncio.TaskGroup() as group:
                task = group.create_task(_ask(client, request))
                while (begun := await figures(server))["core_generation_tokens_total"] < before + 2:
                    await asyncio.sleep(0.01)
                task.cancel()
            assert begun["core_kv_blocks_used"] > 0
            async with asyncio.timeout(20):
                while (now := await figures(server))["core_kv_blocks_used"]:
                    await asyncio.sleep(0.01)
            assert now["core_num_requests_running"] == 0
            assert now["core_steps_total"] - begun["core_steps_total"] <= 2

    with serving(folder, "--backend-option", "step_ms=400") as server:
        for stream in (True, False):
            run(leaves(server, stream))


async def _ask(client: httpx.AsyncClient, request: dict[str, object]) -> None:
    async with client.stream("POST", "/v1/completions", json=request, timeout=60) as response:
        async for _ in response.aiter_bytes():
            pass


def test_a_second_server_on_the_port_fails_within_a_second_and_before_it_loads(
    server: Server, folder: Path
) -> None:
    port = server.url.removesuffix("/v1").rsplit(":", 1)[1]
    # Python's own start is no part of what is bounded.
    code = (
        "import sys, time\nfrom core.cli import main\nimport core.server.run\nstart = time.monotonic()\n"
        "try:\n    main()\nfinally:\n    print('took', time.monotonic() - start)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", str(folder), "--backend", "null", "--port", port],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr and "loading" not in done.stdout
    assert float(done.stdout.split()[-1]) < 1.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_finish_and_then_ends_everything(folder: Path, number: int) -> None:
    with serving(folder) as server:

        async def body() -> None:
            async with Client(server.url, timeout_s=60) as client:
                request = {"prompt": "a b c", "max_tokens": 3000, "ignore_eos": True}
                task = asyncio.create_task(client.ask("/v1/completions", request))
                while not (await client.metrics())["core_num_requests_running"]:
                    await asyncio.sleep(0.005)
                server.process.send_signal(number)
                answer = await task
                assert answer.completion_tokens == 3000 and answer.finish_reason == "length"

        run(body())
        assert server.last_words() == "ended: what ran was finished"
        with pytest.raises(OSError), socket.create_connection(("127.0.0.1", int(_port(server))), timeout=1):
            pass


@pytest.mark.parametrize("is_hurried", [False, True], ids=["time", "second signal"])
def test_a_request_that_outlasts_the_drain_time_is_cut_off_with_an_error(
    folder: Path, is_hurried: bool
) -> None:
    # Slow steps: the request would run for half an hour if it were let.
    options = ("--drain-timeout-s", "50" if is_hurried else "0.2", "--backend-option", "step_ms=50")
    with serving(folder, *options) as server:

        async def body() -> None:
            async with Client(server.url, timeout_s=60) as client:
                request = {"prompt": "a b c", "max_tokens": LONG - 100, "ignore_eos": True}
                task = asyncio.create_task(client.ask("/v1/completions", request))
                while not (await client.metrics())["core_num_requests_running"]:
                    await asyncio.sleep(0.005)
                server.process.send_signal(signal.SIGTERM)
                if is_hurried:
                    await asyncio.sleep(0.3)
                    server.process.send_signal(signal.SIGTERM)
                start = time.monotonic()
                with pytest.raises(DeviceError, match="the engine was closed"):
                    await task
                assert time.monotonic() - start < 4, "as long as it was given, and no longer"

        run(body())
        assert server.last_words() == "ended: what still ran was cut off"


def test_an_engine_that_dies_makes_the_server_unhealthy_and_end_its_streams(
    folder: Path, tmp_path: Path
) -> None:
    with (
        (tmp_path / "errors").open("w") as errors,
        serving(folder, "--backend-option", "fail_step=30", errors=errors) as server,
    ):

        async def body() -> None:
            async with Client(server.url, timeout_s=60) as client:
                request = {"prompt": "a b c", "max_tokens": 1000, "ignore_eos": True}
                with pytest.raises(Exception, match="fails at step 30"):
                    await client.ask("/v1/completions", request)
            async with httpx.AsyncClient(base_url=server.url.removesuffix("/v1")) as plain:
                answer = await plain.get("/health")
                assert answer.status_code == 503 and "fails at step 30" in answer.text
            found = await figures(server)
            held = ("core_engine_up", "core_num_requests_running", "core_kv_blocks_used")
            assert [found[name] for name in held] == [0, 0, 0]

        run(body())
        told = server.next_line()
        assert told.startswith("error: the engine stopped") and "fails at step 30" in told, (
            "it is told at once"
        )
        assert server.stop() == 1, "the exit status tells it, too"
    last = (tmp_path / "errors").read_text().splitlines()[-1]
    assert last.startswith("error: the engine stopped") and "fails at step 30" in last


def test_a_full_queue_answers_429_and_serves_those_it_took(folder: Path) -> None:
    with serving(folder, "--max-requests", "2", "--max-waiting", "2") as server:

        async def body() -> None:
            async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:

                async def ask(i: int) -> str:
                    try:
                        found = await client.completions.create(
                            model="tiny",
                            prompt="a b c " * (1 + i),
                            max_tokens=2000,
                            extra_body={"ignore_eos": True},
                        )
                    except openai.RateLimitError:
                        return "429"
                    return str(found.choices[0].finish_reason)

                found = await asyncio.gather(*map(ask, range(12)))
                assert found.count("length") >= 4 and found.count("429") >= 1
                assert set(found) == {"length", "429"}

        run(body())


def test_a_model_that_cannot_be_served_ends_the_command_with_its_reason(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, str(tmp_path), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ},
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_what_the_memory_buys_is_told_before_loading(folder: Path) -> None:
    process = subprocess.Popen(
        [
            *COMMAND,
            str(folder),
            "--backend",
            "null",
            "--dtype",
            "float32",
            "--port",
            "0",
            "--max-model-len",
            "64",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("serving "):
            break
    process.terminate()
    process.communicate(timeout=30)
    told = [i for i, line in enumerate(lines) if "blocks of 16" in line and "requests of 64 tokens" in line]
    loading = [i for i, line in enumerate(lines) if line.startswith("loading weights")]
    assert told and loading and told[0] < loading[0]


def _port(server: Server) -> str:
    return server.url.removesuffix("/v1").rsplit(":", 1)[1]


@pytest.mark.parametrize("given", [(), ("--api-key", "other")])
def test_the_key_of_the_environment_guards_the_server_unless_one_is_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CORE_API_KEY", "secret")
    with serving(folder, *given) as server:
        for key, status in {
            None: 401,
            "secret": 401 if given else 200,
            "other": 200 if given else 401,
        }.items():
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            assert httpx.get(f"{server.url}/models", headers=headers).status_code == status
