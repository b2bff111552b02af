"""What a backend declares, as data: `BackendSpec` and its rules; the check that nothing else is asked of it.

A field of a record whose metadata names a capability may differ from its default only for a backend whose
`BackendSpec` declares it: `check_capabilities` refuses anything else, typed, before memory is touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from core.contract.errors import UnsupportedError

ProcessModel = Literal["per_device", "single_controller"]
Determinism = Literal["none", "batch_invariant", "bitwise"]


@dataclass(frozen=True, kw_only=True)
class BatchRules:
    """How rows may be combined in one step. Core obeys; the backend never reorders.

    Decode and verify rows always come first.

    Attributes:
        mixed: decode and prefill rows may share a step.
        max_prefills: prefill rows in one step at most; None = no limit.
        prefill_multiple: each prefill chunk but a prompt's last one is a multiple of this many tokens.
        max_tokens: tokens in one step at most; None = no limit.
        max_requests: rows in one step at most; None = no limit.
        rectangular_decode: a decode step is a rectangle, rows padded on the left with pad blocks to the
            longest.
        max_rows_x_context: rows times the longest row's context, rounded up to whole blocks, of a decode
            step at most. Rows are counted before they are padded to a bucket, but as `min_decode_rows` at
            least.
        min_decode_rows: a decode step is padded to at least this many rows.
        adapters: `StepBatch.adapter_slots` is read.
        input_embeds: `StepBatch.input_embeds` is read.
        prefix_groups: `prefix_group` and `prefix_blocks` of a step are read.
        hidden_states: hidden states of chosen layers can be returned.
    """

    mixed: bool = True
    max_prefills: int | None = None
    prefill_multiple: int = 1
    max_tokens: int | None = None
    max_requests: int | None = None
    rectangular_decode: bool = False
    max_rows_x_context: int | None = None
    min_decode_rows: int = 1
    adapters: bool = False
    input_embeds: bool = False
    prefix_groups: bool = False
    hidden_states: bool = False


@dataclass(frozen=True, kw_only=True)
class ShapeRules:
    """Which shapes a Program accepts.

    Attributes:
        kind: "dynamic" = any shape, one Program serves all; "bucketed" = core pads to a ladder of buckets,
            new ones may be compiled while serving; "static" = every bucket is compiled before serving starts.
        token_buckets, request_buckets: the ladder, ascending; () = powers of two chosen by core.
        width_buckets: columns of the block tables, ascending; () = powers of two chosen by core.
    """

    kind: Literal["dynamic", "bucketed", "static"] = "dynamic"
    token_buckets: tuple[int, ...] = ()
    request_buckets: tuple[int, ...] = ()
    width_buckets: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CacheRules:
    """What the block manager must respect.

    Attributes:
        block_sizes: allowed tokens per block; the first is preferred.
        dtypes: element types of a KV cache; () = the compute dtype only.
        num_blocks_multiple: the number of blocks is a multiple of this.
        max_table_bytes: requests x columns x 4 of one block table at most; None = no limit.
    """

    block_sizes: tuple[int, ...] = (16,)
    dtypes: tuple[str, ...] = ()
    num_blocks_multiple: int = 1
    max_table_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionRules:
    """What `attend` and `attend_latent` can do. A head size or feature that is not declared is refused.

    Attributes:
        head_sizes: allowed head sizes of keys and values; () = any.
        window, chunk, soft_cap, sinks, non_causal, q_scale, lse: the AttentionSpec feature of that name
            works.
        latent: `attend_latent` works.
        max_decode_queries: query tokens of a verify row at most.
        probability: dtype of the softmax's weights where they are multiplied with the values: the
            accumulator's, or "compute" = rounded to the compute dtype first.
    """

    head_sizes: tuple[int, ...] = ()
    window: bool = False
    chunk: bool = False
    soft_cap: bool = False
    sinks: bool = False
    non_causal: bool = False
    q_scale: bool = False
    lse: bool = False
    latent: bool = False
    max_decode_queries: int = 1
    probability: Literal["accumulator", "compute"] = "accumulator"


@dataclass(frozen=True, kw_only=True)
class BackendSpec:
    """Everything that a backend declares, as data. Built without importing a vendor library.

    Attributes:
        name: the value of `backend=`; lower case, the entry point's name.
        contract: (major, minor) that the plugin was built for.
        summary: one line for `core backends`.
        framework: "numpy", "torch", "jax", ...
        auto_rank: `backend="auto"` takes the highest rank whose probe gives devices; None = only by name.
        dtypes: compute dtypes; the first is what `dtype="auto"` means where the checkpoint's own is not in
            the list.
        accumulator: dtype of sums in products, norms and softmax.
        state_kinds: kinds of `state_scan` that work ("gated_delta").
        routed_experts: `route` and `experts` work.
        quantization: schemes that `pack` accepts besides plain dtypes.
        collectives: methods of `Communicator` that work.
        max_world_size: ranks of one communicator at most; 1 = no parallelism.
        lengths_on_device: `accepted[request_slot]` is kept on the device, so verification may be overlapped.
        device_sampler: `core_sampler` is implemented. Otherwise a Program may take greedy rows itself and
            gives all others to the reference sampler on the host.
        sampler_history: `State.history` holds each slot's output, so penalties may be overlapped.
        host_batch: Program.run reads the host StepBatch itself (eager backends; host length lists).
        determinism: what equal inputs promise: "bitwise" = equal bits on repetition, "batch_invariant" = a
            row's bits do not depend on other rows either.
        overlap: largest number of steps in flight that pays; 1 = steps are synchronous inside `run`.
    """

    name: str
    contract: tuple[int, int]
    summary: str
    framework: str
    auto_rank: int | None = None
    process_model: ProcessModel = "per_device"
    dtypes: tuple[str, ...] = ("float32",)
    accumulator: str = "float32"
    batch: BatchRules = field(default_factory=BatchRules)
    shapes: ShapeRules = field(default_factory=ShapeRules)
    cache: CacheRules = field(default_factory=CacheRules)
    attention: AttentionRules = field(default_factory=AttentionRules)
    state_kinds: tuple[str, ...] = ()
    routed_experts: bool = False
    quantization: tuple[str, ...] = ()
    collectives: tuple[str, ...] = ()
    max_world_size: int = 1
    lengths_on_device: bool = False
    device_sampler: bool = False
    sampler_history: bool = False
    host_batch: bool = False
    determinism: Determinism = "none"
    overlap: int = 1


def check_block_sizes(spec: BackendSpec, sizes: Iterable[int]) -> None:
    """Refuse blocks of sizes that `spec` does not declare.

    Raises:
        UnsupportedError: names the size, and those that are declared.
    """
    for size in sizes:
        if size not in spec.cache.block_sizes:
            raise UnsupportedError(
                f"block size {size} is not one that backend {spec.name!r} allows; choose from "
                f"{sorted(spec.cache.block_sizes)}"
            )


def needs(capability: str) -> Mapping[str, str]:
    """Metadata of a dataclass field that only backends with this capability may be given."""
    return {"capability": capability}


def check_capabilities(spec: BackendSpec, record: object, what: str = "") -> None:
    """Refuse a record that uses a feature `spec` does not declare.

    Every field of `record` whose metadata names a capability, and whose value differs from the default, needs
    the attribute path in `spec` (for example "attention.window") to be true, or to contain the value where
    the attribute is a tuple. Nested records are checked too.

    Raises:
        UnsupportedError: names backend, field, value and capability.
    """
    if not is_dataclass(record):
        return
    name = what or type(record).__name__
    for f in fields(record):
        value = getattr(record, f.name)
        capability = f.metadata.get("capability")
        if capability is not None and value != f.default:
            declared: Any = spec
            for part in capability.split("."):
                declared = getattr(declared, part)
            held = value in declared if isinstance(declared, tuple) else bool(declared)
            if not held:
                raise UnsupportedError(
                    f"{name}.{f.name} is {value!r}, but backend {spec.name!r} does not declare {capability} "
                    f"(declared: {declared!r}); choose another backend or a model without it"
                )
        elif is_dataclass(value) and not isinstance(value, type):
            check_capabilities(spec, value, f"{name}.{f.name}")
