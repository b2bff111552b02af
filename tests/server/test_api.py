"""The answers of the API, whole and streamed, and what is refused."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from dataclasses import fields
from typing import Any

import httpx
import pytest

from core.engine.metrics import EngineMetrics
from core.engine.outputs import Logprob
from core.sampling.params import SamplingParams
from core.server.protocol import CompletionRequest
from tests.server.conftest import Connect
from tests.server.fake import FakeEngine

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def get(client: httpx.AsyncClient, path: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with client:
            return await client.get(path)

    return asyncio.run(ask())


def post(client: httpx.AsyncClient, path: str, **body: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with client:
            return await client.post(path, json=body)

    return asyncio.run(ask())


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream, in order; it must end as streams end."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_has_text_reason_and_usage(connect: Connect) -> None:
    answer = post(connect(), "/v1/completions", model="fake", prompt="xyz", max_tokens=4).json()
    assert answer["object"] == "text_completion" and answer["model"] == "fake"
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["index"]) == ("abcd", "length", 0)
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [("ab", ["ab"]), ([97, 98], [[97, 98]]), (["a", "b"], ["a", "b"]), ([[97], [98, 99]], [[97], [98, 99]])],
)
def test_every_form_of_prompt_is_taken_and_choices_are_numbered_through(
    connect: Connect, prompt: Any, asked: list[Any]
) -> None:
    engine = FakeEngine()
    answer = post(connect(engine), "/v1/completions", prompt=prompt, n=2).json()
    assert sorted(str(a[0]) for a in engine.asked) == sorted(map(str, asked))
    assert [c["index"] for c in answer["choices"]] == list(range(2 * len(asked)))


def test_a_stream_of_completions_adds_up_to_the_whole_answer(connect: Connect) -> None:
    body = {"prompt": ["x", "y"], "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    found = events(post(connect(), "/v1/completions", **body))
    texts = ["", "", "", ""]
    for event in found[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["abcdef"] * 4
    assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == 24


def test_a_chat_is_rendered_with_the_models_template(connect: Connect) -> None:
    engine = FakeEngine()
    answer = post(connect(engine), "/v1/chat/completions", **CHAT, max_completion_tokens=3).json()
    assert "".join(map(chr, engine.asked[0][0])) == "<user>hi<assistant>"  # type: ignore[arg-type]
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "abc"}
    parts = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}
        ]
    }
    post(connect(engine), "/v1/chat/completions", **parts)
    assert engine.asked[1][0] == engine.asked[0][0]


def test_a_streamed_chat_begins_with_the_role_and_ends_with_the_reason(connect: Connect) -> None:
    found = events(post(connect(), "/v1/chat/completions", **CHAT, stream=True, max_tokens=3))
    choices = [event["choices"][0] for event in found]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["delta"].get("content", "") for c in choices[1:]] == ["a", "b", "c"]
    assert [c["finish_reason"] for c in choices] == [None, None, None, "length"]


def test_what_may_become_a_stop_text_is_not_sent_before_it_is_certain(connect: Connect) -> None:
    engine = FakeEngine(reply="abENxENDy")
    found = events(
        post(connect(engine), "/v1/completions", prompt="x", stop="END", max_tokens=20, stream=True)
    )
    sent = [event["choices"][0]["text"] for event in found]
    assert "".join(sent) == "abENx"
    assert sent[:3] == ["a", "b", "ENx"] or "E" not in sent[2:3]
    assert found[-1]["choices"][0]["stop_reason"] == "END"


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        (
            "/v1/completions",
            {"prompt": "x", "temperatur": 1},
            400,
            "no field 'temperatur'; did you mean 'temperature'",
        ),
        ("/v1/completions", {}, 400, "the field 'prompt' is missing"),
        ("/v1/completions", {"prompt": "x", "temperature": -1}, 400, "temperature is -1"),
        ("/v1/completions", {"prompt": "x", "temperature": "hot"}, 400, "temperature"),
        ("/v1/completions", {"prompt": []}, 400, "prompt is empty"),
        ("/v1/completions", {"prompt": "x" * 600}, 400, "the prompt has 600 tokens"),
        ("/v1/completions", {"prompt": ["x"] * 5}, 400, "5 prompts were given"),
        ("/v1/completions", {"prompt": "x", "best_of": 3}, 400, "best_of is 3"),
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, 400, "suffix is not supported"),
        ("/v1/completions", {"prompt": "x", "model": "other"}, 404, "no model 'other' here"),
        ("/v1/completions", {"prompt": "x" * 5000}, 413, "larger than 4000 bytes"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {**CHAT, "top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
        (
            "/v1/chat/completions",
            {**CHAT, "response_format": {"type": "json_object"}},
            400,
            "'json_object' is not",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "content of type 'image_url'",
        ),
        ("/v1/nothing", {}, 404, "Not Found"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_gets_its_status_and_one_sentence(
    connect: Connect, path: str, body: dict[str, Any], status: int, words: str, stream: bool
) -> None:
    engine = FakeEngine()
    answer = post(connect(engine, max_prompts=4, max_body_bytes=4000), path, **body, stream=stream)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert words in error["message"] and error["type"] == "invalid_request_error"
    assert not engine.live


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "the body is not JSON"),
        (b"", "the body must be a JSON object"),
        (b"[1]", "the body must be a JSON object"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(connect: Connect, content: bytes, words: str) -> None:
    async def ask() -> httpx.Response:
        async with connect() as client:
            headers = {"content-type": "application/json"}
            return await client.post("/v1/completions", content=content, headers=headers)

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, words)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_is_json_whatever_it_is_called(connect: Connect, kind: str | None) -> None:
    async def ask() -> httpx.Response:
        async with connect() as client:
            headers = {} if kind is None else {"content-type": kind}
            return await client.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)

    assert asyncio.run(ask()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_answers_429(connect: Connect, stream: bool) -> None:
    answer = post(connect(FakeEngine(limit=0)), "/v1/completions", prompt="x", stream=stream)
    assert answer.status_code == 429 and "try again later" in answer.json()["error"]["message"]


def test_a_dead_engine_answers_503_with_its_cause(connect: Connect) -> None:
    engine = FakeEngine(error_after=0)
    answer = post(connect(engine), "/v1/completions", prompt="x")
    assert answer.status_code == 503 and "the device burnt" in answer.json()["error"]["message"]

    async def health() -> httpx.Response:
        async with connect(engine) as client:
            return await client.get("/health")

    found = asyncio.run(health())
    assert found.status_code == 503 and "the device burnt" in found.text


def test_a_stream_that_fails_later_ends_with_the_error(connect: Connect) -> None:
    answer = post(connect(FakeEngine(error_after=2)), "/v1/completions", prompt="x", stream=True)
    last = json.loads([line for line in answer.text.split("\n\n") if line][-1].removeprefix("data: "))
    assert "the device burnt" in last["error"]["message"]
    assert answer.text.count('"text":"') == 2


@pytest.mark.parametrize(
    ("given", "status"), [(None, 401), ("Bearer wrong", 401), ("key", 401), ("Bearer key", 200)]
)
def test_the_api_key_guards_the_api_and_nothing_else(
    connect: Connect, given: str | None, status: int
) -> None:
    async def ask() -> list[int]:
        headers = {} if given is None else {"authorization": given}
        async with connect(api_key="key") as client:
            answers = [
                await client.get(path, headers=headers) for path in ("/v1/models", "/health", "/metrics")
            ]
            return [a.status_code for a in answers]

    assert asyncio.run(ask()) == [status, 200, 200]


def test_models_and_metrics_tell_the_model_and_its_figures(connect: Connect) -> None:
    async def ask() -> tuple[Any, str]:
        async with connect() as client:
            await client.post("/v1/completions", json={"prompt": "xyz", "max_tokens": 4})
            return (await client.get("/v1/models")).json(), (await client.get("/metrics")).text

    models, metrics = asyncio.run(ask())
    assert models["data"][0]["id"] == "fake" and models["data"][0]["max_model_len"] == 512
    assert 'core_kv_cache_usage_ratio{model_name="fake"} 0.25' in metrics
    assert 'core_prompt_tokens_total{model_name="fake"} 3.0' in metrics
    assert 'core_generation_tokens_total{model_name="fake"} 4.0' in metrics
    assert 'core_request_finished_total{finished_reason="length",model_name="fake"} 1.0' in metrics
    assert 'core_time_to_first_token_seconds_bucket{le="0.1",model_name="fake"} 1.0' in metrics


def test_a_request_that_fails_ends_the_other_prompts_of_its_job(connect: Connect) -> None:
    engine = FakeEngine(pause=0.01)
    answer = post(connect(engine), "/v1/completions", prompt=["x", "y" * 600])
    assert answer.status_code == 400 and not engine.live


def test_log_probabilities_are_written_as_each_endpoint_has_them(connect: Connect) -> None:
    answer = post(connect(), "/v1/completions", prompt="xy", logprobs=1, max_tokens=2).json()
    choice = answer["choices"][0]
    assert choice["logprobs"]["tokens"] == ["a", "b"]
    assert choice["logprobs"]["token_logprobs"] == [-0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"][0] == {"a": -0.5, "!": -1.5}
    assert choice["logprobs"]["text_offset"] == [0, 1]
    chat = post(connect(), "/v1/chat/completions", **CHAT, logprobs=True, top_logprobs=2, max_tokens=1).json()
    content = chat["choices"][0]["logprobs"]["content"]
    assert [c["token"] for c in content] == ["a"] and content[0]["bytes"] == [97]
    assert [t["token"] for t in content[0]["top_logprobs"]] == ["a", "!"]


UNUSED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
"""Fields of the API that cannot change an answer, as the protocol says."""

ANSWERED = {"prompt", "model", "stream", "stream_options", "echo", "return_token_ids"}
"""Fields that are about how an answer is written: tests of answers and of streams hold them."""

REFUSED = {"best_of", "suffix"}
ELSEWHERE = UNUSED | ANSWERED | REFUSED | {"add_special_tokens"}


def test_every_parameter_reaches_the_engine(connect: Connect) -> None:
    engine = FakeEngine()
    sent = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 3,
        "min_tokens": 1,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "logprobs": 2,
        "prompt_logprobs": 1,
        "max_tokens": 5,
        "n": 2,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.2,
    }
    lists = {"stop_token_ids": [4], "allowed_token_ids": [1, 2], "stop": ["s"], "bad_words": ["xy"]}
    lists |= {"bad_words_ids": [(1, 2), (3,)]}
    assert {f.name for f in fields(SamplingParams)} - {*sent, *lists, "logit_bias"} == {"detokenize"}
    extra = {"priority": 2, "cache_salt": "me", "queue_timeout": 3.0, "timeout": 9.0}
    assert CompletionRequest.model_fields.keys() - {*sent, *lists, *extra, "logit_bias"} == ELSEWHERE
    post(connect(engine), "/v1/completions", prompt="x", **sent, **lists, **extra, logit_bias={"5": -1.0})
    _, params, priority, salt, queue_timeout, timeout = engine.asked[0]
    for name, value in sent.items():
        assert getattr(params, name) == value, name
    for name, values in lists.items():
        assert tuple(getattr(params, name)) == tuple(values), name
    assert params.logit_bias == {5: -1.0}
    assert (priority, salt, queue_timeout, timeout) == (2, "me", 3.0, 9.0)


def test_an_echo_has_the_prompts_log_probabilities_before_its_own(connect: Connect) -> None:
    answer = post(connect(), "/v1/completions", prompt="xy", logprobs=1, max_tokens=2, echo=True).json()
    choice = answer["choices"][0]
    assert choice["text"] == "xyab"
    assert choice["logprobs"]["tokens"] == ["x", "y", "a", "b"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.5, -0.5]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_no_tokens_may_be_asked_for(connect: Connect, stream: bool) -> None:
    body = {"prompt": "xy", "logprobs": 1, "max_tokens": 0, "echo": True, "stream": stream}
    response = post(connect(), "/v1/completions", **body)
    parts = [e["choices"][0] for e in events(response)] if stream else response.json()["choices"]
    assert "".join(c["text"] for c in parts) == "xy" and parts[-1]["finish_reason"] == "length"
    assert [t for c in parts for t in c["logprobs"]["tokens"]] == ["x", "y"]
    if not stream:
        assert response.json()["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(("max_tokens", "own"), [(0, []), (1, ["a"])])
def test_prompts_of_token_ids_are_scored_each_by_itself(
    connect: Connect, max_tokens: int, own: list[str]
) -> None:
    prompts = [[120, 121, 122], [119]]
    body = {"prompt": prompts, "echo": True, "logprobs": 1, "temperature": 0, "max_tokens": max_tokens}
    answer = post(connect(), "/v1/completions", **body).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    for choice, prompt in zip(answer["choices"], ["xyz", "w"], strict=True):
        found = choice["logprobs"]
        assert choice["text"] == prompt + "".join(own)
        assert found["tokens"] == [*prompt, *own]
        assert found["token_logprobs"] == [None, *[-0.25] * (len(prompt) - 1), *[-0.5] * len(own)]
        assert found["text_offset"] == list(range(len(prompt) + len(own)))
        assert found["top_logprobs"][0] is None
        pairs = zip(found["tokens"][1:], found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True)
        assert all(top[token] == value for token, value, top in pairs)
    assert answer["usage"]["prompt_tokens"] == 4 and answer["usage"]["completion_tokens"] == 2 * len(own)


def test_a_streamed_echo_sends_the_prompt_first(connect: Connect) -> None:
    body = {"prompt": [120, 121], "echo": True, "stream": True, "logprobs": 0, "max_tokens": 2}
    found = events(post(connect(), "/v1/completions", **body))
    choices = [event["choices"][0] for event in found]
    assert [c["text"] for c in choices] == ["xy", "a", "b"]
    assert [c["logprobs"]["text_offset"] for c in choices] == [[0, 1], [2], [3]]


def test_a_null_is_a_field_that_was_left_out(connect: Connect) -> None:
    engine = FakeEngine()
    nulls = dict.fromkeys(("temperature", "top_p", "n", "presence_penalty", "stop", "seed", "stream"))
    assert post(connect(engine), "/v1/completions", prompt="x", **nulls).status_code == 200
    assert post(connect(engine), "/v1/chat/completions", **CHAT, **nulls).status_code == 200
    assert engine.asked[0][1].temperature == 1.0


def test_what_a_chat_cannot_have_is_refused(connect: Connect) -> None:
    none = post(connect(), "/v1/chat/completions", **CHAT, max_completion_tokens=0, max_tokens=5)
    assert none.status_code == 400 and "max_tokens" in none.json()["error"]["message"]


@pytest.mark.parametrize(
    ("told", "size", "status"), [(100, 100, 200), (101, 15, 413), (None, 100, 200), (None, 101, 413)]
)
def test_a_body_is_measured_by_what_is_told_and_by_what_comes(
    connect: Connect, told: int | None, size: int, status: int
) -> None:
    body = json.dumps({"prompt": "x"}).encode().ljust(size)

    async def chunks() -> AsyncIterator[bytes]:
        for i in range(0, size, 10):
            yield body[i : i + 10]

    async def ask() -> httpx.Response:
        async with connect(max_body_bytes=100) as client:
            headers = {} if told is None else {"content-length": str(told)}
            return await client.post("/v1/completions", content=chunks(), headers=headers)

    answer = asyncio.run(ask())
    assert answer.status_code == status
    assert status == 200 or "larger than 100 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize("length", ["many", "-5", "1e9"])
def test_a_length_that_is_no_number_is_refused(connect: Connect, length: str) -> None:
    async def ask() -> int:
        async with connect() as client:
            headers = {"content-length": length}
            return (
                await client.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
            ).status_code

    assert asyncio.run(ask()) == 413


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("own", "operators", "wanted"),
    [(None, None, None), (None, 3.0, 3.0), (2.0, None, 2.0), (2.0, 3.0, 2.0), (9.0, 3.0, 3.0)],
)
def test_the_operators_time_limit_holds_whatever_a_client_asks(
    connect: Connect, path: str, own: float | None, operators: float | None, wanted: float | None
) -> None:
    engine = FakeEngine()
    body = {"prompt": "x"} if path == "/v1/completions" else CHAT
    answer = post(connect(engine, request_timeout_s=operators), path, **body, timeout=own)
    assert answer.status_code == 200 and engine.asked[0][5] == wanted


@pytest.mark.parametrize("wanted", [True, False])
def test_a_text_gets_special_tokens_unless_told_otherwise(connect: Connect, wanted: bool) -> None:
    engine = FakeEngine()
    post(connect(engine), "/v1/completions", prompt="x", add_special_tokens=wanted)
    post(connect(engine), "/v1/completions", prompt="x")
    assert engine.special == [wanted, True]


def test_each_metric_tells_its_own_figure(monkeypatch: pytest.MonkeyPatch, connect: Connect) -> None:
    names = {
        "num_requests_running": "num_running",
        "num_requests_waiting": "num_waiting",
        "kv_blocks_total": "blocks_total",
        "kv_blocks_used": "blocks_used",
        "kv_blocks_shared": "blocks_shared",
        "kv_blocks_cached": "blocks_cached",
        "steps_total": "steps",
        "scheduled_tokens_total": "scheduled_tokens",
        "cached_prompt_tokens_total": "cached_tokens",
        "preemptions_total": "preemptions",
        "prefix_cache_queries_total": "prefix_query_tokens",
        "prefix_cache_hits_total": "prefix_hit_tokens",
        "prompt_tokens_total": "prompt_tokens",
        "generation_tokens_total": "generated_tokens",
    }
    counted = {f.name for f in fields(EngineMetrics)} - {"finished"}
    assert set(names.values()) == counted, "every figure of the engine has a metric"
    figures = {name: 10 + i for i, name in enumerate(sorted(counted))}
    engine = FakeEngine()
    monkeypatch.setattr(engine, "metrics", lambda: EngineMetrics(finished={"stop": 3, "abort": 5}, **figures))
    text = get(connect(engine), "/metrics").text
    for name, field in names.items():
        assert f'\ncore_{name}{{model_name="fake"}} {figures[field]:.1f}\n' in text
    for reason, number in (("stop", 3), ("abort", 5)):
        labels = f'{{finished_reason="{reason}",model_name="fake"}}'
        assert f"\ncore_request_finished_total{labels} {number:.1f}\n" in text


def test_a_dead_engine_runs_and_holds_nothing(connect: Connect) -> None:
    engine = FakeEngine()
    metrics = [get(connect(engine), "/metrics").text]
    engine.is_alive = False
    metrics.append(get(connect(engine), "/metrics").text)
    rows = zip(metrics, ("1.0", "0.0"), ("25.0", "0.0"), ("0.25", "0.0"), strict=True)
    for text, up, used, share in rows:
        assert f'core_engine_up{{model_name="fake"}} {up}' in text
        assert f'core_kv_blocks_used{{model_name="fake"}} {used}' in text
        assert f'core_kv_cache_usage_ratio{{model_name="fake"}} {share}' in text
        assert 'core_generation_tokens_total{model_name="fake"} 4.0' in text, "what was done stays done"


def test_an_exception_that_nobody_expected_is_an_error_in_json(
    monkeypatch: pytest.MonkeyPatch, connect: Connect
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr("core.server.service.Service._completion_job", broken)
    client = connect()
    client._transport.raise_app_exceptions = False  # type: ignore[attr-defined]
    answer = post(client, "/v1/completions", prompt="x")
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "unexpected ZeroDivisionError: no luck"


def test_a_number_that_json_does_not_have_is_null(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.server.fake.Logprob", lambda value, *rest: Logprob(-math.inf, *rest))
    for stream in (False, True):
        answer = post(connect(), "/v1/completions", prompt="x", logprobs=1, max_tokens=1, stream=stream)
        assert "Infinity" not in answer.text and '"token_logprobs":[null]' in answer.text.replace(" ", "")


@pytest.mark.parametrize("most", [0, 1, 2])
def test_a_chat_has_as_many_of_the_likeliest_tokens_as_were_asked_for(connect: Connect, most: int) -> None:
    answer = post(connect(), "/v1/chat/completions", **CHAT, logprobs=True, top_logprobs=most, max_tokens=2)
    places = answer.json()["choices"][0]["logprobs"]["content"]
    assert [len(place["top_logprobs"]) for place in places] == [most] * 2


def test_what_chats_cannot_be_told_is_refused(connect: Connect) -> None:
    answer = post(connect(), "/v1/chat/completions", **CHAT, parallel_tool_calls=False)
    assert answer.status_code == 400 and "parallel_tool_calls is not supported" in answer.text
