"""What the endpoints do: requests of the API in, its answers out, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from core.contract.errors import RequestError
from core.engine.async_llm import AsyncLLM
from core.engine.outputs import CompletionOutput, RequestOutput
from core.sampling.params import SamplingParams
from core.server import errors
from core.server.config import ServerConfig
from core.server.deltas import Delta, Growth
from core.server.logprobs import LogprobWriter
from core.server.metrics import ServerMetrics
from core.server.protocol import ChatRequest, CommonRequest, CompletionRequest
from core.tokenizer import chat_prompt

Prompt = str | list[int]
Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"


class Service:
    """One model behind the API."""

    def __init__(self, engine: AsyncLLM, config: ServerConfig, model_name: str) -> None:
        self.engine = engine
        self.model_name = model_name
        self.metrics = ServerMetrics(engine, model_name)
        self._config = config
        self._created = int(time.time())
        self._writer = LogprobWriter(engine.tokenizer)

    def models(self) -> Json:
        """The answer of GET /v1/models."""
        model = {
            "id": self.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "core",
            "max_model_len": self.engine.max_model_len,
        }
        return {"object": "list", "data": [model]}

    # Completions

    async def complete(self, request: CompletionRequest) -> Json:
        """The whole answer of POST /v1/completions."""
        job = self._completion_job(request)
        outputs = await self._finish(job)
        choices = []
        for p, output in enumerate(outputs):
            for choice in output.outputs:
                choices.append(self._completion_choice(request, job, p, output, choice))
        return {**job.head("text_completion"), "choices": choices, "usage": _usage(outputs)}

    async def stream_completion(self, request: CompletionRequest) -> AsyncGenerator[bytes]:
        """The same as server-sent events."""
        job = self._completion_job(request)
        growth = [Growth(job.params) for _ in job.prompts]
        starts = [0] * len(job.prompts)
        begun: set[int] = set()
        latest: dict[int, RequestOutput] = {}
        head = job.head("text_completion")
        async with aclosing(self._run(job)) as outputs:
            async for p, output in outputs:
                if request.echo and p not in latest:
                    for i in range(request.n):
                        choice = self._echo_choice(request, job, p, output, i)
                        starts[p] = len(choice["text"])
                        begun.add(choice["index"])
                        yield _event({**head, "choices": [choice]})
                latest[p] = output
                for delta in filter(None, map(growth[p].take, output.outputs)):
                    choice = self._delta_choice(request, p, delta, starts[p])
                    if choice["index"] not in begun:
                        begun.add(choice["index"])
                        choice |= self._of_prompt(request, output)
                    yield _event({**head, "choices": [choice], **_running_usage(request, latest)})
        for event in self._closing(request, head, latest):
            yield event

    def _completion_job(self, request: CompletionRequest) -> _Job:
        self._check_model(request)
        request.check()
        prompts = request.prompts()
        if len(prompts) > self._config.max_prompts:
            raise RequestError(
                f"{len(prompts)} prompts were given, at most {self._config.max_prompts} are taken"
            )
        if request.echo and request.logprobs is not None and request.prompt_logprobs is None:
            request = request.model_copy(update={"prompt_logprobs": request.logprobs})
        # Nothing to generate: the engine makes one token all the same, which is not shown.
        limit = 1 if request.max_tokens == 0 else request.max_tokens
        params = request.sampling(max_tokens=limit, logprobs=request.logprobs)
        return self._job("cmpl", prompts, params, request)

    def _completion_choice(
        self, request: CompletionRequest, job: _Job, p: int, output: RequestOutput, choice: CompletionOutput
    ) -> Json:
        echo = self._prompt_text(job.prompts[p], output) if request.echo else ""
        logprobs = None
        if request.logprobs is not None:
            logprobs = self._writer.completion(
                choice.token_ids, choice.logprobs or (), choice.text_offsets or (), len(echo)
            )
            if request.echo:
                logprobs = self._writer.joined(self._writer.prompt(output, echo), logprobs)
        found: Json = {
            "index": p * request.n + choice.index,
            "text": echo + choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            **self._of_prompt(request, output),
        }
        if request.return_token_ids:
            found["token_ids"] = choice.token_ids
        return found

    def _echo_choice(
        self, request: CompletionRequest, job: _Job, p: int, output: RequestOutput, i: int
    ) -> Json:
        text = self._prompt_text(job.prompts[p], output)
        return {
            "index": p * request.n + i,
            "text": text,
            "logprobs": None if request.logprobs is None else self._writer.prompt(output, text),
            "finish_reason": None,
            **self._of_prompt(request, output),
        }

    def _delta_choice(self, request: CompletionRequest, p: int, delta: Delta, start: int) -> Json:
        logprobs = None
        if request.logprobs is not None:
            logprobs = self._writer.completion(
                delta.token_ids, delta.logprobs or (), delta.text_offsets, start
            )
        found: Json = {
            "index": p * request.n + delta.index,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if request.return_token_ids:
            found["token_ids"] = delta.token_ids
        return found

    def _of_prompt(self, request: CommonRequest, output: RequestOutput) -> Json:
        """What a choice says of its prompt, once."""
        found: Json = {}
        if request.prompt_logprobs is not None:
            found["prompt_logprobs"] = self._writer.plain(output.prompt_logprobs)
        if request.return_token_ids:
            found["prompt_token_ids"] = output.prompt_token_ids
        return found

    def _prompt_text(self, prompt: Prompt, output: RequestOutput) -> str:
        if isinstance(prompt, str):
            return prompt
        return self.engine.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)

    # Chat

    async def chat(self, request: ChatRequest) -> Json:
        """The whole answer of POST /v1/chat/completions."""
        job = await self._chat_job(request)
        output, most = (await self._finish(job))[0], request.top_logprobs or 0
        choices = []
        for choice in output.outputs:
            found: Json = {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text},
                "logprobs": self._writer.chat(choice.token_ids, choice.logprobs, most)
                if request.logprobs
                else None,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            if request.return_token_ids:
                found["token_ids"] = choice.token_ids
            choices.append(found)
        head = {**job.head("chat.completion"), **self._of_prompt(request, output)}
        return {**head, "choices": choices, "usage": _usage([output])}

    async def stream_chat(self, request: ChatRequest) -> AsyncGenerator[bytes]:
        """The same as server-sent events."""
        job = await self._chat_job(request)
        head = job.head("chat.completion.chunk")
        growth, most = Growth(job.params), request.top_logprobs or 0
        latest: dict[int, RequestOutput] = {}
        async with aclosing(self._run(job)) as outputs:
            async for _, output in outputs:
                if not latest:
                    of_prompt = self._of_prompt(request, output)
                    for i in range(request.n):
                        first = {"role": "assistant", "content": ""}
                        choice: Json = {"index": i, "delta": first, "logprobs": None, "finish_reason": None}
                        yield _event({**head, **of_prompt, "choices": [choice]})
                        of_prompt = {}
                latest[0] = output
                for delta in filter(None, map(growth.take, output.outputs)):
                    choice = {
                        "index": delta.index,
                        "delta": {"content": delta.text} if delta.text else {},
                        "logprobs": self._writer.chat(delta.token_ids, delta.logprobs, most)
                        if request.logprobs
                        else None,
                        "finish_reason": delta.finish_reason,
                        "stop_reason": delta.stop_reason,
                    }
                    if request.return_token_ids:
                        choice["token_ids"] = delta.token_ids
                    yield _event({**head, "choices": [choice], **_running_usage(request, latest)})
        for event in self._closing(request, head, latest):
            yield event

    async def _chat_job(self, request: ChatRequest) -> _Job:
        self._check_model(request)
        request.check()
        messages = [_plain_content(m) for m in request.messages]
        variables = request.template_variables()
        # A long conversation takes a while to render and tokenize: other streams go on meanwhile.
        ids = await asyncio.to_thread(chat_prompt, self.engine.tokenizer, messages, request.tools, variables)
        limit = request.max_completion_tokens
        if limit is None:
            limit = request.max_tokens
        top = (request.top_logprobs or 0) if request.logprobs else None
        return self._job("chatcmpl", [ids], request.sampling(max_tokens=limit, logprobs=top), request)

    # Both

    def _check_model(self, request: CommonRequest) -> None:
        if request.model not in (None, self.model_name):
            raise ModelNotFound(
                f"there is no model {request.model!r} here; this server has {self.model_name!r}"
            )

    def _job(
        self, kind: str, prompts: Sequence[Prompt], params: SamplingParams, request: CommonRequest
    ) -> _Job:
        return _Job(f"{kind}-{uuid.uuid4().hex}", self.model_name, list(prompts), params, request)

    async def _finish(self, job: _Job) -> list[RequestOutput]:
        """Every prompt's final output."""
        found: dict[int, RequestOutput] = {}
        async with aclosing(self._run(job)) as outputs:
            async for p, output in outputs:
                found[p] = output
        return [found[p] for p in range(len(job.prompts))]

    async def _run(self, job: _Job) -> AsyncGenerator[tuple[int, RequestOutput]]:
        """(index of prompt, its output) whenever one has grown. Closing it ends all of them."""
        limits = (job.request.timeout, self._config.request_timeout_s)
        timeout = min((limit for limit in limits if limit is not None), default=None)
        # A chat's template has put its own already.
        adds_special = isinstance(job.request, CompletionRequest) and job.request.add_special_tokens
        streams = [
            self.engine.generate(
                prompt,
                job.params,
                request_id=f"{job.id}-{p}",
                priority=job.request.priority,
                queue_timeout_s=job.request.queue_timeout,
                timeout_s=timeout,
                salt=job.request.cache_salt,
                add_special_tokens=adds_special,
            )
            for p, prompt in enumerate(job.prompts)
        ]
        shows_nothing = isinstance(job.request, CompletionRequest) and job.request.max_tokens == 0
        async with aclosing(_merged(streams)) as outputs:
            async for p, output in outputs:
                if output.finished:
                    self.metrics.finished(output)
                yield p, _without_tokens(output) if shows_nothing else output

    def _closing(
        self, request: CommonRequest, head: Json, latest: Mapping[int, RequestOutput]
    ) -> list[bytes]:
        options = request.stream_options
        if options is not None and options.include_usage:
            return [_event({**head, "choices": [], "usage": _usage(list(latest.values()))}), DONE]
        return [DONE]


class ModelNotFound(RequestError):
    """The client named a model that this server does not have."""


class _Job:
    """One request of the API on its way through the engine."""

    def __init__(
        self, id: str, model: str, prompts: list[Prompt], params: SamplingParams, request: CommonRequest
    ) -> None:
        self.id = id
        self.prompts = prompts
        self.params = params
        self.request = request
        self._model = model
        self._created = int(time.time())

    def head(self, kind: str) -> Json:
        """What every answer and event begins with."""
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}


def _without_tokens(output: RequestOutput) -> RequestOutput:
    """What is told of a prompt alone."""
    outputs = tuple(
        replace(
            c,
            text="",
            token_ids=(),
            stop_reason=None,
            logprobs=None if c.logprobs is None else (),
            text_offsets=None,
        )
        for c in output.outputs
    )
    ended = tuple(replace(c, finish_reason=c.finish_reason and "length") for c in outputs)
    return replace(output, outputs=ended)


async def _merged(
    streams: Sequence[AsyncIterator[RequestOutput]],
) -> AsyncGenerator[tuple[int, RequestOutput]]:
    """Outputs of several streams as they come. The first error ends all."""
    if len(streams) == 1:
        try:
            async for output in streams[0]:
                yield 0, output
        finally:
            await _close(streams[0])
        return
    queue: asyncio.Queue[tuple[int, RequestOutput | BaseException | None]] = asyncio.Queue(2 * len(streams))

    async def pump(p: int) -> None:
        try:
            async for output in streams[p]:
                await queue.put((p, output))
            await queue.put((p, None))
        except Exception as error:
            await queue.put((p, error))
        finally:
            await _close(streams[p])

    tasks = [asyncio.create_task(pump(p)) for p in range(len(streams))]
    try:
        left = len(tasks)
        while left:
            p, item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield p, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _close(stream: AsyncIterator[RequestOutput]) -> None:
    if isinstance(stream, AsyncGenerator):
        await stream.aclose()


def _plain_content(message: Mapping[str, Any]) -> Json:
    """A message whose content is text: parts of type text are joined, anything else is refused."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    texts = []
    for part in content:
        if (
            not isinstance(part, Mapping)
            or part.get("type") != "text"
            or not isinstance(part.get("text"), str)
        ):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RequestError(f"a message has content of type {kind!r}; this model takes text only")
        texts.append(part["text"])
    return {**message, "content": "".join(texts)}


def _usage(outputs: Sequence[RequestOutput]) -> Json:
    prompt = sum(len(o.prompt_token_ids) for o in outputs)
    completion = sum(len(c.token_ids) for o in outputs for c in o.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(o.num_cached_tokens for o in outputs)},
    }


def _running_usage(request: CommonRequest, latest: Mapping[int, RequestOutput]) -> Json:
    options = request.stream_options
    if options is None or not options.continuous_usage_stats:
        return {}
    return {"usage": _usage(list(latest.values()))}


def _event(value: Json) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_event(error: Exception) -> bytes:
    """The last event of a stream that failed after it had begun."""
    return _event(errors.answer(error)[1])
