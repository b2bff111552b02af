"""An engine without a model: each request counts up, and what becomes of it is recorded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from core.contract.errors import CoreError, EngineDead, QueueFullError, RequestError
from core.engine.metrics import EngineMetrics
from core.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from core.sampling.params import SamplingParams


class FakeTokenizer:
    """One token per character; its id is the character's code point."""

    chat_template: str | None = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tool_template: str | None = None
    bos_token = eos_token = ""
    special_ids: frozenset[int] = frozenset()
    vocab_size = 0x110000
    is_byte_level = True
    shared_ids: frozenset[int] = frozenset()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()


@dataclass
class FakeEngine:
    """Answers `reply` character by character; `pause` seconds before each; `gate` holds all until it is set.

    Attributes:
        asked: (prompt, params, priority, salt, timeouts) of each request. ended: ids of requests that were
            closed early. num_cached: tokens of each prompt that were found in the prefix cache.
    """

    reply: str = "abcdef"
    pause: float = 0.0
    limit: int = 1000
    error_after: int | None = None
    asked: list[tuple[object, SamplingParams, int, str, float | None, float | None]] = field(
        default_factory=list
    )
    special: list[bool] = field(default_factory=list)
    live: set[str] = field(default_factory=set)
    ended: list[str] = field(default_factory=list)
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    max_model_len: int = 512
    is_alive: bool = True
    failure: BaseException | None = None
    num_cached: int = 1

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
    ) -> AsyncGenerator[RequestOutput]:
        name = request_id or "request"
        self.special.append(add_special_tokens)
        self.asked.append((prompt, params, priority, salt, queue_timeout_s, timeout_s))
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if len(ids) >= self.max_model_len:
            raise RequestError(f"the prompt has {len(ids)} tokens")
        if len(self.live) >= self.limit:
            raise QueueFullError("1 requests are waiting, the most allowed; try again later")
        self.live.add(name)
        try:
            count = min(len(self.reply), params.max_tokens if params.max_tokens is not None else 10**9)
            for size in range(1, count + 1):
                await asyncio.sleep(self.pause)
                if self.error_after is not None and size > self.error_after:
                    raise self._die()
                yield self._output(name, prompt, ids, params, size, size == count)
        finally:
            self.live.discard(name)
            if count and size < count:
                self.ended.append(name)

    def _die(self) -> CoreError:
        self.is_alive, self.failure = False, EngineDead("the device burnt")
        return EngineDead("the engine stopped: the device burnt")

    def _output(
        self,
        name: str,
        prompt: str | Sequence[int],
        ids: list[int],
        params: SamplingParams,
        size: int,
        is_last: bool,
    ) -> RequestOutput:
        outputs, finished = [], True
        for i in range(params.n):
            text, reason, stop = self.reply[:size], "length" if is_last else None, None
            for s in params.stop:
                if s in text:
                    text, reason, stop = text[: text.index(s)], "stop", s
            new = tuple(ord(c) for c in self.reply[:size])
            found = None
            if params.logprobs is not None:
                found = tuple({t: Logprob(-0.5, 1, chr(t)), 33: Logprob(-1.5, 2, "!")} for t in new)
            offsets = None if found is None else tuple(range(len(new)))
            outputs.append(CompletionOutput(i, text, new, reason, stop, found, offsets))
            finished = finished and reason is not None
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            prompt_logprobs = (None, *({t: Logprob(-0.25, 1, chr(t))} for t in ids[1:]))
        return RequestOutput(
            request_id=name,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=tuple(ids),
            outputs=tuple(outputs),
            finished=finished,
            num_cached_tokens=self.num_cached,
            metrics=RequestMetrics(0.1, 0.5 if finished else None, 0),
            prompt_logprobs=prompt_logprobs,
        )

    def metrics(self) -> EngineMetrics:
        return EngineMetrics(
            num_running=len(self.live),
            blocks_total=100,
            blocks_used=25,
            generated_tokens=4,
            prompt_tokens=3,
            finished={"length": 1},
        )
