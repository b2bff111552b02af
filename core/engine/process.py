"""The engine's own process: commands in, and one message out per step.

Between two steps it takes every command that has arrived; with no work it sleeps until one does. A message
that is not a command, or a request that cannot run, is answered or dropped before the step loop sees it.
"""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.contract.errors import EngineDead
from core.engine.child import die_with_parent, read_setup
from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.engine.messages import (
    AbortRequest,
    AddRequest,
    Close,
    EndChoice,
    Ended,
    ModelFacts,
    Progress,
    Ready,
    Refused,
    StepEvents,
)
from core.engine.stream import stream_event
from core.executor.failure import Failure
from core.executor.wire import decode, encode
from core.weights.loader import LoadState

COMMANDS, EVENTS = "commands", "events"
"""Names of the two sockets in the parent's folder."""

_PROGRESS_S = 1.0
_NOTHING_RUNS_MS = 1
_LINGER_MS = 2000


@dataclass(frozen=True)
class ChildSetup:
    """What the engine's process is started with: options, the folder of the sockets, its parent's id."""

    config: EngineConfig
    folder: Path
    parent: int

    def encode(self) -> bytes:
        """As bytes for `Child`."""
        return encode((self.config, self.folder, self.parent))


def main() -> None:
    """Run an engine until it is told to close, fails, or its parent is gone."""
    import zmq

    # A signal to the whole group of the parent is the parent's to act on: it may want to finish what runs.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    setup = ChildSetup(*decode(read_setup()))
    die_with_parent(setup.parent, setup.folder)
    context = zmq.Context()
    commands, events = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    commands.connect(f"ipc://{setup.folder / COMMANDS}")
    events.connect(f"ipc://{setup.folder / EVENTS}")
    process = EngineProcess(commands, events)
    status = process.run(setup.config)
    context.destroy(linger=_LINGER_MS)
    sys.exit(status)


class EngineProcess:
    """An engine between two sockets.

    Args:
        commands: a zmq PULL socket. events: a zmq PUSH socket; it blocks while the reader is far behind.
    """

    def __init__(self, commands: Any, events: Any) -> None:
        self._commands = commands
        self._events = events
        self._phase = "starting"
        self._last_progress = -_PROGRESS_S
        self._told = ""

    def run(self, config: EngineConfig) -> int:
        """Start an engine and serve; the exit status. The first failure is sent with its phase."""
        engine: Engine | None = None
        try:
            engine = Engine(
                config,
                progress=self._progress,
                on_resolved=lambda found: self._send(Progress(found.summary())),
            )
            self._send(Ready(_facts(engine), engine.metrics()))
            self._phase = "serving"
            self.serve(engine)
        except Exception as error:
            root = error.__cause__ if isinstance(error, EngineDead) and error.__cause__ else error
            steps = "" if engine is None else f", after {engine.scheduler.counters.steps} steps"
            self._send(Ended(Failure.of(root, self._phase + steps)))
            return 1
        finally:
            if engine is not None:
                engine.close()
        return 0

    def serve(self, engine: Engine) -> None:
        """Step while there is work, until `Close` arrives.

        Raises:
            EngineDead: a step failed.
        """
        while self._take_commands(engine):
            if not engine.has_work:
                continue
            events = [stream_event(event) for event in engine.step()]
            self._send(StepEvents(tuple(events), engine.metrics()))
            if not events and not engine.scheduler.num_in_flight:
                self._commands.poll(_NOTHING_RUNS_MS)

    def _take_commands(self, engine: Engine) -> bool:
        """Obey what has arrived; False once that is `Close`. Sleeps while there is no work."""
        while not engine.has_work or self._commands.poll(0):
            if not self._obey(engine, self._commands.recv()):
                return False
        return True

    def _obey(self, engine: Engine, message: bytes) -> bool:
        try:
            command = decode(message)
        except Exception as error:
            _drop(f"{type(error).__name__}: {error}")
            return True
        if isinstance(command, AddRequest):
            self._add(engine, command)
        elif isinstance(command, AbortRequest):
            engine.abort(command.request_id)
        elif isinstance(command, EndChoice):
            engine.end_choice(command.request_id, command.choice)
        elif not isinstance(command, Close):
            _drop(f"a {type(command).__name__}")
        return not isinstance(command, Close)

    def _add(self, engine: Engine, command: AddRequest) -> None:
        try:
            engine.add(
                command.request_id,
                command.prompt_ids,
                command.params,
                priority=command.priority,
                queue_timeout_s=command.queue_timeout_s,
                timeout_s=command.timeout_s,
                salt=command.salt,
            )
        except EngineDead:
            raise
        except Exception as error:
            self._send(Refused(command.request_id, Failure.of(error, "queueing a request")))

    def _progress(self, state: LoadState) -> None:
        self._phase = "loading"
        now, is_done = time.monotonic(), state.tensors_done == state.tensors_total
        text = f"{state.phase} weights: {state.sentence()}"
        if text != self._told and (now - self._last_progress >= _PROGRESS_S or is_done):
            self._last_progress, self._told = now, text
            self._send(Progress(text))

    def _send(self, message: object) -> None:
        self._events.send(encode(message))


def _facts(engine: Engine) -> ModelFacts:
    config, rules = engine.config, engine.backend.spec.batch
    return ModelFacts(
        name=config.model.name,
        architecture=engine.model.architecture,
        vocab_size=engine.model.vocab_size,
        max_model_len=engine.max_model_len,
        max_requests=min(config.max_requests, rules.max_requests or config.max_requests),
        cache_tokens=engine.cache.num_tokens,
        dtype=engine.dtype,
        backend=engine.backend.name,
        backend_reason=engine.choice_reason,
    )


def _drop(what: str) -> None:
    sys.stderr.write(f"core: the engine dropped a message that is no command ({what})\n")
