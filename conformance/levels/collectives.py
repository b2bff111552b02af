"""L3: collectives between processes: exact where values are integers, else within rule A, alike on all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial

import numpy as np

from conformance.bench import Array
from conformance.check import Check, Context, Failed
from conformance.opcases.base import exactly
from conformance.rank import Call, shares
from conformance.ranks import ALL, GROUPS, forget_ranks, own_ranks, ranks_of
from conformance.tolerance import gamma
from core.contract.spec import BackendSpec

SIZES = ((1, 1), (1, 3), (2, 7), (3, 31), (5, 16), (1, 127), (7, 33), (13, 128), (64, 257))
"""Tokens and columns: one element, primes, and powers of two with their neighbours."""
TIMEOUT_S = 5.0
"""Of the communicators of checks in which a rank is lost."""
Expected = Callable[[Sequence[Array], Mapping[str, int]], list[Array]]
"""Members' arrays [T, C], in rank order, to each member's result [T, V]."""


def _all_reduce(x: Sequence[Array], options: Mapping[str, int]) -> list[Array]:
    return [np.sum(x, axis=0)] * len(x)


def _all_gather(x: Sequence[Array], options: Mapping[str, int]) -> list[Array]:
    whole = np.concatenate(x, 1) if options["dim"] else x[options["keep"]]
    return [whole] * len(x)


def _reduce_scatter(x: Sequence[Array], options: Mapping[str, int]) -> list[Array]:
    whole = np.sum(x, axis=0)
    if options["dim"] == 0:
        return [part.reshape(len(whole), -1) for part in whole.reshape(len(x), -1)]
    return np.split(whole, len(x), 1)


def _all_to_all(x: Sequence[Array], options: Mapping[str, int]) -> list[Array]:
    size = len(x)
    counts = shares(len(x[0]), size, options["uneven"])
    found = []
    for rank in range(size):
        parts = []
        for source in range(size):
            sent = [counts[(to - source) % size] for to in range(size)]
            first = sum(sent[:rank])
            parts.append(x[source][first : first + sent[rank]])
        found.append(np.concatenate(parts))
    return found


def _broadcast(x: Sequence[Array], options: Mapping[str, int]) -> list[Array]:
    return [x[options["source"]]] * len(x)


def _ring(x: Sequence[Array], options: Mapping[str, int]) -> list[Array]:
    return [x[rank - 1] for rank in range(len(x))]


def _nothing(x: Sequence[Array], options: Mapping[str, int]) -> list[Array]:
    return [np.sum(x, axis=0)] * len(x)


EXPECTED: Mapping[str, tuple[Expected, tuple[str, ...]]] = {
    "all_reduce": (_all_reduce, ("all_reduce",)),
    "all_gather": (_all_gather, ("all_gather",)),
    "reduce_scatter": (_reduce_scatter, ("reduce_scatter",)),
    "all_to_all": (_all_to_all, ("all_to_all",)),
    "broadcast": (_broadcast, ("broadcast",)),
    "ring": (_ring, ("send", "receive")),
    "nothing": (_nothing, ("all_reduce", "broadcast", "all_gather")),
}
"""What each collective gives, and which methods it needs."""
VARIANTS: Mapping[str, tuple[Mapping[str, int], ...]] = {
    "all_gather": ({"dim": 1}, {"dim": 0, "keep": 0}, {"dim": 0, "keep": 1}),
    "reduce_scatter": ({"dim": 1}, {"dim": 0}),
    "all_to_all": ({"uneven": 0}, {"uneven": 1}),
    "broadcast": ({"source": 0}, {"source": 1}),
}


def integers(tokens: int, columns: int, rank: int, size: int) -> Array:
    """Values that name rank, row and column; their sums over ranks are below 128, which every dtype holds."""
    at = np.arange(tokens * columns).reshape(tokens, columns)
    return (at * 7 + rank * 11 + at // columns) % (128 // size)


def _calls(
    name: str, x: Sequence[Array], members: Sequence[int], group: str, options: Mapping[str, int], size: int
) -> list[Call | None]:
    calls: list[Call | None] = [None] * size
    for rank, process in enumerate(members):
        calls[process] = Call(name, tuple(map(tuple, x[rank].tolist())), group, dict(options))
    return calls


def _padded(x: Array, rows: int) -> Array:
    """Padding tokens have id 0: they are further rows like the first."""
    return np.concatenate([x, np.repeat(x[:1], rows - len(x), 0)])


def _round(
    context: Context,
    name: str,
    x: Sequence[Array],
    group: str = ALL,
    size: int = 0,
    options: Mapping[str, int] | None = None,
) -> tuple[list[Array], list[Array]]:
    """Results of the members, in rank order, and the exact ones."""
    size = size or len(x)
    members = tuple(range(size)) if group == ALL else GROUPS[size][group]
    given = options or {}
    try:
        answers = ranks_of(context, size).run(_calls(name, x, members, group, given, size))
    except Failed:
        forget_ranks(context, size)
        raise
    by_process = dict(zip(sorted(members), answers, strict=True))
    found = [by_process[process] for process in members]
    rows = {count for _, count in found}
    context.require(len(rows) == 1, f"members' steps have {sorted(rows)} rows; the same is wanted")
    wanted = EXPECTED[name][0]([_padded(part, max(rows)) for part in x], given)
    return [result for result, _ in found], [part[: len(x[0])] for part in wanted]


def exact(context: Context, name: str, size: int) -> None:
    """Integers in every shape, one collective after the other on one communicator."""
    factor = size if name == "reduce_scatter" else 1
    for options in VARIANTS.get(name, ({},)):
        for tokens, columns in ((t, c * factor) for t, c in SIZES):
            x = [integers(tokens, columns, rank, size).astype(np.float64) for rank in range(size)]
            found, wanted = _round(context, name, x, options=options)
            for rank, (one, right) in enumerate(zip(found, wanted, strict=True)):
                what = f"{name} {dict(options)} of [{tokens}, {columns}] on rank {rank} of {size}"
                context.equal(one, right, what)


def rounded(context: Context, name: str, size: int) -> None:
    """Sums of random numbers are within rule A, and have the same bits on every rank."""
    rng = context.rng()
    tokens, columns = 4 * size, 32 * size
    x = [exactly(rng.normal(size=(tokens, columns))) for _ in range(size)]
    options = {"dim": 1} if name == "reduce_scatter" else {}
    found, wanted = _round(context, name, x, options=options)
    precision = context.precision
    for rank, (one, right) in enumerate(zip(found, wanted, strict=True)):
        sums = _reduce_scatter([np.abs(part) for part in x], {"dim": 1})[rank]
        magnitude = sums if name == "reduce_scatter" else np.sum(np.abs(x), axis=0)
        u_sum = max(precision.u_acc, 2.0**-24)
        bound = gamma(size, u_sum) * magnitude + precision.u_out * np.abs(right) + precision.tiny
        context.within(one, right, bound, f"{name} on rank {rank}")
    if name == "all_reduce":
        for rank, one in enumerate(found):
            context.equal(one, found[0], f"all_reduce on rank {rank}, beside rank 0")
        again, _ = _round(context, name, x)
        context.equal(again[0], found[0], "all_reduce, once more")


def groups(context: Context, group: str) -> None:
    """Groups that overlap or have another order keep apart."""
    members = GROUPS[3][group]
    size = len(members)
    for name in ("all_reduce", "all_gather", "broadcast"):
        options = VARIANTS.get(name, ({},))[0]
        x = [integers(3, 5, rank, size).astype(np.float64) for rank in range(size)]
        found, wanted = _round(context, name, x, group, 3, options)
        for rank, (one, right) in enumerate(zip(found, wanted, strict=True)):
            context.equal(one, right, f"{name} in group {group} on rank {rank}")


def late(context: Context) -> None:
    """A rank that comes late changes nothing."""
    x = [integers(3, 5, rank, 2).astype(np.float64) for rank in range(2)]
    calls = _calls("all_reduce", x, (0, 1), ALL, {}, 2)
    first, second = calls
    assert first is not None and second is not None
    slow = Call(second.name, second.x, late_s=1.0)
    for result, _ in ranks_of(context, 2).run([first, slow]):
        context.equal(result, x[0] + x[1], "all_reduce with a late rank")


def barrier(context: Context) -> None:
    """Nobody leaves a barrier before the last one came."""
    begin = time.time()
    calls = [Call("barrier", ()), Call("barrier", (), late_s=0.8)]
    for rank, answer in enumerate(ranks_of(context, 2).ask(calls)):
        context.require("error" not in answer, f"rank {rank}: {answer.get('error')}")
        waited = answer["at"] - begin
        context.require(waited >= 0.8, f"rank {rank} left the barrier after {waited:.2f} s; 0.8 are wanted")


def lost(context: Context) -> None:
    """When a rank ends, the others get a DeviceError in time."""
    with own_ranks(context, 2, TIMEOUT_S) as ranks:
        x = integers(3, 5, 0, 2)
        call = _calls("all_reduce", [x, x], (0, 1), ALL, {}, 2)[0]
        assert call is not None
        begin = time.monotonic()
        ranks.ask([call, call])
        end = Call("all_reduce", call.x, is_last=True)
        with suppress(Failed):  # it has ended, as it was told
            ranks.ask([None, end])
        answer = ranks.ask([call], TIMEOUT_S + 15)[0]
        context.record("seconds", time.monotonic() - begin)
        context.require("error" in answer, "all_reduce without rank 1 gives a result on rank 0")
        context.require(
            answer["kind"] == "DeviceError",
            f"all_reduce without rank 1 raises {answer['kind']} ({answer['error']}); DeviceError is wanted",
        )


def absent(context: Context) -> None:
    """A member that never comes ends the meeting in time, with a DeviceError."""
    from conformance.rank import Rank, RankSetup
    from conformance.ranks import _free_port
    from core.contract.errors import DeviceError

    place = f"tcp://127.0.0.1:{_free_port()}"
    setup = RankSetup(context.subject.target, 0, (("all", place, (0, 1)),), 2.0)
    begin = time.monotonic()
    context.refused(lambda: Rank(setup), "joining a group whose other member is absent", DeviceError)
    took = time.monotonic() - begin
    context.require(took < 20, f"it took {took:.0f} s with a limit of 2 s")


def checks(spec: BackendSpec) -> Iterator[Check]:
    """See `conformance.catalogue`."""

    def check(
        name: str, run: Callable[[Context], None], about: str, methods: Sequence[str], size: int
    ) -> Check:
        return Check(
            id=f"L3/{name}",
            run=run,
            about=about,
            needs=tuple(f"collectives:{method}" for method in methods),
            supported=lambda s: s.max_world_size >= size,
            profile="multi-device",
            timeout_s=120.0,
        )

    for size in (2, 3):
        for name, (_, methods) in EXPECTED.items():
            about = (
                f"{name} of integers that name rank, row and column is exact over {size} ranks in every shape"
            )
            yield check(f"{name}/exact-{size}", partial(exact, name=name, size=size), about, methods, size)
        for name in ("all_reduce", "reduce_scatter"):
            about = f"{name} of random numbers over {size} ranks is within rule A"
            yield check(
                f"{name}/rounded-{size}", partial(rounded, name=name, size=size), about, (name,), size
            )
    for group in GROUPS[3]:
        methods = ("all_reduce", "all_gather", "broadcast")
        about = "groups that overlap, or order their members otherwise, keep apart"
        yield check(f"groups/{group}", partial(groups, group=group), about, methods, 3)
    yield check("failure/late", late, "a rank that comes a second late changes nothing", ("all_reduce",), 2)
    yield check("barrier/waits", barrier, "nobody leaves a barrier before the last one came", ("barrier",), 2)
    about = "when a rank ends, the others get a DeviceError within their limit"
    yield check("failure/lost", lost, about, ("all_reduce",), 2)
    about = "a member that never comes ends the meeting with a DeviceError, within its limit"
    yield check("failure/absent", absent, about, ("all_reduce",), 2)
