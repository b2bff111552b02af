"""A process per rank. Commands and results are msgpack bytes over pipes; every rank gets every step.

A worker process answers each command with ("ok", value) or ("error", Failure); while it loads, the first rank
also sends how far it is. The first failure of any rank ends all of them and is raised in the engine with the
rank's own sentence.
"""

from __future__ import annotations

import multiprocessing
import signal
import socket
from collections.abc import Sequence
from contextlib import closing
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from core.block_manager import BlockCopy
from core.contract.batch import Int32, StepBatch, StepLayout
from core.contract.errors import DeviceError, PluginError
from core.contract.types import Bucket, SamplingBatch
from core.engine.config import EngineConfig
from core.engine.memory import CacheBudget
from core.engine.resolve import Resolution
from core.executor.failure import Failure
from core.executor.rank import Executor, RankPlace, RankReport, RankWorker
from core.executor.wire import decode, encode
from core.plugins import BackendHandle, Plugins
from core.runner.runner import StepResult
from core.scheduler import PromptRow
from core.weights.checkpoint import open_checkpoint
from core.weights.loader import LoadState, Progress

_PROGRESS_S = 0.1
_UNANSWERED = ("submit", "sample")
"""Commands whose failure is told when the step is waited for."""


class MultiprocessExecutor(Executor):
    """Runs `config.tensor_parallel` ranks in processes of their own."""

    def __init__(self, config: EngineConfig, backend: BackendHandle) -> None:
        self._config = config
        outside = backend.plugins.registered_place(backend.name)
        if outside == "":
            raise PluginError(
                f"backend {backend.name!r} was registered in this process alone, so other ranks cannot load "
                "it; install it, or give its place when it is registered"
            )
        context = multiprocessing.get_context("spawn")
        rendezvous = f"tcp://127.0.0.1:{_free_port()}"
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for rank in range(config.tensor_parallel):
            ours, theirs = context.Pipe()
            place = RankPlace(rank, config.tensor_parallel, rendezvous)
            process = context.Process(
                target=_worker_main,
                args=(theirs, encode((config, backend.name, outside or "", place))),
                name=f"core-rank-{rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def resolve(self, backend_reason: str) -> Resolution:
        """See Executor."""
        found: list[Resolution] = self._call("resolve", backend_reason)
        return min(found, key=lambda r: (r.max_model_len, r.cache.num_tokens))

    def load(self, resolution: Resolution, progress: Progress | None) -> RankReport:
        """See Executor."""
        reports: list[RankReport] = self._call("load", resolution, progress=progress)
        return min(reports, key=lambda r: r.free_bytes)

    def allocate(self, budget: CacheBudget) -> None:
        """See Executor."""
        self._call("allocate", budget)

    @property
    def processes(self) -> tuple[int, ...]:
        """See Executor."""
        return tuple(process.pid for process in self._processes if process.pid is not None)

    def host_buffer(self, size: int) -> Int32:
        """See Executor."""
        return np.zeros(size, np.int32)

    def warm(self, buckets: Sequence[Bucket]) -> None:
        """See Executor."""
        self._call("warm", tuple(buckets))

    def submit(
        self,
        batch: StepBatch,
        sampling: SamplingBatch | None,
        copies: Sequence[BlockCopy],
        prompts: Sequence[PromptRow] = (),
    ) -> None:
        """See Executor."""
        counts = (batch.num_tokens, batch.num_requests, batch.num_decodes, batch.num_samples)
        moves = tuple(copies)
        self._send("submit", batch.step_id, batch.bucket, counts, batch.flat, sampling, moves, tuple(prompts))

    def sample(self, step_id: int, sampling: SamplingBatch) -> None:
        """See Executor."""
        self._send("sample", step_id, sampling)

    def wait(self, step_id: int) -> StepResult:
        """See Executor."""
        results: list[StepResult] = self._call("wait", step_id)
        return results[0]

    def close(self) -> None:
        """See Executor."""
        for pipe in self._pipes:
            try:
                pipe.send_bytes(encode(("close",)))
            except OSError:
                continue
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        self._pipes, self._processes = [], []

    def _send(self, command: str, *arguments: Any) -> None:
        message = encode((command, *arguments))
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send_bytes(message)
            except OSError as error:
                raise self._fail(rank, f"does not take commands ({error})") from error

    def _call(self, command: str, *arguments: Any, progress: Progress | None = None) -> list[Any]:
        self._send(command, *arguments)
        # As they come: a rank that fails leaves the others waiting for it in a collective.
        ranks = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        answers: list[Any] = [None] * len(ranks)
        while ranks:
            for pipe in wait(list(ranks)):
                rank = ranks[pipe]  # type: ignore[index]
                answer = self._receive(rank)
                if isinstance(answer, LoadState):
                    if progress is not None:
                        progress(answer)
                    continue
                answers[rank] = answer
                del ranks[pipe]  # type: ignore[arg-type]
        return answers

    def _receive(self, rank: int) -> Any:
        try:
            answer = decode(self._pipes[rank].recv_bytes())
        except (EOFError, OSError) as error:
            code = self._processes[rank].exitcode
            raise self._fail(rank, f"ended without an answer (exit status {code})") from error
        if answer[0] == "ok":
            return answer[1]
        failure: Failure = answer[1]
        self._kill()
        raise failure.error(DeviceError)

    def _fail(self, rank: int, what: str) -> DeviceError:
        self._kill()
        return DeviceError(f"rank {rank} {what}; see its messages above, then start the engine again")

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _worker_main(pipe: Connection, setup: bytes) -> None:
    """A worker process: answer commands until the pipe closes."""
    # The terminal interrupts every process of its group; the engine decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker: _Worker | None = None
    while True:
        try:
            command, *arguments = decode(pipe.recv_bytes())
        except (EOFError, OSError):
            break
        if command == "close":
            break
        try:
            worker = worker or _Worker(setup, lambda state: pipe.send_bytes(encode(("ok", state))))
            result = getattr(worker, f"do_{command}")(*arguments)
        except Exception as error:
            pipe.send_bytes(encode(("error", Failure.of(error, multiprocessing.current_process().name))))
            continue
        if command not in _UNANSWERED:
            pipe.send_bytes(encode(("ok", result)))
    if worker is not None:
        worker.close()


class _Worker:
    """Commands of a worker process."""

    def __init__(self, setup: bytes, tell: Progress) -> None:
        self._config, name, outside, place = decode(setup)
        self._tell = tell if place.rank == 0 else None
        self._told_s = 0.0
        plugins = Plugins()
        plugins.load()
        backend = plugins.register_place(outside, name) if outside else plugins.backend(name)
        self._rules = backend.spec.batch
        self._rank = RankWorker(self._config, backend, place)
        self._failed: dict[int, Exception] = {}

    def do_resolve(self, backend_reason: str) -> Resolution:
        with closing(open_checkpoint(self._config.model, self._config.load_format)) as checkpoint:
            return self._rank.resolve(checkpoint, backend_reason)

    def do_load(self, resolution: Resolution) -> RankReport:
        with closing(open_checkpoint(self._config.model, self._config.load_format)) as checkpoint:
            return self._rank.load(checkpoint, resolution, self._progress)

    def _progress(self, state: LoadState) -> None:
        is_due = state.tensors_done == state.tensors_total or state.seconds - self._told_s >= _PROGRESS_S
        if self._tell is not None and is_due:
            self._told_s = state.seconds
            self._tell(state)

    def do_allocate(self, budget: CacheBudget) -> None:
        self._rank.allocate(budget)
        self._plan = budget.plan

    def do_warm(self, buckets: tuple[Bucket, ...]) -> None:
        self._rank.runner.warm(buckets)

    def do_submit(
        self,
        step_id: int,
        bucket: Bucket,
        counts: tuple[int, int, int, int],
        flat: Int32,
        sampling: SamplingBatch | None,
        copies: tuple[BlockCopy, ...],
        prompts: tuple[PromptRow, ...],
    ) -> None:
        # A step that fails here is answered for when it is waited for, so commands and answers stay in step.
        try:
            layout = StepLayout.of(bucket, self._plan, self._rules)
            batch = StepBatch(step_id, layout, self._plan, flat.copy(), *counts)
            self._rank.runner.submit(batch, sampling, copies, prompts)
        except Exception as error:
            self._failed[step_id] = error

    def do_sample(self, step_id: int, sampling: SamplingBatch) -> None:
        if step_id in self._failed:
            return
        try:
            self._rank.runner.sample(step_id, sampling)
        except Exception as error:
            self._failed[step_id] = error

    def do_wait(self, step_id: int) -> StepResult:
        if step_id in self._failed:
            raise self._failed.pop(step_id)
        return self._rank.runner.wait(step_id)

    def close(self) -> None:
        self._rank.close()
