"""The support matrix says what the committed reports say, and nothing beyond it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from conformance.catalogue import LEVELS
from conformance.check import Result, check_seed
from conformance.cli import app
from conformance.constraints.rules import PROFILES
from conformance.execution import execution_of
from conformance.reading import from_json, merge, validate
from conformance.report import Report, badge_text, digest, ids_digest, of_refused, to_json
from conformance.session import Request, Session
from conformance.status import Status
from conformance.subject import Subject, Target
from core.contract.errors import ConfigError
from core.contract.types import DeviceInfo
from tests.conformance.test_misbehaving import run as run_module

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "support.py"
BACKEND = "cpu_reference"

Change = Callable[[Report], Report]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("support_tool", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A run of level 0, whole, of the reference; at a commit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORE_COMMIT", "abc1234")
        return run(tmp_path_factory.mktemp("real"))


def run(out: Path, **options: Any) -> Report:
    request = Request(**{"levels": "L0", "seed": 3, "out": out, "is_shown": False, **options})
    return Session(Subject.of(Target(BACKEND)), request).run()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree of three backends, without a report."""
    for name in (BACKEND, "second", "third"):
        (tmp_path / "backends" / name).mkdir(parents=True)
        (tmp_path / "backends" / name / "plugin.py").touch()
    (tmp_path / "docs" / "conformance").mkdir(parents=True)
    return tmp_path


def commit(tree: Path, report: Report, name: str = BACKEND) -> Path:
    folder = tree / "docs" / "conformance" / name
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(to_json(report))
    return folder


def cells(page: str, backend: str) -> list[list[str]]:
    """Of each row of the backend: the device, and the cells of the levels."""
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith(f"| `{backend}`")]
    return [[cell.removesuffix(" |") for cell in row[1:]] for row in rows]


def page_of(tool: ModuleType, tree: Path) -> str:
    return str(tool.render(tree)[Path("docs", "support.md")])


def level_0(tool: ModuleType, tree: Path, report: Report) -> str:
    commit(tree, report)
    return cells(page_of(tool, tree), BACKEND)[0][1]


def of_run(report: Report, **facts: object) -> Report:
    return replace(report, run={**report.run, **facts})


def of_environment(report: Report, **facts: object) -> Report:
    return replace(report, environment={**report.environment, **facts})


def ended(report: Report, status: Status) -> Report:
    """With another end of the last check."""
    last = replace(report.results[-1], status=status.value)
    waivers = ({"test": last.id},) if status is Status.WAIVED else ()
    return replace(report, results=(*report.results[:-1], last), waivers=waivers)


# The tree itself


def test_the_committed_matrix_is_what_the_committed_reports_say() -> None:
    done = subprocess.run(
        [sys.executable, TOOL, "--check"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_every_backend_of_this_tree_has_a_row(tool: ModuleType) -> None:
    page = (ROOT / "docs" / "support.md").read_text()
    names = tool.backends_of(ROOT)
    assert {"cpu", "cpu_reference", "tpu"} <= set(names)
    assert all(cells(page, name) for name in names)


def test_every_profile_says_whose_rules_it_has(tool: ModuleType) -> None:
    assert list(tool.AS_ON) == list(PROFILES)
    guide = (ROOT / "docs" / "conformance.md").read_text()
    assert all(f"| `{name}` | {vendor} |" in guide for name, vendor in tool.AS_ON.items())


# What a cell says


def test_a_backend_without_a_report_was_not_run(tool: ModuleType, tree: Path, real: Report) -> None:
    commit(tree, real)
    page = page_of(tool, tree)
    for name in ("second", "third"):
        ((_, *levels),) = cells(page, name)
        assert levels == ["not run"] * len(LEVELS)
    assert page.count("| not run |\n") >= len(PROFILES), "no report of a profile is there either"


def test_a_level_that_passed_links_its_report_and_names_commit_device_and_date(
    tool: ModuleType, tree: Path, real: Report
) -> None:
    commit(tree, real)
    ((device, first, *rest),) = cells(page_of(tool, tree), BACKEND)
    link, tip = re.fullmatch(r"\[native: passed, \d+\]\((\S+) \"(.*)\"\)", first).groups()  # type: ignore[union-attr]
    assert tool.main(["--write"], tree) == 0 and (tree / "docs" / link).exists()
    assert real.environment["device"] in tip and "commit abc1234" in tip and real.run["end"][:10] in tip
    assert real.environment["device"] in device and real.run["dtype"] in device
    assert rest == ["not run"] * 7, "levels that were not asked for"


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.PASS])
def test_only_a_level_whose_every_check_passed_is_passed(
    status: Status, tool: ModuleType, tree: Path, real: Report
) -> None:
    said = level_0(tool, tree, ended(real, status))
    assert "pass" not in said.replace("unexpected pass", "")
    count = len(real.results)
    if status in (Status.FAIL, Status.XPASS):
        assert f"[native: FAILED, 1 of {count}]" in said
    elif status.is_good:
        assert f"[native: {count - 1} of {count}, 1 {status}]" in said
    else:
        assert f"[native: incomplete, {count - 1} of {count}]" in said


def test_a_level_of_which_nothing_is_supported_is_not_passed(
    tool: ModuleType, tree: Path, real: Report
) -> None:
    none = tuple(replace(r, status=Status.NOT_SUPPORTED.value) for r in real.results)
    said = level_0(tool, tree, replace(real, results=none))
    assert f"[native: {len(none)} not supported]" in said


def test_a_part_of_a_level_is_incomplete(tool: ModuleType, tree: Path, tmp_path: Path, real: Report) -> None:
    part = of_environment(run(tmp_path / "part", only="registration/loads"), commit="abc1234")
    assert part.exit_code == 0
    assert f"[native: incomplete, 1 of {len(real.results)}]" in level_0(tool, tree, part)


def test_a_level_that_has_no_case_says_so(tool: ModuleType, tree: Path, real: Report) -> None:
    checks = {**real.run["checks"], "L7": 0}
    commit(tree, of_run(real, levels=[0, 7], levels_text="L0,L7", checks=checks))
    assert cells(page_of(tool, tree), BACKEND)[0][8] == "no case"


def test_a_backend_that_core_refuses_failed_level_0_and_ran_no_other(
    tool: ModuleType, tree: Path, real: Report
) -> None:
    refused = of_refused(Target(BACKEND), (0, 1, 2), 3, "built for another contract")
    commit(tree, of_environment(refused, commit="abc1234"))
    own, _ = cells(page_of(tool, tree), BACKEND)
    assert "FAILED, 1 of 1" in own[1] and own[2:4] == ["not run", "not run"]


@pytest.mark.parametrize("how", ["emulated", "compiled"])
def test_what_did_not_run_natively_never_fills_the_row_of_the_hardware(
    how: str, tool: ModuleType, tree: Path, real: Report
) -> None:
    commit(tree, of_environment(real, execution=how))
    there, own = cells(page_of(tool, tree), BACKEND)
    assert there[1].startswith(f"[{how}: passed") and real.environment["device"] in there[0]
    assert own == ["the hardware that it is named for", *["not run"] * 8]


def test_a_backend_from_elsewhere_fills_no_row_of_the_tree(
    tool: ModuleType, tree: Path, real: Report
) -> None:
    stranger = {**real.backend, "name": "second", "target": "a_stranger.plugin:"}
    commit(tree, replace(real, backend=stranger), "stranger")
    page = page_of(tool, tree)
    assert cells(page, "second")[0][1:] == ["not run"] * 8
    assert "`second (a_stranger.plugin:)`" in page


def test_a_report_under_other_rules_stands_in_the_table_of_profiles_alone(
    tool: ModuleType, tree: Path, real: Report
) -> None:
    ids = [result.id.replace("L0/", "L5/") for result in real.results]
    seed = int(real.run["seed"], 16)
    fifth = tuple(replace(r, id=i, seed=check_seed(seed, i)) for r, i in zip(real.results, ids, strict=True))
    facts = {"levels": [5], "levels_text": "L5", "checks": {"L5": len(fifth)}, "ids_sha256": ids_digest(ids)}
    ruled = replace(of_run(real, constraints="split", **facts), results=fifth)
    commit(tree, ruled, f"profiles/{BACKEND}-split")
    page = page_of(tool, tree)
    row = next(line for line in page.splitlines() if line.startswith("| `split` |"))
    assert f"`{BACKEND}` (native, float32)" in row and f"[emulated: passed, {len(fifth)}]" in row
    assert cells(page, BACKEND) == [["the hardware that it is named for", *["not run"] * 8]]


# What is refused


def refusal(tool: ModuleType, tree: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What --write and --check both refuse, and that nothing was written."""
    for action in ("--write", "--check"):
        assert tool.main([action], tree) == 1
    assert not (tree / "docs" / "support.md").exists()
    return capsys.readouterr().err


def test_a_report_that_was_edited_is_refused(
    tool: ModuleType, tree: Path, real: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    file = commit(tree, ended(real, Status.FAIL)) / "report.json"
    file.write_text(file.read_text().replace('"status": "fail"', '"status": "pass"'))
    assert f"docs/conformance/{BACKEND}/report.json was changed" in refusal(tool, tree, capsys)


@pytest.mark.parametrize(
    ("change", "place", "words"),
    [
        (lambda r: of_run(r, fault="seed-ignored:"), BACKEND, "planted fault"),
        (lambda r: of_run(r, shard=[1, 2]), BACKEND, "is shard 1 of 2; merge"),
        (lambda r: of_environment(r, commit=""), BACKEND, "names no commit; set CORE_COMMIT"),
        (lambda r: of_run(r, constraints="split"), BACKEND, f"docs/conformance/profiles/{BACKEND}-split/"),
        (lambda r: of_run(r, constraints="split"), "profiles/other", f"profiles/{BACKEND}-split/"),
        (lambda r: r, f"profiles/{BACKEND}-split", "docs/conformance/NAME/"),
        (lambda r: r, "deep/er", "lies too deep"),
        (lambda r: replace(r, schema=1), BACKEND, "schema 1"),
        (lambda r: of_environment(r, execution="in a dream"), BACKEND, "does not tell how the backend ran"),
    ],
)
def test_what_is_no_evidence_is_refused(
    change: Change,
    place: str,
    words: str,
    tool: ModuleType,
    tree: Path,
    real: Report,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commit(tree, change(real), place)
    assert words in refusal(tool, tree, capsys)


def test_a_folder_without_its_report_is_refused(
    tool: ModuleType, tree: Path, real: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    (commit(tree, real) / "report.json").unlink()
    assert f"docs/conformance/{BACKEND} has no report.json" in refusal(tool, tree, capsys)


@pytest.mark.parametrize("edited", ["docs/support.md", f"docs/conformance/{BACKEND}/report.md"])
def test_pages_that_do_not_say_what_the_reports_say_fail_the_check(
    edited: str, tool: ModuleType, tree: Path, real: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(tree, real)
    assert tool.main(["--check"], tree) == 1, "nothing was written yet"
    assert tool.main(["--write"], tree) == 0 and tool.main(["--check"], tree) == 0
    page = tree / edited
    page.write_text(page.read_text().replace("| ", "|  ", 1))
    capsys.readouterr()
    assert tool.main(["--check"], tree) == 1
    assert capsys.readouterr().err.startswith(edited)


def test_a_new_backend_or_report_makes_the_matrix_stale(tool: ModuleType, tree: Path, real: Report) -> None:
    assert tool.main(["--write"], tree) == 0
    commit(tree, real)
    assert tool.main(["--check"], tree) == 1 and tool.main(["--write"], tree) == 0
    (tree / "backends" / "fourth").mkdir()
    (tree / "backends" / "fourth" / "plugin.py").touch()
    assert tool.main(["--check"], tree) == 1


# How a backend ran


def info(execution: str = "native") -> DeviceInfo:
    return DeviceInfo(backend="x", index=0, name="chip", execution=execution)  # type: ignore[arg-type]


def test_native_is_the_word_of_the_device_and_can_only_be_taken_back() -> None:
    assert DeviceInfo(backend="x", index=0, name="chip").execution == "emulated", "where nothing is said"
    assert execution_of(info(), "") == "native" and execution_of(info(), "emulated") == "emulated"
    assert execution_of(info(), "compiled") == "compiled" and execution_of(None, "") == "emulated"
    assert execution_of(info("of course"), "") == "emulated"
    for told, claimed in (("emulated", "native"), ("compiled", "native"), ("compiled", "emulated")):
        with pytest.raises(ConfigError, match=f"the device says '{told}'"):
            execution_of(info(told), claimed)
    with pytest.raises(ConfigError, match="'perhaps'; one of emulated, compiled"):
        execution_of(info(), "perhaps")


def test_who_runs_the_suite_can_say_that_the_device_is_a_stand_in(tmp_path: Path) -> None:
    report = run(tmp_path, execution="emulated")
    assert report.execution == "emulated" and "(emulated)" in report.verdict
    assert "emulated" in badge_text(report) and "emulated" in (tmp_path / "report.md").read_text()
    arguments = ["run", "--backend", "null", "--level", "L0", "--execution", "native", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and "the device says 'emulated'" in done.output


def test_the_open_device_is_believed_and_not_the_probe(tmp_path: Path) -> None:
    end = run_module("two_faced", tmp_path, "--level", "L0", "--only", "registration/(loads|devices)")
    assert end.code == 0 and end.report is not None
    environment = end.report["environment"]
    assert environment["execution"] == "emulated" and environment["device"] == "stand-in"


def rehashed(text: str, change: Callable[[dict[str, Any]], object]) -> str:
    found = json.loads(text)
    found.pop("sha256")
    change(found)
    return json.dumps({**found, "sha256": digest(found)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["environment"].pop("execution"), "does not tell how the backend ran"),
        (lambda r: r["environment"].update(execution="unknown"), "its execution is 'unknown'"),
        (lambda r: r["summary"]["counts"].update({"pass": 99}), "do not fit the rest"),
        (lambda r: r["backend"]["spec"].update(summary="other"), "do not fit the rest"),
        (lambda r: r.update(schema=1), "reads 2, which tells how the backend ran"),
        (lambda r: r["run"].pop("checks"), "does not fit the schema of reports at run"),
    ],
)
def test_verify_refuses_what_does_not_tell_how_it_ran(
    change: Callable[[dict[str, Any]], object], words: str, real: Report, tmp_path: Path
) -> None:
    validate(to_json(real), "whole")
    file = tmp_path / "report.json"
    file.write_text(rehashed(to_json(real), change))
    done = CliRunner().invoke(app, ["verify", str(file)])
    assert done.exit_code == 8 and words in done.output
    assert "Traceback" not in done.output


def test_shards_that_ran_otherwise_or_at_another_commit_do_not_merge(real: Report) -> None:
    first, second = of_run(real, shard=[1, 2]), of_run(real, shard=[2, 2])
    assert merge([first, second], ["a", "b"]).execution == "native"
    for other in ({"execution": "emulated"}, {"commit": "fff0000"}):
        with pytest.raises(ConfigError, match="not shards of one run"):
            merge([first, of_environment(second, **other)], ["a", "b"])


def test_a_report_counts_the_checks_of_its_levels_whatever_was_left_out(real: Report, tmp_path: Path) -> None:
    part = run(tmp_path, only="registration/loads", shard="1/2")
    again = from_json(to_json(part), "part")
    assert again.run["checks"] == real.run["checks"] == {"L0": len(real.results)}
    assert len(again.results) == 1 and again.run["only"] == "registration/loads"
    assert isinstance(again.results[0], Result)
