"""The profiles: rules of steps as five kinds of hardware have them, laid on any backend.

A profile only narrows. What the backend under test declares itself stays in force: of two rules the stricter
one holds, and a ladder of shapes that the backend needs is kept. What a profile could not set is said in the
report. Sizes are those of the hardware where the suite's tiny models reach them, and else smaller, so that
every rule binds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import lcm

from core.contract.errors import ConfigError
from core.contract.spec import BackendSpec, BatchRules, CacheRules, ShapeRules

_KINDS = ("dynamic", "bucketed", "static")


@dataclass(frozen=True)
class Constraints:
    """One profile.

    Attributes:
        name: the value of `--constraints`. about: its rules in words.
        batch, shapes, cache: as in `BackendSpec`; what they do not set constrains nothing.
    """

    name: str
    about: str
    batch: BatchRules = field(default_factory=BatchRules)
    shapes: ShapeRules = field(default_factory=ShapeRules)
    cache: CacheRules = field(default_factory=CacheRules)


@dataclass(frozen=True)
class Narrowed:
    """A spec under a profile. `kept`: rules of the backend's own that stand in place of the profile's."""

    spec: BackendSpec
    kept: tuple[str, ...]


_PROFILES = (
    Constraints(
        "mixed",
        "mixed steps of packed rows; buckets of powers of two; blocks of a multiple of 16 tokens",
        shapes=ShapeRules(kind="bucketed"),
        cache=CacheRules(block_sizes=(16, 32, 64, 128, 256)),
    ),
    Constraints(
        "static",
        "mixed steps, decode rows first; every shape static and compiled beforehand; block tables of at most "
        "512 KiB",
        batch=BatchRules(max_tokens=256, max_requests=16),
        shapes=ShapeRules(
            kind="static",
            token_buckets=(16, 32, 64, 128, 256),
            request_buckets=(8, 16),
            width_buckets=(1, 2, 4, 8, 16, 32),
        ),
        cache=CacheRules(block_sizes=(16, 32, 64, 128, 256), max_table_bytes=512 * 1024),
    ),
    Constraints(
        "split",
        "prefill or decode steps, never both; rows padded to rectangles; every bucket warmed; blocks of 128",
        batch=BatchRules(mixed=False, max_prefills=4),
        shapes=ShapeRules(kind="static", token_buckets=(32, 64, 128, 256), request_buckets=(1, 2, 4, 8, 16)),
        cache=CacheRules(block_sizes=(128,)),
    ),
    Constraints(
        "host-lists",
        "mixed steps of packed rows; any shape; lengths as lists on the host; blocks of 128",
        cache=CacheRules(block_sizes=(128,)),
    ),
    Constraints(
        "rectangular",
        "one prompt per step in chunks of 64; decode steps are rectangles of two rows or more, padded on the "
        "left, of at most 384 rows x context; blocks of 64",
        batch=BatchRules(
            mixed=False,
            max_prefills=1,
            prefill_multiple=64,
            rectangular_decode=True,
            max_rows_x_context=384,
            min_decode_rows=2,
        ),
        shapes=ShapeRules(kind="static", token_buckets=(64, 128, 256), request_buckets=(2, 4, 8, 16)),
        cache=CacheRules(block_sizes=(64,), num_blocks_multiple=4),
    ),
)
PROFILES = {profile.name: profile for profile in _PROFILES}


def profile_of(name: str) -> Constraints:
    """The profile of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PROFILES:
        raise ConfigError(f"constraints {name!r} are not known; choose from {', '.join(PROFILES)}")
    return PROFILES[name]


def check_levels(name: str, levels: Sequence[int]) -> None:
    """Refuse other levels than the engine's under the profile of that name; "" = none.

    Raises:
        ConfigError: there are such.
    """
    if name and tuple(levels) != (5,):
        asked = ", ".join(f"L{level}" for level in levels)
        raise ConfigError(
            f"constraints {name} are rules of an engine's steps, but {asked} are asked for; give --level L5"
        )


def narrow(spec: BackendSpec, profile: Constraints) -> Narrowed:
    """The spec under the profile's rules and its own."""
    kept: list[str] = []
    narrowed = replace(
        spec,
        batch=_batch(spec.batch, profile.batch),
        shapes=_shapes(spec.shapes, profile.shapes, kept),
        cache=_cache(spec.cache, profile.cache, kept),
    )
    return Narrowed(narrowed, tuple(kept))


def _batch(own: BatchRules, given: BatchRules) -> BatchRules:
    return replace(
        own,
        mixed=own.mixed and given.mixed,
        max_prefills=_least(own.max_prefills, given.max_prefills),
        prefill_multiple=lcm(own.prefill_multiple, given.prefill_multiple),
        max_tokens=_least(own.max_tokens, given.max_tokens),
        max_requests=_least(own.max_requests, given.max_requests),
        rectangular_decode=own.rectangular_decode or given.rectangular_decode,
        max_rows_x_context=_least(own.max_rows_x_context, given.max_rows_x_context),
        min_decode_rows=max(own.min_decode_rows, given.min_decode_rows),
    )


def _shapes(own: ShapeRules, given: ShapeRules, kept: list[str]) -> ShapeRules:
    if own.kind == "dynamic":
        return given
    ladders = [name for name in ("token_buckets", "request_buckets", "width_buckets") if getattr(given, name)]
    kept += [f"shapes.{name}" for name in ladders if getattr(own, name) != getattr(given, name)]
    return replace(own, kind=max(own.kind, given.kind, key=_KINDS.index))


def _cache(own: CacheRules, given: CacheRules, kept: list[str]) -> CacheRules:
    sizes = tuple(size for size in given.block_sizes if size in own.block_sizes)
    if not sizes:
        kept.append("cache.block_sizes")
    return replace(
        own,
        block_sizes=sizes or own.block_sizes,
        num_blocks_multiple=lcm(own.num_blocks_multiple, given.num_blocks_multiple),
        max_table_bytes=_least(own.max_table_bytes, given.max_table_bytes),
    )


def _least(a: int | None, b: int | None) -> int | None:
    return min((x for x in (a, b) if x is not None), default=None)
