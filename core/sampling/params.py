"""SamplingParams: what a user may ask of a request's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from core.contract.errors import RequestError
from core.values import is_number, is_whole

MAX_LOGPROBS = 20
"""Most likely tokens of a position that may be reported."""
MAX_BANS = 1024
"""Sequences of ids that may be banned."""
MAX_BAN_CHARACTERS = 1 << 16
MAX_STOPS, MAX_STOP_CHARACTERS = 64, 1 << 14
"""Each token's text is searched for them."""
MAX_BIAS = 1e30
"""So that a biased logit stays finite in float32, divided by the lowest temperature too."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
"""Beyond these, logits divided by the temperature might leave the range of float32. Lower ones are 0."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a request's tokens are chosen and when it ends. Checked when made.

    Attributes:
        n: continuations of the prompt; each is a sequence of its own.
        temperature: 0 = greedy, as is anything below 1e-6; otherwise, up to 1e6, logits are divided by it.
        top_k: only the k most likely tokens; 0 or -1 = all.
        top_p: only the most likely tokens whose probabilities sum to at least this.
        min_p: only tokens at least this times as likely as the most likely one.
        seed: 64-bit seed; None = one is drawn when the request is added.
        max_tokens: tokens to generate at most; None = up to the maximum model length.
        stop: texts that end the output; they are not part of it. They need `detokenize`.
        stop_token_ids: ids that end the output, besides the model's own.
        ignore_eos: go on after the model's end-of-sequence id.
        min_tokens: the ids that end the output are not drawn before this many tokens, and stop texts that are
            complete by then do not end it.
        presence_penalty: subtracted from the logits of ids that the output has.
        frequency_penalty: the same, times how often it has them.
        repetition_penalty: logits of ids that prompt or output have are divided by this where positive, else
            multiplied by it.
        bad_words: texts that are not generated; `resolved` makes them ids.
        bad_words_ids: sequences of ids that are not generated: the last is not drawn after the others.
        logit_bias: added to the logits of these ids, by id; -inf forbids one.
        allowed_token_ids: only these ids are drawn; None = all.
        logprobs: report log-probabilities of each token drawn and of this many most likely ones; None = none.
        prompt_logprobs: the same of the prompt's tokens but the first. Such a request reads no cached prefix.
        include_stop_str_in_output: leave the stop text in the text.
        detokenize: make text; False leaves `text` empty.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        RequestError: a value is out of range or of another type; names it and what was wanted.
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
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bad_words: tuple[str, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._take_types()
        object.__setattr__(self, "top_k", 0 if self.top_k == -1 else self.top_k)
        if 0 < self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        _check("n", self.n, self.n >= 1, "at least 1")
        _check(
            "temperature",
            self.temperature,
            0 <= self.temperature <= MAX_TEMPERATURE,
            f"in [0, {MAX_TEMPERATURE:g}] (0 = greedy)",
        )
        _check("top_k", self.top_k, 0 <= self.top_k < 2**31, "in [0, 2^31) (0 = all)")
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
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(name, value, -2 <= value <= 2, "in [-2, 2]")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 1e-6 <= penalty <= 1e6, "in [1e-6, 1e6] (1 = none)")
        self._check_lists()

    def _take_types(self) -> None:
        """Every field as its own type: plain numbers and tuples of them, with nothing rounded or read into a
        text.
        """
        for name in ("n", "top_k", "min_tokens", "seed", "max_tokens", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None or name in ("n", "top_k", "min_tokens"):
                object.__setattr__(self, name, _whole(name, value))
        penalties = ("presence_penalty", "frequency_penalty", "repetition_penalty")
        for name in ("temperature", "top_p", "min_p", *penalties):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        for name in ("ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens"):
            value = getattr(self, name)
            _check(name, value, isinstance(value, bool), "True or False")
        for name in ("stop", "bad_words"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        object.__setattr__(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        bans = [_ids("bad_words_ids", ban) for ban in _items("bad_words_ids", self.bad_words_ids)]
        object.__setattr__(self, "bad_words_ids", tuple(dict.fromkeys(bans)))
        if self.allowed_token_ids is not None:
            ids = _ids("allowed_token_ids", self.allowed_token_ids)
            object.__setattr__(self, "allowed_token_ids", tuple(dict.fromkeys(ids)))
        if self.logit_bias is not None:
            given = self.logit_bias
            _check("logit_bias", given, isinstance(given, Mapping), "a mapping of ids to numbers")
            bias = {_whole("logit_bias's id", i): _number("logit_bias", value) for i, value in given.items()}
            object.__setattr__(self, "logit_bias", bias)

    def _check_lists(self) -> None:
        if self.stop and not self.detokenize:
            raise RequestError(
                "stop has texts, but detokenize is False, so there is no text to find them in; use "
                "stop_token_ids, or leave detokenize on"
            )
        if len(self.stop) > MAX_STOPS or sum(map(len, self.stop)) > MAX_STOP_CHARACTERS:
            raise RequestError(
                f"stop has {len(self.stop)} texts of {sum(map(len, self.stop))} characters; it may have "
                f"{MAX_STOPS} of {MAX_STOP_CHARACTERS} in all"
            )
        words, bans = self.bad_words, self.bad_words_ids
        if (count := sum(map(len, words))) > MAX_BAN_CHARACTERS:
            raise RequestError(f"bad_words has {count} characters; it may have {MAX_BAN_CHARACTERS}")
        _check("bad_words_ids", bans, all(bans), "made of sequences that are not empty")
        for name, many in (("bad_words", words), ("bad_words_ids", bans)):
            if len(many) > MAX_BANS:
                raise RequestError(f"{name} has {len(many)} entries; it may have {MAX_BANS}")
        if self.logit_bias is not None:
            wrong = [v for v in self.logit_bias.values() if not (abs(v) <= MAX_BIAS or v == -inf)]
            _check("logit_bias", self.logit_bias, not wrong, f"made of numbers up to {MAX_BIAS:g}, or -inf")
        if self.allowed_token_ids is not None:
            _check("allowed_token_ids", (), bool(self.allowed_token_ids), "at least one id, or None")

    @property
    def is_plain(self) -> bool:
        """Whether rows of this request need none of what `core.runner.sampling` adds."""
        asked = (self.logit_bias, self.allowed_token_ids, self.logprobs)
        changed = self.min_tokens or self.bad_words_ids or self.is_penalized
        return not changed and all(value is None for value in asked)

    @property
    def is_penalized(self) -> bool:
        """Whether a penalty applies."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def is_recurrent(self) -> bool:
        """Whether a draw depends on the tokens drawn before it by more than its logits."""
        return self.is_penalized or any(len(ban) > 1 for ban in self.bad_words_ids)

    def resolved(self, encode: Callable[[str], list[int]]) -> SamplingParams:
        """These parameters with `bad_words` as ids; the original where there is none.

        Each text is banned as it is at the beginning of a text, after a space and after a sign, since it has
        other tokens in each place.

        Args:
            encode: token ids of a text, without special tokens.

        Raises:
            RequestError: a text has no tokens.
        """
        if not self.bad_words:
            return self
        bans = list(self.bad_words_ids)
        for word in self.bad_words:
            texts = (word,) if word[0].isspace() else (word, " " + word)
            found = [tuple(ids) for text in texts if (ids := encode(text))]
            found += _after_a_sign(word, encode)
            if not found:
                raise RequestError(
                    f"the bad word {word!r} has no tokens in this model's vocabulary; leave it out"
                )
            bans += found
        return replace(self, bad_words=(), bad_words_ids=tuple(bans))

    def check_ids(self, vocab_size: int, eos_ids: Iterable[int]) -> None:
        """Hold what the parameters say of ids against a vocabulary.

        Raises:
            RequestError: an id is outside it, or no id is left that may be drawn.
        """
        bias, allowed = self.logit_bias or {}, self.allowed_token_ids
        if self.bad_words:
            raise RequestError(
                "bad_words are texts, but the engine takes ids; use bad_words_ids or `resolved`"
            )
        bans = [i for ban in self.bad_words_ids for i in ban]
        for i in (*bias, *(allowed or ()), *self.stop_token_ids, *bans):
            if not 0 <= i < vocab_size:
                raise RequestError(f"a parameter names token id {i}, but the vocabulary has {vocab_size} ids")
        banned = {i for i, value in bias.items() if value == -inf} | {ban[-1] for ban in self.bad_words_ids}
        if self.min_tokens:
            banned |= {*eos_ids, *self.stop_token_ids}
        if banned.issuperset(range(vocab_size) if allowed is None else allowed):
            raise RequestError(
                "logit_bias, allowed_token_ids, bad words and min_tokens together may leave no token to "
                "draw; allow one more"
            )


_SIGNS = ("(", "\n", '"')


def _after_a_sign(text: str, encode: Callable[[str], list[int]]) -> list[tuple[int, ...]]:
    """The text's ids where it follows a sign without a space; [] where no sign stays a token of its own."""
    for sign in _SIGNS:
        before, ids = encode(sign), encode(sign + text)
        if ids[: len(before)] == before and len(ids) > len(before):
            return [tuple(ids[len(before) :])]
    return []


def _check(name: str, value: object, held: bool, wanted: str) -> None:
    if not held:
        raise RequestError(f"{name} is {value!r:.200}; it must be {wanted}")


def _whole(name: str, value: object) -> int:
    if not is_whole(value):
        raise RequestError(f"{name} is {value!r:.200}; it must be a whole number")
    return int(value)


def _number(name: str, value: object) -> float:
    if not is_number(value):
        raise RequestError(f"{name} is {value!r:.200}; it must be a number")
    return float(value)


def _items(name: str, values: Any) -> tuple[Any, ...]:
    values = () if values is None else values
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise RequestError(f"{name} is {values!r:.200}; it must be a list")
    return tuple(values)


def _ids(name: str, values: object) -> tuple[int, ...]:
    return tuple(_whole(name, i) for i in _items(name, values))


def _texts(name: str, values: Any) -> tuple[str, ...]:
    """One text, several, or None for none."""
    texts = (values,) if isinstance(values, str) else _items(name, values)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise RequestError(f"{name} holds {text!r}; it must be made of texts that are not empty")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{name} holds {text!r}, which is not valid Unicode ({error.reason})"
            ) from None
    return texts
