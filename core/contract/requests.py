"""What hooks are given: one frozen record each. Growth is a new defaulted field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core.contract.opspecs import AttentionSpec, LatentSpec
from core.contract.types import CacheLayerSpec


@dataclass(frozen=True, kw_only=True)
class SpecRequest:
    """`core_backend_spec` gets this. `contract` is the version of the core that asks."""

    contract: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ProbeRequest:
    """`core_probe` gets this. `visible`: device indices the user allows; None = all."""

    visible: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceRequest:
    """`core_open_device` gets this.

    Attributes:
        index: which device. rank, world_size: this process among those of the model.
        num_threads: host threads the backend may use; None = its own choice.
        options: backend options that the user gave (`LLM(backend_options=...)`).
    """

    index: int = 0
    rank: int = 0
    world_size: int = 1
    num_threads: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AllocatorRequest:
    """`core_memory_allocator` gets this. `budget_bytes`: what it may use at most; None = what the device has
    free.
    """

    device: Any
    budget_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionKernelRequest:
    """`core_attention_kernel` gets this: a layer's cache and what is computed over it."""

    device: Any
    dtype: str
    layer: CacheLayerSpec
    attention: AttentionSpec | LatentSpec


@dataclass(frozen=True, kw_only=True)
class CommunicatorRequest:
    """`core_communicator` gets this.

    Attributes:
        group: logical axis ("tp", "pp", ...). rank: this member. world_size: members.
        rendezvous: where members meet, "tcp://HOST:PORT" of the first member.
    """

    device: Any
    group: str
    rank: int
    world_size: int
    rendezvous: str
    timeout_s: float = 60.0


@dataclass(frozen=True, kw_only=True)
class OpsRequest:
    """`core_ops` gets this. `attention`: the kernel to use for `attend`, from this backend or an add-on."""

    device: Any
    dtype: str
    attention: Any | None = None


@dataclass(frozen=True, kw_only=True)
class SamplerRequest:
    """`core_sampler` gets this. `vocab_size`: V."""

    device: Any
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class OverrideRequest:
    """`core_model_override` gets this: the model's family, frozen configuration and tree of `Param`."""

    device: Any
    family: str
    config: Any
    params: Any


@dataclass(frozen=True, kw_only=True)
class ConformanceRequest:
    """`core_conformance` gets this. `version`: of the suite that asks."""

    version: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Floor:
    """A speed below which a backend does not fall on a device, by its vendor's word.

    Attributes:
        measure: "products", "decode_attention", "prefill_attention", "block_copies" or "engine".
        value: in the measure's unit: FLOP/s, bytes/s, FLOP/s, bytes/s, tokens/s.
        device: pattern of `DeviceInfo.name` ("*" and "?" as in file names). dtype: compute dtype.
    """

    measure: str
    value: float
    device: str = "*"
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class ConformanceExtras:
    """What a vendor brings to the suite.

    Attributes:
        waivers: path of its waivers file; None = none.
        modules: names of modules with checks of its own.
        floors: what its devices are held to.
    """

    waivers: str | None = None
    modules: tuple[str, ...] = ()
    floors: tuple[Floor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CliRequest:
    """`core_cli` gets this. `app`: the typer application to add commands to."""

    app: Any


@dataclass(frozen=True, kw_only=True)
class ObserverRequest:
    """`core_observer` gets this, once, when an engine starts. `engine`: its name, for logs."""

    engine: str
