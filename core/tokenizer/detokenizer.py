"""IncrementalDetokenizer: tokens in, text out, never half a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from core.tokenizer.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
# Tokens of the prompt that decide how the output's first token looks (a space before it or not).
CONTEXT = 4
# A character has at most 4 bytes, so what stays unfinished for longer never was one.
MAX_HELD = 8


class IncrementalDetokenizer:
    """Text of a growing sequence; constant work per token on average.

    What `add` and then `finish` return, joined, is the text of the whole sequence after that of the prompt.
    A character that the prompt leaves unfinished belongs to the output.

    Args:
        prompt_ids: what the output follows; may be empty.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._vocab_size = tokenizer.vocab_size
        self._stream: _Bytes | _Window
        if tokenizer.is_byte_level:
            self._stream = _Bytes(tokenizer)
            self._stream.add(self._last(prompt_ids, MAX_HELD))
        else:
            count = CONTEXT
            context = self._last(prompt_ids, count)
            while len(context) == count and tokenizer.is_byte_fallback(context[0]):
                count *= 2
                context = self._last(prompt_ids, count)
            self._stream = _Window(tokenizer, context)

    def add(self, token_ids: Iterable[int]) -> str:
        """Text that these tokens complete; "" while a character is unfinished."""
        return self._stream.add([t for t in token_ids if self._shows(t)])

    def num_held(self) -> int:
        """Characters that are whole and held back all the same: the next token begins after them."""
        return self._stream.num_held()

    def finish(self) -> str:
        """What was held back: bytes that form no character come out as U+FFFD. Nothing may be added after."""
        return self._stream.finish()

    def _shows(self, token: int) -> bool:
        # Logits may be wider than the vocabulary: such ids have no text.
        return token not in self._skip and 0 <= token < self._vocab_size

    def _last(self, ids: Sequence[int], count: int) -> list[int]:
        """The last `count` of `ids` that show in the text, in order."""
        found: list[int] = []
        for i in range(len(ids) - 1, -1, -1):
            if len(found) == count:
                break
            if self._shows(ids[i]):
                found.append(int(ids[i]))
        return found[::-1]


class _Bytes:
    """For tokenizers whose tokens are bytes wherever they stand."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(self._tokenizer.token_bytes(i) for i in ids))

    def num_held(self) -> int:
        return 0

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Window:
    """For all others: decode the last tokens again, since a token's text depends on those before it.

    The window is what was given out last, as context, and what is held back.
    """

    def __init__(self, tokenizer: Tokenizer, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = context
        self._given = len(context)
        self._text = self._decode(context).rstrip(REPLACEMENT)

    def add(self, ids: Sequence[int]) -> str:
        self._ids += ids
        if not ids:
            return ""
        # A run of raw bytes becomes text as a whole: one wrong byte spoils all of them.
        if self._tokenizer.is_byte_fallback(ids[-1]):
            return ""
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT) and len(self._ids) - self._given < MAX_HELD:
            return ""
        return self._give(text)

    def num_held(self) -> int:
        # The bytes of a character that has begun spoil the run of whole ones before them.
        for end in range(len(self._ids), max(self._given, len(self._ids) - 4), -1):
            text = self._decode(self._ids[:end])
            if not text.endswith(REPLACEMENT):
                return max(0, len(text) - len(self._text))
        return 0

    def finish(self) -> str:
        return self._give(self._decode(self._ids))

    def _give(self, text: str) -> str:
        new = text[len(self._text) :]
        self._ids = self._ids[self._given :] or self._ids
        self._given = len(self._ids)
        self._text = self._decode(self._ids)
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        # Tokens without text were left out before: dropping them here would move the window's start.
        return self._tokenizer.decode(ids, skip_special_tokens=False)
