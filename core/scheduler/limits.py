"""Limits: what a request may ask for, by its size; known before weights are read."""

from __future__ import annotations

from dataclasses import dataclass

from core.block_manager import CacheGroup
from core.contract.errors import RequestError
from core.sampling.params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one engine.

    Attributes:
        max_model_len: tokens of prompt and output of a sequence at most.
        max_rows: sequences that run at once at most.
        prefill_multiple: prompts are computed in multiples of so many tokens. groups: of the caches.
    """

    max_model_len: int
    max_rows: int
    prefill_multiple: int
    groups: tuple[CacheGroup, ...]

    def tokens(self, prompt_length: int, params: SamplingParams) -> int:
        """Tokens of prompt and output of each of the request's sequences at most."""
        if params.max_tokens is None:
            return self.max_model_len
        return min(self.max_model_len, prompt_length + params.max_tokens)

    def check(self, prompt_length: int, params: SamplingParams) -> None:
        """Refuse a request that can never run.

        Raises:
            RequestError: its prompt is empty or too long, it has too many continuations, or the caches do not
                hold one of them.
        """
        if not 1 <= prompt_length < self.max_model_len:
            raise RequestError(
                f"the prompt has {prompt_length} tokens; it must have 1 to {self.max_model_len - 1} "
                f"(the maximum model length is {self.max_model_len})"
            )
        if params.n > self.max_rows:
            raise RequestError(f"n is {params.n}, but at most {self.max_rows} sequences run at once; lower n")
        wanted = self.tokens(prompt_length, params)
        if not all(self._fits(group, wanted) for group in self.groups):
            raise RequestError(
                f"{wanted} tokens of prompt and output do not fit the KV cache; "
                "lower max_tokens or raise the memory budget"
            )

    def _fits(self, group: CacheGroup, num_tokens: int) -> bool:
        """Whether one sequence of that many tokens gets on when it runs alone, chunk by chunk."""
        if group.kind == "state":
            return True
        blocks = group.blocks_for(num_tokens)
        if group.window is not None and self.prefill_multiple > 1:
            # A window is trimmed at whole blocks, so up to a block less one token lags behind it.
            span = group.window + self.prefill_multiple + group.block_size - 3
            columns = min(-(-num_tokens // group.block_size), -(-span // group.block_size) + 1)
            blocks = max(blocks, columns)
        return blocks <= group.num_blocks - 1
