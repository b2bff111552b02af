"""Tokenizers read the same ids as their originals, from folders and from GGUF files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from gguf import GGUFWriter
from tokenizers import Regex, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from core.contract.errors import ConfigError, RequestError
from core.tokenizer import load_tokenizer

from . import small


def texts(count: int = 300) -> list[str]:
    """What tokenizers disagree on: digits, runs of spaces, contractions, scripts, spelled specials."""
    rng = random.Random(0)
    parts = [
        "the",
        "12345",
        " ",
        "  ",
        "\n\n",
        "\t",
        "'LL",
        "don't",
        "café",
        "cafe\u0301",
        "日本",
        "🙂🏽",
        "½",
        "Ⅷ",
    ]
    parts += [small.BOS, small.TURN, small.TOOL, "<|", "x = 3.14;", "\r\n", "\u00a0", ",,,\n", "\x00"]
    made = ["".join(rng.choices(parts, k=rng.randint(1, 12))) for _ in range(count)]
    return ["", *small.TEXTS, *made]


@pytest.mark.parametrize("pre", ["default", "gpt-2", "smollm", "starcoder", "llama-bpe", "qwen2"])
def test_a_gguf_vocabulary_cuts_texts_as_its_pre_tokenizer_says(tmp_path: Path, pre: str) -> None:
    found = load_tokenizer(small.write_gguf(tmp_path / "m.gguf", pre, add_bos=False))
    original = small.byte_level()
    if pre in ("smollm", "starcoder"):
        original.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    elif pre == "llama-bpe":
        split = Split(Regex(TikTokenConverter(vocab_file="none").pattern), "isolated")
        original.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    elif pre == "qwen2":
        published = Qwen2Tokenizer(vocab={"a": 0}, merges=[]).backend_tokenizer
        original.normalizer = published.normalizer
        original.pre_tokenizer = published.pre_tokenizer
    for text in texts():
        ids = original.encode(text).ids
        assert found.encode(text) == ids, text
        for skip in (True, False):
            assert found.decode(ids, skip) == original.decode(ids, skip_special_tokens=skip)


def test_a_gguf_without_pre_tokenizer_is_read_as_gpt2(tmp_path: Path) -> None:
    named, unnamed = (small.write_gguf(tmp_path / f"{p}.gguf", p) for p in ("gpt-2", None))
    for text in texts(50):
        assert load_tokenizer(named).encode(text) == load_tokenizer(unnamed).encode(text)


@pytest.mark.parametrize(
    ("pre", "flag", "added"),
    [("smollm", None, False), ("smollm", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_bos_is_added_where_the_file_or_its_family_wants_it(
    tmp_path: Path, pre: str, flag: bool | None, added: bool
) -> None:
    found = load_tokenizer(small.write_gguf(tmp_path / "m.gguf", pre, flag))
    assert (found.encode("the")[:1] == [0]) is added
    assert 0 not in found.encode("the", add_special_tokens=False)


@pytest.mark.parametrize(("pre", "count"), [("llama-bpe", 1), ("gpt-2", 2)])
def test_llama3_takes_a_word_that_no_merge_leads_to(tmp_path: Path, pre: str, count: int) -> None:
    found = load_tokenizer(small.write_gguf(tmp_path / "m.gguf", pre, add_bos=False, words=("zq",)))
    assert len(found.encode("zq")) == count


def test_a_gguf_tells_its_special_tokens(tmp_path: Path) -> None:
    found = load_tokenizer(small.write_gguf(tmp_path / "m.gguf", "smollm"))
    assert (found.bos_token, found.bos_token_id) == (small.BOS, 0)
    assert (found.eos_token, found.eos_token_ids) == (small.EOS, (1, 2))
    assert found.special_ids == {0, 1, 2}
    assert found.vocab_size == len(small.trained()["vocab"])
    assert found.chat_template == "{{ messages }}"
    assert found.encode(small.TOOL) == [3]
    assert found.decode([0, 3, 2]) == small.TOOL
    assert found.decode([0, 3, 2], skip_special_tokens=False) == small.BOS + small.TOOL + small.TURN


@pytest.mark.parametrize(
    ("pre", "kind", "message"), [("smollm", "bert", "kind 'bert'"), ("x", "gpt2", "'x'")]
)
def test_a_gguf_tokenizer_that_is_not_read_is_named(
    tmp_path: Path, pre: str, kind: str, message: str
) -> None:
    path = small.write_gguf(tmp_path / "m.gguf", pre, kind=kind)
    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value) and "tokenizer.json" in str(caught.value)


def test_a_gguf_whose_merges_make_no_token_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    writer.add_token_merges(["a b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="merge 'a b'"):
        load_tokenizer(tmp_path / "m.gguf")


def test_a_folder_reads_as_its_tokenizer_json(tmp_path: Path) -> None:
    original = small.byte_level()
    original.enable_truncation(4)
    original.enable_padding(length=16)
    folder = small.write_folder(tmp_path, original)
    original.no_truncation()
    original.no_padding()
    found = load_tokenizer(folder)
    for text in texts(50):
        ids = original.encode(text).ids
        assert found.encode(text) == ids
        assert found.decode(ids) == original.decode(ids)
    assert (found.bos_token_id, found.bos_token, found.eos_token, found.eos_token_ids) == (None, "", "", ())
    assert found.chat_template is None


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"tokenizer_config": {"eos_token": small.EOS}}, (1,)),
        ({"generation_config": {"eos_token_id": [2, 1]}, "config": {"eos_token_id": 0}}, (2, 1)),
        ({"config": {"eos_token_id": 2}}, (2,)),
        ({"config": {"text_config": {"eos_token_id": 2}}}, (2,)),
        (
            {
                "tokenizer_config": {"eos_token": {"content": small.TURN}},
                "generation_config": {"eos_token_id": [1, 2]},
            },
            (2, 1),
        ),
    ],
)
def test_ends_come_from_tokenizer_and_generation_config(
    tmp_path: Path, files: dict[str, object], ends: tuple[int, ...]
) -> None:
    assert load_tokenizer(small.write_folder(tmp_path, small.byte_level(), **files)).eos_token_ids == ends


def test_a_chat_template_file_goes_before_the_configuration(tmp_path: Path) -> None:
    config = {
        "bos_token": small.BOS,
        "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}],
    }
    folder = small.write_folder(tmp_path, small.byte_level(), tokenizer_config=config)
    assert load_tokenizer(folder).chat_template == "d"
    assert load_tokenizer(folder).bos_token_id == 0
    small.write_folder(tmp_path, small.byte_level(), chat_template={"chat_template": "j"})
    assert load_tokenizer(folder).chat_template == "j"
    (folder / "chat_template.jinja").write_text("f\n")
    assert load_tokenizer(folder).chat_template == "f\n"


def test_a_broken_or_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(tmp_path / "absent.gguf")
    small.write_folder(tmp_path, small.byte_level(), generation_config=[1])
    with pytest.raises(ConfigError, match=r"generation_config\.json holds a list"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_text_and_ids_that_cannot_be_are_the_requests_fault(tmp_path: Path) -> None:
    found = load_tokenizer(small.write_folder(tmp_path, small.byte_level()))
    with pytest.raises(RequestError, match="not valid Unicode"):
        found.encode("a\ud800")
    for wrong in (-1, 2**32):
        with pytest.raises(RequestError, match=str(wrong)):
            found.decode([5, wrong])
    assert found.decode([found.vocab_size, 5]) == found.decode([5])


def test_token_bytes_are_those_of_the_decoded_text(tmp_path: Path) -> None:
    found = load_tokenizer(small.write_folder(tmp_path / "a", small.byte_level()))
    for i in range(found.vocab_size):
        raw = found.token_bytes(i)
        assert raw.decode("utf-8", "replace") == found.decode([i], skip_special_tokens=False)
        assert not found.is_byte_fallback(i)
    assert found.token_bytes(found.vocab_size) == b""
    fallback = load_tokenizer(small.write_folder(tmp_path / "b", small.byte_fallback()))
    assert (found.is_byte_level, fallback.is_byte_level) == (True, False)
    assert [fallback.is_byte_fallback(i) for i in (2, 3, 258, 259)] == [False, True, True, False]


@pytest.mark.sample
def test_the_sample_tokenizer_equals_the_transformers_one_with_its_own_pre_tokenizer(
    sample_model: Path,
) -> None:
    """transformers reads the vocabulary but not this file's `pre`, and so cuts `x  1` in another place."""
    from transformers import AutoTokenizer

    found = load_tokenizer(sample_model)
    theirs = AutoTokenizer.from_pretrained(sample_model.parent, gguf_file=sample_model.name)
    cases = [t.replace(small.BOS, "<|im_start|>").replace(small.TURN, "<|im_end|>") for t in texts()]
    undisputed = [t for t in cases if not any(c.isnumeric() for c in t)]
    assert len(undisputed) > 50
    assert [found.encode(t) for t in undisputed] == [theirs(t).input_ids for t in undisputed]
    theirs.backend_tokenizer.pre_tokenizer = Sequence([Digits(True), ByteLevel(add_prefix_space=False)])
    for text in cases:
        ids = theirs(text).input_ids
        assert found.encode(text) == ids
        assert found.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert found.eos_token_ids == (theirs.eos_token_id,) and found.bos_token_id == theirs.bos_token_id
    assert {found.decode([i], False) for i in found.special_ids} >= set(theirs.all_special_tokens)


def test_accents_are_composed_where_the_vocabulary_was_made_so(tmp_path: Path) -> None:
    found = load_tokenizer(small.write_gguf(tmp_path / "m.gguf", "qwen2"))
    decomposed = normalizers.NFD().normalize_str("café")
    assert decomposed != "café" and found.encode(decomposed) == found.encode("café")
