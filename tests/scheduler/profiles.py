"""Constraint profiles that a BackendSpec can declare, after real hardware; named by what they demand."""

from __future__ import annotations

from dataclasses import dataclass

from core.contract.spec import BackendSpec, BatchRules, CacheRules, ShapeRules
from core.contract.types import CacheGroupSpec, CacheLayerSpec, CachePlan, GroupKind


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Rules, with limits and a window that make them bite."""

    spec: BackendSpec
    max_requests: int = 6
    max_tokens: int
    max_len: int
    window: int

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def block(self) -> int:
        return self.spec.cache.block_sizes[0]


def _spec(name: str, block: int, batch: BatchRules, shapes: ShapeRules | None = None) -> BackendSpec:
    return BackendSpec(
        name=name,
        contract=(0, 1),
        summary=name,
        framework="none",
        batch=batch,
        shapes=shapes or ShapeRules(),
        cache=CacheRules(block_sizes=(block,)),
    )


PROFILES = (
    Profile(
        spec=_spec("mixed", 16, BatchRules(adapters=True, prefix_groups=True)),
        max_tokens=40,
        max_len=90,
        window=21,
    ),
    Profile(
        spec=_spec(
            "static buckets",
            16,
            BatchRules(max_tokens=48),
            ShapeRules(
                kind="static", token_buckets=(16, 32, 48), request_buckets=(4, 8), width_buckets=(2, 4, 8, 16)
            ),
        ),
        max_tokens=48,
        max_len=100,
        window=16,
    ),
    Profile(
        spec=_spec(
            "prefill or decode, large blocks",
            128,
            BatchRules(mixed=False, max_tokens=200, max_requests=5),
            ShapeRules(kind="bucketed"),
        ),
        max_tokens=256,
        max_len=400,
        window=150,
    ),
    Profile(
        spec=_spec("mixed, large blocks", 128, BatchRules(max_prefills=2, max_requests=4)),
        max_tokens=130,
        max_len=300,
        window=40,
    ),
    Profile(
        spec=_spec(
            "rectangle, one prefill, capped area",
            64,
            BatchRules(
                mixed=False,
                max_prefills=1,
                prefill_multiple=64,
                rectangular_decode=True,
                max_rows_x_context=64 * 8,
                min_decode_rows=2,
            ),
            ShapeRules(kind="static", token_buckets=(64, 128, 192), request_buckets=(1, 2, 4, 8)),
        ),
        max_tokens=150,
        max_len=256,
        window=70,
    ),
)
MIXED, STATIC, EITHER, LARGE, RECTANGLE = PROFILES

Kinds = tuple[GroupKind, ...]
KINDS: dict[str, Kinds] = {
    "full": ("paged",),
    "full and window": ("paged", "window"),
    "window and state": ("window", "state"),
    "all": ("paged", "window", "state"),
}


def make_plan(profile: Profile, kinds: Kinds, *, tight: bool) -> CachePlan:
    """Pools that hold every request at full length; tight ones hold little more than one request.

    Windows have blocks of half the size, and states two blocks between checkpoints.
    """
    groups = []
    for i, kind in enumerate(kinds):
        size = {"paged": profile.block, "window": profile.block // 2, "state": profile.block * 2}[kind]
        columns = -(-profile.max_len // size)
        wanted = columns * profile.max_requests
        if tight and kind == "paged":
            wanted = columns + columns // 2
        elif tight and kind == "window":
            seen = profile.window + profile.spec.batch.prefill_multiple
            wanted = -(-seen // size) + 3
        elif kind == "state":
            wanted = profile.max_requests + (2 if tight else 2 * profile.max_requests)
        window = profile.window if kind == "window" else None
        groups.append(
            CacheGroupSpec(kind=kind, layers=(i,), block_size=size, num_blocks=1 + wanted, window=window)
        )
    layers = tuple(CacheLayerSpec(kind=kind, dtype="float32") for kind in kinds)
    return CachePlan(
        layers=layers,
        groups=tuple(groups),
        group_of=tuple(range(len(kinds))),
        max_requests=profile.max_requests,
    )
