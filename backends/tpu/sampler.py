"""Greedy sampling on the device, and the test of whether a batch is greedy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from backends.tpu.device import device_errors
from core.contract.types import Array, SampledTokens, SamplingBatch


def is_greedy(sampling: SamplingBatch) -> bool:
    """Whether every row's token is the plain argmax of its logits and nothing else is wanted."""
    plain = sampling.bias_ids is None and sampling.bitmask is None and sampling.history is None
    no_logprobs = sampling.logprobs is None or bool(np.all(np.asarray(sampling.logprobs) < 0))
    return plain and no_logprobs and bool(np.all(np.asarray(sampling.temperature) == 0))


def greedy(logits: Array) -> jax.Array:
    """logits [n, V] -> int32 [n]; ties go to the lowest id. -1 where the largest, as which NaN counts, is not
    finite.
    """
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), tokens, -1)


class TokensOnDevice:
    """Tokens on their way: the first `num_rows` of int32 [R] are real."""

    def __init__(self, tokens: Array, num_rows: int) -> None:
        self._tokens, self._num_rows = tokens, num_rows

    def is_ready(self) -> bool:
        """Whether the step has ended."""
        return bool(self._tokens.is_ready())

    def get(self) -> SampledTokens:
        """Wait; tokens int32 [num_rows].

        The cut is made on the host: on the device each count would compile anew.
        """
        with device_errors("sampling"):
            return SampledTokens(np.array(self._tokens)[: self._num_rows])


class TokensOnHost:
    """Tokens that the reference sampler drew."""

    def __init__(self, sampled: SampledTokens) -> None:
        self._sampled = sampled

    def is_ready(self) -> bool:
        """True."""
        return True

    def get(self) -> SampledTokens:
        """The tokens, with the log probabilities that were asked for."""
        return self._sampled
