"""Offsets of tokens are positions in the answer's text, half characters too; streamed and whole alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer as Backend

from core.engine.outputs import RequestOutput
from core.engine.stream import RequestStream, StreamEvent
from core.sampling.params import SamplingParams
from core.scheduler import Request
from core.tokenizer import Tokenizer, load_tokenizer
from tests.server.conftest import Connect
from tests.server.fake import FakeEngine
from tests.server.test_asked_of_prompts import events
from tests.tokenizer import small


class Speaker(FakeEngine):
    """Answers with ids that were laid down, through a real tokenizer; `top` are each one's rivals."""

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int], top: Sequence[int] = ()) -> None:
        super().__init__()
        self.top = tuple(top)
        self.tokenizer = tokenizer  # type: ignore[assignment]
        self.ids = ids

    async def generate(
        self, prompt: str | Sequence[int], params: SamplingParams, **_: Any
    ) -> AsyncGenerator[RequestOutput]:
        """An output for each id."""
        ids = tuple(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        request = Request(request_id="r", prompt_ids=ids, params=params)
        text = prompt if isinstance(prompt, str) else None
        stream = RequestStream(request, text, self.tokenizer, lambda: 0.0, lambda choice: None)
        of_prompt = None if params.prompt_logprobs is None else (None, *[(-0.5, 1, (), ())] * (len(ids) - 1))
        for i in self.ids:
            found = (-1.0, 1, self.top, tuple(-2.0 - k for k in range(len(self.top))))
            stream.take(StreamEvent("r", 0, i, logprobs=found, prompt_logprobs=of_prompt))
            yield stream.output()
            if stream.finished:
                return
        stream.take(StreamEvent("r", 0, -1, finish_reason="length"))
        yield stream.output()


SMALL = 247
"""Ids of special tokens and of single bytes: no merges."""

Load = Callable[[Backend], Tokenizer]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return lambda backend: load_tokenizer(small.write_folder(tmp_path / "t", backend))


def asked(connect: Connect, engine: FakeEngine, **body: Any) -> tuple[str, dict[str, list[Any]]]:
    """Text and log-probabilities of a completion, which streamed must add up to the same."""
    body = {"prompt": "h", "logprobs": 0, **body}

    async def ask(is_streamed: bool) -> httpx.Response:
        async with connect(engine) as client:
            return await client.post("/v1/completions", json={**body, "stream": is_streamed})

    whole = asyncio.run(ask(False)).json()["choices"][0]
    text, found = "", {name: [] for name in whole["logprobs"]}
    for event in events(asyncio.run(ask(True))):
        text += event["choices"][0]["text"]
        for name, values in event["choices"][0]["logprobs"].items():
            found[name] += values
    assert (text, found) == (whole["text"], whole["logprobs"])
    return text, found


@pytest.mark.parametrize("backend", [small.byte_level, small.byte_fallback, small.metaspace])
def test_each_token_of_a_text_stands_where_its_offset_says(
    connect: Connect, load: Load, backend: Callable[[], Backend]
) -> None:
    tokenizer = load(backend())
    ids = tokenizer.encode("hello heé hello lo" if backend is small.metaspace else "heé日x 🙂 hello")
    text, found = asked(connect, Speaker(tokenizer, ids))
    offsets = found["text_offset"]
    assert offsets == sorted(offsets) and offsets[0] == 0 and len(offsets) == len(ids) > 5
    for token, at in zip(found["tokens"], offsets, strict=True):
        is_part = token.startswith(("bytes:", "\ufffd"))
        assert is_part or text.startswith(token.replace("\u2581", " ").strip(), at) or text[at] == " "


def test_all_tokens_of_one_character_stand_where_it_stands(connect: Connect, load: Load) -> None:
    tokenizer = load(small.byte_fallback())
    ids = tokenizer.encode("日日h")[-7:]
    text, found = asked(connect, Speaker(tokenizer, ids), prompt="lo")
    assert (text, found["text_offset"]) == ("日日h", [0, 0, 0, 1, 1, 1, 2])
    tokenizer = load(small.byte_level(SMALL))
    ids = tokenizer.encode("é日x")
    text, found = asked(connect, Speaker(tokenizer, ids))
    assert (text, found["text_offset"]) == ("é日x", [0, 0, 1, 1, 1, 2])
    assert found["tokens"][0] == "bytes:\\xc3"


def test_an_echo_counts_from_the_prompts_text(connect: Connect, load: Load) -> None:
    tokenizer = load(small.byte_level(SMALL))
    prompt = f"é{small.TURN}h"
    ids = tokenizer.encode("日h")
    text, found = asked(connect, Speaker(tokenizer, ids), prompt=prompt, echo=True)
    own = len(prompt)
    assert text == prompt + "日h"
    assert found["text_offset"] == [0, 0, 1, own - 1, own, own, own, own + 1]
    begin = [tokenizer.bos_token_id or 0, *tokenizer.encode(prompt)]
    text, found = asked(connect, Speaker(tokenizer, ids), prompt=begin, echo=True)
    shift = len(small.BOS)
    assert text.startswith(small.BOS) and found["text_offset"][:3] == [0, shift, shift]


def test_a_stop_text_that_is_cut_leaves_its_tokens_where_they_stood(connect: Connect, load: Load) -> None:
    tokenizer = load(small.byte_level(SMALL))
    text, found = asked(connect, Speaker(tokenizer, tokenizer.encode("abENDx")), stop="END")
    assert (text, found["text_offset"]) == ("ab", [0, 1, 2, 3, 4])


def test_what_shows_nothing_takes_no_room(connect: Connect, load: Load) -> None:
    tokenizer = load(small.byte_level(SMALL))
    ids = tokenizer.encode(f"a{small.TURN}b")
    assert asked(connect, Speaker(tokenizer, ids))[1]["text_offset"] == [0, 1, 1]
    shown = asked(connect, Speaker(tokenizer, ids), skip_special_tokens=False)
    assert shown[1]["text_offset"] == [0, 1, 1 + len(small.TURN)]


def test_a_token_behind_a_run_of_bytes_begins_behind_its_text(connect: Connect, load: Load) -> None:
    tokenizer = load(small.byte_fallback())
    ids = tokenizer.encode("he日 heo")
    text, found = asked(connect, Speaker(tokenizer, ids), prompt="lo")
    assert (text, found["text_offset"]) == (" he日 heo", [0, 3, 3, 3, 4, 7])
    begun = [*ids[:3], *ids[4:]]
    text, found = asked(connect, Speaker(tokenizer, begun), prompt="lo")
    assert (text, found["text_offset"]) == (" he\ufffd heo", [0, 3, 3, 4, 7])


def test_a_token_behind_a_character_that_was_left_begins_behind_its_sign(
    connect: Connect, load: Load
) -> None:
    tokenizer = load(small.byte_level(SMALL))
    first, _, x = tokenizer.encode("éx")
    text, found = asked(connect, Speaker(tokenizer, [first, x, first, first, x]))
    assert (text, found["text_offset"]) == ("\ufffdx\ufffd\ufffdx", [0, 1, 2, 3, 4])
