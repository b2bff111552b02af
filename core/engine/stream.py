"""RequestStream: from a request's events to its text, on the side of whoever asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from core.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from core.scheduler import Event, Request
from core.scheduler.records import TokenLogprobs
from core.tokenizer import IncrementalDetokenizer, Tokenizer

PlainLogprobs = tuple[float, int, tuple[int, ...], tuple[float, ...]]


class StreamEvent(NamedTuple):
    """What a stream is told of one continuation: a new token (-1 = none), or its end. Plain values, so that
    it can cross to another process.

    Attributes:
        choice: index among the request's continuations.
        cached_tokens: prompt tokens found in the prefix cache.
        finish_reason: None while it runs. stop_reason: the id that ended it, or what failed.
        num_preemptions: so far. logprobs: the fields of a TokenLogprobs, where they were asked for.
        prompt_logprobs: the same of the prompt's tokens, with the first token.
    """

    request_id: str
    choice: int
    token: int
    cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_preemptions: int = 0
    logprobs: PlainLogprobs | None = None
    prompt_logprobs: tuple[PlainLogprobs | None, ...] | None = None


def stream_event(event: Event) -> StreamEvent:
    """The part of a scheduler's event that streams need."""
    s = event.sequence
    if not event.finished:
        prompt = event.prompt_logprobs
        return StreamEvent(
            s.request.request_id,
            s.choice,
            event.token,
            s.cached_tokens,
            logprobs=_plain(event.logprobs),
            prompt_logprobs=None if prompt is None else tuple(map(_plain, prompt)),
        )
    return StreamEvent(
        s.request.request_id,
        s.choice,
        event.token,
        s.cached_tokens,
        s.finish_reason,
        s.stop_reason,
        s.num_preemptions,
    )


def _plain(found: TokenLogprobs | None) -> PlainLogprobs | None:
    return None if found is None else (found.logprob, found.rank, found.top_ids, found.top_logprobs)


class _Choice:
    """Text and ids of one continuation so far."""

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        params = request.params
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self.offsets: list[int] | None = None
        self._stop = params.stop
        self._keeps_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._searched = 0
        self._settled = 0  # a stop text that was complete here came within `min_tokens` tokens
        self._detokenizer = (
            IncrementalDetokenizer(tokenizer, request.prompt_ids, params.skip_special_tokens)
            if params.detokenize
            else None
        )
        if self.logprobs is not None and self._detokenizer is not None:
            self.offsets = []

    def add(self, token: int) -> str | None:
        """Take a token; the stop text that it completed, if any. The text then ends before it."""
        self.ids.append(token)
        if self._detokenizer is None:
            return None
        if self.offsets is not None:
            self.offsets.append(len(self.text) + self._detokenizer.begin(token))
        self.text += self._detokenizer.add([token])
        if len(self.ids) <= self._min_tokens:
            self._settled = len(self.text)
            return None
        return self._find_stop()

    def _find_stop(self) -> str | None:
        found = []
        for stop in self._stop:
            start = max(self._searched, self._settled - len(stop) + 1)
            if (at := self.text.find(stop, start)) >= 0:
                found.append((at, stop))
        if found:
            at, stop = min(found)
            self.text = self.text[: at + len(stop) if self._keeps_stop else at]
            return stop
        longest = max((len(s) for s in self._stop), default=1)
        self._searched = max(0, len(self.text) - longest + 1)
        return None

    def finish(self, reason: str | None, stop: int | str | None) -> None:
        """The continuation ended; what the detokenizer held back comes out unless a stop text cut it."""
        if self._detokenizer is not None and self.stop_reason is None:
            self.text += self._detokenizer.finish()
            if len(self.ids) > self._min_tokens and (cut := self._find_stop()) is not None:
                self.stop_reason, reason = cut, "stop"
        self.finish_reason = reason
        if self.stop_reason is None:
            self.stop_reason = stop


def _logprobs(
    token: int, logprob: float, rank: int, top_ids: tuple[int, ...], top_logprobs: tuple[float, ...]
) -> dict[int, Logprob]:
    """By id: the most likely ones in falling order, and the token drawn."""
    top = zip(top_ids, top_logprobs, strict=True)
    found = {i: Logprob(value, place) for place, (i, value) in enumerate(top, start=1)}
    found.setdefault(token, Logprob(logprob, rank))
    return found


class RequestStream:
    """Collects the events of one request.

    Args:
        prompt: the text, or None where ids were given. clock: seconds.
        end: called with a continuation's index when its text reached a stop text; ends it in the engine.
    """

    def __init__(
        self,
        request: Request,
        prompt: str | None,
        tokenizer: Tokenizer,
        clock: Callable[[], float],
        end: Callable[[int], None],
    ) -> None:
        self.request = request
        self._prompt = prompt
        self._choices = [_Choice(tokenizer, request) for _ in range(request.params.n)]
        self._clock = clock
        self._end = end
        self._start = clock()
        self._first_token_s: float | None = None
        self._total_s: float | None = None
        self._cached = 0
        self._prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
        self._preemptions = 0

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def finished(self) -> bool:
        """Whether every continuation has ended."""
        return all(c.finish_reason is not None for c in self._choices)

    def take(self, event: StreamEvent) -> None:
        """Take an event of this request. What comes after a continuation's end is dropped."""
        choice = self._choices[event.choice]
        self._cached = max(self._cached, event.cached_tokens)
        if choice.finish_reason is not None:
            return
        if event.token >= 0:
            if self._first_token_s is None:
                self._first_token_s = self._clock() - self._start
            if event.prompt_logprobs is not None:
                ids = self.request.prompt_ids
                self._prompt_logprobs = tuple(
                    None if found is None else _logprobs(i, *found)
                    for i, found in zip(ids, event.prompt_logprobs, strict=True)
                )
            if choice.logprobs is not None and event.logprobs is not None:
                choice.logprobs.append(_logprobs(event.token, *event.logprobs))
            stop = choice.add(event.token)
            if stop is not None:
                choice.stop_reason = stop
                self._end(event.choice)
                choice.finish("stop", None)
        if event.finish_reason is not None:
            self._preemptions += event.num_preemptions
            choice.finish(event.finish_reason, event.stop_reason)
        if self.finished and self._total_s is None:
            self._total_s = self._clock() - self._start

    def output(self) -> RequestOutput:
        """What there is now."""
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self._prompt,
            prompt_token_ids=self.request.prompt_ids,
            outputs=tuple(
                CompletionOutput(
                    i,
                    c.text,
                    tuple(c.ids),
                    c.finish_reason,
                    c.stop_reason,
                    None if c.logprobs is None else tuple(c.logprobs),
                    None if c.offsets is None else tuple(c.offsets),
                )
                for i, c in enumerate(self._choices)
            ),
            finished=self.finished,
            num_cached_tokens=self._cached,
            metrics=RequestMetrics(self._first_token_s, self._total_s, self._preemptions),
            prompt_logprobs=self._prompt_logprobs,
        )
