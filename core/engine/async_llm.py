"""AsyncLLM: a model in a process of its own, for many callers of one event loop.

This side tokenizes, makes text, finds stop texts and keeps the record of each request; the engine's process
(`core.engine.process`) only ever sees token ids. Between the two go msgpack messages over sockets in a folder
that nobody else may enter.

Queues are bounded: a request counts until the engine has told the end of its last continuation, whether or
not somebody still listens, and beyond `max_requests` running and `max_waiting` waiting ones no more are
taken. A stream holds the newest state of its request, so a slow reader misses steps, never memory.
"""

from __future__ import annotations

import asyncio
import itertools
import operator
import os
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

from core.contract.errors import CoreError, EngineDead, QueueFullError, RequestError
from core.engine.child import Child
from core.engine.config import EngineConfig
from core.engine.link import Link
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
from core.engine.metrics import EngineMetrics
from core.engine.outputs import RequestOutput
from core.engine.process import ChildSetup
from core.engine.queueing import Queueing
from core.engine.stream import RequestStream
from core.executor.failure import Failure
from core.sampling.params import SamplingParams
from core.scheduler import Request
from core.tokenizer import Tokenizer, load_tokenizer

_THREAD_CHARS = 1024
"""Texts longer than this are tokenized in a thread: they would hold every stream up."""

_CLOSE_S = 10.0
_LAST_WORDS_S = 0.2


@dataclass(eq=False)
class _Stream:
    """A request on this side. `wire_id` names it in the engine: a name that a user chose may come again."""

    wire_id: str
    name: str
    requests: RequestStream
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    failure: CoreError | None = None

    def fail(self, error: CoreError) -> None:
        """End with an error, unless it had its end already."""
        if not self.requests.finished and self.failure is None:
            self.failure = error
        self.changed.set()


class AsyncLLM:
    """A model, ready to generate for many callers. Made by `start`; one event loop uses it.

    Attributes:
        tokenizer: the model's. model: facts of the running engine.
    """

    tokenizer: Tokenizer
    model: ModelFacts

    def __init__(self, config: EngineConfig, progress: Callable[[str], None] | None) -> None:
        self._progress = progress
        self._max_waiting = config.served_max_waiting
        # The bound is kept on this side, where it also covers what is on its way.
        self._config = replace(config, max_waiting=None)
        self._loop = asyncio.get_running_loop()
        self._streams: dict[str, _Stream] = {}
        self._names: dict[str, str] = {}
        self._unfinished: dict[str, int] = {}
        self._aborted: set[str] = set()
        self._num_live = 0
        self._ids = itertools.count()
        self._metrics = EngineMetrics()
        self._failure: EngineDead | None = None
        self._failed = asyncio.Event()
        self._start_failure: CoreError | None = None
        self._is_draining = False
        self._is_closed = False
        self._closing: asyncio.Future[None] | None = None
        self._idle, self._loading = asyncio.Event(), asyncio.Event()
        self._ready, self._exited = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._link = Link(self._take)
        setup = ChildSetup(self._config, self._link.folder, os.getpid())
        try:
            self._child = Child(setup.encode(), self._on_exit)
        except BaseException:
            self._link.close()
            raise

    @classmethod
    async def start(cls, config: EngineConfig, *, progress: Callable[[str], None] | None = None) -> AsyncLLM:
        """Start the engine's process; returns when it serves.

        Args:
            progress: told a line now and then while weights are loaded.

        Raises:
            CoreError: as the engine raised it: what is wrong and what to do. Nothing is left running.
            ConfigError: pyzmq is not installed; the extra `server` has it.
        """
        llm = cls(config, progress)
        try:
            await llm._start()
        except BaseException:
            llm._child.kill()
            await llm.close()
            raise
        return llm

    async def _start(self) -> None:
        try:
            self.tokenizer = await asyncio.to_thread(
                load_tokenizer, self._config.model, or_bytes=self._config.load_format == "dummy"
            )
        except CoreError:
            # What the engine finds wrong with the model's folder says more, and is known before it loads.
            await self._loading.wait()
            if self._start_failure is not None:
                raise self._start_failure from None
            raise
        await self._ready.wait()
        if self._start_failure is not None:
            raise self._start_failure

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output of a sequence at most."""
        return self.model.max_model_len

    @property
    def is_alive(self) -> bool:
        """Whether the engine runs. It is alive while it drains."""
        return self._failure is None and not self._is_closed

    @property
    def failure(self) -> BaseException | None:
        """Why the engine stopped, from the first failure; None while it runs and after an orderly end."""
        return self._failure

    def metrics(self) -> EngineMetrics:
        """The engine's figures after its newest step."""
        return self._metrics

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        queue_timeout_s: float | None = None,
        timeout_s: float | None = None,
        salt: str = "",
        add_special_tokens: bool = True,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Continue a prompt. Gives the whole state of the request so far whenever it has grown.

        Closing or cancelling the iterator aborts the request.

        Args:
            prompt: text or token ids. request_id: None = one is made up.
            priority: lower goes first under the policy "priority".
            queue_timeout_s, timeout_s: the request ends as "deadline" if it has not begun, not ended, by
            then.
            salt: blocks are shared only with requests of the same salt.
            add_special_tokens: a text gets the tokens that its tokenizer puts around it.

        Raises:
            RequestError: it can never run, a value is out of range, or its id is in use; at the first
                iteration.
            QueueFullError: as many wait as may, or the engine is draining; at the first iteration.
            EngineDead: the engine stopped, now or before; with the first failure's sentence.
        """
        waits = Queueing(priority=priority, queue_timeout_s=queue_timeout_s, timeout_s=timeout_s, salt=salt)
        given = partial(AddRequest, **asdict(waits))
        stream = await self._add(prompt, params, request_id, given, add_special_tokens)
        try:
            while True:
                await stream.changed.wait()
                stream.changed.clear()
                if stream.failure is not None:
                    raise stream.failure
                output = stream.requests.output()
                yield output
                if output.finished:
                    return
        finally:
            self._leave(stream)

    async def abort(self, request_id: str) -> None:
        """End a request; its iterator ends with the finish reason "abort". Nothing where it is not known."""
        self._abort(self._names.get(request_id, ""))

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests, and wait until those there are have ended; False where some have not."""
        self._is_draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return self._failure is None

    async def failed(self) -> BaseException:
        """Wait until the engine stops of itself; why it did. Never returns where it does not."""
        await self._failed.wait()
        return self._dead()

    async def close(self) -> None:
        """End the engine and its processes; iterators that were not done raise EngineDead. Idempotent."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._is_closed = True
        self._fail_streams()
        self._send(Close())
        try:
            await asyncio.wait_for(self._exited.wait(), _CLOSE_S)
        except TimeoutError:
            self._child.kill()
            await self._exited.wait()
        self._link.close()

    # Requests in

    async def _add(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        name: str | None,
        given: Callable[..., AddRequest],
        add_special_tokens: bool,
    ) -> _Stream:
        wire_id = str(next(self._ids))
        name = f"request-{wire_id}" if name is None else name
        self._reserve(wire_id, name, params.n)
        try:
            ids = await self._tokenize(prompt, add_special_tokens)
            if params.bad_words:
                encode = partial(self.tokenizer.encode, add_special_tokens=False)
                params = await asyncio.to_thread(params.resolved, encode)
            self._check_alive()
            seed = secrets.randbits(64) if params.seed is None else params.seed
            message = given(request_id=wire_id, prompt_ids=ids, params=replace(params, seed=seed))
            stream = _Stream(wire_id, name, self._request_stream(wire_id, name, prompt, message))
            self._send(message)
        except BaseException as error:
            self._end(wire_id)
            self._names.pop(name, None)
            if isinstance(error, TypeError | ValueError | OverflowError):
                raise RequestError(f"request {name!r} cannot be sent to the engine: {error}") from error
            raise
        self._streams[wire_id] = stream
        if wire_id in self._aborted:
            self._send(AbortRequest(wire_id))
        return stream

    def _reserve(self, wire_id: str, name: str, count: int) -> None:
        self._check_alive()
        if self._is_draining:
            raise QueueFullError("the engine finishes what runs and takes no more requests; ask another")
        if name in self._names:
            raise RequestError(f"request id {name!r} is in use; choose another")
        running = self.model.max_requests
        if count > running:
            raise RequestError(f"n is {count}, but at most {running} sequences run at once; lower n")
        if self._num_live + count > running + self._max_waiting:
            raise QueueFullError(
                f"{self._num_live} sequences run or wait, and at most {running} may run and "
                f"{self._max_waiting} wait; try again later"
            )
        self._names[name] = wire_id
        self._unfinished[wire_id] = count
        self._num_live += count
        self._idle.clear()

    async def _tokenize(self, prompt: str | Sequence[int], add_special_tokens: bool) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return self._checked(prompt)
        if len(prompt) <= _THREAD_CHARS:
            return tuple(self.tokenizer.encode(prompt, add_special_tokens))
        return tuple(await asyncio.to_thread(self.tokenizer.encode, prompt, add_special_tokens))

    def _checked(self, prompt: Sequence[int]) -> tuple[int, ...]:
        try:
            ids = tuple(map(operator.index, prompt))
        except TypeError:
            raise RequestError("the prompt is neither a text nor a sequence of token ids") from None
        if ids and not (min(ids) >= 0 and max(ids) < self.model.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.model.vocab_size)
            raise RequestError(
                f"prompt token id {wrong} is outside the vocabulary of {self.model.vocab_size} ids"
            )
        return ids

    def _request_stream(
        self, wire_id: str, name: str, prompt: str | Sequence[int], message: AddRequest
    ) -> RequestStream:
        request = Request(request_id=name, prompt_ids=message.prompt_ids, params=message.params)
        text = prompt if isinstance(prompt, str) else None

        def end(choice: int) -> None:
            self._send(EndChoice(wire_id, choice))

        return RequestStream(request, text, self.tokenizer, time.monotonic, end)

    def _leave(self, stream: _Stream) -> None:
        """Nobody listens to a request any more."""
        self._abort(stream.wire_id)
        self._streams.pop(stream.wire_id, None)
        if self._names.get(stream.name) == stream.wire_id:
            del self._names[stream.name]

    def _abort(self, wire_id: str) -> None:
        """Tell the engine, once, and not before it was told of the request."""
        if wire_id in self._unfinished and wire_id not in self._aborted:
            self._aborted.add(wire_id)
            if wire_id in self._streams:
                self._send(AbortRequest(wire_id))

    def _send(self, message: object) -> None:
        """Send a command; dropped where the engine's process has ended: its streams end by that."""
        if not self._exited.is_set():
            self._link.send(message)

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise self._dead()

    # Events out

    def _take(self, message: object) -> None:
        if isinstance(message, StepEvents):
            self._take_step(message)
        elif isinstance(message, Refused):
            self._end(message.request_id)
            stream = self._streams.get(message.request_id)
            if stream is not None:
                stream.fail(message.failure.error(RequestError))
        elif isinstance(message, Progress):
            self._loading.set()
            if self._progress is not None:
                self._progress(message.text)
        elif isinstance(message, Ready):
            self.model, self._metrics = message.model, message.metrics
            self._loading.set()
            self._ready.set()
        elif isinstance(message, Ended):
            self._fail(message.failure)

    def _take_step(self, step: StepEvents) -> None:
        self._metrics = step.metrics
        for event in step.events:
            if event.finish_reason is not None:
                self._end(event.request_id, 1)
            stream = self._streams.get(event.request_id)
            if stream is None:
                continue
            try:
                stream.requests.take(event)
            except Exception as error:
                # One stream's text is no reason for the others to end.
                failure = RequestError(f"the text of request {stream.name!r} failed: {error}")
                failure.__cause__ = error
                stream.fail(failure)
            stream.changed.set()

    def _end(self, wire_id: str, count: int | None = None) -> None:
        """So many continuations of a request (None = all) have ended in the engine."""
        left = self._unfinished.get(wire_id, 0)
        count = left if count is None else min(count, left)
        self._num_live -= count
        if left > count:
            self._unfinished[wire_id] = left - count
        else:
            self._unfinished.pop(wire_id, None)
            self._aborted.discard(wire_id)
        if not self._num_live:
            self._idle.set()

    def _on_exit(self, status: int) -> None:
        """In the thread that watches the process."""
        try:
            self._loop.call_soon_threadsafe(self._exit_seen, status)
        except RuntimeError:
            return  # the loop was closed: nobody waits

    def _exit_seen(self, status: int) -> None:
        # What it said at last may still be on its way.
        self._loop.call_later(_LAST_WORDS_S if self.is_alive else 0.0, self._gone, status)

    def _gone(self, status: int) -> None:
        """The process has ended, and what it had said before was read."""
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        if self.is_alive:
            self._fail(
                Failure(
                    kind="EngineDead",
                    sentence=f"its process ended ({how}); see its messages above, and start it again",
                    memory=(),
                    trace="",
                    phase="serving" if self._ready.is_set() else "starting",
                )
            )
        self._exited.set()
        self._ready.set()
        self._loading.set()

    def _fail(self, failure: Failure) -> None:
        """The first failure is what everyone gets."""
        if self._failure is not None:
            return
        cause = failure.error(EngineDead)
        self._failure = EngineDead(f"the engine stopped while {failure.phase}: {failure.sentence}")
        self._failure.__cause__ = cause
        self._start_failure = self._failure if type(cause) is EngineDead else cause
        self._unfinished.clear()
        self._num_live = 0
        for event in (self._idle, self._ready, self._loading, self._failed):
            event.set()
        self._fail_streams()

    def _fail_streams(self) -> None:
        for stream in self._streams.values():
            stream.fail(self._dead())

    def _dead(self) -> EngineDead:
        """A new exception for each that raises it: tracebacks grow."""
        if self._failure is None:
            return EngineDead("the engine was closed; start a new one")
        error = EngineDead(str(self._failure))
        error.__cause__ = self._failure.__cause__
        return error
