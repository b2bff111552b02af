"""Typed Protocols of the objects that hooks return. The step loop calls these, never pluggy.

Common rules. All calls on one device take effect in submission order. Calls marked *async* return before the
device is done; `Pending.get()` waits. Objects are used by one thread. Errors: `OutOfMemoryError` when an
allocation does not fit (nothing was allocated), `UnsupportedError` for what `BackendSpec` does not declare
(before memory is touched), `DeviceError` for the device's own failure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from core.contract.batch import Int32, Step, StepBatch, StepLayout
from core.contract.ops import Ops
from core.contract.opspecs import AttentionSpec, LatentSpec
from core.contract.types import (
    Array,
    BlockRegion,
    Bucket,
    CacheHandle,
    CacheLayerSpec,
    CachePlan,
    DeviceInfo,
    MemoryInfo,
    Packed,
    PackRequest,
    SampledTokens,
    SamplingBatch,
    State,
)


@runtime_checkable
class Pending(Protocol):
    """A value on its way from the device."""

    def is_ready(self) -> bool:
        """Whether `get` would return at once. Never blocks."""

    def get(self) -> Any:
        """Wait and return the value as host arrays. May be called again and gives the same value.

        Raises:
            DeviceError: the work failed.
        """


class DeviceTokens(Protocol):
    """Tokens of one step, on their way to the host."""

    def is_ready(self) -> bool:
        """Whether `get` would return at once. Never blocks."""

    def get(self) -> SampledTokens:
        """Wait; the real rows only, in the order of `sample_rows`: tokens int32 [num_samples]."""


class StepOutput(Protocol):
    """What a step's forward pass left on the device."""

    def get(self) -> npt.NDArray[np.float32]:
        """Wait; logits of the real sampled rows (or hidden of the real tokens for an inner stage), float32
        [n, V or D].

        With `Outputs.all_logits`: of every real token. Which of them it is follows from the batch's
        `Outputs`, never from the shape.
        """

    def hidden(self, layer: int) -> npt.NDArray[np.float32]:
        """Wait; hidden state after `layer`, float32 [num_tokens, D], of a layer named in
        `Outputs.hidden_layers`.
        """


class Device(Protocol):
    """One open device."""

    @property
    def info(self) -> DeviceInfo:
        """As the probe gave it, with figures that needed the driver."""

    def memory(self) -> MemoryInfo:
        """Memory now. A declared figure never exceeds what the device has."""

    def host_buffer(self, size: int) -> Int32:
        """A host int32 array [size] from which a copy to the device is fast (pinned where that exists);
        zeroed.

        An engine takes one more than it has steps in flight and uses them in turn. A rank in a process of
        its own gets batches in ordinary, read-only arrays.
        """

    def synchronize(self) -> None:
        """Wait for everything submitted."""

    def close(self) -> None:
        """Give everything back. Idempotent; later calls on the device raise DeviceError."""


class MemoryAllocator(Protocol):
    """Owns the device memory of one model: caches, state and weights. Layouts are its own affair."""

    def block_bytes(self, layer: CacheLayerSpec, block_size: int) -> int:
        """Device bytes that one block (or state slot) of this layer takes, padding included. Pure."""

    def allocate_state(self, plan: CachePlan) -> State:
        """Caches for every layer, and `last` [max_requests + 1] zeroed. Blocks hold unspecified values.

        Raises:
            OutOfMemoryError: it does not fit the budget; nothing was allocated.
            UnsupportedError: a layer's kind, dtype or head size, or a block size is not declared.
        """

    def free_state(self, state: State) -> None:
        """Give the caches back; no step is in flight. The state may not be used again."""

    def export_blocks(self, state: State, layer: int, blocks: Sequence[int]) -> Pending:
        """Async. Copies of blocks (or state slots) in canonical form: a tuple of host arrays [n, ...].

        paged and window: (k [n, Z, K, H], v [n, Z, K, Hv]); latent: (c [n, Z, C + P],); state: one [n,
        *shape] per part.
        """

    def import_blocks(
        self, state: State, layer: int, blocks: Sequence[int], data: tuple[npt.NDArray[Any], ...]
    ) -> State:
        """The inverse of `export_blocks`, bit-exact in the cache's dtype."""

    def copy_blocks(self, state: State, group: int, src: Sequence[int], dst: Sequence[int]) -> State:
        """Copy whole blocks (or state slots) in every layer of a group; reads come before writes."""

    def zero_blocks(self, state: State, group: int, blocks: Sequence[int]) -> State:
        """Set blocks (or state slots) to zero in every layer of a group."""

    def set_last(self, state: State, slots: Sequence[int], tokens: Sequence[int]) -> State:
        """Write tokens into `last`, for tokens that were sampled on the host."""

    def pack(self, request: PackRequest) -> Packed:
        """Bring a parameter to the device in the layout that its uses want.

        Raises:
            OutOfMemoryError, UnsupportedError: as above.
        """

    def unpack(self, packed: Packed) -> npt.NDArray[Any]:
        """The canonical array again, in the packed precision; for tests and weight export."""

    def regions(self, state: State, layer: int, block: int) -> tuple[BlockRegion, ...]:
        """Raw memory of one block, for transfers between equal layouts; () where that makes no sense."""

    def used_bytes(self) -> int:
        """Device memory that this allocator holds now."""


class AttentionKernel(Protocol):
    """Attention over one kind of cache layer; semantics in `Ops.attend`."""

    @property
    def name(self) -> str:
        """Shown by `core doctor` and in reports."""

    def supports(self, layer: CacheLayerSpec, attention: AttentionSpec | LatentSpec) -> bool:
        """Whether `attend` handles this geometry. Pure."""

    def attend(
        self,
        q: Array,
        k: Array | None,
        v: Array | None,
        cache: CacheHandle,
        step: Step,
        spec: AttentionSpec,
        sinks: Array | None,
        want_lse: bool,
    ) -> tuple[Array, Array | None, CacheHandle]:
        """As `Ops.attend`."""


class Communicator(Protocol):
    """Collectives of one group. Value semantics: the result is returned, the input is undefined afterwards.

    Any size and any shape, 0 elements included; a backend pads where its library needs it. All members call
    the same methods in the same order.
    """

    @property
    def rank(self) -> int:
        """This member, in [0, world_size)."""

    @property
    def world_size(self) -> int:
        """Members."""

    def all_reduce(self, x: Array) -> Array:
        """Sum over members, accumulated in float32 or wider, same shape and dtype."""

    def all_gather(self, x: Array, dim: int) -> Array:
        """Members' arrays, equal in shape and dtype, joined along `dim` in rank order."""

    def reduce_scatter(self, x: Array, dim: int) -> Array:
        """Sum over members, of which this member gets its equal part along `dim`."""

    def all_to_all(self, x: Array, send: Sequence[int], receive: Sequence[int]) -> Array:
        """Rows of dimension 0: `send[r]` rows go to member r, `receive[r]` come from it, in rank order."""

    def broadcast(self, x: Array, source: int) -> Array:
        """The source's value, everywhere."""

    def send(self, x: Array, to: int) -> None:
        """Give `x` to one member."""

    def receive(self, like: Array, source: int) -> Array:
        """An array of `like`'s shape and dtype from one member."""

    def barrier(self) -> None:
        """Return when every member has called it."""

    def close(self) -> None:
        """Leave the group. Idempotent."""


StepFunction = Callable[
    [Ops, tuple[Packed, ...], tuple[CacheHandle, ...], Step], tuple[Array, tuple[CacheHandle, ...]]
]
"""fn(ops, weights, caches, step) -> (logits float32 [R, V] of `sample_rows`, caches). Pure, traceable, no
collectives beyond those in `ops`."""

ReferenceSampler = Callable[[npt.NDArray[np.float32], SamplingBatch], SampledTokens]
"""Host sampler: logits float32 [n, V] and parameters to tokens."""


@dataclass(frozen=True, kw_only=True)
class CompileRequest:
    """`core_compile` gets this.

    Attributes:
        fn: the step function; the same object for all buckets.
        weights: packed parameters, in the order `fn` wants. Never donated.
        state: the device's state when the program is made (a graph is captured over it).
        layout: of this program's bucket. plan: the caches.
        sampler: the device sampler, or None; then `reference_sampler` runs on the host.
    """

    device: Device
    fn: StepFunction
    ops: Ops
    weights: tuple[Packed, ...]
    state: State
    layout: StepLayout
    plan: CachePlan
    sampler: Sampler | None
    reference_sampler: ReferenceSampler

    @property
    def bucket(self) -> Bucket:
        """The static shape that the program serves."""
        return self.layout.bucket


class Program(Protocol):
    """One compiled step for one bucket."""

    def warm(self, state: State) -> State:
        """Compile and measure now what would otherwise happen on the first run. Changes no block but the pad
        block.
        """

    def run(self, batch: StepBatch, state: State) -> tuple[StepOutput, State]:
        """Async. Forward pass. `batch.flat` is not read after the step's tokens were waited for.

        The state given in may not be used again; the caller keeps the returned one.

        Raises:
            UnsupportedError: `batch.layout` is not the one that this was compiled for, or it holds what
                is not declared. Nothing was run; the state given in is still good.
        """

    def sample(
        self, output: StepOutput, batch: StepBatch, sampling: SamplingBatch, state: State
    ) -> tuple[DeviceTokens, State]:
        """Async where the sampler runs on the device. The only writer of `last[sample_slots]`."""

    def run_and_sample(
        self, batch: StepBatch, sampling: SamplingBatch, state: State
    ) -> tuple[DeviceTokens, State]:
        """`run` then `sample`, as one captured unit where that pays. Backends without one call the two in
        turn.
        """


class Sampler(Protocol):
    """A device sampler. Must agree with the reference sampler token by token on equal logits."""

    def sample(self, logits: Array, sampling: SamplingBatch) -> Pending:
        """Async. logits [n, V] on the device; gives SampledTokens."""


class Observer(Protocol):
    """Callbacks of the step loop. Called in the engine's thread; must not block or raise."""

    def on_step(self, step_id: int, num_tokens: int, num_requests: int, duration_s: float) -> None:
        """After a step was waited for."""

    def on_request_finished(self, request_id: str, reason: str, num_output_tokens: int) -> None:
        """After a request ended."""
