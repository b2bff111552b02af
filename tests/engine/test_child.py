"""The engine's process ends together with whatever it started."""

from __future__ import annotations

import os
import queue
import time
from pathlib import Path

import pytest

from core.engine import child

# It starts a process that would outlive it, tells that one's id, and then ends or waits.
BOOT = """
import subprocess, sys
sys.stdin.buffer.readline()
from core.engine.child import read_setup
setup = read_setup()
started = subprocess.Popen(["sleep", "60"])
with open(setup, "w") as out: print(started.pid, file=out)
if setup.endswith(b"ends"): sys.exit(7)
started.wait()
"""


def is_running(pid: int) -> bool:
    """Whether a process exists and has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@pytest.mark.parametrize(("name", "status"), [("ends", 7), ("killed", -9)])
def test_what_it_started_ends_with_it(
    name: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_BOOT", BOOT)
    path = tmp_path / name
    os.mkfifo(path)
    exits: queue.Queue[int] = queue.Queue()
    process = child.Child(os.fsencode(path), exits.put)
    started = int(path.read_text())
    if name == "killed":
        assert is_running(started)
        process.kill()
    assert exits.get(timeout=20) == status
    end = time.monotonic() + 5
    while is_running(started):
        assert time.monotonic() < end
        time.sleep(0.01)
    process.kill()
