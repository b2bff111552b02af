"""The fault zoo: every fault can be planted, and its family finds it; the clean clone is clean."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conformance.catalogue import catalogue
from conformance.subject import Subject, Target
from conformance.worker import run_check
from conformance.zoo.clone import edited, load, sources
from conformance.zoo.faults import FAULTS, NO_SUBJECT, Fault
from conformance.zoo.plant import planted
from conformance.zoo.run import family_of, hunt, variants
from core.contract.errors import ConfigError
from core.plugins import Plugins


def test_every_fault_of_the_catalogue_is_planted_or_accounted_for() -> None:
    numbers = [fault.number for fault in FAULTS]
    assert len(set(numbers)) == len(numbers) and not set(numbers) & set(NO_SUBJECT)
    assert set(numbers) | set(NO_SUBJECT) == set(range(1, 83))
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize(("fault", "severity"), variants(), ids=lambda x: getattr(x, "name", x))
def test_a_fault_is_still_a_change_of_the_backends_text(fault: Fault, severity: str) -> None:
    planted(f"{fault.name}:{severity}")


def test_a_text_that_has_changed_is_noticed() -> None:
    with pytest.raises(ConfigError, match="follow the backend's text"):
        edited(sources(), [("attention", "no such text", "")])


def test_a_second_fault_takes_the_place_of_the_first() -> None:
    first = planted("window-off-by-one:1")
    assert planted("seed-ignored:") is not first


def test_the_clean_clone_raises_no_alarm() -> None:
    plugins = Plugins(disabled=frozenset())
    target = Target("cpu_reference")
    handle = plugins.register_backend(load(sources(), "conformance_zoo_clean"), "cpu_reference")
    subject = Subject(target, handle)
    for check in catalogue(subject.spec, target, 11):
        if check.level in (1, 2) and check.is_quick and "distribution" not in check.id:
            result = run_check(check, subject, 11)
            assert result.status == "pass", (check.id, result.message)


def test_each_fault_has_a_family() -> None:
    subject = Subject.of(Target("cpu_reference"))
    checks = catalogue(subject.spec, subject.target, 0)
    for fault in FAULTS:
        assert family_of(fault, checks, subject), fault.name


def test_a_fault_is_hunted_by_its_family_alone() -> None:
    window = next(fault for fault in FAULTS if fault.name == "window-off-by-one")
    catch = hunt(window, "1", 0)
    assert catch.by.startswith("L2/addressing/") and catch.status == "fail"
    elsewhere = replace(window, caught_by="L1/pack/")
    assert hunt(elsewhere, "1", 0).by == ""
