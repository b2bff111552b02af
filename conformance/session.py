"""One run of the suite: which checks, in what order, what is shown, and what is written down."""

from __future__ import annotations

import fcntl
import json
import re
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from conformance import report as reports
from conformance.catalogue import (
    LEVELS,
    catalogue_of,
    in_shard,
    lacking,
    parse_levels,
    parse_shard,
    select,
)
from conformance.check import Check, Result, check_seed
from conformance.report import Report
from conformance.runner import in_order, open_device_info, run_all
from conformance.status import Status
from conformance.subject import Subject
from conformance.waivers import Waiver, apply, read_waivers
from conformance.worker import Setup
from core.contract.errors import ConfigError

PROFILES = ("dense", "moe", "latent", "state", "multi-device")
PERFORMANCE = 7
"""The level whose checks run one at a time: a neighbour would slow them."""
_LINES = "results.jsonl"
_LOCK = ".lock"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for; texts as they were given.

    Attributes:
        seed: None = drawn. profiles: claims; () = whatever the backend declares. only: pattern of ids.
        time_factor: what each check's time limit is multiplied by, for devices that are emulated.
        execution: how the backend runs, where that is less than its device says; "" = as it says.
    """

    levels: str = "L0..L5"
    profiles: tuple[str, ...] = ()
    seed: int | None = None
    shard: str = "1/1"
    quick: bool = True
    only: str = ""
    jobs: int = 1
    out: Path = Path("conformance-report")
    resume: bool = False
    waivers: Path | None = None
    time_factor: float = 1.0
    execution: str = ""
    is_shown: bool = True


class Session:
    """Runs a request against a backend.

    Raises:
        ConfigError: the request is wrong; nothing was run. BackendMissing: there is no device.
    """

    def __init__(self, subject: Subject, request: Request) -> None:
        self._subject, self._request = subject, request
        self._start = datetime.now(UTC)
        self._levels = parse_levels(request.levels)
        self._shard = parse_shard(request.shard)
        unknown = [p for p in request.profiles if p not in PROFILES]
        if unknown:
            raise ConfigError(f"profile {unknown[0]!r} is not known; known are {', '.join(PROFILES)}")
        if not 0 < request.time_factor < 1e6:
            raise ConfigError(f"--time-factor is {request.time_factor:g}; a number above 0 is wanted")
        if self._shard[1] > 1 and request.seed is None and not request.resume:
            raise ConfigError("--shard needs --seed with a value, the same for every shard")
        try:
            re.compile(request.only)
        except re.error as error:
            raise ConfigError(f"--only {request.only!r} is no regular expression: {error}") from None
        self._seed = self._choose_seed()
        extras = subject.extras
        self._waivers = read_waivers(request.waivers or (Path(extras.waivers) if extras.waivers else None))
        self._setup = Setup(subject.target, self._seed, extras.modules)
        self._all = catalogue_of(subject, self._seed)
        self._of_all_shards = select(
            self._all,
            self._levels,
            is_quick=request.quick,
            profiles=request.profiles,
            pattern=request.only,
        )
        self._checks = [check for check in self._of_all_shards if in_shard(check.id, self._shard)]
        self._results: dict[str, Result] = {}
        self._shown = 0

    def run(self) -> Report:
        """Run the checks level by level; the report is written whatever becomes of them."""
        with self._folder_alone():
            facts = self._facts()
            if self._request.resume:
                self._read_lines()
            else:
                (self._request.out / _LINES).unlink(missing_ok=True)
            self._write_key()
            self._say(
                f"{self._subject.spec.name} on {facts['device']}: {len(self._checks)} checks of "
                f"{reports.levels_text(self._levels)}, {self._subject.target.dtype}, seed {self._seed:016x}"
                f"{f'; {len(self._results)} results are kept' if self._results else ''}"
            )
            try:
                for level in self._levels:
                    self._run_level(level)
            except KeyboardInterrupt:
                self._say("\ninterrupted; `--resume` goes on from here")
            return self._finish(facts)

    @contextmanager
    def _folder_alone(self) -> Iterator[None]:
        """The folder of the report, made, and held so that no other run writes into it.

        Raises:
            ConfigError: it cannot be made, or another run has it.
        """
        out = self._request.out
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = (out / _LOCK).open("w")
        except OSError as error:
            raise ConfigError(f"--out {out} cannot be written ({error.strerror}); choose a folder") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(
                    f"another run writes into {out}; wait for it, or choose another --out"
                ) from None
            yield

    def _facts(self) -> dict[str, Any]:
        """The environment, by the word of the open device. One that does not open ran nothing natively."""
        info = open_device_info(self._setup, self._request.time_factor)
        info = info or replace(self._subject.info, execution="emulated")
        return reports.environment_facts(info, self._request.execution)

    def _choose_seed(self) -> int:
        key = self._key()
        if self._request.resume and key is not None and self._request.seed is None:
            return int(key["seed"], 16)
        return secrets.randbits(64) if self._request.seed is None else self._request.seed

    # What a resumed run goes on from

    def _key(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self._request.out / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found

    def _own_key(self) -> dict[str, Any]:
        return {
            "seed": f"{self._seed:016x}",
            "target": asdict(self._subject.target),
            "spec": reports.digest(asdict(self._subject.spec)),
            "suite": reports.suite_facts(self._all),
            "code": _code_digest(self._subject.place.partition(":")[0]),
        }

    def _write_key(self) -> None:
        (self._request.out / "run.json").write_text(json.dumps(self._own_key()), encoding="utf-8")

    def _read_lines(self) -> None:
        old = self._key()
        if old is None:
            return
        if json.dumps(old, sort_keys=True) != json.dumps(self._own_key(), sort_keys=True):
            raise ConfigError(
                f"{self._request.out} holds a run of another seed, backend, option or suite, or of other "
                "code of the backend; give the same ones, or another folder, or leave --resume out"
            )
        wanted = {check.id for check in self._checks}
        try:
            lines = (self._request.out / _LINES).read_text(encoding="utf-8").splitlines()
        except OSError:
            return
        for line in lines:
            try:
                result = Result(**json.loads(line))
                is_kept = Status(result.status).is_good
            except (ValueError, TypeError):
                continue  # the line that an interruption cut
            if result.id in wanted and is_kept:
                self._results[result.id] = result

    # Running

    def _run_level(self, level: int) -> None:
        own = [check for check in self._checks if check.level == level]
        if not own:
            self._say(f"L{level} {LEVELS[level]}: no case")
            return
        rest = []
        for check in own:
            if check.id in self._results:
                continue
            if (early := self._without_running(check)) is not None:
                self._take(early)
            else:
                rest.append(check)
        with (self._request.out / _LINES).open("a", encoding="utf-8") as lines:

            def report(result: Result) -> None:
                self._take(result)
                lines.write(json.dumps(asdict(result)) + "\n")
                lines.flush()
                self._progress(level, len(own))

            lost = Status.DEVICE_LOST.value
            run_all(
                rest,
                self._setup,
                report,
                1 if level == PERFORMANCE else self._request.jobs,
                lambda: any(r.status == lost for r in self._results.values()),
                self._request.time_factor,
            )
        self._level_done(level, own)

    def _without_running(self, check: Check) -> Result | None:
        """What becomes of a check that is not run at all."""
        seed = check_seed(self._seed, check.id)
        missing = lacking(check, self._subject.spec)
        if missing or not check.supported(self._subject.spec):
            what = ", ".join(missing) or "a feature that the check uses"
            message = f"the backend does not declare {what}"
            if check.profile in self._request.profiles:
                return Result(
                    check.id, Status.FAIL.value, f"profile {check.profile} is claimed, but {message}", 0, seed
                )
            return Result(check.id, Status.NOT_SUPPORTED.value, message, 0, seed)
        bad = [
            r
            for r in self._results.values()
            if r.id.startswith("L0/registration") and r.status == Status.FAIL
        ]
        if bad and check.level > 0:
            return Result(
                check.id, Status.BLOCKED.value, f"{bad[0].id} failed, so this says nothing", 0, seed
            )
        return None

    def _take(self, result: Result) -> None:
        self._results[result.id] = result
        if not Status(result.status).is_good and result.status not in (Status.NOT_RUN, Status.BLOCKED):
            self._clear()
            self._say(f"{result.status.upper()}  {result.id}  {result.message}")

    def _finish(self, facts: dict[str, Any]) -> Report:
        results = in_order(self._results.values(), self._checks)
        results, used = apply(self._waivers, results, self._all, self._subject, facts["driver"])
        report = Report(
            suite=reports.suite_facts(self._all),
            backend=reports.backend_facts(self._subject),
            environment=facts,
            run=reports.run_facts(
                self._levels,
                self._seed,
                self._shard,
                self._subject.target,
                self._request.quick,
                self._start,
                () if self._subject.watch is None else self._subject.watch.narrowed.kept,
                self._request.only,
                self._request.profiles,
                select(self._all, self._levels, is_quick=self._request.quick),
                [check.id for check in self._of_all_shards],
            ),
            results=tuple(results),
            waivers=tuple(_as_dict(waiver) for waiver in used),
        )
        for result in results:
            if result.status == Status.WAIVED:
                self._say(f"WAIVED  {result.id}  {result.waiver}")
            elif reports.is_of_waiver(result.id):
                self._say(f"WAIVER  {result.message}")
        reports.write(report, self._request.out)
        self._say(f"{report.verdict}\n{self._request.out / 'report.html'}")
        if wrong := [r.id for r in results if r.status in (Status.FAIL, Status.CRASH, Status.TIMEOUT)]:
            self._say(
                f"one alone: core conformance repro {self._request.out / 'report.json'} {wrong[0]} --debug"
            )
        return report

    # What is shown

    def _progress(self, level: int, count: int) -> None:
        if self._request.is_shown and sys.stderr.isatty():
            done = sum(1 for i in self._results if i.startswith(f"L{level}/"))
            bad = sum(1 for r in self._results.values() if not Status(r.status).is_good)
            text = f"L{level} {LEVELS[level]}: {done}/{count}{f', {bad} wrong' if bad else ''}"
            sys.stderr.write(f"\r{text:<{self._shown}}")
            sys.stderr.flush()
            self._shown = len(text)

    def _clear(self) -> None:
        if self._shown:
            sys.stderr.write(f"\r{' ' * self._shown}\r")
            self._shown = 0

    def _level_done(self, level: int, own: Sequence[Check]) -> None:
        self._clear()
        found = [self._results[c.id] for c in own if c.id in self._results]
        good = sum(1 for r in found if r.status == Status.PASS)
        off = sum(1 for r in found if r.status == Status.NOT_SUPPORTED)
        seconds = sum(r.duration_s for r in found)
        self._say(
            f"L{level} {LEVELS[level]}: {good} of {len(own) - off} pass"
            f"{f', {off} not supported' if off else ''} ({seconds:.1f} s)"
        )

    def _say(self, text: str) -> None:
        if self._request.is_shown:
            print(text, flush=True)


def _as_dict(waiver: Waiver) -> dict[str, Any]:
    return {k: str(v) for k, v in asdict(waiver).items()}


def _code_digest(module: str) -> str:
    """Hash of a backend's code: of all files beside its plugin's module, or of that alone."""
    found = find_spec(module)
    if found is None or found.origin is None:
        return ""
    origin = Path(found.origin)
    in_package = "." in module or found.submodule_search_locations is not None
    paths = origin.parent.rglob("*") if in_package else (origin,)
    files = sorted(path for path in paths if path.is_file() and path.suffix != ".pyc")
    return reports.digest([(str(p), sha256(p.read_bytes()).hexdigest()) for p in files])
