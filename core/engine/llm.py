"""LLM: the offline Python API."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import partial
from numbers import Integral
from operator import index
from pathlib import Path
from typing import Any, Literal, Never

from core.contract.errors import EngineDead, RequestError
from core.engine.bars import generating_bar, loading_bar
from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.engine.outputs import RequestOutput
from core.engine.queueing import Queueing, queueing_of
from core.engine.resolve import Resolution
from core.engine.stream import RequestStream, stream_event
from core.env import cache_dir
from core.sampling.params import SamplingParams
from core.tokenizer import Tokenizer, chat_prompt, load_tokenizer
from core.weights.sample import resolve_model

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class LLM:
    """A model, ready to generate. Several threads may use it; their requests run together.

    Args:
        model: a folder with safetensors, a .gguf file, or "sample" (SmolLM2-135M-Instruct, fetched at first
        use).
        backend: name, or "auto". dtype: "auto", "float32", "bfloat16", ...
        Other arguments: as in `EngineConfig`.

    Raises:
        CoreError: a sentence that says what is wrong and what to do.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        backend: str = "auto",
        dtype: str = "auto",
        load_format: Literal["auto", "dummy"] = "auto",
        quantized: Literal["auto", "packed", "dequantized"] = "auto",
        device: int = 0,
        max_model_len: int | None = None,
        max_requests: int = 64,
        max_batch_tokens: int = 2048,
        block_size: int | None = None,
        num_blocks: int | None = None,
        kv_cache_bytes: int | None = None,
        prefix_cache: bool = True,
        policy: Literal["fcfs", "priority"] = "fcfs",
        max_waiting: int | None = None,
        overlap: int | None = None,
        tensor_parallel: int = 1,
        num_threads: int | None = None,
        batch_invariant: bool = False,
        warm_up: bool = False,
        show_progress: bool = True,
        backend_options: Mapping[str, str] | None = None,
        tokenizer: Tokenizer | None = None,
        on_resolved: Callable[[Resolution], None] | None = None,
        **unknown: Never,
    ) -> None:
        """Load a model.

        Args:
            show_progress: tell on stderr what was decided and how far loading is.
            tokenizer: the model's, where it was loaded before.
            on_resolved: told what was decided before weights are read; what it raises ends the start.
            unknown: refused, with the nearest name.

        Raises:
            CoreError: what cannot work; before weights are read, where it can be known then.
        """
        EngineConfig.check_names(unknown)
        self._show_progress = show_progress
        config = EngineConfig(
            model=resolve_model(str(model), cache_dir()),
            backend=backend,
            dtype=dtype,
            load_format=load_format,
            quantized=quantized,
            device=device,
            max_model_len=max_model_len,
            max_requests=max_requests,
            max_batch_tokens=max_batch_tokens,
            block_size=block_size,
            num_blocks=num_blocks,
            kv_cache_bytes=kv_cache_bytes,
            prefix_cache=prefix_cache,
            policy=policy,
            max_waiting=max_waiting,
            overlap=overlap,
            tensor_parallel=tensor_parallel,
            num_threads=num_threads,
            batch_invariant=batch_invariant,
            warm_up=warm_up,
            backend_options=dict(backend_options or {}),
        )
        self.tokenizer = tokenizer or load_tokenizer(config.model, or_bytes=config.load_format == "dummy")

        def tell(resolution: Resolution) -> None:
            if on_resolved is not None:
                on_resolved(resolution)
            if show_progress:
                sys.stderr.write(f"{resolution.summary()}\n")

        with loading_bar(config.model.name, show_progress) as progress:
            self.engine = Engine(config, progress=progress, on_resolved=tell)
        self._ids = itertools.count()
        self._live: dict[str, RequestStream] = {}
        self._changed: set[str] = set()
        self._lock = threading.RLock()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        priority: int | Sequence[int] = Queueing.priority,
        queue_timeout_s: float | None = Queueing.queue_timeout_s,
        timeout_s: float | None = Queueing.timeout_s,
        salt: str = Queueing.salt,
    ) -> list[RequestOutput]:
        """Continue prompts, given as text or token ids; all at once, results in the order of the prompts.

        Args:
            params: for all prompts, or one each; None = SamplingParams().
            use_tqdm: show a progress bar; None = as the LLM was made.
            priority: lower goes first under the policy "priority"; for all prompts, or one each.
            queue_timeout_s, timeout_s: a request ends as "deadline" if it has not begun, not ended, by then.
            salt: blocks are shared only with requests of the same salt.

        Raises:
            RequestError: a prompt or parameter is wrong; nothing was generated for any of them.
            EngineDead: the device failed.
        """
        streams = self.queue(
            prompts,
            params,
            priority=priority,
            queue_timeout_s=queue_timeout_s,
            timeout_s=timeout_s,
            salt=salt,
        )
        finished: dict[str, RequestOutput] = {}
        show = self._show_progress if use_tqdm is None else use_tqdm
        with generating_bar(len(streams), show) as advance:
            for output in self.run(streams):
                if output.finished:
                    finished[output.request_id] = output
                    advance(sum(len(o.token_ids) for o in output.outputs))
        return [finished[stream.request_id] for stream in streams]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Message] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool | None = None,
        priority: int | Sequence[int] = Queueing.priority,
        queue_timeout_s: float | None = Queueing.queue_timeout_s,
        timeout_s: float | None = Queueing.timeout_s,
        salt: str = Queueing.salt,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several: messages are mappings with `role` and `content`.

        Args:
            tools: JSON schemas of functions that the model may call.
            chat_template_kwargs: further names for the model's template, such as `enable_thinking`.
            Others: as in `generate`.

        Raises:
            ConfigError: the model has no chat template. Otherwise as `generate`.
        """
        if isinstance(messages, str):
            raise RequestError("messages is a text; give a list such as [{'role': 'user', 'content': ...}]")
        many = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [self.chat_prompt(m, tools, chat_template_kwargs) for m in many]  # type: ignore[arg-type]
        return self.generate(
            prompts,
            params,
            use_tqdm=use_tqdm,
            priority=priority,
            queue_timeout_s=queue_timeout_s,
            timeout_s=timeout_s,
            salt=salt,
        )

    def chat_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, ready for the model to answer; arguments as those of `chat`."""
        return chat_prompt(self.tokenizer, messages, tools, chat_template_kwargs)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = Queueing.priority,
        queue_timeout_s: float | None = Queueing.queue_timeout_s,
        timeout_s: float | None = Queueing.timeout_s,
        salt: str = Queueing.salt,
    ) -> Generator[RequestOutput, None, None]:
        """Like `generate`, but gives every request's state whenever it has grown.

        The requests are queued when the first output is asked for; closing the iterator ends them.
        """
        streams = self.queue(
            prompts,
            params,
            priority=priority,
            queue_timeout_s=queue_timeout_s,
            timeout_s=timeout_s,
            salt=salt,
        )
        yield from self.run(streams)

    def queue(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = Queueing.priority,
        queue_timeout_s: float | None = Queueing.queue_timeout_s,
        timeout_s: float | None = Queueing.timeout_s,
        salt: str = Queueing.salt,
    ) -> list[RequestStream]:
        """Queue prompts for `run`, which continues them; arguments and errors as those of `generate`.

        The streams are in the order of the prompts; `RequestStream.output` is what there is of one, at any
        time.
        """
        many = _as_prompts(prompts)
        each = _as_params(params, len(many))
        waits = queueing_of(len(many), priority, queue_timeout_s, timeout_s, salt)
        with self._lock:
            return self._queue(many, each, waits)

    def run(self, streams: Sequence[RequestStream]) -> Generator[RequestOutput, None, None]:
        """Step the engine until these requests are finished; a request's output whenever it changed.

        What a step brings to other requests is kept for those who wait for them.
        """
        mine = {stream.request_id: stream for stream in streams}
        try:
            while mine:
                with self._lock:
                    ready = [name for name in mine if name in self._changed]
                    if not ready:
                        self._step()
                    self._changed.difference_update(ready)
                    outputs = [mine[name].output() for name in ready]
                    for output in outputs:
                        if output.finished:
                            del mine[output.request_id], self._live[output.request_id]
                yield from outputs
        finally:
            with self._lock:
                for name in mine:
                    self._live.pop(name, None)
                    self._changed.discard(name)
                    self.engine.abort(name)

    def _step(self) -> None:
        if not self.engine.has_work:
            raise EngineDead("a request is waited for that the engine does not have; please report it")
        for event in self.engine.step():
            stream = self._live.get(event.sequence.request.request_id)
            if stream is not None:
                stream.take(stream_event(event))
                self._changed.add(stream.request_id)

    def _queue(
        self, prompts: list[Prompt], params: list[SamplingParams], waits: list[Queueing]
    ) -> list[RequestStream]:
        added: list[RequestStream] = []
        try:
            for prompt, one, wait in zip(prompts, params, waits, strict=True):
                text = prompt if isinstance(prompt, str) else None
                ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(map(index, prompt))
                one = one.resolved(partial(self.tokenizer.encode, add_special_tokens=False))
                request = self.engine.add(
                    f"request-{next(self._ids)}",
                    ids,
                    one,
                    priority=wait.priority,
                    queue_timeout_s=wait.queue_timeout_s,
                    timeout_s=wait.timeout_s,
                    salt=wait.salt,
                )
                end = partial(self.engine.end_choice, request.request_id)
                added.append(RequestStream(request, text, self.tokenizer, time.monotonic, end))
        except BaseException:
            for stream in added:
                self.engine.abort(stream.request_id)
            raise
        self._live |= {stream.request_id: stream for stream in added}
        return added

    def close(self) -> None:
        """Give the device back. Idempotent; also done at the end of a `with` block."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise RequestError(f"the prompt is {prompts!r}; give a text, token ids, or a list of either")
    many = list(prompts)
    if many and all(isinstance(p, Integral) for p in many):
        return [many]  # type: ignore[list-item]
    return many  # type: ignore[return-value]


def _as_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if isinstance(params, Mapping) or not all(isinstance(p, SamplingParams) for p in params):
        raise RequestError(
            f"params is {params!r}; give SamplingParams(...), or a list of one for each prompt"
        )
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling parameters were given for {count} prompts; give one each")
    return list(params)
