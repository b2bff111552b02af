"""L6: a model on several ranks gives what it gives on one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial

from conformance.check import Check, Context, Failed
from conformance.families import FAMILIES, sized
from conformance.levels.engine import LENGTH, OUTPUT, Ask, engine_of, play, prompt, right, same
from core.contract.errors import CoreError, EngineDead
from core.contract.spec import BackendSpec
from core.sampling.params import SamplingParams

MODELS = ("llama", "gemma2", "mixtral", "qwen3_5")
"""Families of these checks: plain, with a soft cap and windows, with experts, with states."""
LOST_S = 30.0
"""Time in which the death of a rank must be told."""


def greedy(context: Context, family: str) -> None:
    """Greedy tokens in a batch, in chunks and preempted are those of one rank, and right."""
    asks = [Ask(f"r{i}", prompt(context, i, n)) for i, n in enumerate((LENGTH, 5, 17, 30))]
    with engine_of(context, family) as engine:
        one = {ask.name: play(engine, [[ask]])[ask.name] for ask in asks}
    with engine_of(context, family, tensor_parallel=2, max_batch_tokens=16) as engine:
        two = play(engine, [asks[:2], asks[2:]])
    for ask in asks:
        right(context, family, ask, two[ask.name], "on two ranks")
        same(context, family, ask, one[ask.name], two[ask.name], "on two ranks")


def seeded(context: Context, family: str) -> None:
    """Every rank draws the same token: otherwise the caches of the ranks part, and later tokens show it."""
    params = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=2 * OUTPUT, ignore_eos=True, top_k=20 * (i % 2))
        for i in range(4)
    ]
    asks = [Ask(f"r{i}", prompt(context, i, 9 + 5 * i), p) for i, p in enumerate(params)]
    with engine_of(context, family) as engine:
        one = play(engine, [asks])
    with engine_of(context, family, tensor_parallel=2) as engine:
        two = play(engine, [asks])
    equal = sum(one[ask.name] == two[ask.name] for ask in asks)
    context.record("equal", equal)
    context.require(
        equal >= 3, f"{4 - equal} of 4 seeded requests give other tokens on two ranks than on one"
    )


def undivided(context: Context) -> None:
    """Four heads cannot be cut in three: refused, with the numbers, before a rank starts."""
    begin = time.monotonic()
    sentence = context.refused(lambda: _start(context, 3), "a model of 4 heads on 3 ranks")
    context.require("3" in sentence and "4" in sentence, f"the refusal names no numbers: {sentence}")
    context.record("seconds", time.monotonic() - begin)


def too_many(context: Context) -> None:
    """More ranks than the backend declares are refused."""
    most = context.spec.max_world_size
    context.refused(lambda: _start(context, most + 1), f"{most + 1} ranks", kind=CoreError)


def _start(context: Context, ranks: int) -> None:
    with engine_of(context, "llama", tensor_parallel=ranks):
        pass


def lost(context: Context) -> None:
    """A rank that is killed ends the engine in time, which names it; no process stays."""
    with engine_of(context, "llama", tensor_parallel=2) as engine:
        processes = engine.rank_processes
        context.require(len(processes) == 2, f"two ranks run in {len(processes)} processes of their own")
        engine.add("r0", prompt(context, 0), Ask("r0", ()).params)
        engine.step()
        os.kill(processes[1], signal.SIGKILL)
        begin = time.monotonic()
        try:
            while engine.has_work:
                engine.step()
        except EngineDead as error:
            sentence = str(error)
        else:
            raise Failed("the engine goes on without rank 1")
        took = time.monotonic() - begin
        context.record("seconds", took)
        context.require("rank" in sentence, f"the engine ends with {sentence!r}, which names no rank")
        context.require(took < LOST_S, f"it took {took:.0f} s; {LOST_S:g} are allowed")
    alive = [pid for pid in processes if _is_alive(pid)]
    context.require(not alive, f"processes {alive} are left behind")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def checks(spec: BackendSpec) -> Iterator[Check]:
    """See `conformance.catalogue`."""

    def check(name: str, run: Callable[[Context], None], about: str, needs: tuple[str, ...] = ()) -> Check:
        return Check(
            id=f"L6/{name}",
            run=run,
            about=about,
            needs=("collectives:all_reduce", "collectives:all_gather", *needs),
            supported=lambda s: s.max_world_size > 1 and s.process_model == "per_device",
            profile="multi-device",
            timeout_s=180.0,
        )

    sizes = spec.attention.head_sizes
    for family in MODELS:
        needs = FAMILIES[family][3]
        about = f"{family}: greedy tokens on two ranks are those on one, and the oracle's"
        yield check(
            f"tensor-parallel/greedy-{family}",
            partial(greedy, family=sized(family, sizes)),
            about,
            needs,
        )
    about = "drawn tokens on two ranks are those on one, until a draw that is not decided"
    yield check(
        "tensor-parallel/seeded-llama",
        partial(seeded, family=sized("llama", sizes)),
        about,
    )
    about = "heads that cannot be cut equally are refused before a rank starts"
    yield check("refusals/undivided", undivided, about)
    yield check("refusals/too-many", too_many, "more ranks than are declared are refused")
    about = "the death of a rank is told in time, by its number, and no process stays"
    yield check("failure/lost", lost, about)
