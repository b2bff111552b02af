"""`core conformance`: run the suite, and what can be done with its reports."""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from conformance.status import EMPTY, EXIT_MEANING, FAILURES, MISMATCH, NO_DEVICE, USAGE
from conformance.subject import BackendMissing, BackendRefused, Subject, Target
from core.contract.errors import ConfigError, CoreError

if TYPE_CHECKING:
    from conformance.report import Report

Resume = Annotated[bool, typer.Option(help="go on from --out")]
Others = Annotated[list[Path] | None, typer.Option("--from", help="a file of another shard; may be repeated")]

app = typer.Typer(
    help="Check a backend against the contract and the CPU reference.",
    no_args_is_help=True,
    epilog="Exit status: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_MEANING.items()) + ".",
)

Backend = Annotated[
    str, typer.Option(help="a backend's name, or MODULE:OBJECT of a plugin that is not installed")
]
Levels = Annotated[str, typer.Option(help="a level, a range or a list: L2, L0..L5, L0,L2")]
Dtype = Annotated[
    str, typer.Option(help="compute dtype; auto = float32, or the backend's first where it has not that")
]
Options = Annotated[
    list[str] | None, typer.Option("--option", help="backend option as NAME=VALUE; may be repeated")
]


def _target(
    backend: str, dtype: str, device: int, options: Sequence[str] | None, constraints: str = ""
) -> Subject:
    given = {}
    for option in options or ():
        name, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(f"--option {option!r} is not NAME=VALUE")
        given[name] = value
    return Subject.declared(Target(backend, dtype, device, given, constraints=constraints))


def _end(code: int, message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def _files(known: Sequence[Path] | None, resume: bool, out: Path | None) -> list[Path]:
    """What a run goes on from."""
    return [*(known or ()), *([out] if resume and out is not None and out.exists() else ())]


def _seed(text: str) -> int:
    if text == "auto":
        return secrets.randbits(64)
    if not re.fullmatch("[0-9A-Fa-f]{1,16}", text):
        raise ConfigError(f"--seed is {text!r}; give auto or up to 16 hexadecimal digits")
    return int(text, 16)


def _read(path: Path, code: int) -> Report:
    """A report, or the end with this exit status."""
    from conformance.reading import from_json

    try:
        return from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        _end(code, f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); give a report.json")
    except ConfigError as error:
        _end(code, str(error))


@app.command()
def run(
    backend: Backend,
    level: Levels = "L0..L5",
    profile: Annotated[
        str, typer.Option(help="profiles, separated by commas; each must be supported whole")
    ] = "",
    dtype: Dtype = "auto",
    device: Annotated[int, typer.Option(min=0, help="index of the device")] = 0,
    option: Options = None,
    seed: Annotated[str, typer.Option(help="auto, or up to 16 hexadecimal digits")] = "auto",
    shard: Annotated[str, typer.Option(help="i/n: this part of n of the checks")] = "1/1",
    resume: Annotated[bool, typer.Option(help="go on where the run in --out was interrupted")] = False,
    out: Annotated[Path, typer.Option(help="folder of the report")] = Path("conformance-report"),
    full: Annotated[bool, typer.Option("--full", help="every check, not the quick ones only")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="worker processes")] = 1,
    only: Annotated[str, typer.Option(help="a regular expression that ids must contain")] = "",
    waivers: Annotated[Path | None, typer.Option(help="the vendor's waivers.toml")] = None,
    constraints: Annotated[
        str,
        typer.Option(
            help="rules of other hardware that L5 obeys: mixed, static, split, host-lists, rectangular"
        ),
    ] = "",
    time_factor: Annotated[
        float, typer.Option(help="multiplies the time limit of each check, for emulated devices")
    ] = 1.0,
    execution: Annotated[
        str,
        typer.Option(
            help="emulated or compiled, where the device is less than it says: a stand-in, or none at all"
        ),
    ] = "",
) -> None:
    """Run the checks of some levels, and write a report."""
    from conformance.catalogue import parse_levels
    from conformance.constraints.rules import check_levels
    from conformance.report import of_refused, write
    from conformance.session import Request, Session

    try:
        try:
            subject = _target(backend, dtype, device, option, constraints)
            check_levels(constraints, parse_levels(level))
        except BackendRefused as error:
            given = Target(backend, dtype, device, constraints=constraints)
            report = of_refused(given, parse_levels(level), _seed(seed), str(error))
            write(report, out)
            typer.echo(f"FAIL  {report.results[0].id}  {error}\n{out / 'report.html'}")
            raise typer.Exit(report.exit_code) from None
        except BackendMissing as error:
            _end(NO_DEVICE, str(error))
        request = Request(
            levels=level,
            profiles=tuple(p.strip() for p in profile.split(",") if p.strip()),
            seed=None if seed == "auto" else _seed(seed),
            shard=shard,
            quick=not full,
            only=only,
            jobs=jobs,
            out=out,
            resume=resume,
            waivers=waivers,
            time_factor=time_factor,
            execution=execution,
        )
        report = Session(subject, request).run()
    except BackendMissing as error:
        _end(NO_DEVICE, str(error))
    except ConfigError as error:
        _end(USAGE, str(error))
    raise typer.Exit(report.exit_code)


@app.command("list")
def list_(
    backend: Backend,
    level: Levels = "L0..L7",
    dtype: Dtype = "auto",
    option: Options = None,
) -> None:
    """The ids of all checks that concern a backend, and which of them it does not support."""
    from conformance.catalogue import LEVELS, catalogue_of, lacking, parse_levels

    try:
        levels = parse_levels(level)
        subject = _target(backend, dtype, 0, option)
    except BackendMissing as error:
        _end(NO_DEVICE, str(error))
    except CoreError as error:
        _end(USAGE, str(error))
    checks = catalogue_of(subject, 0)
    for number in levels:
        own = [check for check in checks if check.level == number]
        typer.echo(f"L{number} {LEVELS[number]}: {f'{len(own)} checks' if own else 'no case'}")
        for check in own:
            missing = lacking(check, subject.spec)
            is_off = bool(missing) or not check.supported(subject.spec)
            typer.echo(f"  {check.id}{f'  (not supported: {chr(44).join(missing)})' if is_off else ''}")


@app.command()
def explain(check_id: str, backend: Backend = "cpu_reference") -> None:
    """What a check does, what it needs, and where it is written."""
    from conformance.catalogue import catalogue_of

    try:
        subject = Subject.of(Target(backend))
    except BackendMissing as error:
        _end(NO_DEVICE, str(error))
    found = {check.id: check for check in catalogue_of(subject, 0)}
    if check_id not in found:
        import difflib

        near = difflib.get_close_matches(check_id, found, n=1)
        hint = f"; nearest is {near[0]}" if near else ""
        _end(USAGE, f"there is no check {check_id!r} for backend {backend!r} (--backend){hint}")
    check = found[check_id]
    run = getattr(check.run, "func", check.run)
    code = run.__code__
    typer.echo(f"{check.id}\n  {check.about}")
    typer.echo(
        f"  needs: {', '.join(check.needs) or 'nothing that a backend may lack'}; profile {check.profile}"
    )
    typer.echo(f"  limit {check.timeout_s:g} s; {'may' if check.is_waivable else 'may not'} be waived")
    typer.echo(f"  {run.__module__}, line {code.co_firstlineno}")


@app.command()
def repro(
    report: Path, check_id: str, debug: Annotated[bool, typer.Option(help="show the traceback")] = False
) -> None:
    """Run one check of a report again, here, with the same seed and options."""
    from conformance.catalogue import catalogue_of
    from conformance.status import Status
    from conformance.worker import run_check

    found = _read(report, MISMATCH)
    facts = found.run
    target = Target(
        found.backend["target"],
        facts["dtype"],
        facts["device"],
        facts["options"],
        facts["fault"],
        facts.get("constraints", ""),
    )
    seed = int(facts["seed"], 16)
    try:
        subject = Subject.of(target)
    except CoreError as error:
        _end(NO_DEVICE, str(error))
    checks = {check.id: check for check in catalogue_of(subject, seed)}
    if check_id not in checks:
        _end(USAGE, f"{report} has no check {check_id!r}")
    result = run_check(checks[check_id], subject, seed)
    typer.echo(f"{result.status}: {result.message or 'nothing wrong'}")
    for name, value in result.metrics.items():
        typer.echo(f"  {name} = {value}")
    if debug and result.log:
        typer.echo(result.log, err=True)
    raise typer.Exit(0 if Status(result.status).is_good else FAILURES)


@app.command()
def merge(
    reports: list[Path], out: Annotated[Path, typer.Option(help="folder of the merged report")]
) -> None:
    """One report of all shards of a run."""
    from conformance.reading import merge as merged
    from conformance.report import write

    if any(path.resolve().parent == out.resolve() for path in reports):
        _end(USAGE, f"--out {out} holds one of the shards, which would be lost; choose another folder")
    try:
        whole = merged([_read(path, MISMATCH) for path in reports], [str(path) for path in reports])
    except ConfigError as error:
        _end(MISMATCH, str(error))
    try:
        write(whole, out)
    except OSError as error:
        _end(USAGE, f"--out {out} cannot be written ({error.strerror}); choose a folder")
    typer.echo(f"{whole.verdict}\n{out}")
    raise typer.Exit(whole.exit_code)


@app.command()
def verify(report: Path) -> None:
    """Hold a report against its schema, its hash and its own figures. A part of a run ends with status 5."""
    from conformance.reading import validate

    found = _read(report, MISMATCH)
    try:
        validate(report.read_text(encoding="utf-8"), str(report))
    except ConfigError as error:
        _end(MISMATCH, str(error))
    typer.echo(found.verdict)
    raise typer.Exit(found.exit_code or (EMPTY if found.part else 0))


@app.command()
def badge(
    report: Path, out: Annotated[Path | None, typer.Option(help="file; otherwise printed")] = None
) -> None:
    """A badge of a report, as SVG."""
    from conformance.report import to_badge

    svg = to_badge(_read(report, MISMATCH))
    if out is None:
        sys.stdout.write(svg)
    else:
        out.write_text(svg, encoding="utf-8")


@app.command()
def zoo(
    seeds: Annotated[int, typer.Option(min=1, help="seeds 0 to N - 1")] = 1,
    shard: Annotated[str, typer.Option(help="i/n")] = "1/1",
    only: Annotated[str, typer.Option(help="a regular expression that the fault's name must contain")] = "",
    resume: Resume = False,
    known: Others = None,
    out: Annotated[Path | None, typer.Option(help="JSON file of what became of each fault")] = None,
) -> None:
    """Plant every known fault in the reference backend, and see that a test of its family finds it."""
    from conformance.catalogue import parse_shard
    from conformance.zoo.faults import FAULTS, NO_SUBJECT
    from conformance.zoo.run import Catch, hunt_all, resumed, write_results

    def keep(found: Sequence[Catch]) -> None:
        if out is not None:
            write_results(out, found)

    try:
        before = resumed(Catch, _files(known, resume, out))
        found = hunt_all(seeds, parse_shard(shard), only, before, keep)
    except ConfigError as error:
        _end(USAGE, str(error))
    keep(found)
    missed = [catch for catch in found if not catch.by]
    numbers = {fault.number for fault in FAULTS}
    typer.echo(
        f"{len(found) - len(missed)} of {len(found)} caught; {len(numbers)} faults of the catalogue have a "
        f"subject, {len(NO_SUBJECT)} have none"
    )
    for catch in missed:
        typer.echo(f"MISSED {catch.fault} {catch.severity} (seed {catch.seed})")
    raise typer.Exit(FAILURES if missed else 0)


@app.command()
def alarms(
    seeds: Annotated[int, typer.Option(min=1, help="seeds 0 to N - 1")] = 1,
    level: Levels = "L1..L2",
    backend: Annotated[list[str] | None, typer.Option(help="a clean backend; may be repeated")] = None,
    dtype: Dtype = "float32",
    shard: Annotated[str, typer.Option(help="i/n")] = "1/1",
    resume: Resume = False,
    known: Others = None,
    jobs: Annotated[int, typer.Option(min=1, help="workers of a run")] = 2,
    out: Annotated[Path | None, typer.Option(help="JSON file of what was found")] = None,
) -> None:
    """Run the checks against backends that are right: clean ones, and the reference under legal changes."""
    from conformance.catalogue import parse_levels, parse_shard
    from conformance.zoo.run import Alarms, all_alarms, resumed, write_results

    def keep(found: Sequence[Alarms]) -> None:
        if out is not None:
            write_results(out, found)

    try:
        parse_levels(level)
        before = resumed(Alarms, _files(known, resume, out))
        clean = backend or ["cpu_reference"]
        found = all_alarms(clean, dtype, seeds, level, parse_shard(shard), before, jobs, keep)
    except BackendMissing as error:
        _end(NO_DEVICE, str(error))
    except CoreError as error:
        _end(USAGE, str(error))
    keep(found)
    false = sum(len(one.alarms) for one in found)
    typer.echo(f"{false} false alarms in {sum(one.checks for one in found)} checks of {len(found)} runs")
    raise typer.Exit(FAILURES if false else 0)


@app.command()
def mutants(
    module: Annotated[
        list[str] | None, typer.Option(help="attention, state or sampler; may be repeated; all by default")
    ] = None,
    seed: Annotated[str, typer.Option(help="up to 16 hexadecimal digits")] = "0",
    shard: Annotated[str, typer.Option(help="i/n")] = "1/1",
    limit: Annotated[int | None, typer.Option(min=1, help="of mutants that are run")] = None,
    resume: Resume = False,
    known: Others = None,
    out: Annotated[Path | None, typer.Option(help="JSON file of what became of each mutant")] = None,
) -> None:
    """Make every small change in the text of the reference's attention, states and sampler, and see that the
    checks of its family find it.
    """
    from conformance.catalogue import parse_shard
    from conformance.zoo.mutants import FAMILIES
    from conformance.zoo.mutation import AIM, Fate, counts, run_mutants, score, stale
    from conformance.zoo.run import resumed, write_results

    modules = module or list(FAMILIES)

    def keep(fates: Sequence[Fate]) -> None:
        if out is not None:
            write_results(out, fates, counts(fates))

    try:
        before = resumed(Fate, _files(known, resume, out))
        found = run_mutants(modules, _seed(seed), parse_shard(shard), limit, before, keep)
        wrong = stale(found, modules)
    except ConfigError as error:
        _end(USAGE, str(error))
    keep(found)
    for what in wrong:
        typer.echo(f"equivalent.toml: {what}")
    numbers = ", ".join(f"{count} {status}" for status, count in counts(found).items())
    typer.echo(
        f"{len(found)} mutants: {numbers}; {score(found):.1%} of those that are not equivalent are killed"
    )
    raise typer.Exit(FAILURES if wrong or score(found) < AIM else 0)


def new_backend(
    name: Annotated[str, typer.Argument(help="the value of backend=: lower case letters, digits and _")],
    out: Annotated[Path | None, typer.Option(help="folder; core-backend-NAME where none is given")] = None,
) -> None:
    """Write a separate package for a backend of your own: green at level 0, and it says what comes next."""
    from conformance.kit.new_backend import write_backend

    folder = out or Path(f"core-backend-{name}")
    try:
        written = write_backend(name, folder)
    except ConfigError as error:
        _end(USAGE, str(error))
    except OSError as error:
        _end(USAGE, f"--out {folder} cannot be written ({error.strerror}); choose another folder")
    for path in written:
        typer.echo(path)
    typer.echo(
        f"next: cd {folder}; pip install -e '.[conformance]'; core conformance run --backend {name} "
        f"--level L0"
    )
