"""Runs checks in worker processes, each under a watchdog."""

from __future__ import annotations

import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import IO

from conformance.check import Check, Result, check_seed
from conformance.status import Status
from conformance.worker import Setup
from core.contract.types import DeviceInfo

START_S = 120.0
"""Time in which a worker must have loaded the backend."""
_LOG_BYTES = 4000

Report = Callable[[Result], None]


class WorkerLost(Exception):
    """A worker ended, or was ended: how, and what it printed last."""

    def __init__(self, status: Status, message: str, log: str) -> None:
        super().__init__(message)
        self.status, self.message, self.log = status, message, log


class Worker:
    """One worker process.

    Args:
        time_factor: what the checks' limits are multiplied by.

    Raises (all methods):
        WorkerLost: it crashed, hung or cannot load the backend.
    """

    def __init__(self, setup: Setup, time_factor: float = 1.0) -> None:
        self._time_factor = time_factor
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        # The backend's threads share the machine with those of other workers.
        environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "conformance.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            start_new_session=True,
        )
        self._rest = b""
        try:
            self._tell(setup.text())
            answer = json.loads(self._line(START_S * max(1.0, time_factor), "loading the backend"))
        except BaseException:
            self.close()
            raise
        if "error" in answer:
            log = self._tail()
            self.close()
            raise WorkerLost(Status.INFRA, str(answer["error"]), log)

    def run(self, check: Check) -> Result:
        """Run one check."""
        mark = self._log.seek(0, os.SEEK_END)
        self._tell(json.dumps(check.id))
        result = Result(**json.loads(self._line(check.timeout_s * self._time_factor, check.id)))
        if result.status == Status.PASS:
            return result
        self._log.seek(mark)
        printed = self._log.read()[-_LOG_BYTES:].decode(errors="replace")
        return replace(result, log=(result.log + printed)[-2 * _LOG_BYTES :])

    def device(self) -> DeviceInfo | None:
        """What the open device says of itself; None where it does not open."""
        self._tell("null")
        found = json.loads(self._line(START_S * max(1.0, self._time_factor), "opening the device"))
        return DeviceInfo(**found) if found else None

    def close(self) -> None:
        """End it. Idempotent."""
        process = self._process
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        if process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(2)
        self.kill()
        self._log.close()

    def kill(self) -> None:
        """End the worker and whatever it has started, which is in its session."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._lost() from None

    def _line(self, timeout_s: float, what: str) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.kill()
                    message = f"no answer in {timeout_s:g} s ({what}); its worker was killed"
                    raise WorkerLost(Status.TIMEOUT, message, self._tail())
                piece = os.read(self._process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise self._lost()
                self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _lost(self) -> WorkerLost:
        code = self._process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit status {code}"
        return WorkerLost(Status.CRASH, f"the worker ended {how}", self._tail())

    def _tail(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _LOG_BYTES))
        return self._log.read().decode(errors="replace")


def open_device_info(setup: Setup, time_factor: float = 1.0) -> DeviceInfo | None:
    """What the open device says of itself, asked in a process of its own; None where it can't be asked."""
    try:
        worker = Worker(setup, time_factor)
    except WorkerLost:
        return None
    try:
        return worker.device()
    except WorkerLost:
        return None
    finally:
        worker.close()


def run_all(
    checks: Sequence[Check],
    setup: Setup,
    report: Report,
    jobs: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
    time_factor: float = 1.0,
) -> None:
    """Run checks in `jobs` workers; each result is reported once, by one thread at a time."""
    waiting: queue.SimpleQueue[Check] = queue.SimpleQueue()
    for check in checks:
        waiting.put(check)
    lock = threading.Lock()
    is_ended = threading.Event()
    workers: set[Worker] = set()

    def tell(result: Result) -> None:
        with lock:
            if not is_ended.is_set():
                report(result)

    def new() -> Worker:
        worker = Worker(setup, time_factor)
        workers.add(worker)
        return worker

    def work() -> None:
        worker: Worker | None = None
        try:
            while not (should_stop() or is_ended.is_set()):
                try:
                    check = waiting.get_nowait()
                except queue.Empty:
                    return
                worker = run_one(check, worker, new, setup.seed, tell)
        finally:
            if worker is not None:
                worker.close()

    threads = [threading.Thread(target=work, name=f"conformance-{i}") for i in range(max(1, jobs))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        # What was interrupted counts as not run, and nobody waits for it.
        is_ended.set()
        for worker in list(workers):
            worker.kill()
        for thread in threads:
            thread.join()
        raise


def run_one(
    check: Check, worker: Worker | None, new: Callable[[], Worker], run_seed: int, tell: Report
) -> Worker | None:
    """Run one check; the worker for the next one, or None where a new one is needed."""
    seed = check_seed(run_seed, check.id)
    start = time.monotonic()
    try:
        worker = worker or new()
        result = worker.run(check)
    except WorkerLost as lost:
        if worker is not None:
            worker.close()
        tell(Result(check.id, lost.status.value, lost.message, time.monotonic() - start, seed, {}, lost.log))
        return None
    if result.status == Status.FAIL and result.message.startswith("DeviceError"):
        # Whatever the device was left in, the next check begins with a new one.
        worker.close()
        result, worker = _after_device_error(result, new), None
    tell(result)
    return worker


def _after_device_error(result: Result, new: Callable[[], Worker]) -> Result:
    try:
        new().close()
    except WorkerLost as lost:
        message = f"{result.message}; afterwards the backend does not load any more: {lost.message}"
        return replace(result, status=Status.DEVICE_LOST.value, message=message)
    return result


def in_order(results: Iterable[Result], checks: Sequence[Check]) -> list[Result]:
    """Results in the order of their checks; NOT_RUN for those that have none."""
    found = {result.id: result for result in results}
    return [found.get(c.id, Result(c.id, Status.NOT_RUN.value, "the run ended before it")) for c in checks]
