"""A process of this engine's own: started, watched, and ended together with everything that it started.

It leads a process group, so one signal reaches its ranks too. It gets its setup on standard input and watches
it: the pipe closes when its parent is gone, however the parent ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

_BOOT = """
import json, sys
sys.path[:] = json.loads(sys.stdin.buffer.readline())
from core.engine.process import main
main()
"""
_WATCH_S = 0.5
_STDERR = 2


class Child:
    """The engine's process, seen from its parent.

    Args:
        setup: what `read_setup` gives there.
        on_exit: called once, in a thread of its own, with the exit status (-N = signal N), when the process
            has ended and all that it started was killed.
    """

    def __init__(self, setup: bytes, on_exit: Callable[[int], None]) -> None:
        self._on_exit = on_exit
        # Its prints go to standard error: the parent's standard output may be a program's result.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, "core-engine"],
            stdin=subprocess.PIPE,
            stdout=_STDERR,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._lock = threading.Lock()
        self._is_reaped = False
        threading.Thread(target=self._watch, name="core-engine-watch", daemon=True).start()
        pipe = self._process.stdin
        # A child that ended already is reported by the watch.
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.write(json.dumps(sys.path).encode() + b"\n" + len(setup).to_bytes(8, "big") + setup)
                pipe.flush()

    def kill(self) -> None:
        """End the process and its group at once."""
        # Before it is reaped its id cannot be another's.
        with self._lock:
            if not self._is_reaped:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)

    def _watch(self) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self.kill()
        with self._lock:
            status = self._process.wait()
            self._is_reaped = True
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._on_exit(status)


def read_setup() -> bytes:
    """In the child: what its parent gave it."""
    stream = sys.stdin.buffer
    size = int.from_bytes(stream.read(8), "big")
    return stream.read(size)


def die_with_parent(parent: int, folder: Path) -> None:
    """In the child: from now on, end this process and its group when process `parent` is gone.

    `folder`, which the parent can no longer remove, is removed then.
    """
    threading.Thread(
        target=_watch_parent, args=(parent, folder), name="core-parent-watch", daemon=True
    ).start()


def _watch_parent(parent: int, folder: Path) -> None:
    # A process that was forked from the parent may hold the pipe open, so the parent's id is looked at too.
    while os.getppid() == parent:
        ready, _, _ = select.select([0], [], [], _WATCH_S)
        if ready and not os.read(0, 1):
            break
    shutil.rmtree(folder, ignore_errors=True)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
