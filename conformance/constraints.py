"""A backend under the rules of other hardware: five sets of constraints, and a check of every step.

A backend that takes any step can be told to declare less. Core then has to obey what it would have to obey on
hardware of that kind, with real tokens; a step that breaks a rule ends the check with a sentence.

| name | steps | shapes | tokens of a block |
|---|---|---|---|
| mixed | prompts and decodes together | any | 16 |
| static | prompts and decodes together | few, compiled before serving | 16 |
| split | prompts or decodes, not both | a ladder of buckets | 128 |
| host-lists | prompts and decodes together | any | 128 |
| rectangular | one prompt, or two decodes and more, with rows x context bounded | few, compiled before | 64 |
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from core.contract.batch import DECODE, PREFILL, StepBatch
from core.contract.errors import ConfigError, DeviceError
from core.contract.hookspecs import hookimpl
from core.contract.interfaces import Program
from core.contract.spec import BackendSpec, BatchRules, ShapeRules
from core.contract.types import State
from core.plugins import BackendHandle

_MIXED = BatchRules(mixed=True)
_SPLIT = BatchRules(mixed=False, max_prefills=2, max_tokens=256, max_requests=8)
_RECTANGULAR = BatchRules(
    mixed=False,
    max_prefills=1,
    prefill_multiple=64,
    max_tokens=128,
    max_requests=8,
    rectangular_decode=True,
    max_rows_x_context=1024,
    min_decode_rows=2,
)


@dataclass(frozen=True)
class Constraints:
    """What is declared in place of a backend's own rules."""

    batch: BatchRules
    shapes: ShapeRules = field(default_factory=ShapeRules)
    block_size: int = 16

    def apply(self, spec: BackendSpec) -> BackendSpec:
        """The spec under these rules and its own: of two limits the stricter.

        A ladder of its own stays, and so do its blocks where it has none of this size.
        """
        own, these = spec.batch, self.batch
        batch = replace(
            own,
            mixed=own.mixed and these.mixed,
            max_prefills=_least(own.max_prefills, these.max_prefills),
            prefill_multiple=max(own.prefill_multiple, these.prefill_multiple),
            max_tokens=_least(own.max_tokens, these.max_tokens),
            max_requests=_least(own.max_requests, these.max_requests),
            rectangular_decode=own.rectangular_decode or these.rectangular_decode,
            max_rows_x_context=_least(own.max_rows_x_context, these.max_rows_x_context),
            min_decode_rows=max(own.min_decode_rows, these.min_decode_rows),
        )
        sizes = (self.block_size,) if self.block_size in spec.cache.block_sizes else spec.cache.block_sizes
        return replace(
            spec,
            batch=batch,
            shapes=self.shapes if spec.shapes.kind == "dynamic" else spec.shapes,
            cache=replace(spec.cache, block_sizes=sizes),
            auto_rank=None,
        )


def _least(a: int | None, b: int | None) -> int | None:
    return min((n for n in (a, b) if n is not None), default=None)


CONSTRAINTS = {
    "mixed": Constraints(_MIXED),
    "static": Constraints(
        BatchRules(mixed=True, max_tokens=64, max_requests=4),
        ShapeRules(kind="static", token_buckets=(16, 64), request_buckets=(4,), width_buckets=(4, 8)),
    ),
    "split": Constraints(
        _SPLIT,
        ShapeRules(
            kind="bucketed",
            token_buckets=(32, 64, 128, 256),
            request_buckets=(1, 2, 4, 8),
            width_buckets=(1, 2, 4),
        ),
        128,
    ),
    "host-lists": Constraints(_MIXED, block_size=128),
    "rectangular": Constraints(
        _RECTANGULAR,
        ShapeRules(
            kind="static", token_buckets=(64, 128), request_buckets=(2, 4, 8), width_buckets=(2, 4, 8)
        ),
        64,
    ),
}


def constraints_of(name: str) -> Constraints:
    """Constraints by name.

    Raises:
        ConfigError: there are none of that name.
    """
    if name not in CONSTRAINTS:
        raise ConfigError(f"constraints {name!r} are not known; known are {', '.join(CONSTRAINTS)}")
    return CONSTRAINTS[name]


def check_step(batch: StepBatch, spec: BackendSpec) -> None:
    """Hold a step to the rules that a backend declares.

    Raises:
        DeviceError: names rule, found, wanted.
    """
    rules, shapes = spec.batch, spec.shapes
    kinds = batch.query_kind[: batch.num_requests].tolist()
    lens = (batch.query_start[1 : batch.num_requests + 1] - batch.query_start[: batch.num_requests]).tolist()
    prefills = kinds.count(PREFILL)
    whole = all(
        n % rules.prefill_multiple == 0 or _is_last(batch, r)
        for r, n in enumerate(lens)
        if kinds[r] == PREFILL
    )
    longest = int(batch.seq_lens[: batch.num_requests].max(initial=0))
    size = batch.plan.groups[0].block_size
    rows = max(batch.num_requests, rules.min_decode_rows)
    area = rows * -(-longest // size) * size
    is_decode = set(kinds) == {DECODE}
    held = {
        "decode rows come first": kinds == sorted(kinds),
        "no step is mixed": rules.mixed or prefills in (0, len(kinds)),
        "prefill rows": rules.max_prefills is None or prefills <= rules.max_prefills,
        "tokens of a step": rules.max_tokens is None or batch.num_tokens <= rules.max_tokens,
        "rows of a step": rules.max_requests is None or batch.num_requests <= rules.max_requests,
        "chunks are whole multiples": whole,
        "rows of a decode bucket": not is_decode or batch.bucket.requests >= rules.min_decode_rows,
        "rows x context": not is_decode
        or rules.max_rows_x_context is None
        or area <= rules.max_rows_x_context,
        "token bucket": is_decode or not shapes.token_buckets or batch.bucket.tokens in shapes.token_buckets,
        "request bucket": not shapes.request_buckets or batch.bucket.requests in shapes.request_buckets,
        "width bucket": not shapes.width_buckets
        or all(width in (0, *shapes.width_buckets) for width in batch.bucket.widths),
    }
    broken = [rule for rule, is_held in held.items() if not is_held]
    if broken:
        raise DeviceError(
            f"step {batch.step_id} breaks a declared rule ({broken[0]}): {batch.num_tokens} tokens in rows "
            f"of {lens}, the longest sequence of {longest}, in {batch.bucket}"
        )


def _is_last(batch: StepBatch, row: int) -> bool:
    """Whether a prompt's chunk may be its last one: then the row is sampled."""
    last = int(batch.query_start[row + 1]) - 1
    return last in batch.sample_rows[: batch.num_samples].tolist()


class CheckedProgram:
    """A program whose every step is held to the rules. See `core.contract.interfaces.Program`."""

    def __init__(self, inner: Program, spec: BackendSpec) -> None:
        self._inner, self._spec = inner, spec

    def warm(self, state: State) -> State:
        """See the protocol."""
        return self._inner.warm(state)

    def run(self, batch: StepBatch, state: State) -> Any:
        """See the protocol. Raises DeviceError where a rule is broken."""
        check_step(batch, self._spec)
        return self._inner.run(batch, state)

    def sample(self, output: Any, batch: StepBatch, sampling: Any, state: State) -> Any:
        """See the protocol."""
        return self._inner.sample(output, batch, sampling, state)

    def run_and_sample(self, batch: StepBatch, sampling: Any, state: State) -> Any:
        """See the protocol. Raises as `run`."""
        check_step(batch, self._spec)
        return self._inner.run_and_sample(batch, sampling, state)


class Constrained:
    """A backend's hooks, with constraints declared and checked."""

    def __init__(self, handle: BackendHandle, constraints: Constraints) -> None:
        self._handle = handle
        self.spec = constraints.apply(handle.spec)

    @hookimpl
    def core_backend_spec(self, request: Any) -> BackendSpec:
        return self.spec

    @hookimpl
    def core_probe(self, request: Any) -> Any:
        found = self._handle.probe(request)
        return list(found) if isinstance(found, tuple) else found

    @hookimpl
    def core_open_device(self, request: Any) -> Any:
        return self._handle.open_device(request)

    @hookimpl
    def core_memory_allocator(self, request: Any) -> Any:
        return self._handle.memory_allocator(request)

    @hookimpl
    def core_ops(self, request: Any) -> Any:
        return self._handle.ops(request)

    @hookimpl
    def core_compile(self, request: Any) -> Any:
        return CheckedProgram(self._handle.compile(request), self.spec)

    @hookimpl
    def core_communicator(self, request: Any) -> Any:
        return self._handle.communicator(request)

    @hookimpl
    def core_sampler(self, request: Any) -> Any:
        return self._handle.sampler(request)
