"""`core doctor`: whether each backend loads, finds a device, and multiplies correctly on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from core.contract.batch import Step, StepBatch, StepLayout
from core.contract.errors import CoreError, DeviceError
from core.contract.interfaces import CompileRequest
from core.contract.ops import Ops, inherited_ops
from core.contract.requests import AllocatorRequest, DeviceRequest, OpsRequest, ProbeRequest
from core.contract.types import (
    Array,
    CacheGroupSpec,
    CacheHandle,
    CacheLayerSpec,
    CachePlan,
    DeviceInfo,
    Outputs,
    Packed,
    PackRequest,
    Unavailable,
)
from core.plugins import BackendHandle, Plugins
from core.runner.buckets import Buckets
from core.sampling.reference import sample


@dataclass(frozen=True)
class Check:
    """One line of the report. UNAVAILABLE: no device, which is no failure."""

    backend: str
    device: str
    status: Literal["PASS", "FAIL", "UNAVAILABLE"]
    detail: str


def examine() -> list[Check]:
    """Check every installed backend and every device that it finds."""
    plugins = Plugins()
    plugins.load()
    checks: list[Check] = []
    for spec in plugins.specs():
        try:
            found = plugins.probe(spec.name, ProbeRequest())
        except CoreError as error:
            checks.append(Check(spec.name, "-", "FAIL", str(error)))
            continue
        if isinstance(found, Unavailable):
            remedy = f"; {found.remedy}" if found.remedy else ""
            checks.append(Check(spec.name, "-", "UNAVAILABLE", f"{found.reason}{remedy}"))
            continue
        for info in found:
            checks.append(_check(plugins.backend(spec.name), info))
    checks += [Check(f.name, "-", "FAIL", f.reason) for f in plugins.failures]
    return checks


def _check(backend: BackendHandle, info: DeviceInfo) -> Check:
    device = f"{info.index}: {info.name}"
    try:
        error, composites = _product(backend, info.index)
    except Exception as failure:
        return Check(backend.name, device, "FAIL", f"{type(failure).__name__}: {failure}")
    if error > 1e-2:
        return Check(backend.name, device, "FAIL", f"a product is wrong by {error:.1e} of its norm")
    inherited = f"; {len(composites)} ops run as composites: {', '.join(composites)}" if composites else ""
    return Check(backend.name, device, "PASS", f"a product is right to {error:.1e}{inherited}")


def _product(backend: BackendHandle, index: int) -> tuple[float, tuple[str, ...]]:
    """Relative error of one product run through the whole path: pack, compile, run, read back."""
    rng = np.random.default_rng(0)
    size = 64
    table, w = rng.standard_normal((size, size)), rng.standard_normal((size, size))
    device = backend.open_device(DeviceRequest(index=index))
    try:
        dtype = backend.spec.dtypes[0]
        allocator = backend.memory_allocator(AllocatorRequest(device=device))
        ops = backend.ops(OpsRequest(device=device, dtype=dtype))
        packed = tuple(
            allocator.pack(PackRequest(array=a.astype(np.float32), uses=(use,), dtype=dtype, name=use))
            for a, use in ((table, "embed"), (w, "linear"))
        )
        plan = _tiny_plan(backend, dtype)
        buckets = Buckets(backend.spec, plan, 1, 1)
        layout = StepLayout.of(buckets.choose("decode", 1, 1, 1, 1, Outputs()), plan, backend.spec.batch)
        state = allocator.allocate_state(plan)
        program = backend.compile(
            CompileRequest(
                device=device,
                fn=_step,
                ops=ops,
                weights=packed,
                state=state,
                layout=layout,
                plan=plan,
                sampler=None,
                reference_sampler=sample,
            )
        )
        flat = device.host_buffer(layout.size)
        layout.clear(flat)
        batch = StepBatch(0, layout, plan, flat, 1, 1, 1, 1)
        batch.token_ids[0] = 3
        batch.seq_lens[0] = 1
        batch.views["counts"][:] = 1
        output, state = program.run(batch, state)
        found = output.get()[0]
        allocator.free_state(state)
    finally:
        device.close()
    if not np.isfinite(found).all():
        raise DeviceError("a product gave values that are not finite")
    wanted = table[3] @ w.T
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)), inherited_ops(ops)


def _tiny_plan(backend: BackendHandle, dtype: str) -> CachePlan:
    heads = backend.spec.attention.head_sizes
    size = heads[0] if heads else 64
    layer = CacheLayerSpec(kind="paged", dtype=dtype, num_kv_heads=1, head_size=size, v_head_size=size)
    blocks = backend.spec.cache.num_blocks_multiple * 2
    group = CacheGroupSpec(
        kind="paged", layers=(0,), block_size=backend.spec.cache.block_sizes[0], num_blocks=blocks
    )
    return CachePlan(layers=(layer,), groups=(group,), group_of=(0,), max_requests=1)


def _step(
    ops: Ops, weights: tuple[Packed, ...], caches: tuple[CacheHandle, ...], step: Step
) -> tuple[Array, tuple[CacheHandle, ...]]:
    return ops.linear(ops.embed_step(weights[0], step), weights[1], wide=True), caches
