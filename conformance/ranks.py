"""Groups of ranks, each a process that this one starts, asks and ends."""

from __future__ import annotations

import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import IO, Any

import numpy as np

from conformance.bench import Array
from conformance.check import Context, Failed
from conformance.rank import Call, RankSetup
from conformance.subject import Target

ALL = "all"
_LOG_BYTES = 1000


class Ranks:
    """Processes of a group, joined.

    Args:
        size: processes. groups: members of further groups by name; the group "all" has every process.
        timeout_s: of the communicators.

    Raises:
        Failed: they did not join.
    """

    def __init__(
        self,
        target: Target,
        size: int,
        groups: dict[str, tuple[int, ...]] | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        self._logs: list[IO[bytes]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        members = {ALL: tuple(range(size)), **(groups or {})}
        places = tuple((name, f"tcp://127.0.0.1:{_free_port()}", own) for name, own in members.items())
        try:
            for process in range(size):
                self._start()
                self._tell(process, RankSetup(target, process, places, timeout_s).text())
            for i, answer in enumerate(self.answers(range(size), timeout_s + 60)):
                if "error" in answer:
                    raise Failed(f"rank {i} of {size} does not join: {answer['error']}")
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._logs.append(log)
        self._processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "conformance.rank"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ},
            )
        )

    def ask(self, calls: Sequence[Call | None], timeout_s: float = 40.0) -> list[dict[str, Any]]:
        """Each process's answer to its call; None = it is not asked."""
        asked = [i for i, call in enumerate(calls) if call is not None]
        for i in asked:
            call = calls[i]
            assert call is not None
            self._tell(i, json.dumps(asdict(call)))
        return self.answers(asked, timeout_s)

    def run(self, calls: Sequence[Call | None], timeout_s: float = 40.0) -> list[tuple[Array, int]]:
        """Results [T, V] of those asked, and how many rows their steps had.

        Raises:
            Failed: a process raises, ends or hangs.
        """
        found = []
        for i, answer in enumerate(self.ask(calls, timeout_s)):
            if "error" in answer:
                raise Failed(f"rank {i}: {answer['error']}")
            found.append((np.array(answer["result"], np.float64), int(answer["rows"])))
        return found

    def answers(self, processes: Sequence[int], timeout_s: float) -> list[dict[str, Any]]:
        """A line of each process.

        Raises:
            Failed: there is none in time, which names the process.
        """
        deadline = time.monotonic() + timeout_s
        return [self._line(i, deadline, timeout_s) for i in processes]

    def close(self) -> None:
        """End all processes. Idempotent."""
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        for process in self._processes:
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for log in self._logs:
            log.close()
        self._processes, self._logs = [], []

    def _tell(self, process: int, line: str) -> None:
        pipe = self._processes[process].stdin
        assert pipe is not None
        try:
            pipe.write(line.encode() + b"\n")
            pipe.flush()
        except OSError:
            raise Failed(f"rank {process} has ended: {self._tail(process)}") from None

    def _line(self, process: int, deadline: float, timeout_s: float) -> dict[str, Any]:
        pipe = self._processes[process].stdout
        assert pipe is not None
        text = b""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not text.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise Failed(f"rank {process} does not answer in {timeout_s:g} s")
                piece = os.read(pipe.fileno(), 1 << 16)
                if not piece:
                    raise Failed(f"rank {process} has ended: {self._tail(process)}")
                text += piece
        found: dict[str, Any] = json.loads(text)
        return found

    def _tail(self, process: int) -> str:
        log = self._logs[process]
        log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_BYTES))
        return log.read().decode(errors="replace").strip() or "it printed nothing"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_kept: dict[tuple[str, int], Ranks] = {}


def ranks_of(context: Context, size: int) -> Ranks:
    """Ranks that the checks of a worker share; started when they are first asked for."""
    key = f"{context.subject.target}", size
    if key not in _kept:
        _kept[key] = Ranks(context.subject.target, size, GROUPS.get(size))
    return _kept[key]


def forget_ranks(context: Context, size: int) -> None:
    """End the shared ranks: after a failure their group may be out of step."""
    if (kept := _kept.pop((f"{context.subject.target}", size), None)) is not None:
        kept.close()


GROUPS: dict[int, dict[str, tuple[int, ...]]] = {
    3: {"reversed": (2, 1, 0), "left": (0, 1), "right": (1, 2), "ends": (2, 0)}
}
"""Further groups of three processes: other orders of ranks, and groups that overlap."""


@contextmanager
def own_ranks(context: Context, size: int, timeout_s: float) -> Iterator[Ranks]:
    """Ranks of one check alone, which may come to harm."""
    ranks = Ranks(context.subject.target, size, timeout_s=timeout_s)
    try:
        yield ranks
    finally:
        ranks.close()
