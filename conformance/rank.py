"""One rank of a group in a process of its own: `python -m conformance.rank`.

The first line of standard input is a `RankSetup`; the answer says that the groups were joined. Each later
line is a `Call` with this rank's data, answered by its result. Lines are JSON; what is printed goes to
standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from conformance.bench import Array, Bench
from conformance.opcases.base import activations, set_run, table
from conformance.subject import Subject, Target
from conformance.world import World
from core.contract.errors import CoreError
from core.contract.interfaces import Communicator
from core.contract.requests import CommunicatorRequest, ProbeRequest
from core.contract.types import Unavailable


@dataclass(frozen=True)
class RankSetup:
    """What a rank is told first.

    Attributes:
        groups: name, rendezvous and members of each group, members being processes in the order of their
            ranks; a process that is no member does not join. process: which this one is.
    """

    target: Target
    process: int
    groups: tuple[tuple[str, str, tuple[int, ...]], ...]
    timeout_s: float = 60.0

    @classmethod
    def of(cls, text: str) -> RankSetup:
        """From JSON."""
        found = json.loads(text)
        groups = tuple((name, place, tuple(members)) for name, place, members in found["groups"])
        return cls(Target(**found["target"]), found["process"], groups, found["timeout_s"])

    def text(self) -> str:
        """As JSON, on one line."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Call:
    """A collective on this rank's activations.

    Attributes:
        x: [T, C], values that the dtype holds exactly. name: of `COLLECTIVES`. group: which one.
        options: of the collective. late_s: how long this rank waits before it. is_last: it ends the process
            in place of the collective.
    """

    name: str
    x: tuple[tuple[float, ...], ...]
    group: str = "all"
    options: Mapping[str, int] = field(default_factory=dict)
    late_s: float = 0.0
    is_last: bool = False


Collective = Callable[[Communicator, Any, Mapping[str, int]], Any]


def all_reduce(c: Communicator, x: Any, options: Mapping[str, int]) -> Any:
    return c.all_reduce(x)


def all_gather(c: Communicator, x: Any, options: Mapping[str, int]) -> Any:
    """Along dimension 0 only one member's rows are kept, so that the result has a row per token."""
    found = c.all_gather(x, options["dim"])
    at = options.get("keep", 0) * x.shape[0]
    return found if options["dim"] else found[at : at + x.shape[0]]


def reduce_scatter(c: Communicator, x: Any, options: Mapping[str, int]) -> Any:
    """Along dimension 0 of the elements in as many rows as there are members."""
    if options["dim"]:
        return c.reduce_scatter(x, options["dim"])
    return c.reduce_scatter(x.reshape(c.world_size, -1), 0).reshape(x.shape[0], -1)


def all_to_all(c: Communicator, x: Any, options: Mapping[str, int]) -> Any:
    """Member r gives `shares(T, N)[i]` rows to member (r + i) % N."""
    size, rank = c.world_size, c.rank
    counts = shares(x.shape[0], size, options["uneven"])
    send = [counts[(to - rank) % size] for to in range(size)]
    receive = [counts[(rank - source) % size] for source in range(size)]
    return c.all_to_all(x, send, receive)


def shares(rows: int, members: int, is_uneven: int) -> list[int]:
    """Rows to each member, counted from oneself: about equal, or everything to the next one."""
    if is_uneven:
        return [0, rows, *[0] * (members - 2)]
    return [rows // members + (i < rows % members) for i in range(members)]


def broadcast(c: Communicator, x: Any, options: Mapping[str, int]) -> Any:
    return c.broadcast(x, options["source"])


def ring(c: Communicator, x: Any, options: Mapping[str, int]) -> Any:
    """What the member before this one has: even ranks send first, a last even one after all others."""
    before, after = (c.rank - 1) % c.world_size, (c.rank + 1) % c.world_size
    if c.rank % 2 == 0:
        c.send(x, after)
        return c.receive(x, before)
    found = c.receive(x, before)
    c.send(x, after)
    return found


def nothing(c: Communicator, x: Any, options: Mapping[str, int]) -> Any:
    """Collectives of no element between two that have some."""
    c.all_reduce(x)
    c.all_reduce(x[:0])
    c.broadcast(x[:0], 0)
    c.all_gather(x[:, :0], 1)
    return c.all_reduce(x)


COLLECTIVES: Mapping[str, Collective] = {
    f.__name__: f for f in (all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, ring, nothing)
}


class Rank:
    """This process's device and groups."""

    def __init__(self, setup: RankSetup) -> None:
        set_run(0, setup.target.dtype)
        # As an engine places its ranks: on devices that follow each other, or all on the only one.
        first = Subject.of(setup.target)
        found = first.handle.probe(ProbeRequest())
        count = 1 if isinstance(found, Unavailable) else len(found)
        own = replace(setup.target, index=(setup.target.index + setup.process) % count)
        self._subject = Subject(own, first.handle)
        self._dtype = setup.target.dtype
        self._groups = {}
        for name, place, members in setup.groups:
            if setup.process in members:
                self._groups[name] = self._subject.handle.communicator(
                    CommunicatorRequest(
                        device=self._subject.device,
                        group=name,
                        rank=members.index(setup.process),
                        world_size=len(members),
                        rendezvous=place,
                        timeout_s=setup.timeout_s,
                    )
                )

    def run(self, call: Call) -> dict[str, Any]:
        """The collective's result [T, V] inside a step, as a model's are; the rows that the step had."""
        group = self._groups[call.group]
        time.sleep(call.late_s)
        if call.is_last:
            os._exit(0)
        if call.name == "barrier":
            group.barrier()
            return {"at": time.time()}
        x = np.array(call.x)
        inputs, columns = table(x)
        rows = 0

        def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
            nonlocal rows
            (mine,) = activations(ops, w, step, columns)
            rows = int(mine.shape[0])
            return COLLECTIVES[call.name](group, mine, call.options), caches

        world = World((len(x),)).fitted(self._subject.spec)
        found: Array = Bench(self._subject, self._dtype, world, {"x": inputs}, fn).run(world.whole())
        return {"result": found.tolist(), "rows": rows}

    def close(self) -> None:
        """Leave every group."""
        for group in self._groups.values():
            group.close()


def main() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    rank: Rank | None = None
    for line in sys.stdin:
        try:
            if rank is None:
                rank = Rank(RankSetup.of(line))
                found: dict[str, Any] = {"joined": True}
            else:
                found = rank.run(Call(**json.loads(line)))
        except CoreError as error:
            found = {"error": str(error), "kind": type(error).__name__}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}", "kind": "unexpected"}
        answers.write(json.dumps(found) + "\n")
        answers.flush()
    if rank is not None:
        rank.close()


if __name__ == "__main__":
    main()
