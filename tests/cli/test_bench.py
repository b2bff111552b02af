"""`core bench` does as many requests, so close together and so often, as it was told."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from typer.testing import CliRunner

from core.cli.app import app
from core.contract.errors import ConfigError
from core.engine.llm import LLM
from core.server.app import create_app
from core.server.config import ServerConfig
from core.server.run import bind
from core.server.service import Service
from tests.models.conftest import tiny_folder
from tests.server.fake import FakeEngine

__all__ = ["tiny_folder"]


class Watched(FakeEngine):
    """Remembers when each request came, and how many ran at once at most."""

    def __init__(self) -> None:
        super().__init__(pause=0.01)
        self.times: list[float] = []
        self.peak = 0

    async def generate(self, *given: Any, **options: Any) -> Any:
        self.times.append(time.monotonic())
        async for output in super().generate(*given, **options):
            self.peak = max(self.peak, len(self.live))
            yield output


@contextmanager
def serving(engine: FakeEngine, **options: Any) -> Iterator[str]:
    """A server of this engine in a thread; its address."""
    config = ServerConfig(port=0, **options)
    service = Service(engine, config, "fake")  # type: ignore[arg-type]
    settings = uvicorn.Config(create_app(service, config), log_level="warning", lifespan="off")
    server = uvicorn.Server(settings)
    with bind(config) as listener:
        work = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        work.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            work.join()


def measured(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """The figures that a command writes."""
    output = tmp_path / "figures.json"
    command = ["bench", *arguments, "--output", str(output)]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize(("given", "peak"), [((), 12), (("--max-concurrency", "3"), 3)])
def test_no_more_requests_run_at_once_than_were_asked_for(
    tmp_path: Path, given: tuple[str, ...], peak: int
) -> None:
    engine = Watched()
    with serving(engine) as url:
        sizes = ("--num-prompts", "12", "--input-len", "5", "--output-len", "4")
        found = measured(tmp_path, "serve", "--url", url, *sizes, *given)
    assert engine.peak == peak
    assert (found["succeeded"], found["failed"], found["first_error"]) == (12, 0, None)
    assert {len(prompt) for prompt, *_ in engine.asked} == {5}  # type: ignore[arg-type]
    assert {params.max_tokens for _, params, *_ in engine.asked} == {4}
    assert found["output_tokens_per_s"] == pytest.approx(12 * 4 / found["seconds"])
    assert 0 < found["time_to_first_token_s.mean"] < found["latency_s.mean"] < found["seconds"]


def test_requests_arrive_at_the_rate_that_was_asked_for(tmp_path: Path) -> None:
    spans = {}
    for rate in (None, 40.0):
        engine = Watched()
        with serving(engine) as url:
            given = () if rate is None else ("--request-rate", str(rate))
            sizes = ("--num-prompts", "40", "--input-len", "2", "--output-len", "1")
            found = measured(tmp_path, "serve", "--url", url, *sizes, *given)
        assert found["request_rate"] == rate and found["succeeded"] == 40
        spans[rate] = engine.times[-1] - engine.times[0]
    assert spans[40.0] > max(0.5, spans[None]), "40 at 40 a second, and all at once"


def test_the_same_seed_asks_the_same_of_a_server(tmp_path: Path) -> None:
    asked = []
    for seed in ("1", "1", "2"):
        engine = Watched()
        with serving(engine) as url:
            measured(
                tmp_path, "serve", "--url", url, "--num-prompts", "3", "--input-len", "9", "--seed", seed
            )
        asked.append(sorted(tuple(prompt) for prompt, *_ in engine.asked))  # type: ignore[arg-type]
    assert asked[0] == asked[1] != asked[2]


def test_a_load_needs_the_server_s_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CORE_API_KEY", raising=False)
    with serving(FakeEngine(), api_key="secret") as url:
        command = ("serve", "--url", url, "--num-prompts", "1")
        with pytest.raises(Exception, match="the API key is missing"):
            measured(tmp_path, *command)
        assert measured(tmp_path, *command, "--api-key", "secret")["succeeded"] == 1
        monkeypatch.setenv("CORE_API_KEY", "secret")
        assert measured(tmp_path, *command)["succeeded"] == 1


def test_requests_that_fail_are_told_and_a_load_of_failures_is_an_error(tmp_path: Path) -> None:
    words = r"no request of 2 succeeded; the first error: .*try again later"
    with serving(FakeEngine(limit=0)) as url, pytest.raises(ConfigError, match=words):
        measured(tmp_path, "serve", "--url", url, "--num-prompts", "2")
    with serving(FakeEngine(limit=2, pause=0.05)) as url:
        found = measured(tmp_path, "serve", "--url", url, "--num-prompts", "5")
    assert (found["succeeded"], found["failed"]) == (2, 3) and "try again later" in found["first_error"]


@pytest.mark.parametrize("count", [1, 4])
def test_a_start_is_measured_as_often_as_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    starts = iter(range(100))
    monkeypatch.setattr("core.cli.bench._one_start", lambda model, options: {"ready_s": next(starts)})
    (tmp_path / "m").mkdir()
    found = measured(tmp_path, "startup", str(tmp_path / "m"), "--iterations", str(count))
    assert next(starts) == count == found["iterations"]
    assert found["ready_s.mean"] == (count - 1) / 2


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("latency", ("--batch-size", "2", "--iterations", "3"), [(2, 7, 2), *[(2, 7, 4)] * 3]),
        ("throughput", ("--num-prompts", "5"), [(1, 7, 2), (5, 7, 4)]),
    ],
)
def test_an_engine_is_measured_over_the_work_that_was_asked_for(
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    given: tuple[str, ...],
    wanted: list[tuple[int, int, int]],
) -> None:
    generate, done = LLM.generate, []

    def watched(self: LLM, prompts: Any, params: Any, **options: Any) -> Any:
        done.append((len(prompts), len(prompts[0]), params.max_tokens))
        return generate(self, prompts, params, **options)

    monkeypatch.setattr(LLM, "generate", watched)
    monkeypatch.setattr("core.engine.llm.load_tokenizer", lambda *_, **__: FakeEngine().tokenizer)
    sizes = ("--input-len", "7", "--output-len", "4", "--backend", "null", "--max-model-len", "64")
    found = measured(tmp_path, name, str(tiny_folder("llama")), *sizes, *given)
    assert done == wanted, "and a short one before, to warm up"
    assert (found["backend"], found["input_len"], found["output_len"]) == ("null", 7, 4)
