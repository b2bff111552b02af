"""RequestStream: from a request's events to its text, on the side of whoever asked."""

from __future__ import annotations

from collections.abc import Callable

from core.engine.engine import Engine
from core.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from core.scheduler import Event, Request
from core.tokenizer import IncrementalDetokenizer, Tokenizer


class _Choice:
    """Text and ids of one continuation so far."""

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        params = request.params
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._stop = params.stop
        self._searched = 0
        self._detokenizer = (
            IncrementalDetokenizer(tokenizer, request.prompt_ids, params.skip_special_tokens)
            if params.detokenize or params.stop
            else None
        )

    def add(self, token: int) -> str | None:
        """Take a token; the stop text that it completed, if any. The text then ends before it."""
        self.ids.append(token)
        if self._detokenizer is None:
            return None
        self.text += self._detokenizer.add([token])
        return self._find_stop()

    def _find_stop(self) -> str | None:
        found = [(at, stop) for stop in self._stop if (at := self.text.find(stop, self._searched)) >= 0]
        if found:
            at, stop = min(found)
            self.text = self.text[:at]
            return stop
        longest = max((len(s) for s in self._stop), default=1)
        self._searched = max(0, len(self.text) - longest + 1)
        return None

    def finish(self, reason: str | None, stop: int | None) -> None:
        """The continuation ended; what the detokenizer held back comes out unless a stop text cut it."""
        if self._detokenizer is not None and self.stop_reason is None:
            self.text += self._detokenizer.finish()
            if (cut := self._find_stop()) is not None:
                self.stop_reason = cut
        self.finish_reason = reason
        if self.stop_reason is None:
            self.stop_reason = stop


class RequestStream:
    """Collects the events of one request."""

    def __init__(
        self, request: Request, prompt: str | None, tokenizer: Tokenizer, clock: Callable[[], float]
    ) -> None:
        self.request = request
        self._prompt = prompt
        self._choices = [_Choice(tokenizer, request) for _ in range(request.params.n)]
        self._clock = clock
        self._start = clock()
        self._first_token_s: float | None = None
        self._total_s: float | None = None
        self._cached = 0
        self._preemptions = 0

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    def take(self, event: Event, engine: Engine) -> None:
        """Take an event of this request. A stop text ends the sequence in the engine."""
        sequence = event.sequence
        choice = self._choices[sequence.choice]
        self._cached = max(self._cached, sequence.cached_tokens)
        if choice.finish_reason is not None:
            return
        if event.token >= 0:
            if self._first_token_s is None:
                self._first_token_s = self._clock() - self._start
            stop = choice.add(event.token)
            if stop is not None:
                choice.stop_reason = stop
                engine.scheduler.finish(sequence, "stop")
                choice.finish("stop", None)
        if event.finished:
            self._preemptions += sequence.num_preemptions
            choice.finish(sequence.finish_reason, sequence.stop_reason)
        if all(c.finish_reason for c in self._choices) and self._total_s is None:
            self._total_s = self._clock() - self._start

    def output(self) -> RequestOutput:
        """What there is now."""
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self._prompt,
            prompt_token_ids=self.request.prompt_ids,
            outputs=tuple(
                CompletionOutput(i, c.text, tuple(c.ids), c.finish_reason, c.stop_reason)
                for i, c in enumerate(self._choices)
            ),
            finished=all(c.finish_reason is not None for c in self._choices),
            num_cached_tokens=self._cached,
            metrics=RequestMetrics(self._first_token_s, self._total_s, self._preemptions),
        )
