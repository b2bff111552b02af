"""IncrementalDetokenizer: tokens in, text out, never half a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from core.tokenizer.tokenizer import REPLACEMENT, Tokenizer

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

    def begin(self, token_id: int) -> int:
        """Where the text of a token will begin, counted in characters from the end of what was given out so
        far, if the token is added next. One that goes on with an unfinished character begins where that does.
        """
        return self._stream.begin(token_id) if self._shows(token_id) else 0

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

    def begin(self, token_id: int) -> int:
        return _chars_before(self._decoder.getstate()[0], self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Window:
    """For all others: decode the last tokens again, since a token's text depends on those before it.

    The window is the tokens that were given out last, as context, and those that are held back.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        whole = len(prompt) - self._num_unfinished(prompt)
        self._context, self._held = prompt[:whole], prompt[whole:]
        self._text = self._decode(self._context)
        if self._context and self._is_part(self._context[-1]):
            self._text = self._text.rstrip(REPLACEMENT)

    def add(self, ids: Sequence[int]) -> str:
        self._held += ids
        whole = len(self._held) - self._num_unfinished(self._held)
        if not whole or not ids:
            return ""
        text = self._decode(self._context + self._held[:whole])
        if text.endswith(REPLACEMENT) and whole < MAX_HELD and self._is_part(self._held[whole - 1]):
            return ""
        return self._give(text, whole)

    def begin(self, token_id: int) -> int:
        held = b"".join(self._tokenizer.token_bytes(i) for i in self._held)
        return _chars_before(held, self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._give(self._decode(self._context + self._held), len(self._held))

    def _give(self, text: str, count: int) -> str:
        new = text[len(self._text) :]
        self._context, self._held = self._held[:count] or self._context, self._held[count:]
        self._text = self._decode(self._context)
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        # Tokens without text were left out before: dropping them here would move the window's start.
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _num_unfinished(self, ids: Sequence[int]) -> int:
        """How many raw bytes at the end have begun a character that further ones may complete."""
        raw = b""
        for i in reversed(ids[-3:]):
            if not self._tokenizer.is_byte_fallback(i):
                return 0
            raw = self._tokenizer.token_bytes(i) + raw
            if not 0x80 <= raw[0] < 0xC0:
                return len(raw) if _is_begun(raw) else 0
        return 0

    def _is_part(self, token_id: int) -> bool:
        """Whether a token that is no raw byte has bytes that are no whole characters."""
        if self._tokenizer.is_byte_fallback(token_id):
            return False
        try:
            self._tokenizer.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            return True
        return False


def _chars_before(held: bytes, token: bytes) -> int:
    """Characters of `held` before the one in which `token`, which follows, begins."""
    for size in (3, 2, 1):
        end = held[-size:]
        if len(end) == size and _is_begun(end) and _goes_on(end + token[:1]):
            return len(held[:-size].decode(errors="replace"))
    return len(held.decode(errors="replace"))


def _goes_on(raw: bytes) -> bool:
    """Whether bytes are a character or the beginning of one."""
    # Python's decoder waits for the third byte of a surrogate, though no character begins so.
    if raw[:1] == b"\xed" and raw[1:2] >= b"\xa0":
        return False
    try:
        codecs.utf_8_decode(raw, "strict", False)
    except UnicodeDecodeError:
        return False
    return True


def _is_begun(raw: bytes) -> bool:
    """Whether bytes are the beginning of a character that lacks some."""
    return _goes_on(raw) and codecs.utf_8_decode(raw, "strict", False)[1] == 0
