"""Where a stop text ends an output, and what it has to do with min_tokens and detokenize."""

from __future__ import annotations

import pytest

from core.contract.errors import RequestError
from core.engine.stream import RequestStream, StreamEvent
from core.sampling.params import SamplingParams
from core.scheduler import Request
from core.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer import small

SINGLE_BYTES = 247
TEXT = "abXYcdXYef"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token for each byte."""
    return load_tokenizer(small.write_folder(tmp_path_factory.mktemp("t"), small.byte_level(SINGLE_BYTES)))


def played(tokenizer: Tokenizer, params: SamplingParams, text: str = TEXT) -> tuple[str, int, object]:
    """Text, number of tokens and what stopped it, of an output that says `text` if nothing stops it."""
    request = Request(request_id="r", prompt_ids=(5,), params=params)
    ended: list[int] = []
    stream = RequestStream(request, None, tokenizer, lambda: 0.0, ended.append)
    for i in tokenizer.encode(text):
        stream.take(StreamEvent("r", 0, i))
    stream.take(StreamEvent("r", 0, -1, finish_reason="length"))
    found = stream.output().outputs[0]
    assert (found.finish_reason == "stop") == (found.stop_reason is not None)
    return found.text, len(found.token_ids), found.stop_reason


@pytest.mark.parametrize(
    ("min_tokens", "text", "count"),
    [(0, "ab", 4), (3, "ab", 4), (4, "abXYcd", 8), (7, "abXYcd", 8), (8, TEXT, 10), (10, TEXT, 10)],
)
def test_a_stop_text_that_is_complete_within_min_tokens_ends_nothing(
    tokenizer: Tokenizer, min_tokens: int, text: str, count: int
) -> None:
    params = SamplingParams(stop=("XY",), min_tokens=min_tokens)
    assert played(tokenizer, params) == (text, count, "XY" if text != TEXT else None)


def test_a_long_stop_text_brings_no_short_one_back(tokenizer: Tokenizer) -> None:
    params = SamplingParams(stop=("Y", "cdXYe"), min_tokens=4)
    assert played(tokenizer, params) == ("abXYcdX", 8, "Y")
    assert played(tokenizer, SamplingParams(stop=("b", "cdXYe"), min_tokens=4)) == ("abXY", 9, "cdXYe")


def test_a_stop_text_may_begin_within_min_tokens(tokenizer: Tokenizer) -> None:
    assert played(tokenizer, SamplingParams(stop=("bXY",), min_tokens=3)) == ("a", 4, "bXY")


def test_what_is_held_back_at_the_end_is_no_way_around_min_tokens(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("é")[0]
    for min_tokens, text in ((0, "a"), (2, "a\ufffd")):
        params = SamplingParams(stop=("\ufffd",), min_tokens=min_tokens, max_tokens=2)
        request = Request(request_id="r", prompt_ids=(5,), params=params)
        stream = RequestStream(request, None, tokenizer, lambda: 0.0, lambda choice: None)
        for i in (*tokenizer.encode("a"), half):
            stream.take(StreamEvent("r", 0, i))
        stream.take(StreamEvent("r", 0, -1, finish_reason="length"))
        assert stream.output().outputs[0].text == text


def test_stop_texts_without_text_are_refused() -> None:
    with pytest.raises(RequestError, match="stop has texts, but detokenize is False"):
        SamplingParams(stop="x", detokenize=False)  # type: ignore[arg-type]
    assert SamplingParams(stop_token_ids=(3,), detokenize=False).stop == ()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bad_words": ("\ud800",)}, r"bad_words holds '\\ud800', which is not valid Unicode"),
        ({"stop": ("a\udfff",)}, r"stop holds 'a\\udfff', which is not valid Unicode"),
        ({"stop": (1,)}, "stop holds 1; it must be made of texts"),
        ({"bad_words": ("a", "")}, "bad_words holds ''; it must be made of texts"),
    ],
)
def test_what_is_no_text_is_refused_by_its_own_name(fields: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        SamplingParams(**fields)  # type: ignore[arg-type]
