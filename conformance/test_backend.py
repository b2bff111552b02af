"""The suite under pytest: a test per check, each in a worker with a watchdog."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from conformance.catalogue import catalogue_of, lacking, parse_levels, select
from conformance.check import Check, Result
from conformance.constraints.rules import check_levels
from conformance.runner import Worker, run_one
from conformance.status import Status
from conformance.subject import Subject, Target
from conformance.worker import Setup
from core.contract.errors import ConfigError, CoreError


@dataclass
class Run:
    """What is tested. `worker`: the process that the next check runs in."""

    subject: Subject
    checks: dict[str, Check]
    claimed: tuple[str, ...]
    seed: int
    worker: Worker | None = None

    @classmethod
    def of(cls, config: pytest.Config) -> Run:
        """From pytest's options.

        Raises:
            pytest.UsageError: no backend is given, it cannot be loaded, or an option is wrong.
        """
        name = config.getoption("--backend", None)
        if not name:
            raise pytest.UsageError("no backend is given; run pytest --pyargs conformance --backend NAME")
        try:
            seed = _seed(config.getoption("--seed"))
            asked = Target(name, config.getoption("--dtype"), constraints=config.getoption("--constraints"))
            subject = Subject.declared(asked)
            target = subject.target
            levels = parse_levels(config.getoption("--level"))
            check_levels(target.constraints, levels)
            claimed = tuple(filter(None, config.getoption("--profile").split(",")))
            checks = select(
                catalogue_of(subject, seed), levels, is_quick=not config.getoption("--full"), profiles=claimed
            )
        except CoreError as error:
            raise pytest.UsageError(str(error)) from error
        if not checks:
            raise pytest.UsageError(
                f"there is no check of {config.getoption('--level')} for backend {name!r}"
            )
        return cls(subject, {check.id: check for check in checks}, claimed, seed)

    def result(self, check: Check) -> Result:
        """Run a check."""
        found: list[Result] = []
        setup = Setup(self.subject.target, self.seed, self.subject.extras.modules)
        self.worker = run_one(check, self.worker, lambda: Worker(setup), self.seed, found.append)
        return found[0]


RUN = pytest.StashKey[Run | None]()


def _seed(text: str) -> int:
    try:
        return secrets.randbits(64) if text == "auto" else int(text, 16)
    except ValueError:
        raise ConfigError(f"--seed is {text!r}; give auto or up to 16 hexadecimal digits") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test per check."""
    run = Run.of(metafunc.config)
    metafunc.config.stash[RUN] = run
    metafunc.parametrize("check", list(run.checks.values()), ids=list(run.checks))


@pytest.fixture(scope="session")
def conformance_run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """The run, whose worker is ended with it."""
    run = request.config.stash[RUN]
    assert run is not None
    yield run
    if run.worker is not None:
        run.worker.close()


def test_check(check: Check, conformance_run: Run) -> None:
    """One check. What the backend does not declare is skipped, unless its profile was claimed."""
    run = conformance_run
    missing = ", ".join(lacking(check, run.subject.spec))
    if missing or not check.supported(run.subject.spec):
        what = f"the backend does not declare {missing or 'a feature that the check uses'}"
        if check.profile in run.claimed:
            pytest.fail(f"profile {check.profile} is claimed, but {what}", pytrace=False)
        pytest.skip(f"not supported: {what}")
    result = run.result(check)
    if not Status(result.status).is_good:
        text = f"{result.status}: {result.message} (seed {run.seed:016x})\n{result.log}"
        pytest.fail(text.rstrip(), pytrace=False)
