"""The example of a backend outside the repository: small, and conforming (level 0: `tools/clean_room.py`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.catalogue import catalogue_of, lacking, select
from conformance.subject import Subject, Target
from conformance.worker import run_check

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party_backend"
SEED = 12


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    sys.path.insert(0, str(EXAMPLE))
    yield Subject.of(Target("core_tile.plugin:", "float32"))
    sys.path.remove(str(EXAMPLE))


def test_it_is_small_and_has_no_waiver(subject: Subject) -> None:
    lines = sum(len(path.read_text().splitlines()) for path in (EXAMPLE / "core_tile").glob("*.py"))
    assert 0 < lines < 700
    assert subject.extras.waivers is not None
    assert not [
        line for line in Path(subject.extras.waivers).read_text().splitlines() if line[:1] not in ("", "#")
    ]


def test_it_is_unlike_a_gpu(subject: Subject) -> None:
    spec = subject.spec
    assert spec.cache.block_sizes[0] == 64 and not spec.batch.mixed and spec.shapes.kind == "static"


@pytest.mark.parametrize(
    ("levels", "pattern", "count"),
    [((1,), "", 20), ((2,), "rule-a|poison-nan", 60), ((4, 5), "llama", 9)],
)
def test_it_passes(subject: Subject, levels: tuple[int, ...], pattern: str, count: int) -> None:
    checks = [
        check
        for check in select(catalogue_of(subject, SEED), levels, pattern=pattern)
        if not lacking(check, subject.spec) and check.supported(subject.spec)
    ]
    assert len(checks) >= count
    results = {check.id: run_check(check, subject, SEED) for check in checks}
    assert {i: r.message for i, r in results.items() if r.status != "pass"} == {}
