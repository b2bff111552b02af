"""Frozen records that cross the waist: devices, caches, parameters, buckets, sampling.

Sizes are counts of elements unless the name ends in `_bytes`; times end in `_s`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from core.contract.spec import needs

Array = Any
"""An array of the backend's framework. Model code may use + - * /, `reshape`, slicing, and ops on it."""

Packed = Any
"""A parameter in the backend's own layout, as `MemoryAllocator.pack` returned it."""

CacheHandle = Any
"""One layer's cache in the backend's own layout. It names its cache group."""

CacheKind = Literal["paged", "window", "latent", "state"]
GroupKind = Literal["paged", "window", "state"]
StepKind = Literal["decode", "prefill", "mixed"]
Execution = Literal["native", "emulated", "compiled"]


@dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """One device that `core_probe` found.

    Attributes:
        backend: the backend's name.
        index: what `DeviceRequest.index` takes.
        name: the vendor's name of the device.
        memory_bytes: its memory, or None where that cannot be asked without a driver context.
        memory_kind: whether `memory_bytes` was measured or is declared.
        driver: driver or library version, for reports.
        execution: how steps run on it. "native" = on the hardware that the backend is named for; "emulated" =
            elsewhere, where an interpreter or a stand-in takes its place; "compiled" = the vendor's compiler
            makes programs for it, which nothing runs. Nothing is taken for native that does not say so. The
            word of an open device counts in reports: options may change where it runs.
    """

    backend: str
    index: int
    name: str
    memory_bytes: int | None = None
    memory_kind: Literal["measured", "declared"] = "declared"
    driver: str = ""
    execution: Execution = "emulated"


@dataclass(frozen=True)
class Unavailable:
    """Why a probe found no device, and what the user can do about it."""

    reason: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class MemoryInfo:
    """Device memory in bytes at the time of asking."""

    total_bytes: int
    free_bytes: int
    kind: Literal["measured", "declared"]


@dataclass(frozen=True, kw_only=True)
class StatePart:
    """One array of a state layer, for one slot: name ("conv", "scan"), shape without the slot axis, dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class CacheLayerSpec:
    """Geometry of one layer's cache, local to the rank.

    Canonical form of a block, C order, as `export_blocks` gives it:
    paged, window: k [Z, K, H] and v [Z, K, v_head_size]; latent: one array [Z, latent_size + rope_size], the
    normed latent first, the rotated key part after it; state: one array per part, [*shape], of a slot.

    Attributes:
        window: tokens that a query sees, itself included ("window" only).
    """

    kind: CacheKind
    dtype: str
    num_kv_heads: int = 0
    head_size: int = 0
    v_head_size: int = 0
    window: int | None = None
    latent_size: int = 0
    rope_size: int = 0
    state: tuple[StatePart, ...] = ()

    def elements_per_token(self) -> int:
        """Elements that one token takes in this layer (0 for state layers)."""
        if self.kind == "state":
            return 0
        if self.kind == "latent":
            return self.latent_size + self.rope_size
        return self.num_kv_heads * (self.head_size + self.v_head_size)


@dataclass(frozen=True, kw_only=True)
class CacheGroupSpec:
    """Layers that share one block table (or one set of state slots).

    Attributes:
        kind: "paged" (latent layers too), "window" or "state".
        layers: indices of its layers.
        block_size: tokens per block; for "state" the spacing of checkpoints.
        num_blocks: blocks, or state slots; id 0 is the pad block and belongs to no request.
        window: tokens that a query sees ("window" only).
    """

    kind: GroupKind
    layers: tuple[int, ...]
    block_size: int
    num_blocks: int
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """All caches of one rank. `layers[i]` belongs to `groups[group_of[i]]`.

    Attributes:
        max_requests: request slots; the device buffer `last` has one more.
        history_size: tokens of output kept per slot in `State.history` (0 = none).
    """

    layers: tuple[CacheLayerSpec, ...]
    groups: tuple[CacheGroupSpec, ...]
    group_of: tuple[int, ...]
    max_requests: int
    history_size: int = field(default=0, metadata=needs("sampler_history"))


class State(NamedTuple):
    """Everything on the device that a step changes. One object shared by all programs of a device.

    A step takes it and returns it; the caller never keeps the old one. `last` is int32 [max_requests + 1]:
    each request slot's newest token, the extra slot takes padding. `accepted` is int32 [max_requests + 1] for
    backends that declare `lengths_on_device`, `history` int32 [max_requests + 1, history_size] for those that
    declare `sampler_history`.
    """

    caches: tuple[CacheHandle, ...]
    last: Array
    accepted: Array | None = None
    history: Array | None = None


@dataclass(frozen=True)
class BlockRegion:
    """A block's place in memory, for raw transfer between equal layouts: address, size and layout
    fingerprint.
    """

    address: int
    num_bytes: int
    layout: str


@dataclass(frozen=True)
class Part:
    """One tensor of the checkpoint, or a region of one.

    Attributes:
        name: the tensor's name in the checkpoint.
        shape: shape of this part (of the region where `start` is given).
        axes: logical axis of each dimension: embed, heads, kv_heads, head, mlp, vocab, expert, layer, or "" =
            never cut.
        start: where the region begins in the stored tensor; None = the part is the whole tensor.
        unit: elements of each dimension that stay together when it is cut (a head's rows, say); () = 1 each.
        pick: (period, first, size): of every `period` rows of the stored tensor (from `start` on) the part is
            the `size` rows from `first` on; for tensors that interleave two matrices head by head.
        pick_axis: the dimension whose elements `pick` calls rows.
        transform: after reading: "add_one", in float64, for norms stored around zero; "drop_axis_1" removes
            an axis of size 1, "transpose" swaps the last two (matrices stored [in, out]), both after
            everything else: `shape`, `axes` and the rest describe the part as it is stored.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    start: tuple[int, ...] | None = None
    unit: tuple[int, ...] = ()
    pick: tuple[int, int, int] | None = None
    transform: Literal["none", "add_one", "drop_axis_1", "transpose"] = "none"
    pick_axis: int = 0


@dataclass(frozen=True)
class Param:
    """One array that the model uses: parts are cut for the rank one by one, then joined.

    Attributes:
        parts: joined along `join`; with `stack` = n they form n equal groups, each joined, then stacked on a
            new axis 0.
        uses: every op that reads it ("linear", "embed", "norm", "experts", "conv", "constant"), so that one
            packed layout can serve all of them.
    """

    parts: tuple[Part, ...]
    uses: tuple[str, ...]
    join: int = 0
    stack: int = 0


@dataclass(frozen=True, kw_only=True)
class PackRequest:
    """One parameter to bring to the device.

    Attributes:
        array: canonical host array: [out, in] for products; [E, out, in] for experts. float64, float32,
            bfloat16, ...
        uses: as in `Param`.
        dtype: dtype on the device; norms, biases and constants may be kept wider by the backend.
        name: for errors and reports.
        scheme: quantization scheme of `array`; "" = none. With one, `array` is uint8 [..., out, row bytes]:
            each row of `in` elements as blocks of 32, and their values are exact (dtype does not round
            them). "q4_0": float16 d, 16 bytes, values d * (q - 8); "q4_1": float16 d and m, 16 bytes,
            d * q + m; q of element i is the low half of byte i, of element 16 + i its high half. "q8_0":
            float16 d, 32 int8 q, d * q.
    """

    array: Array
    uses: tuple[str, ...]
    dtype: str
    name: str
    scheme: str = field(default="", metadata=needs("quantization"))


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a step gives besides tokens; static.

    Attributes:
        hidden_layers: layers whose hidden state is returned.
        all_logits: logits of every token, not of the sampled rows only.
    """

    hidden_layers: tuple[int, ...] = field(default=(), metadata=needs("batch.hidden_states"))
    all_logits: bool = False


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The static shape of a step; all that traced code may depend on.

    Attributes:
        tokens: T, tokens padded. requests: R, rows padded; also the number of sampled rows, padded.
        widths: B of each cache group's block table (0 for state groups).
        kind: "decode" = one token per row and token t is row t, padding included; "prefill", "mixed"
            otherwise.
        max_query: tokens of the longest row at most. max_seq: context of the longest row at most.
    """

    tokens: int
    requests: int
    widths: tuple[int, ...]
    kind: StepKind
    max_query: int
    max_seq: int
    outputs: Outputs = field(default_factory=Outputs)


@dataclass(frozen=True, kw_only=True)
class SamplingBatch:
    """Sampling parameters of the sampled rows; host arrays of [n], n = real rows (backends pad).

    token = argmax over allowed v of logit[v] / T + Gumbel, with Philox numbers keyed by (seed; position,
    choice); see docs/sampling.md. temperature 0 = greedy, ties to the lowest id.

    Attributes:
        temperature, top_p, min_p, presence, frequency, repetition: float32.
        top_k, position, choice: int32; top_k 0 = off; position = index, in prompt + output, of the token to
            draw.
        seed: uint64.
        logprobs: int32, how many alternatives to report; -1 = none.
        bias_ids, bias_values, bias_start: logit biases of row i are [bias_start[i], bias_start[i + 1]);
            None = none.
        bitmask: uint32 [n, ceil(V / 32)], bit v % 32 of word v // 32 set = allowed; None = all allowed.
        history: row i's prompt ids and output ids for penalties; None = no penalties in this batch.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    seed: Any
    position: Any
    choice: Any
    presence: Any = None
    frequency: Any = None
    repetition: Any = None
    logprobs: Any = None
    bias_ids: Any = None
    bias_values: Any = None
    bias_start: Any = None
    bitmask: Any = None
    history: tuple[tuple[Any, Any], ...] | None = None


@dataclass(frozen=True)
class SampledTokens:
    """Result of sampling on the host.

    Attributes:
        tokens: int32 [n]; -1 where nothing was drawn, as the largest logit is no finite number (NaN counts as
            the largest). Such a row's place in `last` gets 0, so that steps in flight have an id.
        logprobs: where a row asked for them, float32 [n]: log-softmax of the raw logits at the token; NaN in
            rows that did not ask.
        ranks: int32 [n]: 1 + how many ids have a larger raw logit than the token.
        top_ids, top_logprobs: int32 and float32 [n, k], k = the most that a row asked for: the largest raw
            logits' ids, ties to the lower id, and their log-softmax.
    """

    tokens: Any
    logprobs: Any = None
    ranks: Any = None
    top_ids: Any = None
    top_logprobs: Any = None
