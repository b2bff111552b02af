"""Details of answers that clients build on: offsets, ids, prompts in streams; limits of body and time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.contract.errors import ConfigError
from core.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from core.sampling.params import SamplingParams
from core.server.config import ServerConfig
from core.server.deltas import Growth
from core.server.logprobs import LogprobWriter
from core.tokenizer import Tokenizer, load_tokenizer
from tests.server.conftest import Connect
from tests.server.fake import FakeEngine
from tests.server.test_api import CHAT, events, post
from tests.tokenizer.small import byte_level, write_folder

TEXT = "é日x"


@pytest.fixture(scope="module")
def bytes_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tokenizer, list[int]]]:
    """A tokenizer, and TEXT in tokens of single bytes."""
    folder: Path = tmp_path_factory.mktemp("bytes")
    write_folder(folder, byte_level(300))
    tokenizer = load_tokenizer(folder)
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    yield tokenizer, [by_bytes[bytes([b])] for b in TEXT.encode()]


def test_an_echo_has_the_offsets_of_its_own_text(bytes_only: tuple[Tokenizer, list[int]]) -> None:
    tokenizer, ids = bytes_only
    special = min(tokenizer.special_ids)
    found = tuple({i: Logprob(-1.0, 1)} for i in (special, *ids))
    metrics = RequestMetrics(0.0, 0.0, 0)
    output = RequestOutput("r", TEXT, (special, *ids), (), True, 0, metrics, found)
    writer = LogprobWriter(tokenizer)
    assert writer.prompt(output, TEXT)["text_offset"] == [0, 0, 0, 1, 1, 1, 2]
    shown = tokenizer.decode([special], skip_special_tokens=False)
    assert writer.prompt(output, shown + TEXT)["text_offset"][:2] == [0, len(shown)]


def test_a_streamed_completion_tells_of_its_prompt_once(connect: Connect) -> None:
    body = {"prompt": "xy", "n": 2, "max_tokens": 3, "prompt_logprobs": 0, "return_token_ids": True}
    whole = post(connect(), "/v1/completions", **body).json()["choices"]
    found = events(post(connect(), "/v1/completions", **body, stream=True))
    for i in range(2):
        parts = [e["choices"][0] for e in found if e["choices"][0]["index"] == i]
        first, rest = parts[0], parts[1:]
        assert first["prompt_logprobs"] == whole[i]["prompt_logprobs"] and first["prompt_logprobs"][1]
        assert first["prompt_token_ids"] == whole[i]["prompt_token_ids"] == [120, 121]
        assert not any({"prompt_logprobs", "prompt_token_ids"} & part.keys() for part in rest)
        assert [t for part in parts for t in part["token_ids"]] == whole[i]["token_ids"] == [97, 98, 99]


def test_a_streamed_chat_has_its_token_ids(connect: Connect) -> None:
    body = {**CHAT, "max_tokens": 3, "return_token_ids": True}
    whole = post(connect(), "/v1/chat/completions", **body).json()["choices"][0]
    parts = [e["choices"][0] for e in events(post(connect(), "/v1/chat/completions", **body, stream=True))]
    assert [t for part in parts for t in part.get("token_ids", ())] == whole["token_ids"] == [97, 98, 99]


@pytest.mark.parametrize(("keeps", "sent"), [(True, ["a", "b", "E", "N"]), (False, ["a", "b", None, None])])
def test_text_is_held_back_only_where_a_stop_text_would_be_cut_off(keeps: bool, sent: list[Any]) -> None:
    growth = Growth(SamplingParams(stop=("END",), include_stop_str_in_output=keeps))
    found = []
    for size in range(1, 5):
        delta = growth.take(CompletionOutput(0, "abEN"[:size], (), None, None, None))
        found.append(delta and delta.text)
    assert found == sent


def _chunked(client: httpx.AsyncClient, size: int, headers: dict[str, str]) -> httpx.Response:
    async def body() -> AsyncIterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(size):
            yield b"x"
        yield b'", "max_tokens": 1}'

    async def ask() -> httpx.Response:
        async with client:
            return await client.post("/v1/completions", content=body(), headers=headers)

    return asyncio.run(ask())


def test_a_body_without_a_length_is_counted_as_it_comes(connect: Connect) -> None:
    assert _chunked(connect(max_body_bytes=200), 100, {}).status_code == 200
    found = _chunked(connect(max_body_bytes=200), 300, {})
    assert found.status_code == 413 and "larger than 200 bytes" in found.text


@pytest.mark.parametrize("length", ["300", "-1", "many"])
def test_a_body_of_a_wrong_or_too_large_length_is_refused_unread(connect: Connect, length: str) -> None:
    engine = FakeEngine()
    found = _chunked(connect(engine, max_body_bytes=200), 10, {"content-length": length})
    assert found.status_code == 413 and not engine.asked


@pytest.mark.parametrize(("given", "taken"), [({}, 4.0), ({"timeout": 2.0}, 2.0), ({"timeout": 9.0}, 4.0)])
def test_the_operators_limit_of_time_holds_for_everyone(
    connect: Connect, given: dict[str, float], taken: float
) -> None:
    engine = FakeEngine()
    post(connect(engine, request_timeout_s=4.0), "/v1/completions", prompt="x", **given)
    assert engine.asked[0][5] == taken


@pytest.mark.parametrize("name", ["request_timeout_s", "drain_timeout_s", "max_body_bytes", "max_prompts"])
@pytest.mark.parametrize("value", [0, -5, float("nan")])
def test_a_limit_that_is_none_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} is .*(more than 0|whole number)"):
        ServerConfig(**{name: value})  # type: ignore[arg-type]
