"""Which static shape a step is padded to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from core.contract.errors import ConfigError
from core.contract.spec import BackendSpec
from core.contract.types import Bucket, CachePlan, Outputs, StepKind


def powers_of_two(limit: int, first: int = 1) -> tuple[int, ...]:
    """first, 2 first, 4 first, ... up to and including the first that reaches `limit`."""
    sizes = [first]
    while sizes[-1] < limit:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes)


class Buckets:
    """The ladder of shapes of one engine.

    Dynamic backends get exact token and row counts; all others the next rung. Block tables are always as wide
    as the next rung, so that their shape changes rarely.
    """

    def __init__(self, spec: BackendSpec, plan: CachePlan, max_tokens: int, max_model_len: int) -> None:
        self._plan = plan
        self._is_dynamic = spec.shapes.kind == "dynamic"
        self._max_model_len = max_model_len
        self._min_decode = spec.batch.min_decode_rows
        self._tokens = _ladder(spec.shapes.token_buckets, max_tokens, "token")
        self._requests = _ladder(spec.shapes.request_buckets, plan.max_requests, "request")
        self._lengths = _length_rungs(spec.shapes.width_buckets, plan, max_model_len)

    def choose(
        self, kind: StepKind, tokens: int, requests: int, max_query: int, max_seq: int, outputs: Outputs
    ) -> Bucket:
        """The bucket of a step; `requests` counts rows or sampled rows, whichever are more.

        Raises:
            ConfigError: the step is larger than the largest rung.
        """
        if kind == "decode":
            requests = max(requests, self._min_decode)
        if not self._is_dynamic:
            requests = _rung(self._requests, requests, "rows")
            if kind != "decode":
                tokens = max(_rung(self._tokens, tokens, "tokens"), requests)
                max_query = min(tokens, _rung(self._tokens, max_query, "tokens"))
        if kind == "decode":
            tokens, max_query = requests, 1
        length = min(_rung(self._lengths, max_seq, "context"), self._max_model_len)
        return self._bucket(kind, tokens, requests, max_query, length, outputs)

    def _bucket(
        self, kind: StepKind, tokens: int, requests: int, max_query: int, length: int, outputs: Outputs
    ) -> Bucket:
        widths = tuple(0 if g.kind == "state" else -(-length // g.block_size) for g in self._plan.groups)
        return Bucket(
            tokens=tokens,
            requests=requests,
            widths=widths,
            kind=kind,
            max_query=max_query,
            max_seq=length,
            outputs=outputs,
        )

    def decode_buckets(self) -> Iterator[Bucket]:
        """Every decode bucket, for warm-up; smallest first. Empty for dynamic backends."""
        if self._is_dynamic:
            return
        for rows in self._requests:
            if rows >= self._min_decode:
                for length in self._lengths:
                    yield self._bucket("decode", rows, rows, 1, min(length, self._max_model_len), Outputs())


def _ladder(given: tuple[int, ...], limit: int, what: str) -> tuple[int, ...]:
    if not given:
        return powers_of_two(limit)
    if given[-1] < limit:
        raise ConfigError(
            f"the backend's largest {what} bucket is {given[-1]}, but {limit} are allowed in a step; "
            f"lower the limit to {given[-1]}"
        )
    return given


def _length_rungs(widths: tuple[int, ...], plan: CachePlan, max_model_len: int) -> tuple[int, ...]:
    sizes = [g.block_size for g in plan.groups if g.kind != "state"]
    size = max(sizes, default=max_model_len)
    blocks = -(-max_model_len // size)
    rungs = widths or powers_of_two(blocks)
    if rungs[-1] < blocks:
        raise ConfigError(
            f"the backend's widest block table has {rungs[-1]} columns of {size} tokens, but the "
            f"maximum model length is {max_model_len}; lower it to {rungs[-1] * size}"
        )
    return tuple(r * size for r in rungs)


def _rung(ladder: tuple[int, ...], value: int, what: str) -> int:
    at = bisect_left(ladder, value)
    if at == len(ladder):
        raise ConfigError(f"a step of {value} {what} is larger than the largest bucket, {ladder[-1]}")
    return ladder[at]
