"""A token's bytes are its own whatever the tokenizer's kind, and those of several join to their text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders

from core.tokenizer import Tokenizer, load_tokenizer

from . import small, test_folder, test_gguf_vocab

KINDS: dict[str, Callable[[Path], Path]] = {
    "tokenizer.json of bytes": lambda path: small.write_folder(path, small.byte_level()),
    "tokenizer.json of pieces and bytes": lambda path: small.write_folder(path, small.byte_fallback()),
    "GGUF of bytes": lambda path: small.write_gguf(path.with_suffix(".gguf"), "gpt-2"),
    "GGUF of pieces and bytes": lambda path: gguf_of_pieces(path.with_suffix(".gguf")),
    "tokenizer.model": lambda path: test_folder.write_model(path, test_folder.pieces()),
    "tekken.json": test_folder.write_tekken,
    "vocab.json": lambda path: test_folder.write_vocab(path, "Qwen2Tokenizer"),
}


def gguf_of_pieces(path: Path) -> Path:
    test_gguf_vocab.write(path)
    return path


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def found(kind: str, tmp_path: Path) -> Tokenizer:
    return load_tokenizer(KINDS[kind](tmp_path / "m"))


def test_bytes_of_several_tokens_join_to_their_text(found: Tokenizer) -> None:
    whole = "helo é he 日本🙂🏽🐙\u3042 he o"
    ids = found.encode(whole, add_special_tokens=False)
    assert any(len(found.token_bytes(i)) == 1 and found.token_bytes(i)[0] >= 0x80 for i in ids)
    # A space that the tokenizer itself put before the text is a part of the first token.
    assert b"".join(map(found.token_bytes, ids)).decode().removeprefix(" ") == whole == found.decode(ids)


def test_special_tokens_have_their_names_and_ids_beyond_the_vocabulary_nothing(found: Tokenizer) -> None:
    for i in found.special_ids:
        assert found.token_bytes(i).decode() == found.decode([i], skip_special_tokens=False)
    assert found.token_bytes(found.vocab_size) == b""


def test_every_byte_has_a_token_and_no_two_that_are_not_told_share_theirs(found: Tokenizer) -> None:
    shared = found.shared_ids
    own = [found.token_bytes(i) for i in range(found.vocab_size) if i not in shared]
    assert len(set(own)) == len(own) and set(own) >= {found.token_bytes(i) for i in shared}
    wanted = {bytes([b]) for b in range(256)}
    assert wanted <= set(own)


def test_a_raw_byte_gives_way_to_the_piece_of_the_same_text(tmp_path: Path) -> None:
    found = load_tokenizer(small.write_folder(tmp_path / "m", small.byte_fallback()))
    vocab = small.byte_fallback().get_vocab()
    assert found.shared_ids == {vocab[f"<0x{ord(c):02X}>"] for c in " helo"}
    assert found.token_bytes(vocab["<0x68>"]) == found.token_bytes(vocab["h"]) == b"h"
    assert found.token_bytes(vocab["\u2581he"]) == b" he" != found.token_bytes(vocab["he"])


def test_of_tokens_spelled_in_two_ways_the_first_has_its_text(tmp_path: Path) -> None:
    backend = small.byte_level()
    size = backend.get_vocab_size()
    # A space is no letter of the byte alphabet, so it stands for itself.
    backend.add_tokens([AddedToken(" ", normalized=False)])
    found = load_tokenizer(small.write_folder(tmp_path / "m", backend))
    assert found.token_bytes(size) == b" " and found.shared_ids == {size}


def test_spaces_are_spaces_where_only_the_decoder_says_so(tmp_path: Path) -> None:
    backend = small.metaspace()
    vocab = backend.get_vocab()
    found = load_tokenizer(small.write_folder(tmp_path / "m", backend))
    assert found.token_bytes(vocab["\u2581he"]) == b" he"
    # Nothing makes bytes of these names here.
    assert found.token_bytes(vocab["<0x68>"]) == b"<0x68>" and not found.is_byte_fallback(vocab["<0x68>"])


def test_bytes_are_told_where_tokens_are_decoded_together(tmp_path: Path) -> None:
    backend = small.byte_level()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    found = load_tokenizer(small.write_folder(tmp_path / "m", backend))
    assert not found.is_byte_level
    assert b"".join(map(found.token_bytes, found.encode("é日x"))).decode() == "é日x"
