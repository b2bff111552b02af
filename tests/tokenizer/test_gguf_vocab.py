"""Tokenizers of GGUF files: SentencePiece against its algorithm, pre-tokenizers against published patterns,
and what every kind promises.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import BpeTrainer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from core.contract.errors import ConfigError
from core.tokenizer import load_tokenizer
from core.tokenizer.gguf_pre import PRE_TOKENIZERS
from core.tokenizer.gguf_vocab import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED

from . import small
from .test_tokenizer import texts

TOOL, RUN = "<tool>", SPACE * 3


def pieces() -> list[str]:
    """Tokens of a small vocabulary in the order in which they were merged; single characters come last."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = Replace(" ", SPACE)
    trainer = BpeTrainer(vocab_size=300, show_progress=False)
    tokenizer.train_from_iterator([f"{SPACE}{t}" for t in small.TEXTS * 3], trainer)
    found = tokenizer.get_vocab()
    ordered = sorted(found, key=found.__getitem__)
    return [t for t in ordered if len(t) > 1] + [t for t in ordered if len(t) == 1]


def write(path: Path, **change: Any) -> tuple[list[str], list[float], list[int]]:
    """A file with such a vocabulary; metadata below tokenizer.ggml by name. Gives tokens, scores, kinds."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces(), TOOL, RUN]
    tokens = list(dict.fromkeys(tokens))
    kinds = [
        UNKNOWN
        if i == 0
        else CONTROL
        if i < 3
        else BYTE
        if i < 259
        else USER_DEFINED
        if t in (TOOL, RUN)
        else NORMAL
        for i, t in enumerate(tokens)
    ]
    scores = [0.0 if i < 259 else float(259 - i) for i in range(len(tokens))]
    writer = GGUFWriter(path, change.pop("architecture", "llama"))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    if change.pop("scores", True):
        writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, value in change.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tokens, scores, kinds


def merged(text: str, tokens: list[str], scores: list[float], kinds: list[int]) -> list[int]:
    """SentencePiece as published (Kudo & Richardson, 2018): the best neighbours join until none can; what is
    no token by itself becomes its bytes.
    """
    ordinary = {t: i for i, (t, k) in enumerate(zip(tokens, kinds, strict=True)) if k == NORMAL}
    parts = list(text.replace(" ", SPACE))
    while True:
        joined = [(i, ordinary.get(a + b)) for i, (a, b) in enumerate(pairwise(parts))]
        possible = [(-scores[t], i) for i, t in joined if t is not None]
        if not possible:
            break
        at = min(possible)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    first_byte = tokens.index("<0x00>")
    return [
        i
        for part in parts
        for i in ([ordinary[part]] if part in ordinary else [first_byte + b for b in part.encode()])
    ]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_merges_by_score(tmp_path: Path, prefix: bool) -> None:
    parts = write(tmp_path / "m.gguf", add_space_prefix=prefix, add_bos_token=False)
    found = load_tokenizer(tmp_path / "m.gguf")
    plain = [t for t in texts() if not any(s in t for s in (TOOL, "   ", SPACE))]
    assert len(plain) > 200
    for text in plain:
        wanted = merged(f" {text}" if prefix and text else text, *parts)
        assert found.encode(text) == wanted, text


def test_user_defined_tokens_are_found_whole_and_runs_of_spaces_among_them(tmp_path: Path) -> None:
    tokens, *_ = write(tmp_path / "m.gguf", add_space_prefix=False, add_bos_token=False)
    found = load_tokenizer(tmp_path / "m.gguf")
    for text in (f"fox{TOOL}fox", "fox   fox", f"a{TOOL}   {TOOL}"):
        assert found.decode(found.encode(text)) == text
    assert tokens.index(RUN) in found.encode("fox   fox")
    assert tokens.index(TOOL) in found.encode(f"fox{TOOL}fox")
    assert tokens.index(TOOL) not in found.special_ids


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_eos_token": True}, [1], [2]),
        ({"add_bos_token": False, "add_eos_token": True}, [], [2]),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(
    tmp_path: Path, flags: dict[str, bool], before: list[int], after: list[int]
) -> None:
    write(tmp_path / "m.gguf", **flags)
    found = load_tokenizer(tmp_path / "m.gguf")
    assert found.encode("fox") == [*before, *found.encode("fox", add_special_tokens=False), *after]


def test_special_tokens_in_a_text_are_recognised(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    found = load_tokenizer(tmp_path / "m.gguf")
    assert found.special_ids == {0, 1, 2}
    ids = found.encode("<s>fox</s>", add_special_tokens=False)
    assert ids[0] == 1 and ids[-1] == 2 and found.decode(ids) == "fox"
    assert [found.is_byte_fallback(i) for i in (2, 3, 258, 259)] == [False, True, True, False]


@pytest.mark.parametrize(("architecture", "swallowed"), [("phi3", True), ("llama", False)])
def test_phi3_marks_swallow_the_space_behind_them(tmp_path: Path, architecture: str, swallowed: bool) -> None:
    write(tmp_path / "m.gguf", architecture=architecture)
    found = load_tokenizer(tmp_path / "m.gguf")
    assert (found.encode("</s>\n fox") == found.encode("</s>fox")) is swallowed
    assert found.encode("<s>\n fox") != found.encode("<s>fox")


def test_scores_must_be_there(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", scores=False)
    with pytest.raises(ConfigError, match="0 scores"):
        load_tokenizer(tmp_path / "m.gguf")


def cuts(pre: Any, text: str) -> list[str]:
    """The pieces of a text, as parts of it."""
    return [text[a:b] for _, (a, b) in pre.pre_tokenize_str(text)]


PUBLISHED = sorted(set(PRE_TOKENIZERS) & set(GGUF_PRE_TOKENIZER_SPLITS))


def test_most_pre_tokenizers_have_a_published_pattern() -> None:
    assert {"llama-bpe", "qwen2", "qwen35", "gpt-4o", "tekken", "dbrx", "llama4"} <= set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_texts_are_cut_as_the_published_pattern_cuts_them(name: str) -> None:
    pre = PRE_TOKENIZERS[name].build()
    wanted = Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated")
    extra = ["HelloWorld's iPhone/x//\n\n/", "ÀÉaßẞ", "नमस्ते", "'S'Ll 12345678", "ǅungla"]
    for text in [*texts(), *extra]:
        assert cuts(pre, text) == cuts(wanted, text), text


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("deepseek-v3", "a12345日本語とka!x ?\n", "a|123|45|日本語と|ka|!x| ?\n"),
        ("deepseek-v3", "the  fox's <b>", "the| | fox|'s| <|b|>"),
        ("deepseek-llm", "the fox 123日本!?\n\n  ", "the| fox| |1|2|3|日本|!?|\n|\n|  "),
        # Its range of signs from ":" to "~" holds ASCII's letters, which parts them from others.
        ("deepseek-llm", "Straße Ωμ", "Stra|ß|e| Ωμ"),
        ("deepseek-coder", "the fox, 42\nx", "the| fox|,| |4|2|\n|x"),
    ],
)
def test_deepseek_cuts_letters_signs_digits_and_east_asian_text_apart(
    name: str, text: str, wanted: str
) -> None:
    assert cuts(PRE_TOKENIZERS[name].build(), text) == wanted.split("|")


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A tokenizer by pre-tokenizer's name; "llama" and "gemma" are SentencePiece with and without prefix."""
    folder, found = tmp_path_factory.mktemp("kinds"), {}

    def get(name: str) -> Any:
        if name not in found:
            path = folder / f"{name}.gguf"
            if name in ("llama", "gemma"):
                write(path, add_space_prefix=name == "llama")
            else:
                small.write_gguf(path, name)
            found[name] = load_tokenizer(path)
        return found[name]

    return get


ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=SPACE), max_size=60)
LIKELY = st.lists(st.sampled_from(["fox", " ", "  ", "\n", "é", "日本", "12", "'s", "🙂", "X", "\t"])).map(
    "".join
)


@pytest.mark.parametrize("name", ["llama", "gemma", *PRE_TOKENIZERS])
def test_what_is_encoded_decodes_to_itself(name: str, tokenizer_of: Callable[[str], Any]) -> None:
    found = tokenizer_of(name)

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(ANY | LIKELY)
    def check(text: str) -> None:
        # A prefix is put before every piece between tokens that are found whole, a run of spaces included.
        if name == "llama":
            text = text.replace("   ", "")
        if name in PRE_TOKENIZERS and PRE_TOKENIZERS[name].compose:
            text = unicodedata.normalize("NFC", text)
        assert found.decode(found.encode(text)) == text

    check()


def test_texts_stay_whole_when_decoded_token_by_token(tokenizer_of: Callable[[str], Any]) -> None:
    from core.tokenizer.detokenizer import IncrementalDetokenizer

    rng = random.Random(0)
    for name in ("gemma", "llama", "tekken"):
        found = tokenizer_of(name)
        for text in rng.sample(texts(), 40):
            text = text.replace("   ", "").replace(TOOL, "").replace(small.TOOL, "")
            ids = found.encode(text, add_special_tokens=False)
            stream = IncrementalDetokenizer(found, [], True)
            assert "".join(stream.add([i]) for i in ids) + stream.finish() == found.decode(ids)
