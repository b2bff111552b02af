"""A device that follows StepBatches symbolically, and the world of requests around it.

A cache entry is the hash of the whole history up to its token, and so is a state. The device knows what
history each row has (`alone` computes it from the request by itself), so it raises wherever a step reads,
feeds back or writes something else. Besides contents it watches ownership: nothing that a step in flight may
touch is written for another request, and nobody reads what another request's step wrote before that step was
waited for.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import numpy.typing as npt

from core.block_manager import BlockCopy, BlockManager
from core.contract.batch import Int32, StepBatch
from core.contract.types import CachePlan, SamplingBatch
from core.engine.memory import block_groups
from core.runner.buckets import Buckets
from core.runner.builder import BatchBuilder
from core.sampling.params import SamplingParams
from core.scheduler import Event, Request, Scheduler, SchedulerConfig, Sequence, Status, StepPlan
from tests.scheduler.checks import check_books, check_padding, check_rules, check_sampling
from tests.scheduler.profiles import Kinds, Profile, make_plan

VOCAB = 11
GARBAGE = -7

Int64 = npt.NDArray[np.int64]
Place = tuple[int, int]


def follow(history: int, token: int) -> int:
    """The history's hash with one more token."""
    return (history * 1_000_003 + token + 1) % (2**61 - 1)


def draw(history: int, seed: int, choice: int) -> int:
    """The token that the sampler draws behind this history."""
    return follow(follow(history, seed), choice) // 7 % VOCAB


@dataclass(frozen=True)
class Story:
    """A sequence when nothing else runs and nothing stops it: tokens [T], and hashes [T + 1] before each."""

    tokens: Int32
    hashes: Int64


@cache
def alone(request: Request, choice: int, length: int) -> Story:
    """What the request gives by itself, up to `length` tokens."""
    history = hash_of_salt(request.salt)
    tokens, hashes = list(request.prompt_ids), [history]
    for i in range(length):
        if i == len(tokens):
            tokens.append(draw(history, request.seed, choice))
        history = follow(history, tokens[i])
        hashes.append(history)
    return Story(np.array(tokens, np.int32), np.array(hashes, np.int64))


def hash_of_salt(salt: str) -> int:
    """The hash of no tokens."""
    return int.from_bytes(salt.encode(), "little") + 17


def expected_output(request: Request, choice: int, max_len: int) -> tuple[list[int], str]:
    """The request's output and the reason of its end, undisturbed."""
    prompt, params = len(request.prompt_ids), request.params
    end = min(max_len, prompt + (params.max_tokens or max_len))
    output = alone(request, choice, max_len).tokens[prompt:end].tolist()
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else request.eos_ids)}
    for i, token in enumerate(output):
        if token in stops:
            return output[: i + 1], "stop"
    return output, "length"


@dataclass(eq=False)
class Family:
    """One admission of a request: the sequence that computed the prompt, and those forked from it."""

    members: list[tuple[Sequence, int]] = field(default_factory=list)

    @property
    def is_alive(self) -> bool:
        """Whether a member still runs and was not preempted since."""
        running = (Status.PREFILL, Status.DECODE)
        return any(s.status in running and s.num_preemptions == life for s, life in self.members)


@dataclass(frozen=True)
class Row:
    """Who a row of a step belongs to."""

    sequence: Sequence
    family: Family
    story: Story


@dataclass
class Flight:
    """A submitted step, what it touches for whom, and the newest step waited for when it was submitted."""

    batch: StepBatch
    sampling: SamplingBatch
    copies: tuple[BlockCopy, ...]
    rows: list[Row]
    waited: int
    snapshot: Int32
    touched: dict[Place, set[Family]] = field(default_factory=dict)
    slots: dict[int, tuple[Sequence, int]] = field(default_factory=dict)
    tokens: Int32 | None = None


class Memory:
    """Places of one cache group: their hashes, and the step and family that wrote them."""

    def __init__(self, size: int) -> None:
        self.value: Int64 = np.full(size, GARBAGE, np.int64)
        self.step: Int64 = np.full(size, -1, np.int64)
        self.family: npt.NDArray[np.object_] = np.full(size, None, object)
        self.is_surplus: npt.NDArray[np.bool_] = np.zeros(size, np.bool_)

    def write(self, places: Int64, values: Int64 | int, step: int, family: Family | None) -> None:
        self.value[places], self.step[places] = values, step
        self.family[places], self.is_surplus[places] = family, False

    def check(self, places: Int64, values: Int64, waited: int, family: Family, what: str) -> None:
        """Family may read these values here: they are right, and its own or those of a step waited for."""
        wrong = np.flatnonzero(self.value[places] != values)
        assert not len(wrong), f"{what}: place {places[wrong[0]]} does not hold the row's own history"
        others = places[self.family[places] != family]
        assert (self.step[others] <= waited).all(), f"{what}: reads what a step in flight writes for another"
        assert not self.is_surplus[others].any(), f"{what}: reads what a surplus step wrote"


class Device:
    """Runs steps in order, each between its submission and its wait."""

    def __init__(self, plan: CachePlan, seed: int) -> None:
        self.plan = plan
        self.random = random.Random(seed)
        self.memory = [Memory(g.num_blocks * (1 if g.kind == "state" else g.block_size)) for g in plan.groups]
        self.last = np.full(plan.max_requests + 1, GARBAGE, np.int32)
        self.flights: deque[Flight] = deque()
        self.waited = -1

    # Submission: who may touch what

    def submit(
        self, batch: StepBatch, sampling: SamplingBatch, copies: tuple[BlockCopy, ...], rows: list[Row]
    ) -> None:
        """Queue a step. It runs now or later, as it happens."""
        flight = Flight(batch, sampling, copies, rows, self.waited, batch.flat.copy())
        for copy in copies:
            self._check_fresh((copy.group, copy.dst))
        for r, row in enumerate(rows):
            life = (row.sequence, row.sequence.num_preemptions)
            slot = int(batch.request_slots[r])
            self._take_slot(flight, slot, life)
            for place in self._places(batch, r):
                flight.touched.setdefault(place, set()).add(row.family)
        self.flights.append(flight)
        for r, row in enumerate(rows):
            for place in self._written(batch, r):
                self._check_writable(place, row.family)
        if self.random.random() < 0.5:
            self._run_up_to(batch.step_id)

    def _take_slot(self, flight: Flight, slot: int, life: tuple[Sequence, int]) -> None:
        for other in self.flights:
            step_id, holder = other.batch.step_id, other.slots.get(slot, life)
            assert holder == life, f"request slot {slot} is reused before step {step_id} was waited for"
        flight.slots[slot] = life

    def take_sample_slot(self, slot: int, life: tuple[Sequence, int]) -> None:
        """The newest step also writes `last` of this slot."""
        self._take_slot(self.flights[-1], slot, life)

    def _places(self, batch: StepBatch, r: int) -> Iterable[Place]:
        for g, group in enumerate(self.plan.groups):
            if group.kind == "state":
                names = ("state_read", "state_write", "checkpoint_slot")
                blocks = [int(batch.views[f"{name}.{g}"][r]) for name in names]
            else:
                blocks = batch.block_table(g)[r].tolist()
            yield from ((g, block) for block in blocks if block > 0)

    def _written(self, batch: StepBatch, r: int) -> set[Place]:
        start, end = batch.query_start[r : r + 2].tolist()
        written: set[Place] = set()
        for g, group in enumerate(self.plan.groups):
            if group.kind == "state":
                live = int(batch.views[f"state_write.{g}"][r])
                assert live > 0, "a row has no state slot of its own"
                written |= {(g, live), (g, int(batch.views[f"checkpoint_slot.{g}"][r]))}
            else:
                written |= {(g, b) for b in (batch.slots(g)[start:end] // group.block_size).tolist()}
        return {(g, block) for g, block in written if block}

    def _check_writable(self, place: Place, family: Family) -> None:
        for flight in self.flights:
            others = flight.touched.get(place, set()) - {family}
            assert not others, (
                f"block {place[1]} of group {place[0]} is written for another request before step "
                f"{flight.batch.step_id} was waited for"
            )

    def _check_fresh(self, place: Place) -> None:
        for flight in self.flights:
            step_id = flight.batch.step_id
            assert place not in flight.touched, f"a copy goes to {place}, which step {step_id} touches"

    # Running

    def _run_up_to(self, step_id: int) -> None:
        for flight in self.flights:
            if flight.tokens is None and flight.batch.step_id <= step_id:
                self._run(flight)

    def _run(self, flight: Flight) -> None:
        batch, T, n = flight.batch, flight.batch.num_tokens, flight.batch.num_samples
        assert (batch.flat == flight.snapshot).all(), "a host buffer was rewritten before its step ended"
        self._copy(flight.copies)
        source = batch.token_source[:T]
        ids = np.where(source < 0, batch.token_ids[:T], self.last[np.maximum(source, 0)])
        for r in range(batch.num_requests):
            self._read(flight, r, ids)
        for r in range(batch.num_requests):
            self._write(flight, r)
        for g, group in enumerate(self.plan.groups):
            size = 1 if group.kind == "state" else group.block_size
            self.memory[g].write(np.arange(size), GARBAGE, batch.step_id, None)
        for r in range(batch.num_requests):
            self._check_visible(flight, r, int(batch.seq_lens[r]))
        hashes = np.concatenate([self._hashes(flight, r) for r in range(batch.num_requests)])
        flight.tokens = np.array(
            [
                draw(int(hashes[t]), int(seed), int(choice))
                for t, seed, choice in zip(
                    batch.sample_rows[:n], flight.sampling.seed, flight.sampling.choice, strict=True
                )
            ],
            np.int32,
        )
        self.last[batch.sample_slots] = GARBAGE
        self.last[batch.sample_slots[:n]] = flight.tokens

    def _copy(self, copies: tuple[BlockCopy, ...]) -> None:
        moves = []
        for c in copies:
            group, memory = self.plan.groups[c.group], self.memory[c.group]
            size = 1 if group.kind == "state" else group.block_size
            src, dst = np.arange(size) + c.src * size, np.arange(size) + c.dst * size
            arrays = (memory.value, memory.step, memory.family, memory.is_surplus)
            moves += [(array, dst, array[src].copy()) for array in arrays]
        for array, dst, values in moves:
            array[dst] = values

    def _span(self, flight: Flight, r: int) -> tuple[int, int]:
        first, end = flight.batch.query_start[r : r + 2].tolist()
        length = int(flight.batch.seq_lens[r])
        return length - (end - first), length

    def _hashes(self, flight: Flight, r: int) -> Int64:
        start, end = self._span(flight, r)
        return flight.rows[r].story.hashes[start + 1 : end + 1]

    def _read(self, flight: Flight, r: int, ids: Int32) -> None:
        batch, row = flight.batch, flight.rows[r]
        first, last = batch.query_start[r : r + 2].tolist()
        start, end = self._span(flight, r)
        what = f"step {batch.step_id}, row {r}"
        assert (batch.positions[first:last] == np.arange(start, end)).all(), f"{what}: wrong positions"
        assert (ids[first:last] == row.story.tokens[start:end]).all(), f"{what}: wrong input tokens"
        self._check_visible(flight, r, start)
        for g, group in enumerate(self.plan.groups):
            if group.kind == "state":
                read = int(batch.views[f"state_read.{g}"][r])
                assert (read < 0) == (start == 0), f"{what}: wrong choice of the zero state"
                if read >= 0:
                    place, value = np.array([read]), row.story.hashes[start : start + 1]
                    self.memory[g].check(place, value, flight.waited, row.family, f"{what}, state group {g}")

    def _check_visible(self, flight: Flight, r: int, end: int) -> None:
        """Every entry before `end` that the row's queries see."""
        batch, row = flight.batch, flight.rows[r]
        start = self._span(flight, r)[0]
        for g, group in enumerate(self.plan.groups):
            if group.kind != "state":
                low = max(0, start - group.window + 1) if group.window else 0
                p = np.arange(low, end)
                block = batch.block_table(g)[r][p // group.block_size].astype(np.int64)
                what = f"step {batch.step_id}, row {r}, group {g}"
                assert (block > 0).all(), f"{what}: a visible position lies in the pad block"
                places = block * group.block_size + p % group.block_size
                self.memory[g].check(places, row.story.hashes[p + 1], flight.waited, row.family, what)

    def _write(self, flight: Flight, r: int) -> None:
        batch, row, hashes = flight.batch, flight.rows[r], self._hashes(flight, r)
        first, end = batch.query_start[r : r + 2].tolist()
        for g, group in enumerate(self.plan.groups):
            memory, step = self.memory[g], batch.step_id
            if group.kind == "state":
                offset = int(batch.views[f"checkpoint_offset.{g}"][r])
                assert offset <= end - first, "a checkpoint lies behind the row's tokens"
                if offset:
                    place = batch.views[f"checkpoint_slot.{g}"][r : r + 1]
                    memory.write(place, int(hashes[offset - 1]), step, row.family)
                memory.write(batch.views[f"state_write.{g}"][r : r + 1], int(hashes[-1]), step, row.family)
            else:
                memory.write(batch.slots(g)[first:end], hashes, step, row.family)

    def wait(self) -> tuple[int, Int32]:
        """Id and tokens of the oldest step; what it wrote for requests that ended before is surplus."""
        step_id = self.flights[0].batch.step_id
        self._run_up_to(step_id)
        flight = self.flights.popleft()
        self.waited = step_id
        for memory in self.memory:
            for place in np.flatnonzero(memory.step == step_id).tolist():
                family = memory.family[place]
                memory.is_surplus[place] = family is not None and not family.is_alive
        assert flight.tokens is not None
        return step_id, flight.tokens


@dataclass
class Client:
    """One request as its user sees it. `disturbed`: what was done to it."""

    request: Request
    outputs: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, str | None] = field(default_factory=dict)
    disturbed: set[str] = field(default_factory=set)


class World:
    """Requests on one scheduler, with up to `depth` steps in flight."""

    def __init__(
        self,
        profile: Profile,
        kinds: Kinds = ("paged",),
        *,
        depth: int,
        seed: int = 0,
        tight: bool = False,
        plan: CachePlan | None = None,
    ) -> None:
        self.profile, self.depth = profile, depth
        self.now = 0.0
        self.plan = plan or make_plan(profile, kinds, tight=tight)
        self.blocks = BlockManager(
            block_groups(self.plan),
            max_requests=profile.max_requests,
            max_model_len=profile.max_len,
            hash_key=b"test",
        )
        config = SchedulerConfig(
            max_requests=profile.max_requests,
            max_model_len=profile.max_len,
            max_batch_tokens=profile.max_tokens,
            policy="priority",
        )
        rules = profile.spec.batch
        self.scheduler = Scheduler(config, rules, self.blocks, lambda: self.now)
        self.buckets = Buckets(profile.spec, self.plan, profile.max_tokens, profile.max_len)
        buffers = [np.full(30_000, GARBAGE, np.int32) for _ in range(depth + 1)]
        self.builder = BatchBuilder(
            self.plan, rules, self.buckets, self.scheduler.table, self.blocks, buffers, vocab_size=1000
        )
        self.device = Device(self.plan, seed)
        self.clients: dict[str, Client] = {}
        self.families: dict[tuple[Sequence, int], Family] = {}
        self.shapes: set[object] = set()
        self.chunks = 0
        self.passed_over: dict[tuple[Sequence, int], int] = {}
        self.longest_wait = 0

    # What users do

    def add(self, request: Request) -> list[Sequence]:
        """A request arrives."""
        self.clients[request.request_id] = Client(request)
        return self.scheduler.add(request)

    def abort(self, name: str) -> None:
        """A user goes away."""
        if self.scheduler.abort(name):
            self.clients[name].disturbed.add("abort")

    def cancel(self, sequence: Sequence, reason: str = "cancel") -> None:
        """One continuation is ended from outside, as for a stop text."""
        if sequence.status is not Status.FINISHED:
            self.clients[sequence.request.request_id].disturbed.add(reason)
        self.scheduler.finish(sequence, reason)

    def preempt(self, sequence: Sequence) -> None:
        """A running sequence loses its blocks, as when they run out."""
        if sequence.status in (Status.PREFILL, Status.DECODE):
            self.scheduler._preempt(sequence)

    # What the engine does

    def schedule(self) -> bool:
        """Schedule, build and submit one step; False where none can run now."""
        plan = self.scheduler.schedule()
        if plan is None:
            return False
        batch, sampling = self.builder.build(plan), self.builder.sampling(plan)
        self._check(plan, batch, sampling)
        rows = [self._row(slot) for slot in plan.decode.tolist()]
        rows += [self._row(row.slot) for row in plan.prefills]
        slots = [row.sequence.slot for row in rows]
        assert batch.request_slots[: len(rows)].tolist() == slots, "rows are not in the order of the plan"
        self._check_windows(batch, rows)
        self.device.submit(batch, sampling, plan.copies, rows)
        for prefill, row in zip(plan.prefills, rows[len(plan.decode) :], strict=True):
            self.chunks += not prefill.samples
            for slot in prefill.samples:
                life = self._life(slot)
                if life not in self.families:
                    row.family.members.append(life)
                    self.families[life] = row.family
                self.device.take_sample_slot(slot, life)
        self._watch({(row.sequence, row.sequence.num_preemptions) for row in rows})
        return True

    def _life(self, slot: int) -> tuple[Sequence, int]:
        sequence = self.scheduler.table.sequences[slot]
        assert sequence is not None, f"request slot {slot} is scheduled but belongs to nobody"
        assert sequence.status is not Status.FINISHED, "a finished sequence is scheduled"
        return sequence, sequence.num_preemptions

    def _row(self, slot: int) -> Row:
        life = self._life(slot)
        family = self.families.setdefault(life, Family([life]))
        return Row(life[0], family, alone(life[0].request, life[0].choice, self.profile.max_len))

    def _check(self, plan: StepPlan, batch: StepBatch, sampling: SamplingBatch) -> None:
        spec, size = self.profile.spec, self.plan.groups[0].block_size
        check_rules(spec, plan, batch, max_tokens=self.profile.max_tokens, block=size)
        check_padding(batch, spec.batch)
        check_books(self.plan, batch)
        check_sampling(batch, sampling)
        self.shapes.add(batch.bucket)

    def _check_windows(self, batch: StepBatch, rows: list[Row]) -> None:
        """Blocks that left a window before the last step waited for were given back."""
        for g, group in enumerate(self.plan.groups):
            for r, row in enumerate(rows):
                if group.window is not None:
                    seen = int(self.scheduler.table.confirmed[row.sequence.slot]) // group.block_size
                    gone = (seen * group.block_size - group.window + 1) // group.block_size
                    left = batch.block_table(g)[r, : max(0, gone)]
                    assert not left.any(), f"group {g}: blocks that left the window are still held"

    def _watch(self, chosen: set[tuple[Sequence, int]]) -> None:
        """How many steps in a row a running sequence with work to do was not in."""
        table, waits = self.scheduler.table, {}
        for slot, sequence in enumerate(table.sequences):
            if sequence is not None:
                life = (sequence, sequence.num_preemptions)
                has_work = table.planned[slot] < table.limit[slot] or table.computed[slot] < table.known[slot]
                waits[life] = 0 if life in chosen or not has_work else self.passed_over.get(life, 0) + 1
        self.passed_over = waits
        self.longest_wait = max(self.longest_wait, *waits.values(), 0)

    def wait(self) -> bool:
        """Take the oldest step's result; False where none is in flight."""
        if not self.device.flights:
            self._take(self.scheduler.take_events())
            return False
        step_id, tokens = self.device.wait()
        assert step_id == self.scheduler.oldest_step, "scheduler and device disagree about the oldest step"
        self._take(self.scheduler.update(step_id, tokens))
        return True

    def step(self) -> bool:
        """Fill the pipeline and wait for its oldest step; False where nothing is left."""
        self.now += 1.0
        while len(self.device.flights) < self.depth and self.schedule():
            pass
        is_idle = not self.wait()
        assert not is_idle or not self.scheduler.has_work, "requests are left, but nothing runs"
        return self.scheduler.has_work

    def _take(self, events: list[Event]) -> None:
        for event in events:
            sequence = event.sequence
            client = self.clients[sequence.request.request_id]
            assert sequence.choice not in client.reasons, "an event came after the end"
            output = client.outputs.setdefault(sequence.choice, [])
            if event.token >= 0:
                output.append(event.token)
            if event.finished:
                assert output == sequence.output_ids, "events and sequence differ"
                client.reasons[sequence.choice] = sequence.finish_reason

    # Judgement

    def run(self) -> None:
        """To the end of all requests, within the number of steps that one after the other would take."""
        bound = self.bound()
        for i in range(bound):
            if not self.step():
                return
            if i % 5 == 0:
                self.check_cached()
        raise AssertionError(f"the requests do not end within {bound} steps")

    def bound(self) -> int:
        """Steps in which every request ends even if each token costs a whole new prefill."""
        multiple = self.profile.spec.batch.prefill_multiple
        chunk = max(multiple, min(g.block_size for g in self.plan.groups))
        total = 20
        for client in self.clients.values():
            params = client.request.params
            tokens = min(self.profile.max_len, len(client.request.prompt_ids) + (params.max_tokens or 10**9))
            outputs = params.n * (tokens - len(client.request.prompt_ids) + 1)
            total += 2 * outputs * (-(-tokens // chunk) + 1)
        return total

    def check_cached(self) -> None:
        """The books add up, and the prefix cache offers only what was waited for while its request ran."""
        self.blocks.check_integrity()
        for g, group in enumerate(self.plan.groups):
            memory, size = self.device.memory[g], 1 if group.kind == "state" else group.block_size
            cached = np.repeat(self.blocks._pools[g].hittable, size)
            assert (memory.step[cached] <= self.device.waited).all(), "a step in flight is cached already"
            assert not memory.is_surplus[cached].any(), "a surplus step is cached"

    def check_end(self) -> None:
        """Every request ended rightly, and nothing is left."""
        assert not self.scheduler.has_work and not self.device.flights, "work is left"
        for client in self.clients.values():
            for choice in range(client.request.params.n):
                whole, reason = expected_output(client.request, choice, self.profile.max_len)
                output, found = client.outputs.get(choice, []), client.reasons[choice]
                if found in ("stop", "length"):
                    assert (output, found) == (whole, reason), "other output than alone"
                else:
                    is_asked = found in client.disturbed or self._has_deadline(client, found)
                    assert is_asked, f"ended by {found!r}, but nobody asked for it"
                    assert output == whole[: len(output)], "other output than alone"
        self.check_cached()
        assert self.blocks.metrics().used == 0, "blocks are held, but nobody runs"
        self.blocks.reset_prefix_cache()
        metrics = self.blocks.metrics()
        assert metrics.free == metrics.total, "blocks are lost"
        slots = sorted(self.scheduler._free_slots)
        assert slots == list(range(self.profile.max_requests)), "request slots are lost or free twice"

    @staticmethod
    def _has_deadline(client: Client, reason: str | None) -> bool:
        request = client.request
        return reason == "deadline" and not (request.deadline is None and request.queue_deadline is None)

    def random_request(self, r: random.Random, *, max_n: int) -> Request:
        """A request, often with a beginning that others have, that may stop itself."""
        most = self.profile.max_len - 1
        length = r.choice((1, r.randint(1, most // 4), r.randint(1, most // 2), r.randint(1, most)))
        shared = r.choice((0, length // 2, length - 1))
        prompt = tuple(i % 7 for i in range(shared))
        prompt += tuple(r.randrange(VOCAB) for _ in range(length - shared))
        params = SamplingParams(
            n=r.choice((1, 1, 1, r.randint(1, max_n))),
            max_tokens=r.choice((1, r.randint(1, 12), r.randint(1, 40), None)),
            ignore_eos=r.random() < 0.3,
            stop_token_ids=(r.randrange(VOCAB),) if r.random() < 0.3 else (),
        )
        return Request(
            request_id=f"r{len(self.clients)}",
            prompt_ids=prompt,
            params=params,
            eos_ids=(3,) if r.random() < 0.3 else (),
            seed=r.choice((0, r.getrandbits(60))),
            priority=r.choice((0, 0, 1)),
            queue_deadline=self.now + r.randint(0, 40) if r.random() < 0.1 else None,
            deadline=self.now + r.randint(1, 80) if r.random() < 0.1 else None,
            salt=r.choice(("", "", "tenant")),
        )
