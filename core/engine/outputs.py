"""What a finished or running request has produced; named as users of other engines know it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RequestMetrics:
    """Times of a request in seconds since it was added (None = not reached), and how it ran.

    Attributes:
        first_token_s: until its first token. total_s: until its end.
    """

    first_token_s: float | None
    total_s: float | None
    num_preemptions: int


@dataclass(frozen=True)
class Logprob:
    """Log-probability of one token at one position; rank 1 = the most likely."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation.

    Attributes:
        finish_reason: "stop", "length", "abort", "deadline", "error"; None while it runs.
        stop_reason: the stop id or text that ended it, or what failed; None for the model's own end of
            sequence.
        logprobs: of each token, by id: the token's and those of the most likely ones; None = not asked for.
        text_offsets: where in the text each token begins, in characters, or the character that its bytes are
            part of; as the text was before a stop text was cut off. None without `logprobs` or text.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    text_offsets: tuple[int, ...] | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum over the tokens; None where log-probabilities were not asked for."""
        if self.logprobs is None:
            return None
        return sum(f[i].logprob for i, f in zip(self.token_ids, self.logprobs, strict=True))


@dataclass(frozen=True)
class RequestOutput:
    """A request and its continuations.

    Attributes:
        prompt: the text, or None where ids were given.
        num_cached_tokens: prompt tokens found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    num_cached_tokens: int
    metrics: RequestMetrics
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
