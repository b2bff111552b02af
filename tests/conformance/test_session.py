"""Runs of the suite: what becomes of each check, what is written, and what the exit status says."""

from __future__ import annotations

import fcntl
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from conformance import report as reports
from conformance.catalogue import catalogue, in_shard, parse_levels, parse_shard, select
from conformance.check import Check, Result, check_seed, has
from conformance.cli import app
from conformance.reading import from_json, merge, validate
from conformance.report import Report, badge_text, digest, to_json
from conformance.runner import run_all
from conformance.session import Request, Session
from conformance.status import Status, exit_code
from conformance.subject import BackendMissing, BackendRefused, Subject, Target
from conformance.waivers import apply, read_waivers
from conformance.worker import Setup
from core.contract.errors import ConfigError
from tests.conformance import bad_checks

MODULE = "tests.conformance.bad_checks"
TARGET = Target("cpu_reference")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.of(TARGET)


@pytest.fixture(scope="module")
def ended(subject: Subject) -> dict[str, Result]:
    """What became of the bad checks, in two workers."""
    checks = [c for c in bad_checks.checks(subject.spec) if not c.needs]
    found: list[Result] = []
    run_all(checks, Setup(TARGET, 5, (MODULE,)), found.append, jobs=2)
    return {result.id: result for result in found}


@pytest.mark.parametrize("name", bad_checks.ENDS)
def test_a_check_costs_itself_alone(name: str, ended: dict[str, Result]) -> None:
    result = ended[f"L7/ends/{name}"]
    assert result.status == bad_checks.ENDS[name][1]
    assert result.seed == check_seed(5, f"L7/ends/{name}")


def test_what_is_known_of_an_end_is_kept(ended: dict[str, Result]) -> None:
    assert ended["L7/ends/bad"].message == "found 1, wanted 2"
    assert (
        "KeyError" in ended["L7/ends/surprising"].message and "Traceback" in ended["L7/ends/surprising"].log
    )
    assert "exit status 17" in ended["L7/ends/crashing"].message
    assert "signal 11" in ended["L7/ends/killed"].message
    assert "2 s" in ended["L7/ends/hanging"].message
    assert ended["L7/ends/good"].metrics == {"figure": 3}


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ([Status.PASS, Status.NOT_SUPPORTED], 0),
        ([Status.PASS, Status.WAIVED, Status.QUALITY_WARNING], 0),
        ([Status.PASS, Status.FAIL, Status.CRASH], 1),
        ([Status.PASS, Status.XPASS], 4),
        ([Status.NOT_SUPPORTED], 5),
        ([], 5),
        ([Status.FAIL, Status.TIMEOUT, Status.XPASS], 4),
        ([Status.PASS, Status.NOT_RUN], 6),
        ([Status.PASS, Status.BLOCKED], 6),
    ],
)
def test_the_exit_status_is_that_of_the_worst(statuses: list[Status], code: int) -> None:
    assert exit_code(statuses) == code


def test_levels_and_shards_are_read_or_refused() -> None:
    assert parse_levels("L0..L2,L5") == (0, 1, 2, 5) and parse_shard("3/8") == (3, 8)
    for text in ("L8", "0..2", "L3..L1", ""):
        with pytest.raises(ConfigError, match="level"):
            parse_levels(text)
    for text in ("0/2", "3/2", "x", "1"):
        with pytest.raises(ConfigError, match="shard"):
            parse_shard(text)


def test_shards_share_the_checks_and_each_has_level_0(subject: Subject) -> None:
    checks = catalogue(subject.spec, TARGET, 1)
    shards = [{c.id for c in select(checks, (0, 1, 2), shard=(i, 3))} for i in (1, 2, 3)]
    first = {c.id for c in checks if c.level == 0}
    assert all(first <= shard for shard in shards)
    rest = [shard - first for shard in shards]
    assert sum(map(len, rest)) == len(set.union(*rest)) and min(map(len, rest)) > 50
    assert in_shard("L2/x/y", (1, 1))


def test_an_id_must_be_well_formed_and_unique(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("L2/only", "L9/a/b"):
        monkeypatch.setattr(bad_checks, "checks", lambda spec, i=wrong: [Check(i, bad_checks.good, "")])
        with pytest.raises(ConfigError, match="malformed"):
            catalogue(subject.spec, TARGET, 1, (MODULE,))
    twice = [Check("L7/a/b", bad_checks.good, "")] * 2
    monkeypatch.setattr(bad_checks, "checks", lambda spec: twice)
    with pytest.raises(ConfigError, match="two checks"):
        catalogue(subject.spec, TARGET, 1, (MODULE,))


def test_features_are_paths_and_values(subject: Subject) -> None:
    spec = subject.spec
    assert has(spec, "attention.window") and has(spec, "dtypes:float64") and has(spec, "shapes.kind:dynamic")
    assert not has(spec, "device_sampler") and not has(spec, "dtypes:bfloat16")
    assert has(spec, "attention.head_sizes:57"), "an empty tuple means any"


def run(subject: Subject, out: Path, **options: Any) -> Report:
    request = Request(**{"levels": "L0", "seed": 3, "out": out, "is_shown": False, **options})
    return Session(subject, request).run()


def test_a_report_is_written_read_back_and_verified(subject: Subject, tmp_path: Path) -> None:
    report = run(subject, tmp_path)
    text = (tmp_path / "report.json").read_text()
    validate(text, "report.json")
    again = from_json(text, "report.json")
    assert again.results == report.results and again.exit_code == report.exit_code == 0
    suites = ElementTree.fromstring((tmp_path / "junit.xml").read_text())
    assert sum(int(s.attrib["tests"]) for s in suites) == len(report.results)
    page = (tmp_path / "report.html").read_text()
    assert "cpu_reference" in page and "http" not in page.replace("http://www.w3.org", "")
    assert "L0" in (tmp_path / "badge.svg").read_text()
    assert "| L0 registration" in (tmp_path / "report.md").read_text()


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "figure": (lambda r: r["results"][-1]["metrics"].update(ratio_A=999.0), "passes, but its ratio_A is 999"),
    "waived": (lambda r: r["results"][-1].update(status="waived"), "is waived, but no waiver names it"),
    "invented": (lambda r: r["results"].append({**r["results"][-1], "id": "L0/new/one"}), "seed that is not"),
    "twice": (lambda r: r["results"].append(r["results"][-1]), "is there twice"),
    "dropped": (lambda r: r["results"].pop(), "not those that the run took"),
    "verdict": (lambda r: r["summary"].update(verdict="all is well"), "says 'all is well'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_report_whose_hash_was_made_anew_is_still_held_to_its_figures(
    subject: Subject, tmp_path: Path, name: str
) -> None:
    change, words = CHANGES[name]
    run(subject, tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    change(found)
    del found["sha256"]
    again = Report(
        **{
            **{k: v for k, v in found.items() if k != "summary"},
            "results": tuple(Result(**r) for r in found["results"]),
            "waivers": tuple(found["waivers"]),
        }
    )
    if name != "verdict":
        found["summary"] = json.loads(to_json(again))["summary"]
    with pytest.raises(ConfigError, match=re.escape(words)):
        from_json(json.dumps({**found, "sha256": digest(found)}), "report.json")


def test_a_part_of_a_run_never_conforms(subject: Subject, tmp_path: Path) -> None:
    for name, options in {"only": {"only": "registration"}, "shard": {"shard": "1/2"}}.items():
        part = run(subject, tmp_path / name, **options)
        assert part.exit_code == 0 and "a part of L0" in part.verdict and "conforms" not in part.verdict
        assert "none · a part" in badge_text(part)
        path = str(tmp_path / name / "report.json")
        assert CliRunner().invoke(app, ["verify", path]).exit_code == 5


def test_a_level_without_a_case_is_named_and_is_no_grade(subject: Subject, tmp_path: Path) -> None:
    report = run(subject, tmp_path, levels="L0,L1,L3", profiles=())
    assert "no case for this backend: L3" in report.verdict and " L1 " in badge_text(report)


def test_two_runs_never_share_a_folder(subject: Subject, tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another run writes into"):
            run(subject, tmp_path)
    assert run(subject, tmp_path).exit_code == 0


def test_what_failed_and_what_other_code_gave_is_run_again(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(subject, tmp_path)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    (tmp_path / "results.jsonl").write_text("\n".join([json.dumps({**first, "status": "fail"}), *lines[1:]]))
    assert run(subject, tmp_path, resume=True, seed=None).exit_code == 0
    monkeypatch.setattr("conformance.session._code_digest", lambda module: "other")
    with pytest.raises(ConfigError, match="other code of the backend"):
        run(subject, tmp_path, resume=True, seed=None)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("run", "--backend", "cpu_reference", "--only", "("), 2, "is no regular expression"),
        (("run", "--backend", "cpu_reference", "--shard", "1/2"), 2, "--shard needs --seed"),
        (("run", "--backend", "cpu_reference", "--out", "/dev/null/x"), 2, "cannot be written"),
        (
            ("run", "--backend", "cpu_reference", "--seed", "00000000000000001"),
            2,
            "up to 16 hexadecimal digits",
        ),
        (("run", "--backend", "cpu_reference", "--seed=-1"), 2, "up to 16 hexadecimal digits"),
        (("verify", "/nowhere/report.json"), 8, "cannot be read (No such file"),
        (("repro", "/nowhere/report.json", "L0/a/b"), 8, "cannot be read (No such file"),
        (("explain", "--backend", "nobody", "L0/a/b"), 3, "nobody"),
    ],
)
def test_wrong_use_ends_with_a_sentence_and_its_status(
    arguments: tuple[str, ...], code: int, words: str
) -> None:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == code and words in done.output and "Traceback" not in done.output


def test_a_merge_never_writes_over_a_shard(subject: Subject, tmp_path: Path) -> None:
    for i in (1, 2):
        run(subject, tmp_path / str(i), shard=f"{i}/2")
    paths = [str(tmp_path / str(i) / "report.json") for i in (1, 2)]
    done = CliRunner().invoke(app, ["merge", *paths, "--out", str(tmp_path / "1")])
    assert done.exit_code == 2 and "would be lost" in done.output


def test_shards_of_another_device_or_with_a_check_less_do_not_merge(subject: Subject, tmp_path: Path) -> None:
    one, two = (run(subject, tmp_path / str(i), levels="L0,L1", shard=f"{i}/2") for i in (1, 2))
    other = replace(two, environment={**two.environment, "device": "another"})
    with pytest.raises(ConfigError, match="their environment's device differ"):
        merge([one, other], ["a", "b"])
    with pytest.raises(ConfigError, match="lack checks"):
        merge([one, replace(two, results=two.results[:-1])], ["a", "b"])


def test_a_report_that_was_changed_is_refused(subject: Subject, tmp_path: Path) -> None:
    run(subject, tmp_path, only="registration/loads")
    found = json.loads((tmp_path / "report.json").read_text())
    found["results"][0]["status"] = "waived"
    with pytest.raises(ConfigError, match="changed"):
        from_json(json.dumps(found), "report.json")
    with pytest.raises(ConfigError, match="no conformance report"):
        from_json("{}", "x")
    (tmp_path / "report.json").write_text(json.dumps(found))
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "report.json")]).exit_code == 8


def test_shards_merge_into_the_whole_and_strangers_do_not(subject: Subject, tmp_path: Path) -> None:
    whole = run(subject, tmp_path / "w", levels="L0,L1")
    parts = [run(subject, tmp_path / str(i), levels="L0,L1", shard=f"{i}/2") for i in (1, 2)]
    merged = merge(parts, ["a", "b"])
    assert {r.id for r in merged.results} == {r.id for r in whole.results}
    with pytest.raises(ConfigError, match=r"shards \[1\] of 2"):
        merge(parts[:1], ["a"])
    with pytest.raises(ConfigError, match="shards"):
        merge([parts[0], parts[0]], ["a", "a"])
    other = run(subject, tmp_path / "o", levels="L0,L1", shard="2/2", seed=4)
    with pytest.raises(ConfigError, match="not shards of one run"):
        merge([parts[0], other], ["a", "o"])


def test_a_run_goes_on_where_it_was_interrupted(subject: Subject, tmp_path: Path) -> None:
    first = run(subject, tmp_path)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    (tmp_path / "results.jsonl").write_text("\n".join(lines[:5]) + '\n{"id": "L0/cut')
    kept = {json.loads(line)["id"]: json.loads(line)["duration_s"] for line in lines[:5]}
    again = run(subject, tmp_path, resume=True, seed=None)
    assert {r.id for r in again.results} == {r.id for r in first.results} and again.exit_code == 0
    assert all(r.duration_s == kept[r.id] for r in again.results if r.id in kept)
    with pytest.raises(ConfigError, match="another seed"):
        run(subject, tmp_path, resume=True, seed=9)


def test_a_level_without_cases_passes_nothing(subject: Subject, tmp_path: Path) -> None:
    report = run(subject, tmp_path, levels="L7")
    assert report.exit_code == 5 and "no case" in (tmp_path / "report.md").read_text()


def test_a_claimed_profile_must_be_supported_whole(tmp_path: Path) -> None:
    subject = Subject.of(TARGET)
    handle = replace(subject.handle, spec=replace(subject.spec, routed_experts=False))
    lacking = Subject(TARGET, handle)
    found = run(lacking, tmp_path / "a", levels="L2", only="L2/route/.*rule-a")
    assert found.counts == {"not supported": len(found.results)} and found.exit_code == 5
    claimed = run(lacking, tmp_path / "b", levels="L2", only="L2/route/.*rule-a", profiles=("moe",))
    assert claimed.counts == {"fail": len(claimed.results)} and claimed.exit_code == 1


WAIVER = """
[[waiver]]
test = "{test}"
device = "*"
driver = "*"
issue = "https://example.org/1"
reason = "rounding"
impact = "none"
owner = "someone"
opened = {opened}
expires = {expires}
"""


def waived(tmp_path: Path, subject: Subject, test: str, days: int = 10, driver: str = "*") -> list[Result]:
    today = datetime.now(UTC).date()
    file = tmp_path / "waivers.toml"
    opened = today - timedelta(days=5)
    text = WAIVER.format(test=test, opened=opened, expires=opened + timedelta(days=days))
    file.write_text(text.replace('driver = "*"', f'driver = "{driver}"'))
    checks = list(bad_checks.checks(subject.spec))
    results = [
        Result("L7/ends/bad", "fail"),
        Result("L7/ends/good", "pass"),
        Result("L7/ends/never-waived", "fail"),
    ]
    found, _ = apply(read_waivers(file), results, checks, subject, "1.5")
    return found


def test_a_waiver_excuses_its_check(tmp_path: Path, subject: Subject) -> None:
    found = {r.id: r for r in waived(tmp_path, subject, "L7/ends/bad")}
    assert found["L7/ends/bad"].status == "waived" and found["L7/ends/bad"].waiver
    assert found["L7/ends/never-waived"].status == "fail"


def test_a_waiver_of_a_check_that_this_run_leaves_out_is_let_be(tmp_path: Path, subject: Subject) -> None:
    found = waived(tmp_path, subject, "L7/ends/hanging")
    assert not [r for r in found if r.status == "unexpected pass"]


@pytest.mark.parametrize(
    ("driver", "is_waived"),
    [(">=1.2,<1.6", True), ("==1.5", True), (">=1.6", False), ("<1.5", False), ("1.*", True), ("2.*", False)],
)
def test_a_waiver_is_for_a_range_of_drivers(
    driver: str, is_waived: bool, tmp_path: Path, subject: Subject
) -> None:
    found = {r.id: r for r in waived(tmp_path, subject, "L7/ends/bad", driver=driver)}
    assert (found["L7/ends/bad"].status == "waived") == is_waived


@pytest.mark.parametrize(
    ("test", "days", "words"),
    [
        ("L7/ends/good", 10, "pass"),
        ("L7/ends/[bg]*", 10, "L7/ends/good, which passes"),
        ("L7/ends/absent", 10, "matches no check"),
        ("L7/ends/never-waived", 10, "never be waived"),
        ("L7/ends/bad", 2, "expired"),
    ],
)
def test_a_waiver_that_is_not_right_fails_the_run(
    test: str, days: int, words: str, tmp_path: Path, subject: Subject
) -> None:
    found = waived(tmp_path, subject, test, days)
    problem = next(r for r in found if r.status == "unexpected pass")
    assert words in problem.message
    assert exit_code([Status(r.status) for r in found if r.id != "L7/ends/bad" and "never" not in r.id]) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("expires = ", "expired = "), "lacks expires"),
        (('owner = "someone"', 'owner = ""'), "owner"),
        (('driver = "*"', 'driver = ">=x"'), "driver is '>=x'"),
        (('test = "L7/ends/bad"', 'test = "L*/ends/bad"'), "one level and family"),
        (("[[waiver]]", "[[waivers]]"), "waivers"),
    ],
)
def test_a_waivers_file_is_checked_before_anything_runs(
    change: tuple[str, str], words: str, tmp_path: Path
) -> None:
    today = datetime.now(UTC).date()
    text = WAIVER.format(test="L7/ends/bad", opened=today, expires=today + timedelta(days=1))
    (tmp_path / "w.toml").write_text(text.replace(*change))
    with pytest.raises(ConfigError, match=words):
        read_waivers(tmp_path / "w.toml")
    long = WAIVER.format(test="L7/ends/bad", opened=today, expires=today + timedelta(days=91))
    (tmp_path / "w.toml").write_text(long)
    with pytest.raises(ConfigError, match="91 days"):
        read_waivers(tmp_path / "w.toml")


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        ("no-such-backend", BackendMissing),
        ("no_such_module:plugin", BackendMissing),
        ("newer_contract", BackendRefused),
        ("broken_import", BackendRefused),
        ("core_test_plugins.refused:nothing", BackendRefused),
    ],
)
def test_a_backend_that_is_not_there_is_told_from_one_that_is_refused(
    backend: str, kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        Subject.of(Target(backend))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "--backend", "no-such-backend"], 3, "no backend is named"),
        (["run", "--backend", "newer_contract"], 1, "was built for contract"),
        (["run", "--backend", "cpu_reference", "--level", "L9"], 2, "level 'L9'"),
        (["run", "--backend", "cpu_reference", "--dtype", "int3"], 2, "dtype is 'int3'"),
        (["run", "--backend", "cpu_reference", "--seed", "zz"], 2, "--seed"),
        (["run", "--backend", "cpu_reference", "--profile", "other"], 2, "profile 'other'"),
        (["explain", "L1/blocks/copies-pagd"], 2, "nearest is L1/blocks/copies-paged"),
        (["merge", "absent.json", "--out", "x"], 8, "absent.json"),
    ],
)
def test_what_the_command_line_refuses(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    if arguments[0] == "run":
        arguments = [*arguments, "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == code and words in done.output


def test_a_failing_check_is_repeated_from_its_report(tmp_path: Path) -> None:
    faulty = Subject.of(Target("cpu_reference", fault="seed-ignored:"))
    report = run(faulty, tmp_path, levels="L2", only="sampling/keyed-by-seed")
    assert report.exit_code == 1
    done = CliRunner().invoke(app, ["repro", str(tmp_path / "report.json"), "L2/sampling/keyed-by-seed"])
    assert done.exit_code == 1 and "fail: " in done.output
    assert reports.badge_text(report).startswith("conformance")
    assert "keyed-by-seed" in (tmp_path / "report.html").read_text()
    assert to_json(report)


def test_an_interrupt_of_two_workers_leaves_a_report_and_no_traceback(tmp_path: Path) -> None:
    start = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from core.cli import main; main()"
    )
    arguments = ["run", "--backend", "cpu_reference", "--level", "L1,L2", "--jobs", "2"]
    arguments += ["--out", str(tmp_path)]
    command = [sys.executable, "-c", start, "conformance", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "results.jsonl").exists() or not (tmp_path / "results.jsonl").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=60)
    assert process.returncode == 6 and "`--resume` goes on from here" in text and "Traceback" not in text
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["summary"]["counts"]["not run"] > 0 and "crash" not in found["summary"]["counts"]
