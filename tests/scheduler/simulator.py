"""A device that follows StepBatches symbolically, and the world of requests around it.

A cache entry is the hash of the whole history up to its token. So a wrong block, position, state, copy or
fed-back token changes
every later hash of that sequence, and with it its tokens, which are a function of the history alone.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from core.block_manager import BlockManager
from core.contract.batch import Int32, StepBatch
from core.contract.types import CacheGroupSpec, CacheLayerSpec, CachePlan
from core.engine.memory import block_groups
from core.runner.buckets import Buckets
from core.runner.builder import BatchBuilder
from core.sampling.params import SamplingParams
from core.scheduler import Request, Scheduler, SchedulerConfig, Sequence, StepPlan
from tests.scheduler.profiles import Profile

VOCAB, START = 50, 17
MAX_LEN, MAX_REQUESTS, MAX_TOKENS = 192, 8, 64


def follow(history: int, token: int) -> int:
    """The history's hash with one more token."""
    return (history * 1_000_003 + token + 1) % (2**61 - 1)


def token_after(history: int, choice: int) -> int:
    """The token that every sampler draws behind this history."""
    return (history // 7 + 13 * choice) % VOCAB


def alone(prompt: tuple[int, ...], max_tokens: int, choice: int, stop: int) -> list[int]:
    """What a request gives when nothing else runs."""
    history = START
    for token in prompt:
        history = follow(history, token)
    output: list[int] = []
    while len(output) < max_tokens and (not output or output[-1] != stop):
        output.append(token_after(history, choice))
        history = follow(history, output[-1])
    return output


class Device:
    """Cache contents by (group, slot), states by (group, slot), and `last`."""

    def __init__(self, plan: CachePlan) -> None:
        self.plan = plan
        self.entries: list[dict[int, tuple[int, int]]] = [{} for _ in plan.groups]
        self.states: list[dict[int, int]] = [{} for _ in plan.groups]
        self.last = np.zeros(plan.max_requests + 1, np.int32)

    def copy(self, group: int, src: int, dst: int) -> None:
        if self.plan.groups[group].kind == "state":
            self.states[group][dst] = self.states[group].get(src, -1)
            return
        size = self.plan.groups[group].block_size
        for i in range(size):
            self.entries[group].pop(dst * size + i, None)
            if src * size + i in self.entries[group]:
                self.entries[group][dst * size + i] = self.entries[group][src * size + i]

    def run(self, batch: StepBatch, choices: Int32) -> Int32:
        """Follow a step; the tokens of its sampled rows."""
        histories = np.zeros(batch.num_tokens, object)
        ids = np.where(batch.token_source < 0, batch.token_ids, self.last[np.maximum(batch.token_source, 0)])
        for row in range(batch.num_requests):
            self._row(batch, row, ids, histories)
        n = batch.num_samples
        tokens = np.array(
            [token_after(histories[t], int(c)) for t, c in zip(batch.sample_rows[:n], choices, strict=True)],
            np.int32,
        )
        self.last[batch.sample_slots[:n]] = tokens
        return tokens

    def _row(self, batch: StepBatch, row: int, ids: Int32, histories: np.ndarray) -> None:
        first, end = int(batch.query_start[row]), int(batch.query_start[row + 1])
        start = int(batch.positions[first])
        assert batch.seq_lens[row] == start + end - first
        history = START if start == 0 else self._before(batch, row, start)
        for g, group in enumerate(self.plan.groups):
            if group.kind == "state":
                read = int(batch.views[f"state_read.{g}"][row])
                assert (START if read < 0 else self.states[g].get(read)) == history, "a wrong state was read"
        for t in range(first, end):
            history = histories[t] = follow(history, int(ids[t]))
            self._write(batch, row, t, t - first, history)

    def _before(self, batch: StepBatch, row: int, start: int) -> int:
        """The history that every group's visible entries agree on."""
        seen: set[int] = set()
        for g, group in enumerate(self.plan.groups):
            if group.kind == "state":
                continue
            low = max(0, start - group.window + 1) if group.window else 0
            for j in range(low, start):
                block = int(batch.block_table(g)[row, j // group.block_size])
                assert block, f"position {j} lies in the pad block"
                entry = self.entries[g].get(block * group.block_size + j % group.block_size)
                assert entry is not None and entry[0] == j, f"position {j} of group {g} holds {entry}"
                if j == start - 1:
                    seen.add(entry[1])
        if not seen:
            return self.states[0][int(batch.views["state_read.0"][row])]
        assert len(seen) == 1, "cache groups disagree about the history"
        return seen.pop()

    def _write(self, batch: StepBatch, row: int, t: int, offset: int, history: int) -> None:
        position = int(batch.positions[t])
        for g, group in enumerate(self.plan.groups):
            if group.kind == "state":
                if batch.views[f"checkpoint_offset.{g}"][row] == offset + 1:
                    self.states[g][int(batch.views[f"checkpoint_slot.{g}"][row])] = history
                self.states[g][int(batch.views[f"state_write.{g}"][row])] = history
                continue
            slot = int(batch.slots(g)[t])
            block = int(batch.block_table(g)[row, position // group.block_size])
            assert slot == block * group.block_size + position % group.block_size
            assert block, "a token was written to the pad block"
            self.entries[g][slot] = (position, history)


@dataclass
class Client:
    """One request as its user sees it."""

    request: Request
    outputs: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, str | None] = field(default_factory=dict)
    disturbed: bool = False


class World:
    """Random requests on one scheduler, run with the profile's overlap."""

    def __init__(
        self, profile: Profile, seed: int, *, blocks: int, kinds: tuple[str, ...] = ("paged",)
    ) -> None:
        self.random = random.Random(seed)
        self.profile = profile
        self.now = 0.0
        size = profile.spec.cache.block_sizes[0]
        window = 24
        groups = tuple(
            CacheGroupSpec(
                kind=kind,  # type: ignore[arg-type]
                layers=(i,),
                block_size=size,
                num_blocks=blocks if kind != "state" else 1 + 3 * MAX_REQUESTS,
                window=window if kind == "window" else None,
            )
            for i, kind in enumerate(kinds)
        )
        layer = CacheLayerSpec(kind="paged", dtype="float32")
        self.plan = CachePlan(
            layers=(layer,) * len(kinds),
            groups=groups,
            group_of=tuple(range(len(kinds))),
            max_requests=MAX_REQUESTS,
        )
        self.blocks = BlockManager(
            block_groups(self.plan), max_requests=MAX_REQUESTS, max_model_len=MAX_LEN, hash_key=b"test"
        )
        config = SchedulerConfig(
            max_requests=MAX_REQUESTS, max_model_len=MAX_LEN, max_batch_tokens=MAX_TOKENS, policy="priority"
        )
        self.scheduler = Scheduler(config, profile.spec.batch, self.blocks, lambda: self.now)
        buffers = [np.full(20_000, -9, np.int32) for _ in range(profile.overlap + 1)]
        self.builder = BatchBuilder(
            self.plan,
            profile.spec.batch,
            Buckets(profile.spec, self.plan, MAX_TOKENS, MAX_LEN),
            self.scheduler.table,
            self.blocks,
            buffers,
        )
        self.device = Device(self.plan)
        self.clients: dict[str, Client] = {}
        self.pending: deque[tuple[int, Int32]] = deque()
        self.steps = 0
        self.last_seen: dict[int, int] = {}
        self.longest_wait = 0

    def arrive(self) -> None:
        """One more random request, often with a beginning that others have."""
        r = self.random
        shared = tuple(range(1, 1 + r.choice((0, 16, 40, 70))))
        own = tuple(r.randrange(VOCAB) for _ in range(r.randint(1, 40)))
        n = r.choice((1, 1, 1, 2, 3))
        params = SamplingParams(
            n=n, temperature=0, max_tokens=r.randint(1, 30), stop_token_ids=(r.randrange(VOCAB),)
        )
        name = f"r{len(self.clients)}"
        request = Request(
            request_id=name,
            prompt_ids=shared + own,
            params=params,
            priority=r.choice((0, 0, 1)),
            queue_deadline=self.now + 30 if r.random() < 0.1 else None,
            deadline=self.now + 60 if r.random() < 0.1 else None,
            salt=r.choice(("", "", "tenant")),
        )
        self.clients[name] = Client(request)
        self.scheduler.add(request)

    def disturb(self) -> None:
        """Abort a random request."""
        name = self.random.choice(list(self.clients))
        self.clients[name].disturbed = self.scheduler.abort(name) or self.clients[name].disturbed

    def step(self) -> bool:
        """Fill the pipeline, take the oldest result; False where nothing is left."""
        self.now += 1.0
        while len(self.pending) < self.profile.overlap:
            plan = self.scheduler.schedule()
            if plan is None:
                break
            self.submit(plan)
        if self.pending:
            step_id, tokens = self.pending.popleft()
            self.take(self.scheduler.update(step_id, tokens))
        else:
            self.take(self.scheduler.take_events())
        return self.scheduler.has_work

    def submit(self, plan: StepPlan) -> None:
        batch, sampling = self.builder.build(plan)
        self.check_rules(plan, batch)
        for c in plan.copies:
            self.device.copy(c.group, c.src, c.dst)
        self.pending.append((plan.step_id, self.device.run(batch, sampling.choice)))
        self.steps += 1
        for slot in (*plan.decode.tolist(), *(row.slot for row in plan.prefills)):
            self.last_seen[slot] = self.steps
        table = self.scheduler.table
        for slot, sequence in enumerate(table.sequences):
            if sequence is None:
                self.last_seen[slot] = self.steps
            elif table.planned[slot] < table.limit[slot] or table.computed[slot] < table.known[slot]:
                waited = self.steps - self.last_seen.setdefault(slot, self.steps)
                self.longest_wait = max(self.longest_wait, waited)

    def take(self, events: list) -> None:
        for event in events:
            sequence: Sequence = event.sequence
            client = self.clients[sequence.request.request_id]
            assert client.reasons.get(sequence.choice) is None, "an event came after the end"
            if event.token >= 0:
                client.outputs.setdefault(sequence.choice, []).append(event.token)
            if event.finished:
                client.reasons[sequence.choice] = sequence.finish_reason

    def check_rules(self, plan: StepPlan, batch: StepBatch) -> None:
        """Every rule that the profile declares holds for this step."""
        rules, shapes = self.profile.spec.batch, self.profile.spec.shapes
        bucket, n = batch.bucket, len(plan.decode)
        assert plan.num_tokens <= MAX_TOKENS and plan.num_requests <= MAX_REQUESTS
        if not rules.mixed:
            assert not (n and plan.prefills), "prefill and decode rows in one step"
        if rules.max_prefills is not None:
            assert len(plan.prefills) <= rules.max_prefills
        for row in plan.prefills:
            is_last = row.start + row.count == self.scheduler.table.known[row.slot]
            assert is_last or row.count % rules.prefill_multiple == 0
        if rules.max_rows_x_context is not None and n:
            size = self.profile.spec.cache.block_sizes[0]
            context = -(-(int(plan.positions.max()) + 1) // size) * size
            assert n * context <= rules.max_rows_x_context
        kinds = batch.query_kind[: batch.num_requests]
        assert (np.diff(kinds) >= 0).all(), "decode rows do not come first"
        if bucket.kind == "decode":
            assert bucket.tokens == bucket.requests >= rules.min_decode_rows
        if shapes.request_buckets:
            assert bucket.requests in shapes.request_buckets
        if shapes.token_buckets:
            assert bucket.tokens in shapes.token_buckets

    def check_end(self) -> None:
        """Every request ended rightly, and nothing is left."""
        for client in self.clients.values():
            request = client.request
            for choice in range(request.params.n):
                reason = client.reasons.get(choice)
                whole = alone(
                    request.prompt_ids,
                    min(request.params.max_tokens or MAX_LEN, MAX_LEN - len(request.prompt_ids)),
                    choice,
                    request.params.stop_token_ids[0],
                )
                output = client.outputs.get(choice, [])
                if reason in ("stop", "length"):
                    assert output == whole
                else:
                    has_deadline = request.deadline is not None or request.queue_deadline is not None
                    assert (reason == "abort" and client.disturbed) or (reason == "deadline" and has_deadline)
                    assert output == whole[: len(output)]
        self.blocks.check_integrity()
        self.blocks.reset_prefix_cache()
        metrics = self.blocks.metrics()
        assert metrics.used == 0 and metrics.free == metrics.total
        assert sorted(self.scheduler._free_slots) == list(range(MAX_REQUESTS))
