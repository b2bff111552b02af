"""Constraint profiles that a BackendSpec can declare, after real hardware; named by what they demand."""

from __future__ import annotations

from dataclasses import dataclass

from core.contract.spec import BackendSpec, BatchRules, CacheRules, ShapeRules


@dataclass(frozen=True)
class Profile:
    """Rules, and how deep steps overlap."""

    name: str
    spec: BackendSpec
    overlap: int


def _powers(last: int) -> tuple[int, ...]:
    return tuple(2**i for i in range(last.bit_length()))


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


_STATIC = ShapeRules(kind="static", token_buckets=_powers(64), request_buckets=_powers(8))

PROFILES = (
    Profile("mixed, dynamic", _spec("mixed", 16, BatchRules()), 2),
    Profile("mixed, static buckets", _spec("static", 16, BatchRules(), _STATIC), 2),
    Profile(
        "prefill or decode, block 128",
        _spec("either", 128, BatchRules(mixed=False), ShapeRules(kind="bucketed")),
        2,
    ),
    Profile("mixed, block 128", _spec("large", 128, BatchRules()), 1),
    Profile(
        "rectangle, one prefill, capped area",
        _spec(
            "rectangle",
            64,
            BatchRules(
                mixed=False,
                max_prefills=1,
                prefill_multiple=8,
                rectangular_decode=True,
                max_rows_x_context=768,
                min_decode_rows=2,
            ),
            _STATIC,
        ),
        1,
    ),
)
