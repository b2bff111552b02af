"""Which static shape a step is padded to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import product

from core.contract.errors import ConfigError
from core.contract.spec import BackendSpec
from core.contract.types import Bucket, CacheGroupSpec, CachePlan, Outputs, StepKind


def powers_of_two(limit: int, first: int = 1) -> tuple[int, ...]:
    """first, 2 first, 4 first, ... up to and including the first that reaches `limit`."""
    sizes = [first]
    while sizes[-1] < limit:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes)


class Buckets:
    """The ladder of shapes of one engine.

    Dynamic backends get exact token and row counts; all others the next rung. Block tables are always as wide
    as the next rung, so that their shape changes rarely. A ladder that the backend declares is kept to the
    letter.
    """

    def __init__(self, spec: BackendSpec, plan: CachePlan, max_tokens: int, max_model_len: int) -> None:
        """Check the declared ladders against the limits.

        Raises:
            ConfigError: a declared ladder ends below a limit; names both and what to lower.
        """
        rules, shapes = spec.batch, spec.shapes
        self._plan = plan
        self._kind = shapes.kind
        self._is_mixed = rules.mixed
        self._max_tokens = max_tokens
        self._max_model_len = max_model_len
        self._min_decode = rules.min_decode_rows
        self._max_decode = min(plan.max_requests, rules.max_requests or plan.max_requests)
        self._tokens = _ladder(shapes.token_buckets, max_tokens, rules.max_tokens, "token")
        self._max_requests = plan.max_requests
        most = max(plan.max_requests, self._min_decode)
        self._requests = _ladder(shapes.request_buckets, most, rules.max_requests, "request")
        self._widths = shapes.width_buckets
        self._lengths = _length_rungs(shapes.width_buckets, plan, max_model_len)

    @property
    def max_rows(self) -> int:
        """Rows of the largest bucket, padding included."""
        return self._requests[-1]

    def choose(
        self, kind: StepKind, tokens: int, requests: int, max_query: int, max_seq: int, outputs: Outputs
    ) -> Bucket:
        """The bucket of a step; `requests` counts rows or sampled rows, whichever are more.

        Raises:
            ConfigError: the step is larger than the largest rung.
        """
        if kind == "decode":
            requests = max(requests, self._min_decode)
        if self._kind != "dynamic":
            requests = _rung(self._requests, requests, "rows")
            if kind != "decode":
                # No fewer tokens than rows, as far as the ladder goes: sampled rows may be more than tokens.
                tokens = _rung(self._tokens, max(tokens, min(requests, self._tokens[-1])), "tokens")
                # All shapes of a static backend are compiled beforehand: one dimension less to multiply.
                rung = tokens if self._kind == "static" else _rung(self._tokens, max_query, "tokens")
                max_query = min(tokens, rung)
        if kind == "decode":
            tokens, max_query = requests, 1
        length = min(_rung(self._lengths, max_seq, "tokens of context"), self._max_model_len)
        return self._bucket(kind, tokens, requests, max_query, length, outputs)

    def _bucket(
        self, kind: StepKind, tokens: int, requests: int, max_query: int, length: int, outputs: Outputs
    ) -> Bucket:
        return Bucket(
            tokens=tokens,
            requests=requests,
            widths=tuple(self._width(g, length) for g in self._plan.groups),
            kind=kind,
            max_query=max_query,
            max_seq=length,
            outputs=outputs,
        )

    def _width(self, group: CacheGroupSpec, length: int) -> int:
        """Columns of the group's block table for that many tokens."""
        if group.kind == "state":
            return 0
        columns = -(-length // group.block_size)
        return _rung(self._widths, columns, "columns") if self._widths else columns

    def largest(self) -> tuple[Bucket, ...]:
        """A bucket of each kind that no other of its kind exceeds in any dimension."""
        tokens, rows, length = self._max_tokens, self._max_requests, self._max_model_len
        return (
            self.choose("decode", self._max_decode, self._max_decode, 1, length, Outputs()),
            self.choose("mixed" if self._is_mixed else "prefill", tokens, rows, tokens, length, Outputs()),
        )

    def warm_up(self) -> Iterator[Bucket]:
        """What to compile before serving, smallest first: every bucket of a static backend; of a bucketed one
        those of decode steps; of a dynamic one any, as its one program serves all.
        """
        if self._kind == "dynamic":
            yield self.choose("decode", 1, 1, 1, 1, Outputs())
            return
        yield from self._decode_buckets()
        if self._kind == "static":
            yield from self._prefill_buckets()

    def _prefill_buckets(self) -> Iterator[Bucket]:
        found: dict[Bucket, None] = {}
        tokens = self._tokens[: bisect_left(self._tokens, self._max_tokens) + 1]
        rows = self._requests[: bisect_left(self._requests, self._max_requests) + 1]
        kinds: tuple[StepKind, ...] = ("prefill", "mixed") if self._is_mixed else ("prefill",)
        for kind, count, row, length in product(kinds, tokens, rows, self._lengths):
            most = min(length, self._max_model_len)
            found[self.choose(kind, count, row, count, most, Outputs())] = None
        yield from found

    def _decode_buckets(self) -> Iterator[Bucket]:
        # Rungs that no number of rows is rounded up to are never met.
        most = _rung(self._requests, max(self._max_decode, self._min_decode), "rows")
        for rows in self._requests:
            if self._min_decode <= rows <= most:
                for length in self._lengths:
                    yield self._bucket("decode", rows, rows, 1, min(length, self._max_model_len), Outputs())


def _ladder(given: tuple[int, ...], limit: int, cap: int | None, what: str) -> tuple[int, ...]:
    """The declared rungs, or powers of two up to the limit and `cap`, so that no step is padded beyond it."""
    if given:
        if given[-1] < limit:
            raise ConfigError(
                f"the backend's largest {what} bucket is {given[-1]}, but {limit} are allowed in a step; "
                f"lower the limit to {given[-1]}"
            )
        return given
    rungs = powers_of_two(limit)
    return tuple(sorted({*rungs, cap})) if cap is not None and cap < rungs[-1] else rungs


def _length_rungs(widths: tuple[int, ...], plan: CachePlan, max_model_len: int) -> tuple[int, ...]:
    """Context lengths of the buckets: whole blocks of the group whose blocks are largest."""
    sizes = [g.block_size for g in plan.groups if g.kind != "state"]
    size, smallest = max(sizes, default=max_model_len), min(sizes, default=max_model_len)
    if widths and widths[-1] * smallest < max_model_len:
        raise ConfigError(
            f"the backend's widest block table has {widths[-1]} columns of {smallest} tokens, but the "
            f"maximum model length is {max_model_len}; lower it to {widths[-1] * smallest}"
        )
    blocks = -(-max_model_len // size)
    rungs = widths or powers_of_two(blocks)
    return tuple(r * size for r in rungs[: bisect_left(rungs, blocks) + 1])


def _rung(ladder: tuple[int, ...], value: int, what: str) -> int:
    at = bisect_left(ladder, value)
    if at == len(ladder):
        raise ConfigError(f"a step of {value} {what} is larger than the largest bucket, {ladder[-1]}")
    return ladder[at]
