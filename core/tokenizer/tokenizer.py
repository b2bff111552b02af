"""Tokenizer: what the engine needs of one, and its form over the tokenizers package."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from core.contract.errors import RequestError
from core.weights.kinds import is_gguf, not_a_model


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer. Immutable; may be used by several threads."""

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text, or None."""

    @property
    def bos_token(self) -> str:
        """Its text, "" without one; likewise `eos_token`."""

    @property
    def eos_token(self) -> str:
        """Text of the first of `eos_token_ids`, or ""."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end generation; the first is the main one."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a model's logits may be wider."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out when it skips special tokens."""

    @property
    def chat_template(self) -> str | None:
        """The model's Jinja template, or None."""

    @property
    def tool_template(self) -> str | None:
        """The template for conversations with tools, where the model has one of its own."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. Special tokens that are spelled out in it are recognised.

        Args:
            add_special_tokens: add what the model wants around a text (such as BOS). False for text that a
            chat template made: it has them already.

        Raises:
            RequestError: the text is not valid Unicode (lone surrogates).
        """

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids. Bytes that form no character become U+FFFD, one for as many as begin one, and leave
        their neighbours alone; ids outside the vocabulary give nothing.

        Raises:
            RequestError: an id is negative or does not fit 32 bits.
        """

    @property
    def is_byte_level(self) -> bool:
        """Whether a text is its tokens' bytes joined, wherever they stand; else neighbours matter (a space
        that begins a text is dropped, say, and bytes are text only in whole characters).
        """

    @property
    def shared_ids(self) -> frozenset[int]:
        """Ids whose bytes another token has too: all such but one, which is no raw byte where that can be,
        and else the lowest.
        """

    def token_bytes(self, token_id: int) -> bytes:
        """The token's own bytes, which need not be whole characters; b"" outside the vocabulary.

        A raw byte (`is_byte_fallback`) is that byte, a piece of a text its UTF-8 with the space that it
        begins with, a special token its name.
        """

    def is_byte_fallback(self, token_id: int) -> bool:
        """Whether the token is one raw byte, which becomes text together with such neighbours."""


def load_tokenizer(path: str | Path, *, or_bytes: bool = False) -> Tokenizer:
    """The tokenizer of a model folder or of a .gguf file.

    Args:
        or_bytes: for a folder that has a config.json and no tokenizer, one whose ids are bytes.

    Raises:
        ConfigError: the path is no model, or its tokenizer is missing, cannot be read, is of a kind that is
        not known, or has more tokens than the model's embedding.
        WeightError: the .gguf file is broken.
    """
    path = Path(path)
    if path.is_dir() or (or_bytes and path.is_file() and path.suffix == ".json"):
        from core.tokenizer.folder import from_folder

        return from_folder(path, or_bytes=or_bytes)
    if is_gguf(path):
        from core.tokenizer.gguf_vocab import from_gguf

        return from_gguf(path)
    raise not_a_model(path)


@dataclass(frozen=True)
class FastTokenizer:
    """A `tokenizers.Tokenizer` with the facts that it does not hold itself."""

    backend: Any
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    chat_template: str | None
    tool_template: str | None = None

    @property
    def bos_token(self) -> str:
        """See `Tokenizer`."""
        return self._text_of(self.bos_token_id)

    @property
    def eos_token(self) -> str:
        """See `Tokenizer`."""
        return self._text_of(next(iter(self.eos_token_ids), None))

    @cached_property
    def vocab_size(self) -> int:
        """See `Tokenizer`."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """See `Tokenizer`."""
        return frozenset(i for i, t in self.backend.get_added_tokens_decoder().items() if t.special)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """See `Tokenizer`."""
        try:
            return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except (UnicodeEncodeError, TypeError) as e:
            raise RequestError(f"the text is not valid Unicode ({e}); send it as UTF-8") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """See `Tokenizer`."""
        try:
            tokens = self._mended(ids, skip_special_tokens) if self._has_byte_fallback else None
            if tokens is not None:
                return str(self.backend.decoder.decode(tokens))
            return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))
        except OverflowError:
            raise RequestError(
                f"token ids run from {min(ids)} to {max(ids)}; they must be in [0, {self.vocab_size})"
            ) from None

    @cached_property
    def is_byte_level(self) -> bool:
        """See `Tokenizer`."""
        return [d["type"] for d in self._decoders] == ["ByteLevel"]

    @cached_property
    def shared_ids(self) -> frozenset[int]:
        """See `Tokenizer`."""
        owner: dict[bytes, int] = {}
        others: list[int] = []
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            raw = self._bytes(token)
            before = owner.setdefault(raw, i)
            if before != i:
                owner[raw], other = sorted((before, i), key=lambda t: (self.is_byte_fallback(t), t))
                others.append(other)
        return frozenset(others)

    def token_bytes(self, token_id: int) -> bytes:
        """See `Tokenizer`."""
        token = self.backend.id_to_token(token_id)
        return b"" if token is None else self._bytes(token)

    def is_byte_fallback(self, token_id: int) -> bool:
        """See `Tokenizer`."""
        return self._is_raw_byte(self.backend.id_to_token(token_id) or "")

    @cached_property
    def _decoders(self) -> tuple[Mapping[str, Any], ...]:
        """The decoder's steps, as tokenizer.json has them."""
        found = json.loads(self.backend.decoder.__getstate__()) if self.backend.decoder is not None else {}
        return tuple(found.get("decoders", [found] if found else []))

    @cached_property
    def _has_byte_fallback(self) -> bool:
        return any(d["type"] == "ByteFallback" for d in self._decoders)

    def _mended(self, ids: Sequence[int], skip_special_tokens: bool) -> list[str] | None:
        """The tokens with U+FFFD in place of bytes that form no character; None where there are none.

        By itself the package makes U+FFFD of all the bytes of a run, if one of them is wrong: characters
        that were there before it, and that a stream has given out, would be gone.
        """
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        found = [self.backend.id_to_token(i) for i in ids if i not in skipped]
        tokens: list[str] = []
        mended = False
        for is_raw, run in groupby((t for t in found if t is not None), self._is_raw_byte):
            kept = list(run)
            while is_raw and kept:
                try:
                    bytes(int(t[3:5], 16) for t in kept).decode()
                    break
                except UnicodeDecodeError as e:
                    tokens += [*kept[: e.start], REPLACEMENT]
                    kept, mended = kept[e.end :], True
            tokens += kept
        return tokens if mended else None

    def _is_raw_byte(self, token: str) -> bool:
        return self._has_byte_fallback and _BYTE_TOKEN.fullmatch(token) is not None

    def _bytes(self, token: str) -> bytes:
        """The decoder's work on one token, without what it does to a text's beginning or to whole words."""
        for step in self._decoders:
            kind = step["type"]
            if kind == "ByteLevel":
                try:
                    return bytes([_BYTES[c] for c in token])
                except KeyError:
                    # A character outside the alphabet: such a token stands for itself.
                    continue
            if kind == "ByteFallback" and _BYTE_TOKEN.fullmatch(token):
                return bytes([int(token[3:5], 16)])
            if kind == "Metaspace":
                token = token.replace(step["replacement"], " ")
            elif kind == "Replace" and "String" in step["pattern"]:
                token = token.replace(step["pattern"]["String"], step["content"])
        return token.encode()

    def _text_of(self, token_id: int | None) -> str:
        return "" if token_id is None else str(self.backend.id_to_token(token_id) or "")


REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _byte_alphabet() -> dict[str, int]:
    """Character to byte, in GPT-2's alphabet: printable Latin-1 stands for itself, and the other bytes, in
    order, for the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTES = _byte_alphabet()
BYTE_LETTERS = tuple(sorted(_BYTES, key=_BYTES.__getitem__))
"""The letter that stands for each byte."""
