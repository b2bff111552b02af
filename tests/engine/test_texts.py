"""RequestStream: from tokens to text, as the request asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from core.contract.errors import RequestError
from core.engine.stream import RequestStream, StreamEvent
from core.sampling.params import SamplingParams
from core.scheduler import Request
from core.tokenizer import IncrementalDetokenizer, Tokenizer, load_tokenizer
from tests.tokenizer.small import byte_level, write_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("small")
    write_folder(folder, byte_level(300))
    return load_tokenizer(folder)


def told(tokenizer: Tokenizer, ids: Sequence[int], **params: object) -> tuple[str, str | None, int]:
    """Text, stop reason and tokens of a request that drew these ids, until it was ended."""
    wanted = SamplingParams(max_tokens=len(ids), **params)  # type: ignore[arg-type]
    request = Request(request_id="r", prompt_ids=(5,), params=wanted)
    ended: list[int] = []
    stream = RequestStream(request, None, tokenizer, lambda: 0.0, ended.append)
    for i in ids:
        stream.take(StreamEvent("r", 0, i))
    assert ended == ([0] if stream.finished else [])
    stream.take(StreamEvent("r", 0, -1, finish_reason="length"))
    output = stream.output().outputs[0]
    reason = None if output.stop_reason is None else str(output.stop_reason)
    return output.text, reason, len(output.token_ids)


def single(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text in tokens of one byte each."""
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    return [by_bytes[bytes([b])] for b in text.encode()]


def test_special_tokens_are_left_out_or_shown(tokenizer: Tokenizer) -> None:
    special = min(tokenizer.special_ids)
    ids = [*single(tokenizer, "a"), special, *single(tokenizer, "b")]
    shown = tokenizer.decode([special], skip_special_tokens=False)
    assert told(tokenizer, ids)[0] == "ab"
    assert told(tokenizer, ids, skip_special_tokens=False)[0] == f"a{shown}b" != "ab"


def test_without_detokenizing_there_is_no_text(tokenizer: Tokenizer) -> None:
    ids = single(tokenizer, "abc")
    assert told(tokenizer, ids, detokenize=False) == ("", None, 3)
    with pytest.raises(RequestError, match="stop has texts, but detokenize is False"):
        SamplingParams(stop=("b",), detokenize=False)


@pytest.mark.parametrize(
    ("min_tokens", "expected"),
    [
        (0, ("a", "bc", 3)),
        (2, ("a", "bc", 3)),
        (3, ("abca", "bc", 6)),
        (5, ("abca", "bc", 6)),
        (6, ("abcabcbb", None, 8)),
    ],
)
def test_a_stop_text_that_is_complete_before_the_least_number_of_tokens_ends_nothing(
    tokenizer: Tokenizer, min_tokens: int, expected: tuple[str, str | None, int]
) -> None:
    ids = single(tokenizer, "abcabcbb")
    assert told(tokenizer, ids, stop=("bc",), min_tokens=min_tokens) == expected


def test_a_stop_text_may_begin_before_the_least_number_of_tokens(tokenizer: Tokenizer) -> None:
    assert told(tokenizer, single(tokenizer, "abcd"), stop=("bcd",), min_tokens=3) == ("a", "bcd", 4)


class Pieces:
    """A tokenizer whose tokens have no text of their own: ids are bytes, and only a run of them is text."""

    vocab_size = 256
    is_byte_level = False
    special_ids: frozenset[int] = frozenset()

    def is_byte_fallback(self, token: int) -> bool:
        return False

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", "replace")


def test_no_half_character_is_given_out() -> None:
    text = "x日🙂y"
    stream = IncrementalDetokenizer(Pieces(), (), True)  # type: ignore[arg-type]
    given = [stream.add([b]) for b in text.encode()]
    assert given == ["x", "", "", "日", "", "", "", "🙂", "y"] and stream.finish() == ""


def test_of_stop_texts_that_one_token_completes_the_earliest_counts(tokenizer: Tokenizer) -> None:
    pairs = (i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) > 1)
    token = next(i for i in pairs if tokenizer.token_bytes(i).isalpha())
    first, *_, last = tokenizer.token_bytes(token).decode()
    assert first != last
    for stop in ((first, last), (last, first)):
        assert told(tokenizer, [*single(tokenizer, "."), token], stop=stop) == (".", first, 2)


def test_an_output_that_ends_within_a_character_shows_that_it_does(tokenizer: Tokenizer) -> None:
    ids = single(tokenizer, "aé")
    assert told(tokenizer, ids[:2]) == ("a\ufffd", None, 2)
    assert told(tokenizer, ids) == ("aé", None, 3)
