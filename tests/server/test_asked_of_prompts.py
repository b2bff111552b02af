"""What is asked of the prompt and of token ids is answered, whole and streamed; names of chat templates."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.server.conftest import Connect
from tests.server.fake import FakeEngine

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
IDS = {"completions": [120, 121], "chat/completions": [ord(c) for c in "<user>hi<assistant>"]}
BODY: dict[str, dict[str, Any]] = {"completions": {"prompt": "xy"}, "chat/completions": CHAT}


def post(client: httpx.AsyncClient, path: str, **body: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with client:
            return await client.post(f"/v1/{path}", json=body)

    return asyncio.run(ask())


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def holder(path: str, answer: Any, index: int = 0) -> Any:
    """The part of an answer or event that tells of the prompt: a choice, or for chats all of it."""
    return answer["choices"][index] if path == "completions" else answer


@pytest.mark.parametrize("path", BODY)
@pytest.mark.parametrize("echo", [False, True])
def test_what_is_asked_of_the_prompt_comes_with_the_whole_and_with_the_first_event(
    connect: Connect, path: str, echo: bool
) -> None:
    body = {**BODY[path], "prompt_logprobs": 1, "return_token_ids": True, "max_tokens": 3}
    if path == "completions":
        body["echo"] = echo
    else:
        body["n"] = 2
    whole = holder(path, post(connect(), path, **body).json())
    assert whole["prompt_token_ids"] == IDS[path]
    found = whole["prompt_logprobs"]
    assert found[0] is None and len(found) == len(IDS[path])
    assert [list(entry) for entry in found[1:]] == [[str(i)] for i in IDS[path][1:]]
    told = events(post(connect(), path, **body, stream=True))
    assert {name: holder(path, told[0])[name] for name in ("prompt_token_ids", "prompt_logprobs")} == {
        name: whole[name] for name in ("prompt_token_ids", "prompt_logprobs")
    }
    for event in told[1:]:
        assert not {"prompt_token_ids", "prompt_logprobs"} & holder(path, event).keys()


def test_each_choice_of_a_stream_of_completions_tells_of_its_own_prompt_once(connect: Connect) -> None:
    body = {"prompt": ["x", "yz"], "n": 2, "return_token_ids": True, "stream": True, "max_tokens": 2}
    found: dict[int, list[list[int]]] = {}
    for event in events(post(connect(), "completions", **body)):
        choice = event["choices"][0]
        if "prompt_token_ids" in choice:
            found.setdefault(choice["index"], []).append(choice["prompt_token_ids"])
    assert found == {0: [[120]], 1: [[120]], 2: [[121, 122]], 3: [[121, 122]]}


@pytest.mark.parametrize("path", BODY)
@pytest.mark.parametrize("is_asked", [True, False])
def test_token_ids_come_with_what_they_belong_to(connect: Connect, path: str, is_asked: bool) -> None:
    body = {**BODY[path], "max_tokens": 4, **({"return_token_ids": True} if is_asked else {})}
    whole = post(connect(), path, **body).json()["choices"][0]
    told = [event["choices"][0] for event in events(post(connect(), path, **body, stream=True))]
    if not is_asked:
        assert all("token_ids" not in choice for choice in [whole, *told])
        return
    assert whole["token_ids"] == [97, 98, 99, 100]
    with_text = [c for c in told if c.get("text") or c.get("delta", {}).get("content")]
    assert [c["token_ids"] for c in with_text] == [[97], [98], [99], [100]]


def rendered(connect: Connect, template: str, **body: Any) -> str:
    """The prompt that a chat becomes; what is refused is the error's sentence."""
    engine = FakeEngine()
    engine.tokenizer.chat_template = template
    answer = post(connect(engine), "chat/completions", **CHAT, **body)
    if answer.status_code != 200:
        assert answer.status_code == 400 and not engine.asked
        return str(answer.json()["error"]["message"])
    return "".join(map(chr, engine.asked[0][0]))  # type: ignore[arg-type]


def test_a_clients_names_reach_the_template(connect: Connect) -> None:
    documents = "{% for d in documents or ['none'] %}[{{ d }}]{% endfor %}"
    assert rendered(connect, documents) == "[none]"
    assert rendered(connect, documents, chat_template_kwargs={"documents": ["a", "b"]}) == "[a][b]"
    opening = "x{% if add_generation_prompt %}<go>{% endif %}"
    assert rendered(connect, opening) == "x<go>"
    assert rendered(connect, opening, add_generation_prompt=False) == "x"
    assert rendered(connect, opening, chat_template_kwargs={"add_generation_prompt": False}) == "x"
    effort = "x{{ reasoning_effort }}"
    assert rendered(connect, effort, reasoning_effort="low") == "xlow"


def test_tools_reach_the_template_that_is_made_for_them(connect: Connect) -> None:
    tools = [{"type": "function", "function": {"name": "clock"}}]
    shown = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}."
    assert rendered(connect, shown, tools=tools) == "clock."
    assert rendered(connect, shown) == "."
    engine = FakeEngine()
    engine.tokenizer.chat_template, engine.tokenizer.tool_template = "plain", "with tools"
    for body in ({"tools": tools}, {}):
        assert post(connect(engine), "chat/completions", **CHAT, **body).status_code == 200
    assert ["".join(map(chr, asked[0])) for asked in engine.asked] == ["with tools", "plain"]  # type: ignore[arg-type]


@pytest.mark.parametrize("is_asked", [True, False])
def test_usage_grows_with_the_stream_where_it_is_asked_for(connect: Connect, is_asked: bool) -> None:
    options = {"include_usage": True, "continuous_usage_stats": is_asked}
    body = {**BODY["completions"], "max_tokens": 3, "stream": True, "stream_options": options}
    *told, last = events(post(connect(), "completions", **body))
    counts = [event["usage"]["completion_tokens"] for event in told if event.get("usage")]
    assert counts == ([1, 2, 3] if is_asked else [])
    assert last["usage"]["completion_tokens"] == 3 and last["choices"] == []


@pytest.mark.parametrize("path", BODY)
@pytest.mark.parametrize("num_cached", [0, 2])
def test_usage_tells_what_was_cached_of_all_prompts(connect: Connect, path: str, num_cached: int) -> None:
    body = {**BODY[path], **({"prompt": ["xyz", "xyw"]} if path == "completions" else {})}
    whole = post(connect(FakeEngine(num_cached=num_cached)), path, **body).json()["usage"]
    wanted = num_cached * (2 if path == "completions" else 1)
    assert whole["prompt_tokens_details"] == {"cached_tokens": wanted}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    assert events(post(connect(FakeEngine(num_cached=num_cached)), path, **body))[-1]["usage"] == whole


def test_a_model_that_has_only_a_template_for_tools_takes_chats_with_tools(connect: Connect) -> None:
    tools = [{"type": "function", "function": {"name": "clock"}}]
    engine = FakeEngine()
    engine.tokenizer.chat_template, engine.tokenizer.tool_template = None, "with tools"
    assert post(connect(engine), "chat/completions", **CHAT, tools=tools).status_code == 200
    refused = post(connect(engine), "chat/completions", **CHAT)
    assert refused.status_code == 400 and "no chat template" in refused.text
    assert len(engine.asked) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"chat_template_kwargs": {"messages": []}}, "'messages' cannot be given"),
        ({"chat_template_kwargs": {"tools": []}}, "'tools' cannot be given"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "'bos_token' cannot be given"),
        (
            {"add_generation_prompt": True, "chat_template_kwargs": {"add_generation_prompt": False}},
            "add_generation_prompt is True, but False in chat_template_kwargs",
        ),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}},
            "reasoning_effort is 'low', but 'high'",
        ),
    ],
)
def test_a_name_that_is_set_elsewhere_is_refused(connect: Connect, body: dict[str, Any], words: str) -> None:
    assert words in rendered(connect, "x", **body)
