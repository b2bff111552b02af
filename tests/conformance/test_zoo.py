"""The fault zoo: every fault can be planted, and its family finds it; the clean clones are clean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from conformance.catalogue import catalogue, lacking
from conformance.cli import app
from conformance.runner import WorkerLost
from conformance.status import Status
from conformance.subject import Subject, Target
from conformance.worker import run_check
from conformance.zoo.clone import edited, load, sources
from conformance.zoo.faults import FAULTS, NO_SUBJECT, Fault
from conformance.zoo.plant import planted
from conformance.zoo.run import Catch, family_of, hunt, read_results, variants
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


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_the_clean_clone_raises_no_alarm(every: int) -> None:
    plugins = Plugins(disabled=frozenset())
    target = Target("cpu_reference")
    handle = plugins.register_backend(load(sources(), "conformance_zoo_clean"), "cpu_reference")
    subject = Subject(target, handle)
    for check in catalogue(subject.spec, target, 11)[::every]:
        if lacking(check, subject.spec) or not check.supported(subject.spec):
            continue
        if check.level in (1, 2) and check.is_quick and "distribution" not in check.id:
            result = run_check(check, subject, 11)
            assert result.status == "pass", (check.id, result.message)


def test_each_fault_has_a_family() -> None:
    for base in {fault.base for fault in FAULTS}:
        subject = Subject.of(Target(base))
        checks = catalogue(subject.spec, subject.target, 0)
        for fault in FAULTS:
            if fault.base == base:
                assert family_of(fault, checks, subject), fault.name


def test_most_faults_of_the_catalogue_have_a_subject() -> None:
    assert len(FAULTS) >= 60


def test_the_ranks_of_an_engine_load_the_clone_by_its_place() -> None:
    target = Target("cpu", fault="ranks-draw-differently:")
    subject = Subject.of(target)
    module, _, attribute = subject.handle.plugins.registered_place(subject.spec.name).partition(":")
    clone = getattr(import_module(module), attribute)
    assert clone.SPEC.name == subject.spec.name != "cpu"
    with pytest.raises(AttributeError):
        getattr(import_module(module), "no-such-fault")


def test_a_clone_that_does_not_load_is_no_catch(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(FAULTS[0], edits=(("attention", "import math", "import no_such_module"),))
    lost = WorkerLost(Status.INFRA, "no_such_module", "")
    monkeypatch.setattr("conformance.zoo.run.Worker", _raising(lost))
    with pytest.raises(ConfigError, match="does not load"):
        hunt(broken, "", 0)


def _raising(error: Exception) -> Callable[..., None]:
    def call(*args: object) -> None:
        raise error

    return call


def test_a_fault_is_hunted_by_its_family_alone() -> None:
    window = next(fault for fault in FAULTS if fault.name == "window-off-by-one")
    catch = hunt(window, "1", 0)
    assert catch.by.startswith("L2/addressing/") and catch.status == "fail"
    elsewhere = replace(window, caught_by="L1/pack/")
    assert hunt(elsewhere, "1", 0).by == ""


def test_a_sweep_that_was_ended_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, str, int]] = []

    def find(fault: Fault, severity: str, seed: int) -> Catch:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append((fault.name, severity, seed))
        return Catch(fault.name, severity, seed, "L2/check", "fail", "found", 0.1, 1)

    monkeypatch.setattr("conformance.zoo.run.hunt", find)
    monkeypatch.setenv("CORE_COMMIT", "abc")
    out = tmp_path / "zoo.json"

    def sweep(*arguments: str) -> Result:
        command = ["zoo", "--only", "window|sink", "--seeds", "2", "--out", str(out), *arguments]
        return CliRunner().invoke(app, command)

    assert sweep("--shard", "1/2").exit_code != 0
    assert len(ran) == 3 == len(read_results(out)), "each is kept as soon as it is known"
    first = set(ran)
    ran.clear()
    other = tmp_path / "other.json"
    monkeypatch.setattr("conformance.zoo.run.hunt", lambda *what: ran.append(what) or find_none(what))
    assert sweep("--shard", "1/2", "--resume").exit_code == 0
    assert not first & {(fault.name, severity, seed) for fault, severity, seed in ran}
    assert sweep("--shard", "2/2", "--out", str(other)).exit_code == 0
    ran.clear()
    whole = sweep("--from", str(out), "--from", str(other), "--out", str(tmp_path / "whole.json"))
    assert whole.exit_code == 0 and not ran, "shards together are the whole"
    monkeypatch.setenv("CORE_COMMIT", "def")
    refused = sweep("--resume")
    assert refused.exit_code == 2 and "commit abc" in refused.output and "commit def" in refused.output


def find_none(what: tuple[Fault, str, int]) -> Catch:
    fault, severity, seed = what
    return Catch(fault.name, severity, seed, "L2/check", "fail", "found", 0.1, 1)
