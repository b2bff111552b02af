"""All checks of the suite, and which of them a run takes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from hashlib import sha256
from importlib import import_module

from conformance.check import Check, has
from conformance.levels import performance
from conformance.opcases.base import set_run
from conformance.subject import Subject, Target
from core.contract.errors import ConfigError
from core.contract.requests import Floor
from core.contract.spec import BackendSpec

LEVELS = {
    0: "registration and honesty",
    1: "memory and KV blocks",
    2: "kernels",
    3: "collectives",
    4: "models",
    5: "engine",
    6: "parallel",
    7: "performance",
}
_MODULES = {
    0: ("conformance.levels.registration", "conformance.levels.refusals"),
    1: ("conformance.levels.memory",),
    2: (
        "conformance.levels.kernels",
        "conformance.levels.accuracy",
        "conformance.levels.addressing",
        "conformance.levels.sizes",
        "conformance.levels.edges",
        "conformance.levels.packed",
        "conformance.levels.sampling",
        "conformance.levels.draws",
    ),
    3: ("conformance.levels.collectives",),
    4: ("conformance.levels.models",),
    5: ("conformance.levels.engine",),
    6: ("conformance.levels.parallel",),
}


def catalogue(
    spec: BackendSpec, target: Target, seed: int, modules: Sequence[str] = (), floors: Sequence[Floor] = ()
) -> list[Check]:
    """Every check that concerns this backend, in order of level, with data of this seed.

    Args:
        modules: further modules with a function `checks(spec)`: those that a vendor ships.
        floors: of this device, by its vendor's word; each is a check of level 7.

    Raises:
        ConfigError: two checks have one id, an id is malformed, or a floor's measure is not known.
    """
    set_run(seed, target.dtype)
    names = [name for level in sorted(_MODULES) for name in _MODULES[level]]
    found = [check for name in (*names, *modules) for check in import_module(name).checks(spec)]
    found += performance.checks(floors)
    seen: set[str] = set()
    for check in found:
        if not re.fullmatch(r"L[0-7]/[a-z0-9_-]+/[A-Za-z0-9_.:+-]+", check.id):
            raise ConfigError(
                f"check id {check.id!r} is malformed; write LEVEL/family/name, such as L2/attend/mixed"
            )
        if check.id in seen:
            raise ConfigError(f"two checks have the id {check.id!r}; rename one")
        seen.add(check.id)
    return sorted(found, key=lambda check: check.level)


def catalogue_of(subject: Subject, seed: int) -> list[Check]:
    """Every check that concerns a backend, with those that its vendor brings. Raises as `catalogue`."""
    return catalogue(subject.spec, subject.target, seed, subject.extras.modules, subject.floors)


def parse_levels(text: str) -> tuple[int, ...]:
    """Levels of "L2", "L0..L5" or a list of such, separated by commas.

    Raises:
        ConfigError: it is neither.
    """
    levels: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"L([0-7])(?:\.\.L([0-7]))?", part.strip())
        if not found or (found[2] and found[2] < found[1]):
            raise ConfigError(
                f"level {text!r} is not known; give L2, L0..L5 or a list such as L0,L2 (L0 to L7)"
            )
        levels |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    return tuple(sorted(levels))


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n".

    Raises:
        ConfigError: it is not such.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"shard {text!r} is not known; give i/n with 1 <= i <= n, such as 3/8")
    return int(found[1]), int(found[2])


def in_shard(check_id: str, shard: tuple[int, int]) -> bool:
    """Whether a check belongs to a shard. Level 0 belongs to all: it says what the others are worth."""
    i, n = shard
    number = int.from_bytes(sha256(check_id.encode()).digest()[:8], "big")
    return check_id.startswith("L0/") or number % n == i - 1


def lacking(check: Check, spec: BackendSpec) -> tuple[str, ...]:
    """Features that a check needs and the backend does not declare."""
    return tuple(feature for feature in check.needs if not has(spec, feature))


def select(
    checks: Iterable[Check],
    levels: Sequence[int],
    *,
    is_quick: bool = True,
    profiles: Sequence[str] = (),
    shard: tuple[int, int] = (1, 1),
    pattern: str = "",
) -> list[Check]:
    """The checks that a run takes. `pattern`: a regular expression that the id must contain."""
    return [
        check
        for check in checks
        if check.level in levels
        and (check.is_quick or not is_quick)
        and (not profiles or check.profile in profiles or check.level == 0)
        and in_shard(check.id, shard)
        and re.search(pattern, check.id)
    ]
