"""From an engine's growing outputs to what a stream sends next."""

from __future__ import annotations

from dataclasses import dataclass

from core.engine.outputs import CompletionOutput, Logprob
from core.sampling.params import SamplingParams


@dataclass(frozen=True)
class Delta:
    """What one continuation gained.

    Attributes:
        logprobs: of the new tokens; None where they were not asked for. text_offsets: likewise.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, Logprob], ...] | None
    text_offsets: tuple[int, ...]
    finish_reason: str | None
    stop_reason: int | str | None


class Growth:
    """Remembers how much of each continuation was sent.

    Text that may still turn out to be the beginning of a stop text is held back until that is certain.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._sent = [0] * params.n
        self._tokens = [0] * params.n
        self._done = [False] * params.n
        self._stops = () if params.include_stop_str_in_output else params.stop

    def take(self, output: CompletionOutput) -> Delta | None:
        """What is new; None where nothing is."""
        i = output.index
        if self._done[i]:
            return None
        is_done = output.finish_reason is not None
        end = len(output.text) if is_done else len(output.text) - self._held(output.text)
        text = output.text[self._sent[i] : end]
        ids = output.token_ids[self._tokens[i] :]
        if not text and not ids and not is_done:
            return None
        logprobs = None if output.logprobs is None else tuple(output.logprobs[self._tokens[i] :])
        offsets = (output.text_offsets or ())[self._tokens[i] :]
        self._sent[i], self._tokens[i], self._done[i] = (
            max(self._sent[i], end),
            len(output.token_ids),
            is_done,
        )
        return Delta(i, text, tuple(ids), logprobs, offsets, output.finish_reason, output.stop_reason)

    def _held(self, text: str) -> int:
        """Characters at the end that begin a stop text."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
