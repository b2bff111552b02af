"""Records around the scheduler: its limits, what a user sees, steps in flight, totals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from core.contract.batch import Int32
from core.scheduler.plan import PromptRow
from core.scheduler.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits and policy.

    Attributes:
        max_requests: request slots, so running sequences at most. max_model_len: prompt and output tokens
            at most.
        max_batch_tokens: tokens in one step at most. max_waiting: waiting sequences at most; None = no limit.
        max_logit_tokens: tokens of a step of which all logits are wanted, at most.
        policy: "fcfs" ignores priorities.
    """

    max_requests: int
    max_model_len: int
    max_batch_tokens: int = 2048
    max_waiting: int | None = None
    max_logit_tokens: int = 1 << 30
    policy: Literal["fcfs", "priority"] = "fcfs"


class TokenLogprobs(NamedTuple):
    """Log-probability and rank of a token, and the most likely ids with theirs."""

    logprob: float
    rank: int
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Event:
    """Something a user sees: a new token (-1 = none), or the end, of a sequence.

    Attributes:
        prompt_logprobs: of the prompt's tokens, None for the first; with the first token of a request that
            asked.
    """

    sequence: Sequence
    token: int
    finished: bool
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


@dataclass(frozen=True)
class InFlight:
    """A submitted step: which slots it computes up to where, and which it samples; epochs tell stale ones.

    Attributes:
        prompts: rows of which the prompt's log-probabilities are wanted, with their slot's epoch.
    """

    step_id: int
    rows: Int32
    row_epochs: Int32
    after: Int32
    samples: Int32
    sample_epochs: Int32
    prompts: tuple[tuple[PromptRow, int], ...] = ()


@dataclass
class Counters:
    """Totals since the start.

    Attributes:
        cached_tokens: prompt tokens found in the prefix cache. prompt_tokens: of all requests queued.
        generated_tokens: accepted ones. finished: sequences by the reason of their end.
    """

    preemptions: int = 0
    scheduled_tokens: int = 0
    steps: int = 0
    cached_tokens: int = 0
    surplus_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
