"""The null device: steps in flight, the shadow of the caches, and what was done wrong."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from core.contract.batch import Int32, StepBatch
from core.contract.errors import ConfigError, DeviceError, OutOfMemoryError
from core.contract.requests import DeviceRequest
from core.contract.spec import BackendSpec
from core.contract.types import (
    BlockRegion,
    Bucket,
    CacheLayerSpec,
    CachePlan,
    DeviceInfo,
    MemoryInfo,
    PackRequest,
    SamplingBatch,
    State,
)

NOTHING, IMPORTED = -1, -2
"""What a slot of a shadow holds besides the position written there: nothing yet, or imported data."""


def null_token(position: int, vocab: int, eos: int | None = None, eos_every: int = 0) -> int:
    """The token at a position of any sequence: (7 position + 3) mod vocab; `eos` where position + 1 is a
    multiple of `eos_every`, and nowhere else.
    """
    if eos is not None and eos_every and (position + 1) % eos_every == 0:
        return eos
    token = (position * 7 + 3) % vocab
    return (token + 1) % vocab if token == eos else token


@dataclass(eq=False)
class StepRecord:
    """One step as it was submitted: counts, and copies of all views.

    Attributes:
        index: its place in the log.
        sampling: parameters, once `sample` was called. tokens: int32 [num_samples], what it gave.
        is_done: it was waited for.
    """

    index: int
    step_id: int
    bucket: Bucket
    num_tokens: int
    num_requests: int
    num_decodes: int
    num_samples: int
    views: Mapping[str, Int32]
    checksum: int
    batch: StepBatch = field(repr=False)
    sampling: SamplingBatch | None = None
    tokens: Int32 | None = None
    is_done: bool = False

    def writes(self) -> dict[tuple[int, int], set[int]]:
        """(cache group, block or state slot) -> request slots that write it."""
        out: dict[tuple[int, int], set[int]] = {}
        T, R, v = self.num_tokens, self.num_requests, self.views
        owner = v["request_slots"][:R]
        for g, group in enumerate(self.batch.plan.groups):
            if group.kind == "state":
                pairs = zip(v[f"state_write.{g}"][:R].tolist(), owner.tolist(), strict=True)
            else:
                blocks = v[f"slots.{g}"][:T] // group.block_size
                pairs = zip(blocks.tolist(), owner[v["row_of_token"][:T]].tolist(), strict=True)
            for block, slot in set(pairs):
                out.setdefault((g, block), set()).add(slot)
        return out


class NullDevice:
    """See `core.contract.interfaces.Device`.

    Attributes:
        log: every step submitted, in order. violations: sentences, one per breach seen.
        memory_calls: block operations, as (method, arguments), in order.
        serves_any_shape: one program may be given steps of every bucket.
    """

    def __init__(self, spec: BackendSpec, request: DeviceRequest) -> None:
        known = {
            "delay": 0,
            "vocab": 256,
            "eos": -1,
            "eos_every": 0,
            "fail_step": -1,
            "memory": 1 << 26,
            "step_ms": 0,
        }
        for name, text in request.options.items():
            if name not in known:
                raise ConfigError(f"backend {spec.name!r} has no option {name!r}; it has {', '.join(known)}")
            known[name] = int(text)
        self.serves_any_shape = spec.shapes.kind == "dynamic"
        self.delay, self.vocab = known["delay"], known["vocab"]
        self._step_s = known["step_ms"] / 1000
        self.eos = None if known["eos"] < 0 else known["eos"]
        self.eos_every, self.fail_step, self._memory = known["eos_every"], known["fail_step"], known["memory"]
        self.log: list[StepRecord] = []
        self.violations: list[str] = []
        self.memory_calls: list[tuple[str, tuple[Any, ...]]] = []
        self.used_bytes = 0
        self._released = 0
        self._done = 0
        self._last_position: dict[int, int] = {}
        self._info = DeviceInfo(
            backend=spec.name, index=request.index, name="null device", memory_bytes=self._memory
        )
        self._open = True

    @property
    def info(self) -> DeviceInfo:
        """See the protocol."""
        return self._info

    def memory(self) -> MemoryInfo:
        """See the protocol."""
        free = self._memory - self.used_bytes
        return MemoryInfo(total_bytes=self._memory, free_bytes=free, kind="declared")

    def host_buffer(self, size: int) -> Int32:
        """See the protocol."""
        self.check_open()
        return np.zeros(size, np.int32)

    def synchronize(self) -> None:
        """Finish every step."""
        self.check_open()
        if self.log:
            self.finish(self.log[-1])

    def close(self) -> None:
        """See the protocol."""
        self._open = False

    def check_open(self) -> None:
        """Raises DeviceError after `close`."""
        if not self._open:
            raise DeviceError("the null device is closed; open it again before using it")

    def release(self) -> None:
        """Make the tokens of every step submitted so far ready."""
        self._released = len(self.log)

    def is_ready(self, record: StepRecord) -> bool:
        """Whether the tokens of a step have arrived."""
        later = len(self.log) - 1 - record.index
        return record.is_done or record.index < self._released or later >= self.delay

    def in_flight(self) -> list[StepRecord]:
        """Steps that nobody has waited for, in order."""
        return self.log[self._done :]

    def token(self, position: int) -> int:
        """The token that this device draws for a position."""
        return null_token(position, self.vocab, self.eos, self.eos_every)

    def submit(self, batch: StepBatch, shadows: Sequence[Int32 | None]) -> StepRecord:
        """Record a step and check it against those in flight and against what the caches hold."""
        self.check_open()
        time.sleep(self._step_s)
        if len(self.log) == self.fail_step:
            raise DeviceError(f"the null device fails at step {self.fail_step}, as its options say")
        if self._step_s:
            time.sleep(self._step_s)
        record = StepRecord(
            index=len(self.log),
            step_id=batch.step_id,
            bucket=batch.bucket,
            num_tokens=batch.num_tokens,
            num_requests=batch.num_requests,
            num_decodes=batch.num_decodes,
            num_samples=batch.num_samples,
            views={name: view.copy() for name, view in batch.views.items()},
            checksum=zlib.crc32(batch.flat),
            batch=batch,
        )
        self._check_writers(record)
        self._check_slots(record)
        self._check_sources(record)
        for g, shadow in enumerate(shadows):
            if shadow is not None:
                self._write_and_check_reads(record, g, shadow)
        self.log.append(record)
        return record

    def draw(self, record: StepRecord, sampling: SamplingBatch) -> Int32:
        """Tokens of a step, and the note of what `last` holds now."""
        n, v = record.num_samples, record.views
        drawn = v["positions"][v["sample_rows"][:n]] + 1
        if not np.array_equal(drawn, np.asarray(sampling.position)[:n]):
            self._breach(record, f"samples positions {drawn.tolist()} as {list(sampling.position)}")
        for slot, position in zip(v["sample_slots"][:n].tolist(), drawn.tolist(), strict=True):
            self._last_position[slot] = position
        record.sampling = sampling
        record.tokens = np.array([self.token(p) for p in drawn.tolist()], np.int32)
        return record.tokens

    def set_last(self, slots: Sequence[int]) -> None:
        """Tokens came from the host: what `last` holds there is the caller's affair."""
        for slot in slots:
            self._last_position.pop(slot, None)

    def finish(self, record: StepRecord) -> None:
        """Finish a step and all before it; their buffers must be as they were at submission."""
        while self._done <= record.index:
            earlier = self.log[self._done]
            self._done += 1
            earlier.is_done = True
            if zlib.crc32(earlier.batch.flat) != earlier.checksum:
                self._breach(earlier, "had its host buffer changed while it was in flight")

    def note(self, method: str, *arguments: Any) -> None:
        """Record a block operation."""
        self.check_open()
        self.memory_calls.append((method, arguments))

    def _breach(self, record: StepRecord, what: str) -> None:
        self.violations.append(f"step {record.step_id} {what}")

    def _check_writers(self, record: StepRecord) -> None:
        writes = record.writes()
        for (g, block), slots in writes.items():
            if block == 0:
                self._breach(record, f"writes real entries of slots {sorted(slots)} to the pad block of {g}")
            if len(slots) > 1:
                self._breach(record, f"writes block {block} of group {g} for slots {sorted(slots)}")
        for other in self.in_flight():
            for key, slots in other.writes().items():
                if writes.get(key, slots) != slots:
                    self._breach(
                        record,
                        f"writes block {key[1]} of group {key[0]} for slots {sorted(writes[key])} while step "
                        f"{other.step_id}, which writes it for {sorted(slots)}, is in flight",
                    )

    def _check_slots(self, record: StepRecord) -> None:
        """A request slot goes on where the step in flight left it, else another sequence has it."""
        next_position: dict[int, int] = {}
        for other in self.in_flight():
            next_position.update(_ends(other))
        for slot, start in _starts(record).items():
            if next_position.get(slot, start) != start:
                self._breach(
                    record,
                    f"starts request slot {slot} at position {start} while a step in flight ends at "
                    f"{next_position[slot]}",
                )

    def _check_sources(self, record: StepRecord) -> None:
        source = record.views["token_source"][: record.num_tokens]
        for t in np.flatnonzero(source >= 0).tolist():
            slot, position = int(source[t]), int(record.views["positions"][t])
            held = self._last_position.get(slot)
            if held is not None and held != position:
                self._breach(
                    record,
                    f"takes position {position} from last[{slot}], which holds the token of position {held}",
                )

    def _write_and_check_reads(self, record: StepRecord, g: int, shadow: Int32) -> None:
        """shadow int32 [B * Z]: the position that each slot of the group holds."""
        T, v = record.num_tokens, record.views
        group = record.batch.plan.groups[g]
        shadow[v[f"slots.{g}"][:T]] = v["positions"][:T]
        for r in range(record.num_requests):
            first, length = int(v["query_start"][r]), int(v["seq_lens"][r])
            low = 0 if group.window is None else max(0, int(v["positions"][first]) - group.window + 1)
            j = np.arange(low, length)
            table = v[f"block_tables.{g}"][r]
            held = shadow[table[j // group.block_size] * group.block_size + j % group.block_size]
            wrong = j[(held != j) & (held != IMPORTED)]
            if len(wrong):
                self._breach(
                    record,
                    f"row {r} reads position {wrong[0]} in group {g}, where the cache holds "
                    f"{held[wrong[0] - low]} ({NOTHING} = nothing)",
                )


def _starts(record: StepRecord) -> dict[int, int]:
    v, R = record.views, record.num_requests
    starts = v["positions"][v["query_start"][:R]]
    return dict(zip(v["request_slots"][:R].tolist(), starts.tolist(), strict=True))


def _ends(record: StepRecord) -> dict[int, int]:
    v, R = record.views, record.num_requests
    return dict(zip(v["request_slots"][:R].tolist(), v["seq_lens"][:R].tolist(), strict=True))


@dataclass(frozen=True)
class NullPacked:
    """A parameter of which only shape, dtype and name are kept."""

    shape: tuple[int, ...]
    dtype: str
    name: str


@dataclass(frozen=True)
class NullCache:
    """One layer's cache: its group, and the shadow that the layers of a group share (None for state)."""

    num_bytes: int
    group: int
    layer: CacheLayerSpec
    shadow: Int32 | None
    block_size: int


@dataclass(frozen=True)
class Ready:
    """A Pending that is there already."""

    value: Any

    def is_ready(self) -> bool:
        """Always."""
        return True

    def get(self) -> Any:
        """The value."""
        return self.value


class NullAllocator:
    """See `core.contract.interfaces.MemoryAllocator`. Exports are zeros; imported blocks count as written."""

    def __init__(self, device: NullDevice, budget_bytes: int | None) -> None:
        self.device = device
        self._budget = budget_bytes
        self._used = 0

    def block_bytes(self, layer: CacheLayerSpec, block_size: int) -> int:
        """See the protocol."""
        if layer.kind == "state":
            return sum(math.prod(p.shape) * _dtype(p.dtype).itemsize for p in layer.state)
        return layer.elements_per_token() * block_size * _dtype(layer.dtype).itemsize

    def allocate_state(self, plan: CachePlan) -> State:
        """See the protocol."""
        shadows = [
            None if g.kind == "state" else np.full(g.num_blocks * g.block_size, NOTHING, np.int32)
            for g in plan.groups
        ]
        sizes = [
            plan.groups[g].num_blocks * self.block_bytes(layer, plan.groups[g].block_size)
            for layer, g in zip(plan.layers, plan.group_of, strict=True)
        ]
        self._reserve("the cache", sum(sizes))
        caches = tuple(
            NullCache(size, g, layer, shadows[g], plan.groups[g].block_size)
            for size, layer, g in zip(sizes, plan.layers, plan.group_of, strict=True)
        )
        rows = plan.max_requests + 1
        history = np.zeros((rows, plan.history_size), np.int32) if plan.history_size else None
        return State(caches, np.zeros(rows, np.int32), np.zeros(rows, np.int32), history)

    def free_state(self, state: State) -> None:
        """See the protocol."""
        self.device.note("free_state")
        self._reserve("the cache", -sum(cache.num_bytes for cache in state.caches))

    def export_blocks(self, state: State, layer: int, blocks: Sequence[int]) -> Ready:
        """See the protocol."""
        self.device.note("export_blocks", layer, tuple(blocks))
        cache, n = state.caches[layer], len(blocks)
        spec, Z = cache.layer, cache.block_size
        if spec.kind == "state":
            return Ready(tuple(np.zeros((n, *p.shape), _dtype(p.dtype)) for p in spec.state))
        if spec.kind == "latent":
            return Ready((np.zeros((n, Z, spec.latent_size + spec.rope_size), _dtype(spec.dtype)),))
        shape = (n, Z, spec.num_kv_heads)
        k = np.zeros((*shape, spec.head_size), _dtype(spec.dtype))
        return Ready((k, np.zeros((*shape, spec.v_head_size), _dtype(spec.dtype))))

    def import_blocks(
        self, state: State, layer: int, blocks: Sequence[int], data: tuple[npt.NDArray[Any], ...]
    ) -> State:
        """See the protocol."""
        self.device.note("import_blocks", layer, tuple(blocks))
        cache = state.caches[layer]
        if cache.shadow is not None:
            cache.shadow.reshape(-1, cache.block_size)[list(blocks)] = IMPORTED
        return State(*state)

    def copy_blocks(self, state: State, group: int, src: Sequence[int], dst: Sequence[int]) -> State:
        """See the protocol."""
        self.device.note("copy_blocks", group, tuple(src), tuple(dst))
        for blocks in self._shadow(state, group):
            blocks[list(dst)] = blocks[list(src)]
        return State(*state)

    def zero_blocks(self, state: State, group: int, blocks: Sequence[int]) -> State:
        """See the protocol."""
        self.device.note("zero_blocks", group, tuple(blocks))
        for shadow in self._shadow(state, group):
            shadow[list(blocks)] = NOTHING
        return State(*state)

    def set_last(self, state: State, slots: Sequence[int], tokens: Sequence[int]) -> State:
        """See the protocol."""
        self.device.note("set_last", tuple(slots), tuple(tokens))
        self.device.set_last(slots)
        state.last[list(slots)] = tokens
        return State(*state)

    def pack(self, request: PackRequest) -> NullPacked:
        """See the protocol."""
        self._reserve(request.name, math.prod(request.array.shape) * _dtype(request.dtype).itemsize)
        return NullPacked(tuple(request.array.shape), request.dtype, request.name)

    def unpack(self, packed: NullPacked) -> npt.NDArray[Any]:
        """Zeros."""
        return np.zeros(packed.shape, _dtype(packed.dtype))

    def regions(self, state: State, layer: int, block: int) -> tuple[BlockRegion, ...]:
        """None."""
        return ()

    def used_bytes(self) -> int:
        """See the protocol."""
        return self._used

    def _shadow(self, state: State, group: int) -> list[Int32]:
        caches = [c for c in state.caches if c.group == group and c.shadow is not None]
        return [c.shadow.reshape(-1, c.block_size) for c in caches[:1]]

    def _reserve(self, what: str, wanted: int) -> None:
        free = self.device.memory().free_bytes
        if self._budget is not None:
            free = min(free, self._budget - self._used)
        if wanted > free:
            raise OutOfMemoryError(what, wanted, free)
        self._used += wanted
        self.device.used_bytes += wanted


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))
