"""`core new-backend`: what it writes is a package that passes level 0 as it is."""

from __future__ import annotations

import ast
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from conformance.catalogue import catalogue
from conformance.cli import new_backend
from conformance.kit.new_backend import write_backend
from conformance.session import Request, Session
from conformance.subject import Subject, Target
from conformance.waivers import read_waivers
from core.cli.app import app
from core.contract.errors import ConfigError
from core.contract.requests import DeviceRequest
from core.plugins import Plugins


def test_the_package_is_green_at_level_0_and_refuses_what_it_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_backend("kit_chip", tmp_path / "new")
    monkeypatch.syspath_prepend(tmp_path / "new")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "new"))
    subject = Subject.of(Target("core_kit_chip.plugin:"))
    request = Request(levels="L0..L1", seed=1, out=tmp_path / "report", is_shown=False)
    report = Session(subject, request).run()
    bad = {r.id: r.message for r in report.results if r.status not in ("pass", "not supported")}
    assert set(bad) == {"L1/memory/padding-writes-nothing"} and "op 'attend' yet" in bad.popitem()[1]
    assert report.by_level()[0]["pass"] > 25


def test_every_file_reads(tmp_path: Path) -> None:
    written = write_backend("kit_chip", tmp_path / "new")
    for path in written:
        text = path.read_text()
        assert "$name" not in text and "$contract" not in text
        if path.suffix == ".py":
            ast.parse(text)
    project = tomllib.loads((tmp_path / "new" / "pyproject.toml").read_text())
    points = project["project"]["entry-points"]["core.backends"]
    assert points == {"kit_chip": "core_kit_chip.plugin"}
    assert read_waivers(tmp_path / "new" / "core_kit_chip" / "waivers.toml") == ()


@pytest.mark.parametrize(
    "name", ["My-Chip", "9chip", "", "a b", "../x", "cpu_reference", "auto", "class", "core"]
)
def test_a_name_that_no_backend_may_have_writes_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be named"):
        write_backend(name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_example_of_a_waiver_could_be_used(tmp_path: Path) -> None:
    write_backend("kit_chip", tmp_path / "new")
    lines = (tmp_path / "new" / "core_kit_chip" / "waivers.toml").read_text().splitlines()
    start = lines.index("# [[waiver]]")
    (tmp_path / "waivers.toml").write_text("\n".join(line.removeprefix("# ") for line in lines[start:]))
    (waiver,) = read_waivers(tmp_path / "waivers.toml")
    target = Target("cpu_reference")
    named = [c for c in catalogue(Subject.of(target).spec, target, 0) if fnmatchcase(c.id, waiver.test)]
    assert named and all(check.is_waivable for check in named)


def test_the_kit_refuses_options_that_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_backend("kit_chip", tmp_path / "new")
    monkeypatch.syspath_prepend(tmp_path / "new")
    subject = Subject.of(Target("core_kit_chip.plugin:", options={"speed": "high"}))
    with pytest.raises(ConfigError, match="has no option 'speed'"):
        subject.handle.open_device(DeviceRequest(index=0, options={"speed": "high"}))


def test_a_folder_that_cannot_be_made_ends_with_a_sentence() -> None:
    done = CliRunner().invoke(new_backend_app(), ["fast_chip", "--out", "/dev/null/x"])
    assert done.exit_code == 2 and "cannot be written" in done.output


def new_backend_app() -> typer.Typer:
    found = typer.Typer()
    found.command()(new_backend)
    return found


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        write_backend("kit_chip", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_command_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = Plugins(disabled=frozenset())
    plugins.load()
    plugins.cli(app)
    done = CliRunner().invoke(app, ["new-backend", "kit_chip", "--out", str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    assert "core conformance run --backend kit_chip" in done.output
