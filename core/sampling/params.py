"""SamplingParams: what a user may ask of a request's output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf, isfinite, isnan

from core.contract.errors import RequestError

MAX_LOGPROBS = 20
"""Most likely tokens of a position that may be reported."""


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
        min_tokens: the ids that end the output are not drawn before this many tokens.
        logit_bias: added to the logits of these ids, by id; -inf forbids one.
        allowed_token_ids: only these ids are drawn; None = all.
        logprobs: report log-probabilities of each token drawn and of this many most likely ones; None = none.
        prompt_logprobs: the same of the prompt's tokens but the first. Such a request reads no cached prefix.
        include_stop_str_in_output: leave the stop text in the text.
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
    min_tokens: int = 0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
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
        _check("min_tokens", self.min_tokens, self.min_tokens >= 0, "0 or more")
        most = self.max_tokens
        _check(
            "min_tokens",
            self.min_tokens,
            most is None or self.min_tokens <= most,
            f"at most max_tokens, {most}",
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(name, value, value is None or 0 <= value <= MAX_LOGPROBS, f"in [0, {MAX_LOGPROBS}]")
        self._check_ids()
        _check("stop", self.stop, all(self.stop), "made of texts that are not empty")

    def _check_ids(self) -> None:
        if self.logit_bias is not None:
            bias = {int(i): float(value) for i, value in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", bias)
            wrong = [v for v in bias.values() if isnan(v) or v == inf]
            _check("logit_bias", self.logit_bias, not wrong, "made of numbers below infinity")
        if self.allowed_token_ids is not None:
            ids = tuple(dict.fromkeys(int(i) for i in self.allowed_token_ids))
            object.__setattr__(self, "allowed_token_ids", ids)
            _check("allowed_token_ids", ids, bool(ids), "at least one id, or None")

    @property
    def is_plain(self) -> bool:
        """Whether rows of this request need none of what `core.runner.sampling` adds."""
        asked = (self.logit_bias, self.allowed_token_ids, self.logprobs)
        return not self.min_tokens and all(value is None for value in asked)

    def check_ids(self, vocab_size: int, eos_ids: Iterable[int]) -> None:
        """Hold what the parameters say of ids against a vocabulary.

        Raises:
            RequestError: an id is outside it, or no id is left that may be drawn.
        """
        bias, allowed = self.logit_bias or {}, self.allowed_token_ids
        for i in (*bias, *(allowed or ()), *self.stop_token_ids):
            if not 0 <= i < vocab_size:
                raise RequestError(f"a parameter names token id {i}, but the vocabulary has {vocab_size} ids")
        banned = {i for i, value in bias.items() if value == -inf}
        if self.min_tokens:
            banned |= {*eos_ids, *self.stop_token_ids}
        if banned.issuperset(range(vocab_size) if allowed is None else allowed):
            raise RequestError(
                "logit_bias, allowed_token_ids and min_tokens together leave no token to draw; allow one"
            )


def _check(name: str, value: object, held: bool, wanted: str) -> None:
    if not held:
        raise RequestError(f"{name} is {value!r}; it must be {wanted}")
