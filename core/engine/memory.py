"""How much KV cache to allocate: cache groups from a model's layers, and blocks from a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from core.block_manager import CacheGroup
from core.contract.errors import ConfigError, UnsupportedError
from core.contract.spec import BackendSpec, check_block_sizes
from core.contract.types import CacheGroupSpec, CacheLayerSpec, CachePlan

BlockBytes = Callable[[CacheLayerSpec, int], int]
"""Device bytes of one block (or state slot) of a layer, as `MemoryAllocator.block_bytes` gives them."""

GroupKey = tuple[Literal["paged", "window", "state"], int | None]


@dataclass(frozen=True)
class CacheBudget:
    """A plan and what it buys: total bytes, tokens of full attention, and requests at full length."""

    plan: CachePlan
    num_bytes: int
    num_tokens: int
    full_requests: float


def choose_block_size(spec: BackendSpec, wanted: int | None) -> int:
    """The wanted block size if the backend allows it, else its preferred one.

    Raises:
        UnsupportedError: the backend does not allow the wanted size.
    """
    allowed = spec.cache.block_sizes
    if wanted is None:
        return allowed[0]
    check_block_sizes(spec, (wanted,))
    return wanted


def check_layers(spec: BackendSpec, layers: tuple[CacheLayerSpec, ...]) -> None:
    """Refuse caches that the backend does not declare.

    Raises:
        UnsupportedError: names the backend, what was asked, and what it declares.
    """
    for layer in layers:
        sizes = spec.attention.head_sizes
        if layer.kind == "latent" and not spec.attention.latent:
            raise UnsupportedError(f"backend {spec.name!r} does not declare latent attention; choose another")
        if layer.kind == "window" and not spec.attention.window:
            raise UnsupportedError(f"backend {spec.name!r} does not declare window attention; choose another")
        if layer.kind == "state" and "gated_delta" not in spec.state_kinds:
            raise UnsupportedError(
                f"backend {spec.name!r} does not declare state layers of kind 'gated_delta' (declared: "
                f"{spec.state_kinds}); choose another"
            )
        if sizes and layer.kind in ("paged", "window") and layer.head_size not in sizes:
            raise UnsupportedError(
                f"the model's head size is {layer.head_size}; backend {spec.name!r} has {sorted(sizes)}"
            )


def _group_key(layer: CacheLayerSpec) -> GroupKey:
    if layer.kind == "window":
        return "window", layer.window
    return ("state", None) if layer.kind == "state" else ("paged", None)


def plan_cache(
    spec: BackendSpec,
    block_bytes: BlockBytes,
    layers: tuple[CacheLayerSpec, ...],
    *,
    block_size: int,
    max_requests: int,
    max_model_len: int,
    max_step_tokens: int,
    budget_bytes: int,
    num_blocks: int | None = None,
    checkpoints: int | None = None,
) -> CacheBudget:
    """Groups and pool sizes that fit `budget_bytes`, at most what all requests at full length can use.

    `max_step_tokens` counts the tokens of all steps in flight. `num_blocks` fixes the size of full-attention
    pools; `checkpoints` the state slots beyond one per request.

    Raises:
        ConfigError: the budget does not hold one request at full length; names what would.
    """
    keys = list(dict.fromkeys(_group_key(layer) for layer in layers))
    group_of = tuple(keys.index(_group_key(layer)) for layer in layers)
    per_request = -(-max_model_len // block_size)
    groups = []
    for g, (kind, window) in enumerate(keys):
        members = tuple(i for i, of in enumerate(group_of) if of == g)
        if kind == "state":
            size = 1 + max_requests + (2 * max_requests if checkpoints is None else checkpoints)
        else:
            size = 1 + _wanted_blocks(per_request, block_size, window, max_requests, max_step_tokens)
        groups.append(
            CacheGroupSpec(kind=kind, layers=members, block_size=block_size, num_blocks=size, window=window)
        )
    multiple = spec.cache.num_blocks_multiple
    plan = CachePlan(layers=layers, groups=tuple(groups), group_of=group_of, max_requests=max_requests)
    if num_blocks is None:
        num_blocks = _fit(block_bytes, plan, budget_bytes, per_request, multiple)
    elif num_blocks < 2 or num_blocks % multiple:
        raise ConfigError(
            f"num_blocks is {num_blocks}; it must be a multiple of {multiple} for backend {spec.name!r}, and "
            "at least 2, because one block is for padding; "
            f"use {max(-(-num_blocks // multiple), -(-2 // multiple)) * multiple}"
        )
    plan = _with_blocks(plan, num_blocks, multiple)
    tokens = (num_blocks - 1) * block_size
    return CacheBudget(plan, plan_bytes(block_bytes, plan), tokens, tokens / max_model_len)


def _wanted_blocks(
    per_request: int, block_size: int, window: int | None, max_requests: int, max_step_tokens: int
) -> int:
    """Blocks that all requests can use at once; in a window, what is seen and what steps in flight write."""
    if window is None:
        return per_request * max_requests
    visible = min(per_request, -(-window // block_size) + 2)
    return min(visible * max_requests + -(-max_step_tokens // block_size), per_request * max_requests)


def plan_bytes(block_bytes: BlockBytes, plan: CachePlan) -> int:
    """Device memory that the plan's caches take, in bytes."""
    return sum(
        block_bytes(layer, plan.groups[g].block_size) * plan.groups[g].num_blocks
        for layer, g in zip(plan.layers, plan.group_of, strict=True)
    )


def _with_blocks(plan: CachePlan, num_blocks: int, multiple: int) -> CachePlan:
    """The plan with full-attention pools of `num_blocks` and window pools of no more; all are multiples of
    `multiple`.
    """

    def whole(count: int) -> int:
        return -(-count // multiple) * multiple

    groups = tuple(
        replace(g, num_blocks=whole(g.num_blocks))
        if g.kind == "state"
        else replace(g, num_blocks=num_blocks if g.kind == "paged" else min(whole(g.num_blocks), num_blocks))
        for g in plan.groups
    )
    return replace(plan, groups=groups)


def _fit(block_bytes: BlockBytes, plan: CachePlan, budget: int, per_request: int, multiple: int) -> int:
    """The largest number of blocks that the budget holds, at most what all requests can use."""
    most = max((g.num_blocks for g in plan.groups if g.kind != "state"), default=per_request + 1)
    low, high = 0, -(-most // multiple)
    while low < high:
        middle = (low + high + 1) // 2
        if plan_bytes(block_bytes, _with_blocks(plan, middle * multiple, multiple)) <= budget:
            low = middle
        else:
            high = middle - 1
    blocks = low * multiple
    if blocks < per_request + 1:
        least = -(-(per_request + 1) // multiple) * multiple
        needed = plan_bytes(block_bytes, _with_blocks(plan, least, multiple))
        raise ConfigError(
            f"the KV cache budget of {budget / 2**20:.1f} MiB does not hold one request of full length, "
            f"which needs {needed / 2**20:.1f} MiB; raise the budget or lower max_model_len"
        )
    return blocks


def block_groups(plan: CachePlan) -> tuple[CacheGroup, ...]:
    """The block manager's view of a plan."""
    return tuple(
        CacheGroup(
            kind=g.kind,
            layers=g.layers,
            block_size=g.block_size,
            num_blocks=g.num_blocks,
            window=g.window,
        )
        for g in plan.groups
    )
