"""Folders without tokenizer.json: SentencePiece models, tekken.json, vocab.json with merges.txt."""

from __future__ import annotations

import base64
import json
import random
import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from core.contract.errors import ConfigError
from core.tokenizer import load_tokenizer
from core.tokenizer.gguf_pre import PRE_TOKENIZERS
from core.tokenizer.tokenizer import BYTE_LETTERS

from . import small

SPACE = "\u2581"
PARTS = (
    *("the", "12345", " ", "  ", "\n\n", "\t", "don't", "café", "日本", "🙂🏽", "½", "x = 3.14;"),
    *("\r\n", ",,,\n", "   ", "HelloWorld", "aaaa"),
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def texts(count: int = 200) -> list[str]:
    rng = random.Random(0)
    return ["", *("".join(rng.choices(PARTS, k=rng.randint(1, 9))) for _ in range(count))]


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    found = b""
    while value > 0x7F:
        found += bytes([value & 0x7F | 0x80])
        value >>= 7
    return found + bytes([value])


def field(number: int, value: int | float | bytes | str) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    raw = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(raw)) + raw


Piece = tuple[str, float, int]


def pieces() -> list[Piece]:
    """Special tokens, bytes, characters, and merges from a text, the first ones scoring highest."""
    words = " ".join((*small.TEXTS, *PARTS)).replace(" ", SPACE)
    found: list[Piece] = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    found += [(f"<0x{b:02X}>", 0.0, BYTE) for b in range(256)]
    characters = sorted({c for c in words if c.isascii() or c in "é日" + SPACE} - set("=;"))
    pairs = [words[i : i + 2] for i in range(0, 120, 3)] + ["aa", "aaaa", SPACE + "t", "th", SPACE * 2]
    longer = ["the", SPACE + "the", "Hello", SPACE * 3]
    made = list(dict.fromkeys(p for p in (*pairs, *longer) if set(p) <= set(characters)))
    found += [(p, -1.0 - i, NORMAL) for i, p in enumerate(made)]
    return found + [(c, -500.0 - i, NORMAL) for i, c in enumerate(characters)]


def write_model(folder: Path, found: list[Piece], prefixed: bool = True, kind: int = 2) -> Path:
    """tokenizer.model, with fields that a reader must pass over."""
    folder.mkdir(exist_ok=True)
    body = b""
    for piece, score, piece_kind in found:
        body += field(
            1, field(1, piece) + field(2, score) + (field(3, piece_kind) if piece_kind != 1 else b"")
        )
    trainer = field(1, "input.txt") + field(3, kind) + field(10, 0.5) + field(35, 1)
    trainer += field(40, 0) + field(41, 1) + field(42, 2) + field(43, -1)
    body += field(2, trainer) + field(3, field(1, "identity") + field(3, int(prefixed)) + field(4, 0))
    (folder / "tokenizer.model").write_bytes(body)
    return folder


def merged(text: str, found: list[Piece], prefixed: bool) -> list[int]:
    """SentencePiece's BPE by its definition: join the pair that scores highest, the leftmost first."""
    scores = {piece: score for piece, score, kind in found if kind == NORMAL}
    ids = {piece: i for i, (piece, _, _) in enumerate(found)}
    symbols = list((SPACE if prefixed and text else "") + text.replace(" ", SPACE))
    while True:
        pairs = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    made: list[int] = []
    for s in symbols:
        made += [ids[s]] if s in ids else [ids[f"<0x{b:02X}>"] for b in s.encode()]
    return made


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_sentencepiece_model_merges_by_score_and_falls_back_to_bytes(
    tmp_path: Path, prefixed: bool
) -> None:
    found = load_tokenizer(write_model(tmp_path / "m", pieces(), prefixed))
    for text in texts():
        assert found.encode(text) == [1, *merged(text, pieces(), prefixed)], text
        assert found.decode(found.encode(text)) == text
    assert (found.bos_token, found.eos_token, found.eos_token_ids) == ("<s>", "</s>", (2,))
    assert found.special_ids == {0, 1, 2} and found.encode("a</s>")[-1] == 2


def test_added_tokens_and_flags_come_from_the_configuration(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", pieces())
    n = len(pieces())
    config = {
        "add_bos_token": False,
        "add_eos_token": True,
        "eos_token": "<|end|>",
        "added_tokens_decoder": {
            "0": {"content": "<unk>", "special": True},
            "1": {"content": "<s>", "special": True},
            "2": {"content": "</s>", "special": True, "rstrip": True},
            str(n): {"content": "<|end|>", "special": True, "rstrip": True},
            str(n + 1): {"content": "<|tool|>", "special": False},
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    found = load_tokenizer(folder)
    assert found.eos_token_ids == (n,) and found.special_ids == {0, 1, 2, n}
    assert found.encode("<|end|>  \n<|tool|>", False) == [n, n + 1]
    assert found.encode("aa")[0] != 1 and found.encode("aa")[-1] == n
    config["added_tokens_decoder"] = {str(n + 5): {"content": "x|"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"'x\|' comes to id {n}, but {n + 5} is wanted"):
        load_tokenizer(folder)


def test_older_folders_list_added_tokens_in_a_file_of_their_own(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", pieces())
    n = len(pieces())
    (folder / "added_tokens.json").write_text(json.dumps({"<b>": n + 1, "<a>": n}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<a>"]}))
    found = load_tokenizer(folder)
    assert found.encode("<a><b>", False) == [n, n + 1]
    assert found.special_ids == {0, 1, 2, n}


@pytest.mark.parametrize(("legacy", "count"), [(True, 2), (False, 1)])
def test_what_follows_a_special_token_gets_a_space_in_older_models(
    tmp_path: Path, legacy: bool, count: int
) -> None:
    folder = write_model(tmp_path / "m", pieces())
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    found = load_tokenizer(folder)
    text = "".join(found.backend.id_to_token(i) for i in found.encode("the</s>the", False))
    assert text.count(SPACE) == count


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x0a\xff", "truncated"),
        (b"", "it has no pieces"),
        (b"\x0f" * 20, "no SentencePiece model"),
        (b"IQ== 0\nIg== 1\n", "table of ranks"),
        (field(1, field(1, "a")) + field(2, field(3, 1)), "of kind unigram"),
        (field(1, field(1, 5)), "no SentencePiece model"),
        (field(1, b"\x0a\x02\xff\xff"), "no SentencePiece model"),
    ],
)
def test_a_file_that_is_no_sentencepiece_bpe_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.model") in str(caught.value) and "tokenizer.json" in str(caught.value)


def byte_tokens() -> list[bytes]:
    """Tokens by rank: the bytes, then what a small BPE learned."""
    model = small.trained()
    values = {letter: i for i, letter in enumerate(BYTE_LETTERS)}
    skipped = (small.BOS, small.EOS, small.TURN, small.TOOL)
    names = [t for t in sorted(model["vocab"], key=model["vocab"].__getitem__) if t not in skipped]
    return [bytes(values[c] for c in name) for name in names]


def by_rank(piece: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """Join the pair whose result has the lowest rank until there is none."""
    symbols = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in ranks]
        if not pairs:
            return [ranks[s] for s in symbols]
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def write_tekken(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokens = byte_tokens()
    rules = {"default_vocab_size": len(tokens) + 20, "default_num_special_tokens": 20}
    vocab = [{"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate(tokens)]
    # More than the sizes say: the rest is not used.
    vocab.append({"rank": len(tokens), "token_bytes": base64.b64encode(b"never used").decode()})
    pattern = PRE_TOKENIZERS["tekken"].cuts[0]
    found = {"config": {"pattern": pattern, **rules}, "vocab": vocab[::-1], **changes}
    (folder / "tekken.json").write_text(json.dumps(found))
    return folder


def test_tekken_merges_by_rank_after_its_special_tokens(tmp_path: Path) -> None:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    found = load_tokenizer(write_tekken(tmp_path / "m"))
    ranks = {t: i for i, t in enumerate(byte_tokens())}
    split = Split(Regex(PRE_TOKENIZERS["tekken"].cuts[0]), "isolated")
    for text in texts():
        cut = [piece for piece, _ in split.pre_tokenize_str(text)]
        wanted = [20 + i for piece in cut for i in by_rank(piece.encode(), ranks)]
        assert found.encode(text) == [1, *wanted], text
        assert found.decode(found.encode(text)) == text
    assert found.encode("[INST]a[/INST]", False)[::2] == [3, 4]
    assert (found.bos_token, found.eos_token, found.eos_token_ids) == ("<s>", "</s>", (2,))
    assert found.vocab_size == 20 + len(ranks)


def test_tekken_lists_its_special_tokens_since_its_later_versions(tmp_path: Path) -> None:
    names = ["<unk>", "<s>", "</s>", "[THINK]"]
    special = [{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(names)]
    found = load_tokenizer(write_tekken(tmp_path / "m", special_tokens=special))
    assert found.encode("[THINK]", False) == [3] and len(found.special_ids) == 20
    write_tekken(tmp_path / "m", vocab=[{"rank": 0}])
    with pytest.raises(ConfigError, match=r"tekken\.json is not Mistral's table of tokens"):
        load_tokenizer(tmp_path / "m")


def write_vocab(folder: Path, kind: str | None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    model = small.trained()
    special = (small.BOS, small.EOS, small.TURN, small.TOOL)
    names = [t for t in sorted(model["vocab"], key=model["vocab"].__getitem__) if t not in special]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(names)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **config}))
    return folder


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer"])
def test_vocab_and_merges_read_as_the_class_cuts_texts(tmp_path: Path, kind: str) -> None:
    n = len(small.trained()["vocab"]) - 4
    added = {str(n): {"content": small.EOS, "special": True}, str(n + 1): {"content": "<tag>"}}
    folder = write_vocab(tmp_path / "m", kind, eos_token=small.EOS, added_tokens_decoder=added)
    found = load_tokenizer(folder)
    name = "gpt-2" if kind.startswith("GPT2") else "qwen2"
    other = load_tokenizer(small.write_gguf(tmp_path / "m.gguf", name, add_bos=False))
    for text in texts():
        # The same vocabulary after four special tokens.
        assert [i + 4 for i in found.encode(text)] == other.encode(text)
        assert found.decode(found.encode(text)) == other.decode(other.encode(text))
    assert found.encode(small.EOS + "<tag>") == [n, n + 1]
    assert found.eos_token_ids == (n,) and found.special_ids == {n}


def test_a_class_that_is_not_known_and_a_missing_half_are_named(tmp_path: Path) -> None:
    folder = write_vocab(tmp_path / "m", "OtherTokenizerFast")
    with pytest.raises(ConfigError, match="class is OtherTokenizer, but from vocab"):
        load_tokenizer(folder)
    write_vocab(folder, "GPT2Tokenizer")
    (folder / "merges.txt").unlink()
    with pytest.raises(ConfigError, match=r"merges\.txt cannot be read"):
        load_tokenizer(folder)
    write_vocab(folder, "GPT2Tokenizer")
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 2}))
    with pytest.raises(ConfigError, match="ids from 0 on"):
        load_tokenizer(folder)


@pytest.mark.parametrize("write", [write_model, write_tekken])
def test_more_tokens_than_the_embedding_has_rows_are_refused(tmp_path: Path, write: Any) -> None:
    folder = write(tmp_path / "m", pieces()) if write is write_model else write(tmp_path / "m")
    size = load_tokenizer(folder).vocab_size
    for config in ({"vocab_size": size}, {"vocab_size": 3, "text_config": {"vocab_size": size}}):
        (folder / "config.json").write_text(json.dumps(config))
        load_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": size - 1}))
    with pytest.raises(ConfigError, match=rf"with id {size - 1}, but the embedding .* has {size - 1} rows"):
        load_tokenizer(folder)


def test_added_tokens_may_lie_beyond_the_embedding_but_not_the_ends(tmp_path: Path) -> None:
    tokenizer = small.byte_level()
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<image>"])
    folder = small.write_folder(tmp_path / "m", tokenizer, config={"vocab_size": size})
    assert load_tokenizer(folder).encode("<image>") == [size]
    small.write_folder(folder, tokenizer, tokenizer_config={"eos_token": "<image>"})
    with pytest.raises(ConfigError, match=f"'<image>' with id {size}"):
        load_tokenizer(folder)


def test_tools_may_have_a_template_of_their_own(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    folder = small.write_folder(tmp_path / "m", small.byte_level(), tokenizer_config={"chat_template": named})
    found = load_tokenizer(folder)
    assert (found.chat_template, found.tool_template) == ("d", "t")
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("u")
    (folder / "chat_template.jinja").write_text("e")
    found = load_tokenizer(folder)
    assert (found.chat_template, found.tool_template) == ("e", "u")


def test_bytes_stand_in_only_where_there_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 300, "eos_token_id": 7}))
    found = load_tokenizer(tmp_path, or_bytes=True)
    assert found.encode("é<258>") == [0xC3, 0xA9, *b"<258>"]
    assert found.decode([0xC3, 0xA9, 258]) == "é<258>" and found.vocab_size == 300
    assert found.eos_token_ids == (7,)
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    small.write_folder(tmp_path, small.byte_level(), config={"vocab_size": 500})
    assert load_tokenizer(tmp_path, or_bytes=True).encode(small.BOS) == [0]
