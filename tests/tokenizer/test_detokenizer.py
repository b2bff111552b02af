"""Streamed text joins to the whole, and never shows half a character."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from core.tokenizer import IncrementalDetokenizer, Tokenizer, load_tokenizer
from core.tokenizer.detokenizer import MAX_HELD, REPLACEMENT
from core.tokenizer.tokenizer import FastTokenizer

from . import small

KINDS = {
    "byte_level": small.byte_level,
    "byte_fallback": small.byte_fallback,
    "metaspace": small.metaspace,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One of each kind of decoder."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return load_tokenizer(small.write_folder(folder, KINDS[request.param]()))


def stream(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool) -> list[str]:
    """What each token gives, and the end."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
    return [*(detokenizer.add([token]) for token in output), detokenizer.finish()]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 450), max_size=40), skip=st.booleans())
def test_any_ids_join_to_their_decoded_text(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    assert "".join(stream(tokenizer, [], ids, skip)) == tokenizer.decode(ids, skip)


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.integers(0, 450), max_size=20),
    prompt=st.lists(st.integers(0, 450), max_size=20),
    skip=st.booleans(),
)
def test_output_continues_the_text_of_the_prompt(
    tokenizer: Tokenizer, ids: list[int], prompt: list[int], skip: bool
) -> None:
    # A prompt that ends within a character leaves it to the output: here it ends with a whole one.
    wholes = [i for i in range(450) if tokenizer.decode([i, i], False) == "oo"]
    whole = next(i for i in wholes if not tokenizer.is_byte_fallback(i))
    prompt = [*prompt, whole]
    text = tokenizer.decode(prompt + ids, skip)
    assert "".join(stream(tokenizer, prompt, ids, skip)) == text[len(tokenizer.decode(prompt, skip)) :]


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="he lo日é🙂🏽\u0301\n", max_size=30), cut=st.integers(0, 40))
def test_valid_text_streams_without_replacement_characters(tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = tokenizer.encode(text)
    if tokenizer.decode(ids) != text:  # this tokenizer cannot spell the text
        return
    deltas = stream(tokenizer, ids[:cut], ids[cut:], True)
    assert "\ufffd" not in "".join(deltas)
    assert text.endswith("".join(deltas))
    assert len("".join(deltas)) >= len(text) - len(tokenizer.decode(ids[:cut]))


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.integers(0, 450), max_size=30), sizes=st.lists(st.integers(0, 5), min_size=1, max_size=30)
)
def test_text_does_not_depend_on_how_many_tokens_come_at_once(
    tokenizer: Tokenizer, ids: list[int], sizes: list[int]
) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, [], True)
    text, at = "", 0
    for size in sizes:
        text += detokenizer.add(ids[at : at + size])
        at += size
    text += detokenizer.add(ids[at:]) + detokenizer.finish()
    assert text == tokenizer.decode(ids)


def test_a_character_of_several_tokens_comes_out_whole(tmp_path: Path) -> None:
    found = load_tokenizer(small.write_folder(tmp_path, small.byte_level()))
    by_byte = {found.token_bytes(i): i for i in range(4, 260)}
    ids = [by_byte[bytes([b])] for b in "x🙂y".encode()]
    assert stream(found, [], ids, True) == ["x", "", "", "", "🙂", "y", ""]
    assert stream(found, [], ids[:3], True) == ["x", "", "", "\ufffd"]
    assert stream(found, ids[:3], ids[3:], True) == ["", "🙂", "y", ""]


def fallback(folder: Path) -> Tokenizer:
    return load_tokenizer(small.write_folder(folder, small.byte_fallback()))


def raw_bytes(*values: int) -> list[int]:
    """Ids of raw bytes in `small.byte_fallback`."""
    return [3 + value for value in values]


def test_each_character_of_a_run_of_bytes_comes_out_when_it_is_complete(tmp_path: Path) -> None:
    found = fallback(tmp_path)
    ids = raw_bytes(*"日é🙂".encode())
    space_he = found.encode("he")[0]
    whole = ["", "", "日", "", "é", "", "", "", "🙂", " he", ""]
    assert stream(found, [space_he], [*ids, space_he], True) == whole
    assert stream(found, [space_he, *ids[:2]], ids[2:5], True) == ["日", "", "é", ""]


def test_bytes_that_form_no_character_leave_those_around_them_alone(tmp_path: Path) -> None:
    found = fallback(tmp_path)
    space_he = found.encode("he")[0]
    ids = [*raw_bytes(*"日".encode(), 0xFF, *"日".encode(), *"日".encode()[:2]), space_he]
    assert found.decode(ids) == "日\ufffd日\ufffd he"
    assert stream(found, [], ids, True) == ["", "", "日", "\ufffd", "", "", "日", "", "", "\ufffd he", ""]
    assert stream(found, [], ids[:-1], True)[-1] == "\ufffd"


_CHARACTERS = st.sampled_from([*"日é🙂ho\u2581", "\ufffd"]).map(lambda c: raw_bytes(*c.encode()))
_RUNS = st.lists(
    st.one_of(
        _CHARACTERS,
        _CHARACTERS.flatmap(lambda ids: st.integers(0, len(ids)).map(lambda n: ids[:n])),
        st.integers(0, 255).map(lambda b: raw_bytes(b)),
        st.integers(0, 275).map(lambda i: [i]),
    ),
    max_size=14,
).map(lambda parts: [i for part in parts for i in part])


def units(tokenizer: Tokenizer, ids: list[int]) -> list[list[int]]:
    """Ids in groups: those of one character, or of bytes that become one U+FFFD; any other token alone."""
    found: list[list[int]] = []
    at = 0
    while at < len(ids):
        end = at
        while end < len(ids) and tokenizer.is_byte_fallback(ids[end]):
            end += 1
        raw = b"".join(tokenizer.token_bytes(i) for i in ids[at:end])
        while raw:
            try:
                size = len(raw.decode()[0].encode())
            except UnicodeDecodeError as e:
                size = len(raw[: e.start].decode()[0].encode()) if e.start else e.end
            found.append(ids[at : at + size])
            at, raw = at + size, raw[size:]
        if at < len(ids):
            found.append(ids[at : at + 1])
            at += 1
    return found


@settings(max_examples=400, deadline=None)
@given(ids=_RUNS, skip=st.booleans())
@example(ids=raw_bytes(0xED, 0xA0), skip=False)
@example(ids=raw_bytes(0xED, 0xA0, 0x80, 0xF4, 0x90), skip=False)
def test_runs_of_bytes_join_to_their_text_and_none_is_kept_back_for_long(
    tokenizer: Tokenizer, ids: list[int], skip: bool
) -> None:
    whole = tokenizer.decode(ids, skip)
    given = stream(tokenizer, [], ids, skip)
    assert "".join(given) == whole
    if not tokenizer.is_byte_fallback(3):
        return
    shown = [i for i in ids if i < tokenizer.vocab_size and not (skip and i in tokenizer.special_ids)]
    detokenizer, text = IncrementalDetokenizer(tokenizer, [], skip), ""
    before: list[int] = []
    for unit in units(tokenizer, shown):
        start = len(tokenizer.decode(before, False))
        for i in unit:
            assert len(text) + detokenizer.begin(i) == start
            text += detokenizer.add([i])
            assert whole.startswith(text)
        before += unit
        is_character = all(map(tokenizer.is_byte_fallback, unit)) and REPLACEMENT not in tokenizer.decode(
            unit
        )
        if is_character or not tokenizer.is_byte_fallback(unit[0]):
            assert text == tokenizer.decode(before, False)
    assert text + detokenizer.finish() == whole


@settings(max_examples=300, deadline=None)
@given(ids=_RUNS)
def test_text_of_bytes_that_are_whole_characters_is_the_packages(
    tokenizer: Tokenizer, ids: list[int]
) -> None:
    assert isinstance(tokenizer, FastTokenizer)
    text = tokenizer.decode(ids)
    if REPLACEMENT not in text:
        assert text == tokenizer.backend.decode(ids)


def test_skipped_and_unknown_tokens_do_not_cost_the_next_one_its_space(tmp_path: Path) -> None:
    found = load_tokenizer(small.write_folder(tmp_path, small.byte_fallback()))
    space_he = found.encode("he")[0]
    for silent in (2, found.vocab_size + 5):
        ids = [space_he, *[silent] * 12, space_he, *[silent] * 12, space_he]
        assert "".join(stream(found, [], ids, True)) == "he he he"
        assert "".join(stream(found, ids, [silent, space_he], True)) == " he"


def test_work_per_token_does_not_grow(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0
    real = FastTokenizer.decode

    def spy(self: FastTokenizer, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        nonlocal decoded
        decoded += len(ids)
        return real(self, ids, skip_special_tokens)

    monkeypatch.setattr(FastTokenizer, "decode", spy)
    # Bytes that form no character are the worst case: there is never a good moment to give text out.
    ids = [next(i for i in range(450) if tokenizer.decode([i], False) == REPLACEMENT)] * 3000
    decoded = 0
    assert "".join(stream(tokenizer, [], ids, True)) == REPLACEMENT * 3000
    assert decoded <= 40 * len(ids)


def test_half_characters_are_held_back_where_tokens_are_decoded_together(tmp_path: Path) -> None:
    backend = small.byte_level(247)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("never there", "")])
    tokenizer = load_tokenizer(small.write_folder(tmp_path / "t", backend))
    assert not tokenizer.is_byte_level and not tokenizer.is_byte_fallback(5)
    ids = tokenizer.encode("é🙂h")
    assert len(ids) == 7, "a token for each byte"
    assert stream(tokenizer, [], ids, True) == ["", "é", "", "", "", "🙂", "h", ""]
    # What never becomes a character comes out all the same, once it is too long to be one.
    wrong = [ids[0]] * (MAX_HELD + 1)
    assert "".join(stream(tokenizer, [], wrong, True)[:-1]) != ""
