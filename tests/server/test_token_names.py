"""Log-probabilities name each token as no other, and chats tell its true bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from core.engine.outputs import Logprob
from core.server.logprobs import LogprobWriter
from core.tokenizer import Tokenizer, load_tokenizer
from tests.server.conftest import Connect
from tests.server.test_offsets import Speaker
from tests.tokenizer import small


@pytest.fixture(params=[small.byte_level, small.byte_fallback, small.metaspace])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    make: Callable[[], Backend] = request.param
    return load_tokenizer(small.write_folder(tmp_path / "t", make()))


@pytest.fixture
def pieces(tmp_path: Path) -> tuple[Tokenizer, dict[str, int]]:
    """Pieces with spaces inside and raw bytes, and the ids of all."""
    backend = small.byte_fallback()
    return load_tokenizer(small.write_folder(tmp_path / "p", backend)), backend.get_vocab()


def answer(connect: Connect, engine: Speaker, chat: bool) -> dict[str, Any]:
    """The log-probabilities that the endpoint gives."""
    asked: dict[str, Any] = {"prompt": "h", "logprobs": 1}
    if chat:
        asked = {
            "messages": [{"role": "user", "content": "h"}],
            "logprobs": True,
            "top_logprobs": 20,
        }

    async def ask() -> dict[str, Any]:
        async with connect(engine) as client:
            found = await client.post(f"/v1/{'chat/' if chat else ''}completions", json=asked)
            assert found.status_code == 200, found.text
            return dict(found.json()["choices"][0]["logprobs"])

    return asyncio.run(ask())


def templated(tokenizer: Tokenizer) -> Tokenizer:
    object.__setattr__(tokenizer, "chat_template", "{{ messages[0].content }}")
    return tokenizer


def test_no_two_tokens_share_a_key(connect: Connect, tokenizer: Tokenizer) -> None:
    # The last ids are beyond the vocabulary, as logits may be.
    ids = range(tokenizer.vocab_size + 3)
    engine = Speaker(tokenizer, [5], ids)
    found = answer(connect, engine, chat=False)["top_logprobs"][0]
    assert len(found) == len(ids)
    places = [{i: Logprob(-1.0, 1) for i in ids}]
    chat = LogprobWriter(tokenizer).chat([5], places, most=len(ids))
    assert chat is not None and {entry["token"] for entry in chat["content"][0]["top_logprobs"]} == set(found)


def test_names_are_text_where_they_can_be(connect: Connect, pieces: tuple[Tokenizer, dict[str, int]]) -> None:
    tokenizer, vocab = pieces
    raw = vocab["<0x68>"]
    names = ["\u2581he", "he", "é", "<0xC3>", "<0x0A>", small.EOS, "<0x68>", "h"]
    found = answer(connect, Speaker(tokenizer, [vocab[n] for n in names]), chat=False)["tokens"]
    assert found == [" he", "he", "é", "bytes:\\xc3", "\n", small.EOS, f"token_id:{raw}", "h"]


def test_a_chats_bytes_join_to_its_text(connect: Connect, tokenizer: Tokenizer) -> None:
    text = "he é lo日🙂" if tokenizer.is_byte_level or tokenizer.is_byte_fallback(3) else "he lo é"
    ids = tokenizer.encode(text)
    content = answer(connect, Speaker(templated(tokenizer), ids), chat=True)["content"]
    joined = bytes(b for entry in content for b in entry["bytes"])
    assert joined.decode().removeprefix(" ") == text and len(content) == len(ids)


def test_a_token_beyond_the_vocabulary_has_no_bytes(connect: Connect, tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size
    entry = answer(connect, Speaker(templated(tokenizer), [5, size]), chat=True)["content"][1]
    assert (entry["bytes"], entry["token"]) == (None, f"token_id:{size}")
