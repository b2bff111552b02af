"""SamplingParams: what a user may ask of a request's output."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from core.contract.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a request's tokens are chosen and when it ends. Checked when made.

    Attributes:
        n: continuations of the prompt; each is a sequence of its own.
        temperature: 0 = greedy; otherwise logits are divided by it.
        top_k: only the k most likely tokens; 0 or -1 = all.
        top_p: only the most likely tokens whose probabilities sum to at least this.
        min_p: only tokens at least this times as likely as the most likely one.
        seed: 64-bit seed; None = one is drawn when the request is added.
        max_tokens: tokens to generate at most; None = up to the maximum model length.
        stop: texts that end the output; they are not part of it.
        stop_token_ids: ids that end the output, besides the model's own.
        ignore_eos: go on after the model's end-of-sequence id.
        detokenize: make text; False leaves `text` empty.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        RequestError: a value is out of range; names it and the range.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "top_k", 0 if self.top_k == -1 else self.top_k)
        _check("n", self.n, self.n >= 1, "at least 1")
        _check(
            "temperature", self.temperature, isfinite(self.temperature) and self.temperature >= 0, "0 or more"
        )
        _check("top_k", self.top_k, self.top_k >= 0, "0 or more (0 = all)")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        _check("seed", self.seed, self.seed is None or 0 <= self.seed < 2**64, "in [0, 2^64)")
        _check("max_tokens", self.max_tokens, self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        _check("stop", self.stop, all(self.stop), "made of texts that are not empty")


def _check(name: str, value: object, held: bool, wanted: str) -> None:
    if not held:
        raise RequestError(f"{name} is {value!r}; it must be {wanted}")
