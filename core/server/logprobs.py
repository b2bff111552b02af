"""Log-probabilities as the API writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from core.engine.outputs import Logprob, RequestOutput
from core.tokenizer import IncrementalDetokenizer, Tokenizer

Json = dict[str, Any]
Found = Sequence[Mapping[int, Logprob] | None]


class Offsets:
    """Where each token begins in the text of an answer, in characters.

    A token that is a part of a character only begins where that character does.

    Args:
        before: ids that the tokens follow. hides_special: special tokens have no place in the text.
        start: characters of text before the first token.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], hides_special: bool, start: int) -> None:
        self._stream = IncrementalDetokenizer(tokenizer, before, hides_special)
        self._at = start

    def of(self, ids: Sequence[int]) -> list[int]:
        """The offsets of the next tokens."""
        found = []
        for i in ids:
            found.append(self._at)
            self._at += len(self._stream.add([i]))
        return found


class LogprobWriter:
    """Writes tokens as text; bytes that are no text on their own as `bytes:\\xNN`, so that none are lost."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def text(self, token: int) -> str:
        """A token's text."""
        found = self._texts.get(token)
        if found is None:
            raw = self._tokenizer.token_bytes(token)
            if raw is None:
                found = self._tokenizer.decode([token], skip_special_tokens=False)
            else:
                try:
                    found = raw.decode()
                except UnicodeDecodeError:
                    found = "bytes:" + "".join(f"\\x{b:02x}" for b in raw)
            self._texts[token] = found
        return found

    def completion(self, ids: Sequence[int], found: Found, offsets: Offsets) -> Json:
        """Of /v1/completions: parallel lists."""
        tokens = [self.text(i) for i in ids]
        own = [None if f is None else f[i].logprob for i, f in zip(ids, found, strict=False)]
        top = [None if f is None else {self.text(i): p.logprob for i, p in f.items()} for f in found]
        return {"tokens": tokens, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets.of(ids)}

    def prompt(self, output: RequestOutput, is_text: bool) -> Json:
        """The same of the prompt's tokens; the first has none. `is_text`: it was not given as token ids."""
        offsets = Offsets(self._tokenizer, (), is_text, 0)
        return self.completion(output.prompt_token_ids, output.prompt_logprobs or (), offsets)

    def joined(self, first: Json, second: Json) -> Json:
        """Prompt and output in one."""
        return {name: [*first[name], *second[name]] for name in first}

    def plain(self, found: Found | None) -> list[Json | None] | None:
        """Prompt log-probabilities by token id, with ranks."""
        if found is None:
            return None
        return [
            None
            if f is None
            else {
                str(i): {"logprob": p.logprob, "rank": p.rank, "decoded_token": self.text(i)}
                for i, p in f.items()
            }
            for f in found
        ]

    def chat(self, ids: Sequence[int], found: Found | None) -> Json | None:
        """Of /v1/chat/completions."""
        if found is None:
            return None
        content = []
        for i, f in zip(ids, found, strict=False):
            if f is not None:
                others = [self._entry(j, p) for j, p in f.items()]
                content.append({**self._entry(i, f[i]), "top_logprobs": others})
        return {"content": content}

    def _entry(self, token: int, found: Logprob) -> Json:
        raw = self._tokenizer.token_bytes(token)
        return {
            "token": self.text(token),
            "logprob": found.logprob,
            "bytes": None if raw is None else list(raw),
        }
