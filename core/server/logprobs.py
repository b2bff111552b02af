"""Log-probabilities as the API writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from core.engine.outputs import Logprob, RequestOutput
from core.tokenizer import IncrementalDetokenizer, Tokenizer

Json = dict[str, Any]
Found = Sequence[Mapping[int, Logprob] | None]


def _number(value: float) -> float | None:
    """A number as JSON has it, which has no infinite ones."""
    return value if isfinite(value) else None


class LogprobWriter:
    """Writes tokens as text, no two the same.

    Bytes that are no text on their own are written as `bytes:\\xNN`, and a token whose bytes another one has
    too, or that has none (logits may be wider than the vocabulary), as `token_id:N`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Asked here, because it takes a look at every token, and later requests are under way.
        self._shared = tokenizer.shared_ids
        self._texts: dict[int, str] = {}

    def text(self, token: int) -> str:
        """A token's text."""
        found = self._texts.get(token)
        if found is None:
            found = self._texts[token] = self._name(token)
        return found

    def _name(self, token: int) -> str:
        raw = self._tokenizer.token_bytes(token)
        if not raw or token in self._shared:
            return f"token_id:{token}"
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)

    def completion(self, ids: Sequence[int], found: Found, offsets: Sequence[int], start: int = 0) -> Json:
        """Of /v1/completions: parallel lists.

        Args:
            offsets: where each token begins in its own text, in characters.
            start: characters before that text.
        """
        tokens = [self.text(i) for i in ids]
        own = [None if f is None else _number(f[i].logprob) for i, f in zip(ids, found, strict=False)]
        top = [None if f is None else {self.text(i): _number(p.logprob) for i, p in f.items()} for f in found]
        return {
            "tokens": tokens,
            "token_logprobs": own,
            "top_logprobs": top,
            "text_offset": [start + at for at in offsets],
        }

    def prompt(self, output: RequestOutput, text: str) -> Json:
        """The same of the prompt's tokens; the first has none. `text` = the prompt's, as it is shown."""
        ids = output.prompt_token_ids
        return self.completion(ids, output.prompt_logprobs or (), self._prompt_offsets(ids, text))

    def _prompt_offsets(self, ids: Sequence[int], text: str) -> list[int]:
        """Where each token begins in the prompt. A special token that is not in the text takes no room."""
        growing = IncrementalDetokenizer(self._tokenizer, (), skip_special_tokens=False)
        offsets, at = [], 0
        for i in ids:
            begin = at + growing.begin(i)
            offsets.append(min(begin, len(text)))
            shown = self._tokenizer.token_bytes(i).decode("utf-8", "replace")
            if i not in self._tokenizer.special_ids or text.startswith(shown, begin):
                at += len(growing.add([i]))
        return offsets

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
                str(i): {"logprob": _number(p.logprob), "rank": p.rank, "decoded_token": self.text(i)}
                for i, p in f.items()
            }
            for f in found
        ]

    def chat(self, ids: Sequence[int], found: Found | None, most: int) -> Json | None:
        """Of /v1/chat/completions, with the `most` most likely tokens at each place."""
        if found is None:
            return None
        content = []
        for i, f in zip(ids, found, strict=False):
            if f is not None:
                others = [self._entry(j, p) for j, p in f.items() if p.rank and p.rank <= most]
                content.append({**self._entry(i, f[i]), "top_logprobs": others})
        return {"content": content}

    def _entry(self, token: int, found: Logprob) -> Json:
        raw = self._tokenizer.token_bytes(token)
        return {
            "token": self.text(token),
            "logprob": _number(found.logprob),
            "bytes": list(raw) or None,
        }
