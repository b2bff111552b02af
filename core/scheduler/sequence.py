"""Request, Sequence and SlotTable: what the scheduler knows of each continuation.

A request has `n` sequences. A running sequence holds a request slot; everything that changes at every step is
kept in arrays indexed by slot, so a step touches all decoding sequences with a few array operations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from core.contract.batch import Int32
from core.sampling.params import SamplingParams


class Status(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asked for; the record that outlives every failure.

    Attributes:
        request_id: unique among live requests.
        prompt_ids: at least one token id.
        eos_ids: ids that end the output unless `params.ignore_eos`.
        seed: 64-bit; drawn by the engine where the user gave none.
        priority: lower runs first under the policy "priority".
        queue_deadline, deadline: clock times by which it must have started, and ended; None = no limit.
        salt, adapter: prefix-cache entries are shared only within equal ones.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    eos_ids: tuple[int, ...] = ()
    seed: int = 0
    priority: int = 0
    arrival: float = 0.0
    queue_deadline: float | None = None
    deadline: float | None = None
    salt: str = ""
    adapter: str = ""


@dataclass(eq=False)
class Sequence:
    """One continuation of a request. Owned by the scheduler.

    Attributes:
        choice: index among the request's continuations. key: (priority, arrival order): lower goes first.
        slot: request slot while it runs, else -1.
        output_ids: tokens accepted so far. cached_tokens: prompt tokens found in the prefix cache at its
            first start.
        forks: continuations that start when this one's prompt is computed.
        prompt_logprobs: TokenLogprobs of prompt tokens by position, as far as they are known.
        finish_reason: "stop", "length", "abort", "deadline" or "error" once finished; stop_reason: the id
            that ended it, or what failed.
    """

    request: Request
    choice: int
    key: tuple[int, int, int]
    slot: int = -1
    status: Status = Status.WAITING
    output_ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    has_started: bool = False
    forks: list[Sequence] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_preemptions: int = 0
    prompt_logprobs: dict[int, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Prompt and accepted output tokens."""
        return len(self.request.prompt_ids) + len(self.output_ids)

    def all_ids(self) -> Int32:
        """Prompt and accepted output, int32 [num_tokens]."""
        return np.array((*self.request.prompt_ids, *self.output_ids), np.int32)


class SlotTable:
    """Arrays indexed by request slot. The scheduler writes them; the batch builder reads them.

    Attributes:
        tokens: int32 [max_requests, max_model_len]: ids known on the host (prompt and accepted output).
        known: how many of them. computed: tokens whose cache entries are submitted. planned: tokens that
            will exist once every submitted step is done. limit: tokens at which the sequence ends.
        confirmed: computed tokens of steps that were waited for.
        epoch: goes up when the slot changes hands, so results of older steps are recognised.
        temperature .. choice: the sampling parameters of the slot's sequence. special: by slot, those
            sequences that have others.
    """

    def __init__(self, max_requests: int, max_model_len: int) -> None:
        self.max_requests = max_requests
        self.tokens: Int32 = np.zeros((max_requests, max_model_len), np.int32)
        self.known: Int32 = np.zeros(max_requests, np.int32)
        self.computed: Int32 = np.zeros(max_requests, np.int32)
        self.planned: Int32 = np.zeros(max_requests, np.int32)
        self.limit: Int32 = np.zeros(max_requests, np.int32)
        self.confirmed: Int32 = np.zeros(max_requests, np.int32)
        self.epoch: Int32 = np.zeros(max_requests, np.int32)
        self.last_step: npt.NDArray[np.int64] = np.zeros(max_requests, np.int64)
        self.temperature: npt.NDArray[np.float32] = np.zeros(max_requests, np.float32)
        self.top_k: Int32 = np.zeros(max_requests, np.int32)
        self.top_p: npt.NDArray[np.float32] = np.ones(max_requests, np.float32)
        self.min_p: npt.NDArray[np.float32] = np.zeros(max_requests, np.float32)
        self.seed: npt.NDArray[np.uint64] = np.zeros(max_requests, np.uint64)
        self.choice: Int32 = np.zeros(max_requests, np.int32)
        self.sequences: list[Sequence | None] = [None] * max_requests
        self.special: dict[int, Sequence] = {}

    def open(self, slot: int, sequence: Sequence, limit: int, computed: int) -> None:
        """Give a slot to a sequence of which `computed` tokens are already in the cache."""
        ids = sequence.all_ids()
        params = sequence.request.params
        self.tokens[slot, : len(ids)] = ids
        self.known[slot] = self.planned[slot] = len(ids)
        self.computed[slot] = self.confirmed[slot] = computed
        self.limit[slot] = limit
        self.temperature[slot] = params.temperature
        self.top_k[slot] = params.top_k
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.seed[slot] = sequence.request.seed
        self.choice[slot] = sequence.choice
        self.last_step[slot] = -1
        self.sequences[slot] = sequence
        if not params.is_plain:
            self.special[slot] = sequence
        sequence.slot = slot

    def close(self, slot: int) -> None:
        """Take the slot from its sequence."""
        sequence = self.sequences[slot]
        if sequence is not None:
            sequence.slot = -1
        self.sequences[slot] = None
        self.special.pop(slot, None)
        self.epoch[slot] += 1
