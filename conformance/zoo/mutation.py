"""Runs the mutants: each in a child of this process, which has everything imported, under a watchdog."""

from __future__ import annotations

import json
import os
import re
import resource
import selectors
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from conformance.catalogue import catalogue, lacking
from conformance.check import Check
from conformance.status import Status
from conformance.subject import Subject, Target
from conformance.worker import run_check
from conformance.zoo.clone import BASE, load
from conformance.zoo.mutants import FAMILIES, Mutant, equivalents, mutants, texts
from core.contract.errors import ConfigError
from core.plugins import Plugins

KILLED, SURVIVED, EQUIVALENT = "killed", "survived", "equivalent"
AIM = 0.95
"""Of the mutants that are not equivalent, so many must be killed."""
_HANG = 20.0
"""A check hangs that takes so many times as long as it takes on the clean clone, and `_HANG_S` more."""
_HANG_S = 6.0
_MEMORY_BYTES = 6 << 30
"""Address space of a child: a mutant may ask for any amount."""
_SLOW = "no end in"
_NAME = "conformance_zoo_mutant"


@dataclass(frozen=True)
class Fate:
    """What became of a mutant. `by`: the check that found it, or "loading"; "" = none did."""

    module: str
    function: str
    line: int
    before: str
    after: str
    status: str
    by: str
    message: str
    seconds: float

    @property
    def key(self) -> tuple[str, str, str, str]:
        """As `Mutant.key`."""
        return self.module, self.function, self.before, self.after


@dataclass
class Battery:
    """The checks of one module, and what is known of them.

    Attributes:
        seconds: each took on the clean clone. kills: of each so far.
    """

    checks: list[Check]
    seconds: dict[str, float]
    kills: Counter[str] = field(default_factory=Counter)

    def order(self) -> list[Check]:
        """Those that killed most first, for what they cost."""
        return sorted(self.checks, key=lambda c: -(self.kills[c.id] + 1) / (self.seconds[c.id] + 0.01))

    def limit_s(self, check_id: str) -> float:
        """Time in which a check must have ended."""
        return _HANG * self.seconds[check_id] + _HANG_S


def battery(module: str, seed: int) -> Battery:
    """The checks of a module, tried on the clone without a change.

    Raises:
        ConfigError: one of them fails there.
    """
    target = Target(BASE, "float32")
    subject = _subject(target, texts(), "conformance_zoo_unchanged")
    found = Battery([], {})
    for check in catalogue(subject.spec, target, seed):
        if not re.search(FAMILIES[module], check.id) or not check.is_quick:
            continue
        if lacking(check, subject.spec) or not check.supported(subject.spec):
            continue
        result = run_check(check, subject, seed)
        if not Status(result.status).is_good:
            raise ConfigError(f"{check.id} fails without a mutant: {result.message}")
        found.checks.append(check)
        found.seconds[check.id] = result.duration_s
    return found


def _subject(target: Target, whole: dict[str, str], name: str) -> Subject:
    return Subject(target, Plugins(disabled=frozenset()).register_backend(load(whole, name), BASE))


def try_mutant(mutant: Mutant, checks: Battery, seed: int) -> Fate:
    """Run the checks in a child until one finds the mutant."""
    start = time.monotonic()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        _child(mutant, checks.order(), seed, write)
    os.close(write)
    try:
        status, by, message = _watch(read, checks)
    finally:
        os.close(read)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if by in checks.seconds:
        checks.kills[by] += 1
    seconds = time.monotonic() - start
    return Fate(*_place(mutant), status=status, by=by, message=message[:300], seconds=round(seconds, 3))


def _place(mutant: Mutant) -> tuple[str, str, int, str, str]:
    return mutant.module, mutant.function, mutant.line, mutant.before, mutant.after


def _child(mutant: Mutant, checks: Sequence[Check], seed: int, pipe: int) -> None:
    """Tell the name of each check before it runs, and what one found. Does not return."""

    def tell(*words: str) -> None:
        os.write(pipe, json.dumps(words).encode() + b"\n")

    try:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
        tell("run", "loading")
        target = Target(BASE, "float32")
        try:
            subject = _subject(target, {**texts(), mutant.module: mutant.text}, _NAME)
        except Exception as error:
            tell("found", "loading", f"{type(error).__name__}: {error}")
            return
        for check in checks:
            tell("run", check.id)
            result = run_check(check, subject, seed)
            if not Status(result.status).is_good:
                tell("found", check.id, result.message[:300])
                return
        tell("passed")
    finally:
        os._exit(0)


def _watch(pipe: int, checks: Battery) -> tuple[str, str, str]:
    """Status, check and message of what a child tells."""
    running, rest = "loading", b""
    limit = 30.0
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if not selector.select(limit):
                return KILLED, running, f"{_SLOW} {limit:.1f} s"
            piece = os.read(pipe, 1 << 16)
            if not piece:
                return KILLED, running, "the process ended"
            rest += piece
            *lines, rest = rest.split(b"\n")
            for line in lines:
                word, *words = json.loads(line)
                if word == "found":
                    return KILLED, words[0], words[1]
                if word == "passed":
                    return SURVIVED, "", ""
                running = words[0]
                limit = 30.0 if running == "loading" else checks.limit_s(running)


def run_mutants(
    modules: Sequence[str],
    seed: int = 0,
    shard: tuple[int, int] = (1, 1),
    limit: int | None = None,
    known: Sequence[Fate] = (),
    keep: Callable[[Sequence[Fate]], None] = lambda fates: None,
) -> list[Fate]:
    """Fates of a shard's mutants, and of all that are `known`; survivors are shown.

    Args:
        limit: of mutants that are run. keep: is given what is found so far, now and then.
    """
    whole = mutants(modules)
    excused = {one.key for one in equivalents()}
    own = {mutant.key for mutant in whole}
    done = {fate.key: fate for fate in known if fate.key in own}
    # Neighbours go to different shards, which then take about equally long.
    work = [m for i, m in enumerate(whole) if i % shard[1] == shard[0] - 1 and m.key not in done]
    batteries: dict[str, Battery] = {}
    for count, mutant in enumerate(work[:limit]):
        if mutant.module not in batteries:
            batteries[mutant.module] = battery(mutant.module, seed)
        fate = try_mutant(mutant, batteries[mutant.module], seed)
        done[fate.key] = fate
        if fate.status == SURVIVED and fate.key not in excused:
            print(
                f"survived  {fate.module}.py, line {fate.line}: {fate.before}  ->  {fate.after}", flush=True
            )
        if count % 20 == 19:
            print(f"{count + 1} of {len(work[:limit])}", file=sys.stderr, flush=True)
            keep(list(done.values()))
    return judged([done[m.key] for m in whole if m.key in done])


def judged(fates: Sequence[Fate]) -> list[Fate]:
    """With survivors that are listed as equivalent called so; those, too, that are only slow."""
    listed = {one.key for one in equivalents()}
    found = []
    for fate in fates:
        if fate.key in listed and (fate.status != KILLED or fate.message.startswith(_SLOW)):
            found.append(replace(fate, status=EQUIVALENT))
        else:
            found.append(replace(fate, status=SURVIVED) if fate.status == EQUIVALENT else fate)
    return found


def stale(fates: Sequence[Fate], modules: Sequence[str]) -> list[str]:
    """What is wrong with the list of equivalents: entries of no mutant, and of mutants that were killed."""
    known = {mutant.key for mutant in mutants(modules)}
    killed = {fate.key: fate.by for fate in fates if fate.status == KILLED}
    found = []
    for one in equivalents():
        if one.module not in modules:
            continue
        what = f"{one.module}.py, {one.function or 'constants'}: {one.before}  ->  {one.after}"
        if one.key not in known:
            found.append(f"there is no such mutant: {what}")
        elif one.key in killed:
            found.append(f"{killed[one.key]} finds it: {what}")
    return found


def counts(fates: Sequence[Fate]) -> dict[str, int]:
    """How many mutants came to each end."""
    return {status: sum(f.status == status for f in fates) for status in (KILLED, SURVIVED, EQUIVALENT)}


def score(fates: Sequence[Fate]) -> float:
    """The part of the mutants that are not equivalent which were killed."""
    counted = [fate for fate in fates if fate.status != EQUIVALENT]
    return sum(fate.status == KILLED for fate in counted) / max(1, len(counted))
