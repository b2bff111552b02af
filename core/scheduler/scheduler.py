"""What runs in the next step.

Each call of `schedule` takes decode rows first, then chunks of prompts that have begun, then waiting
sequences, within the token and request budgets and the rules that the backend declares. `update` takes the
tokens of the oldest step in flight.
Between the two a sequence is planned ahead: `planned` counts tokens that submitted steps will produce, so the
next step can be scheduled while the last one runs. A step's results are kept only for sequences whose slot
has not changed hands since.

When blocks run out, the sequence that is last by (priority, arrival) gives its blocks back and is recomputed
later.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import numpy as np

from core.block_manager import BlockManager
from core.contract.batch import Int32
from core.contract.errors import ConfigError, QueueFullError, RequestError
from core.contract.spec import BatchRules
from core.contract.types import SampledTokens
from core.scheduler.limits import Limits
from core.scheduler.plan import Checkpoint, PrefillRow, PromptRow, StepPlan
from core.scheduler.records import Counters, Event, InFlight, SchedulerConfig, TokenLogprobs
from core.scheduler.sequence import Request, Sequence, SlotTable, Status
from core.scheduler.waiting import Deadlines, WaitingQueue

Phase = Literal["prefill", "decode"]

_NONE = np.zeros(0, np.int32)
_BEFORE_ALL = (-(2**62), 0, 0)

NO_NUMBERS = (
    "the model's logits were NaN or infinite, so no token could be drawn; try a wider dtype, and check the "
    "weights where other prompts fail too"
)


class Scheduler:
    """Owns all sequences and their slots. One thread uses it."""

    def __init__(
        self,
        config: SchedulerConfig,
        rules: BatchRules,
        blocks: BlockManager,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.table = SlotTable(config.max_requests, config.max_model_len)
        self.counters = Counters()
        self._rules = rules
        self._clock = clock
        self._max_tokens = min(config.max_batch_tokens, rules.max_tokens or config.max_batch_tokens)
        self._max_rows = min(config.max_requests, rules.max_requests or config.max_requests)
        self._limits = Limits(
            max_model_len=config.max_model_len,
            max_rows=self._max_rows,
            prefill_multiple=rules.prefill_multiple,
            groups=tuple(blocks.groups),
        )
        self._commit_size = min(g.block_size for g in blocks.groups)
        self._largest_block = max((g.block_size for g in blocks.groups if g.kind != "state"), default=1)
        self._state_groups = [i for i, g in enumerate(blocks.groups) if g.kind == "state"]
        self._block_groups = [i for i, g in enumerate(blocks.groups) if g.kind != "state"]
        self._window_groups = [i for i, g in enumerate(blocks.groups) if g.kind == "window"]
        self._waiting = WaitingQueue()
        self._deadlines = Deadlines()
        self._prefilling: list[Sequence] = []
        self._decode: Int32 = _NONE
        self._free_slots = list(range(config.max_requests - 1, -1, -1))
        self._fenced_slots: deque[tuple[int, int]] = deque()
        self._in_flight: deque[InFlight] = deque()
        self._requests: dict[str, list[Sequence]] = {}
        self._events: list[Event] = []
        self._arrivals = 0
        self._next_step = 0
        self._fence = -1
        self._retired = -1
        self._last_phase: Phase = "decode"
        self._is_short = False
        self._check_limits()

    def _check_limits(self) -> None:
        cap, size = self._rules.max_rows_x_context, self._largest_block
        rows = self._rules.min_decode_rows
        if cap is not None and cap < rows * -(-self.config.max_model_len // size) * size:
            raise ConfigError(
                f"the maximum model length is {self.config.max_model_len}, but the backend allows "
                f"rows x context of {cap} only, at {rows} rows or more; lower max_model_len to at most "
                f"{cap // rows // size * size}"
            )
        if self._max_tokens < self._rules.prefill_multiple:
            raise ConfigError(
                f"max_batch_tokens is {self._max_tokens}, but the backend takes prompts in multiples of "
                f"{self._rules.prefill_multiple} tokens; raise it to at least that"
            )

    # Requests in

    def add(self, request: Request) -> list[Sequence]:
        """Queue a request; its `n` sequences, the first of which computes the prompt for all.

        Raises:
            RequestError: too long, too many choices, or an id in use. QueueFullError. Nothing was queued.
        """
        self._check_request(request)
        priority = request.priority if self.config.policy == "priority" else 0
        self._arrivals += 1
        self.counters.prompt_tokens += len(request.prompt_ids)
        sequences = [Sequence(request, i, (priority, self._arrivals, i)) for i in range(request.params.n)]
        sequences[0].forks = sequences[1:]
        self._requests[request.request_id] = sequences
        self._waiting.push(sequences[0])
        for sequence in sequences:
            self._deadlines.add(sequence)
        return sequences

    def _check_request(self, request: Request) -> None:
        if request.request_id in self._requests:
            raise RequestError(f"request id {request.request_id!r} is in use; choose another")
        self._limits.check(len(request.prompt_ids), request.params)
        if self.config.max_waiting is not None and len(self._waiting) >= self.config.max_waiting:
            raise QueueFullError(
                f"{len(self._waiting)} requests are waiting, the most allowed; try again later"
            )

    def _limit(self, request: Request) -> int:
        return self._limits.tokens(len(request.prompt_ids), request.params)

    def abort(self, request_id: str) -> bool:
        """End every sequence of a request; False where it is not known (any more)."""
        sequences = self._requests.get(request_id)
        for sequence in sequences or ():
            self.finish(sequence, "abort")
        return sequences is not None

    def finish_choice(self, request_id: str, choice: int, reason: str) -> None:
        """End one continuation of a request; nothing where either is not known (any more)."""
        for sequence in self._requests.get(request_id, ()):
            if sequence.choice == choice:
                self.finish(sequence, reason)

    def finish(self, sequence: Sequence, reason: str, stop: int | str | None = None) -> None:
        """End a sequence now, wherever it is. What it has in flight emits nothing and caches nothing."""
        if sequence.status is Status.FINISHED:
            return
        forks, sequence.forks = sequence.forks, []
        if sequence.status is Status.WAITING:
            self._stop_waiting(sequence)
        else:
            self._release(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason, sequence.stop_reason = reason, stop
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1
        self._events.append(Event(sequence, -1, True))
        live = [s for s in self._requests[sequence.request.request_id] if s.status is not Status.FINISHED]
        if not live:
            del self._requests[sequence.request.request_id]
        # The prompt's computer is gone before it was done: the next choice takes over.
        heirs = [s for s in forks if s.status is not Status.FINISHED]
        if heirs:
            self._free_fork_slots(heirs)
            heirs[0].forks = heirs[1:]
            self._waiting.push(heirs[0])

    def _stop_waiting(self, sequence: Sequence) -> None:
        for leader in self._requests[sequence.request.request_id]:
            if sequence in leader.forks:
                leader.forks.remove(sequence)
                self._free_fork_slots([sequence])
                return
        self._waiting.forget()

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished or any step is in flight."""
        return bool(self._requests or self._in_flight or self._events)

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with a slot."""
        return len(self._prefilling) + len(self._decode)

    @property
    def num_in_flight(self) -> int:
        """Submitted steps that were not waited for."""
        return len(self._in_flight)

    @property
    def oldest_step(self) -> int | None:
        """Id of the step to wait for next; None where none is in flight."""
        return self._in_flight[0].step_id if self._in_flight else None

    @property
    def _newest_step(self) -> int | None:
        """Id of the step submitted last, the fence for what is given back now; None = none in flight."""
        return self._in_flight[-1].step_id if self._in_flight else None

    def take_events(self) -> list[Event]:
        """Events since the last call, in order."""
        events, self._events = self._events, []
        return events

    # One step out

    def schedule(self) -> StepPlan | None:
        """Decide the next step and count it as submitted; None where nothing can run now.

        Where it gives None and steps are in flight, wait for one and call again.
        """
        for sequence in self._deadlines.expired(self._clock()):
            self.finish(sequence, "deadline")
        decode, prefills = self._pick_rows()
        if not len(decode) and not prefills:
            return None
        return self._submit(decode, prefills)

    def _pick_rows(self) -> tuple[Int32, list[PrefillRow]]:
        if self._rules.mixed:
            decode = self._pick_decode()
            room = self._max_tokens - len(decode)
            return decode, self._pick_prefills(room, self._max_rows - len(decode))
        can_prefill = bool(self._prefilling) or self._waiting.peek() is not None
        first: Phase = "prefill" if can_prefill and self._last_phase == "decode" else "decode"
        for phase in (first, "decode" if first == "prefill" else "prefill"):
            if phase == "decode":
                decode, prefills = self._pick_decode(), []
            else:
                decode, prefills = _NONE, self._pick_prefills(self._max_tokens, self._max_rows)
            if len(decode) or prefills:
                self._last_phase = "decode" if phase == "decode" else "prefill"
                return decode, prefills
        return _NONE, []

    def _pick_decode(self) -> Int32:
        table = self.table
        while True:
            ready = self._within_limits(self._decode[table.planned[self._decode] < table.limit[self._decode]])
            # A row takes one block of a group at most. Where they may not do for all, the first in the order
            # get theirs first, and the last give theirs back.
            if any(self.blocks.num_free(g) < len(ready) for g in self._block_groups):
                ready = self._in_order(ready)
            fits = self.blocks.grow_many(ready, table.planned[ready])
            self._is_short = fits < len(ready)
            victim = self._victim(_BEFORE_ALL) if self._is_short and not self._can_wait() else None
            if victim is None:
                break
            self._preempt(victim)
        ready = ready[:fits]
        table.computed[ready] += 1
        table.planned[ready] += 1
        table.last_step[ready] = self._next_step
        return ready

    def _can_wait(self) -> bool:
        """Whether blocks come back by themselves: from behind a fence, or because a window moves on.

        A window moves on with the steps in flight; whoever preempts instead may throw away all that they do.
        """
        if self._fence > self._retired:
            return True
        chunk = self._rules.prefill_multiple
        return bool(self._in_flight) and any(
            self.blocks.num_free(g) < 2 + chunk // self.blocks.groups[g].block_size
            for g in self._window_groups
        )

    def _in_order(self, slots: Int32) -> Int32:
        sequences = self.table.sequences
        return np.array(sorted(slots.tolist(), key=lambda slot: _key_of(sequences[slot])), np.int32)

    def _within_limits(self, ready: Int32) -> Int32:
        """Rows that one decode step may hold; where not all, those that waited longest."""
        limit, cap = min(self._max_rows, self._max_tokens), self._rules.max_rows_x_context
        if len(ready) > limit or cap is not None:
            ready = ready[np.argsort(self.table.last_step[ready], kind="stable")][:limit]
        if cap is not None and len(ready):
            size = self._largest_block
            context = -(-(self.table.computed[ready] + 1) // size) * size
            rows = np.maximum(np.arange(1, len(ready) + 1), self._rules.min_decode_rows)
            area = np.maximum.accumulate(context) * rows
            ready = ready[: int(np.count_nonzero(area <= cap))]
        return ready

    def _pick_prefills(self, tokens: int, rows: int) -> list[PrefillRow]:
        """Chunks of at most so many tokens and, sampled rows included, rows; by key, and none passes another.

        A sequence that cannot go on ends the step's list: those behind it would take what it waits for.
        """
        samples = rows
        if self._rules.max_prefills is not None:
            rows = min(rows, self._rules.max_prefills)
        picked: list[PrefillRow] = []
        if tokens <= 0 or rows <= 0:
            return picked
        room = self.config.max_logit_tokens - (self._max_tokens - tokens)
        for sequence in self._to_prefill():
            wants = sequence.request.params.prompt_logprobs is not None
            if wants:
                # From here on the step's logits are kept for all of its tokens.
                tokens = min(tokens, room - sum(r.count for r in picked))
            row = self._chunk(sequence, tokens, samples)
            if row is None:
                break
            picked.append(row)
            tokens -= row.count
            samples -= len(row.samples)
            if tokens <= 0 or len(picked) >= rows:
                break
        return picked

    def _to_prefill(self) -> Iterator[Sequence]:
        """Sequences that began their prompt, then waiting ones, each admitted when it is asked for."""
        for sequence in list(self._prefilling):
            # One before it may have taken its blocks.
            if sequence.status is Status.PREFILL:
                yield sequence
        while (waiting := self._waiting.peek()) is not None and self._admit(waiting):
            yield waiting

    def _admit(self, sequence: Sequence) -> bool:
        """Give the first waiting sequence a slot (and its forks theirs) if its prompt fits now.

        Not while a decoding sequence waits for a block: a newcomer would take it, only to be preempted for
        it.
        """
        if self._is_short and len(self._decode):
            return False
        if len(self._free_slots) < 1 + len(sequence.forks):
            return False
        ids = sequence.all_ids()
        if not self.blocks.fits_now(len(ids)):
            return False
        self._waiting.pop()
        slot = self._free_slots.pop()
        request = sequence.request
        cached = self.blocks.open(slot, ids, salt=request.salt, adapter=request.adapter)
        if not sequence.has_started:
            sequence.cached_tokens = cached
            self.counters.cached_tokens += cached
        for fork in sequence.forks:
            fork.slot = self._free_slots.pop()
            fork.has_started, fork.cached_tokens = True, cached
        sequence.status, sequence.has_started = Status.PREFILL, True
        self.table.open(slot, sequence, self._limit(request), cached)
        self._prefilling.append(sequence)
        self._prefilling.sort(key=lambda s: s.key)
        return True

    def _chunk(self, sequence: Sequence, tokens: int, samples: int) -> PrefillRow | None:
        """The next chunk of a prompt, with its blocks allocated; None where nothing fits.

        A chunk that is short of blocks is cut before another sequence loses its own: a window's pool may
        never hold a whole prompt.
        """
        slot, table = sequence.slot, self.table
        start, known = int(table.computed[slot]), int(table.known[slot])
        count = self._whole(known - start, tokens)
        if count == known - start and 1 + len(sequence.forks) > samples:
            return None
        while count > 0 and not self.blocks.grow(slot, start + count):
            room = self._whole(known - start, min(count, self.blocks.growable(slot) - start))
            if room <= 0:
                victim = None if self._can_wait() else self._victim(sequence.key)
                if victim is None:
                    return None
                self._preempt(victim)
            else:
                count = room
        if count <= 0:
            return None
        table.computed[slot] = start + count
        table.last_step[slot] = self._next_step
        if start + count < known:
            return PrefillRow(slot, start, count, ())
        table.planned[slot] = known + 1
        return PrefillRow(slot, start, count, (slot, *(fork.slot for fork in sequence.forks)))

    def _whole(self, wanted: int, most: int) -> int:
        """Tokens of the next chunk: all that are wanted, or a multiple of what the backend declares."""
        return wanted if wanted <= most else most - most % self._rules.prefill_multiple

    def _victim(self, after: tuple[int, int, int]) -> Sequence | None:
        """The last running sequence behind `after` by key that this step has not picked."""
        found: Sequence | None = None
        for slot in (*self._decode, *(s.slot for s in self._prefilling)):
            sequence = self.table.sequences[slot]
            if sequence is None or sequence.key <= after or self.table.last_step[slot] == self._next_step:
                continue
            if found is None or sequence.key > found.key:
                found = sequence
        return found

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it waits, at its old place in the order, to be recomputed."""
        self._free_fork_slots(sequence.forks)
        self._release(sequence)
        sequence.status = Status.WAITING
        sequence.num_preemptions += 1
        self.counters.preemptions += 1
        self._waiting.push(sequence)

    def _release(self, sequence: Sequence) -> None:
        slot = sequence.slot
        if sequence.status is Status.PREFILL:
            self._prefilling.remove(sequence)
        else:
            self._decode = self._decode[self._decode != slot]
        fence = self._newest_step
        self.blocks.free(slot, fence=fence)
        self.table.close(slot)
        self._free_slot(slot, fence)

    def _free_slot(self, slot: int, fence: int | None) -> None:
        if fence is None:
            self._free_slots.append(slot)
        else:
            self._fence = fence
            self._fenced_slots.append((fence, slot))

    def _free_fork_slots(self, forks: Iterable[Sequence]) -> None:
        for fork in forks:
            if fork.slot >= 0:
                self._free_slots.append(fork.slot)
                fork.slot = -1

    def _submit(self, decode: Int32, prefills: list[PrefillRow]) -> StepPlan:
        table = self.table
        step_id, self._next_step = self._next_step, self._next_step + 1
        prompts = self._prompts(len(decode), prefills)
        plan = StepPlan(
            step_id,
            decode,
            table.computed[decode] - 1,
            tuple(prefills),
            tuple(self.blocks.take_copies()),
            self._checkpoints(decode, prefills),
            prompts,
        )
        for row in prefills:
            if row.samples:
                self._start_decoding(row)
        rows = np.concatenate([decode, np.array([r.slot for r in prefills], np.int32)])
        samples = np.concatenate([decode, np.array([s for r in prefills for s in r.samples], np.int32)])
        self._in_flight.append(
            InFlight(
                step_id,
                rows,
                table.epoch[rows],
                table.computed[rows],
                samples,
                table.epoch[samples],
                tuple((row, int(table.epoch[row.slot])) for row in prompts),
            )
        )
        self.counters.steps += 1
        self.counters.scheduled_tokens += plan.num_tokens
        return plan

    def _start_decoding(self, row: PrefillRow) -> None:
        sequence = self.table.sequences[row.slot]
        if sequence is None:
            return
        known = row.start + row.count
        for fork in sequence.forks:
            slot = fork.slot
            self.blocks.fork(row.slot, slot, known)
            self.table.open(slot, fork, self._limit(fork.request), known)
            self.table.planned[slot] = known + 1
            self.table.confirmed[slot] = self.table.confirmed[row.slot]
            fork.status = Status.DECODE
        sequence.forks, sequence.status = [], Status.DECODE
        self._prefilling.remove(sequence)
        self._decode = np.concatenate([self._decode, np.array(row.samples, np.int32)])

    def _prompts(self, first: int, prefills: list[PrefillRow]) -> tuple[PromptRow, ...]:
        """Which of the step's tokens predict prompt tokens whose log-probabilities are wanted."""
        found = []
        for row in prefills:
            sequence = self.table.sequences[row.slot]
            top = None if sequence is None else sequence.request.params.prompt_logprobs
            if sequence is not None and top is not None:
                end = min(row.start + row.count, len(sequence.request.prompt_ids) - 1)
                targets = self.table.tokens[row.slot, row.start + 1 : end + 1].copy()
                if len(targets):
                    found.append(PromptRow(row.slot, row.start, first, targets, top))
            first += row.count
        return tuple(found)

    def _checkpoints(self, decode: Int32, prefills: list[PrefillRow]) -> tuple[Checkpoint, ...]:
        found: list[Checkpoint] = []
        for group in self._state_groups:
            after = self.table.computed[decode]
            for row in np.flatnonzero(after % self.blocks.groups[group].block_size == 0):
                self._checkpoint(
                    found, int(row), int(decode[row]), int(after[row]) - 1, int(after[row]), group
                )
            for i, chunk in enumerate(prefills):
                end = chunk.start + chunk.count
                self._checkpoint(found, len(decode) + i, chunk.slot, chunk.start, end, group)
        return tuple(found)

    def _checkpoint(
        self, found: list[Checkpoint], row: int, slot: int, start: int, end: int, group: int
    ) -> None:
        checkpoint = self.blocks.checkpoint_for(slot, start, end, group)
        if checkpoint is not None:
            found.append(Checkpoint(row, group, checkpoint[0], checkpoint[1]))

    # Results in

    def update(
        self,
        step_id: int,
        tokens: Int32,
        sampled: SampledTokens | None = None,
        prompts: tuple[SampledTokens, ...] = (),
    ) -> list[Event]:
        """Take the tokens of the oldest step in flight, in the order of the plan's samples; events in order.

        A sequence whose token is -1 ends as "error": its logits were no numbers.

        `sampled` has the log-probabilities of those rows that asked for them, `prompts` those of the plan's
        prompt rows.

        Raises:
            ValueError: it is not the oldest step, or the number of tokens is wrong.
        """
        if not self._in_flight or self._in_flight[0].step_id != step_id:
            raise ValueError(f"step {step_id} is not the oldest one in flight")
        step = self._in_flight[0]
        if len(tokens) != len(step.samples):
            raise ValueError(f"step {step_id} sampled {len(step.samples)} rows but gave {len(tokens)} tokens")
        self._in_flight.popleft()
        self._retire(step_id)
        live = self.table.epoch[step.samples] == step.sample_epochs
        self.counters.surplus_tokens += int(np.count_nonzero(~live))
        slots = step.samples[live]
        accepted = np.asarray(tokens, np.int32)[live]
        for slot in slots[accepted < 0].tolist():
            self.blocks.forget(slot)
        self._confirm(step)
        self._take_prompts(step, prompts)
        drawn = slots[accepted >= 0]
        self.table.tokens[drawn, self.table.known[drawn]] = accepted[accepted >= 0]
        self.table.known[drawn] += 1
        has_logprobs = sampled is not None and sampled.logprobs is not None
        rows = np.flatnonzero(live).tolist() if has_logprobs else ()
        for i, (slot, token) in enumerate(zip(slots.tolist(), accepted.tolist(), strict=True)):
            sequence = self.table.sequences[slot]
            if sequence is not None and token < 0:
                self.finish(sequence, "error", NO_NUMBERS)
            elif sequence is not None:
                self._accept(sequence, token, _logprobs(sequence, sampled, rows[i]) if rows else None)
        return self.take_events()

    def _take_prompts(self, step: InFlight, prompts: tuple[SampledTokens, ...]) -> None:
        for (row, epoch), found in zip(step.prompts, prompts, strict=True):
            sequence = self.table.sequences[row.slot]
            if sequence is not None and self.table.epoch[row.slot] == epoch:
                for i in range(len(row.targets)):
                    sequence.prompt_logprobs[row.start + 1 + i] = _token_logprobs(found, i, row.top)

    def _accept(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
        sequence.output_ids.append(token)
        self.counters.generated_tokens += 1
        prompt = None
        asked = sequence.choice == 0 and sequence.request.params.prompt_logprobs is not None
        if asked and len(sequence.output_ids) == 1:
            prompt = tuple(map(sequence.prompt_logprobs.get, range(len(sequence.request.prompt_ids))))
        self._events.append(Event(sequence, token, False, logprobs, prompt))
        params = sequence.request.params
        is_eos = token in sequence.request.eos_ids and not params.ignore_eos
        if is_eos or token in params.stop_token_ids:
            self.finish(sequence, "stop", None if is_eos else token)
        elif self.table.known[sequence.slot] >= self.table.limit[sequence.slot]:
            self.finish(sequence, "length")

    def _retire(self, step_id: int) -> None:
        self._retired = step_id
        self.blocks.retire(step_id)
        while self._fenced_slots and self._fenced_slots[0][0] <= step_id:
            self._free_slots.append(self._fenced_slots.popleft()[1])

    def _confirm(self, step: InFlight) -> None:
        """What this step computed is real now: full blocks may be cached, blocks that left a window are
        freed.
        """
        live = self.table.epoch[step.rows] == step.row_epochs
        slots, after = step.rows[live], step.after[live]
        before = self.table.confirmed[slots]
        self.table.confirmed[slots] = after
        for i in np.flatnonzero(after // self._commit_size > before // self._commit_size):
            slot, end = int(slots[i]), int(after[i])
            self.blocks.commit(slot, self.table.tokens[slot, :end], end)
            self.blocks.trim_window(slot, end, self._newest_step)


def _logprobs(sequence: Sequence, sampled: SampledTokens | None, row: int) -> TokenLogprobs | None:
    wanted = sequence.request.params.logprobs
    return None if wanted is None or sampled is None else _token_logprobs(sampled, row, wanted)


def _token_logprobs(found: SampledTokens, row: int, top: int) -> TokenLogprobs:
    return TokenLogprobs(
        float(found.logprobs[row]),
        int(found.ranks[row]),
        tuple(found.top_ids[row, :top].tolist()),
        tuple(found.top_logprobs[row, :top].tolist()),
    )


def _key_of(sequence: Sequence | None) -> tuple[int, int, int]:
    return _BEFORE_ALL if sequence is None else sequence.key
