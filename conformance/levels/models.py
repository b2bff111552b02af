"""L4: tiny models of every family, teacher-forced, against the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

import numpy as np

from conformance.bench import Array
from conformance.check import Check, Context, Failed
from conformance.families import FAMILIES, VOCAB
from conformance.levels.kernels import oracle
from conformance.models import model_logits
from core.contract.spec import BackendSpec

LENGTH = 75
ROOM = 3.0
"""How many times the error of the same-precision emulation a backend's error may be."""
FLOOR = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}
"""Part of the largest logit that is allowed besides: what another order of summation may move."""


@cache
def reference(family: str, seed: int, dtype: str) -> Array:
    """Logits of the oracle in a precision: [T + SHORT, V]."""
    ids = np.random.default_rng(seed).integers(0, VOCAB, LENGTH)
    return model_logits(oracle(), family, ids, dtype, seed, exact=dtype == "float64")


def logits(context: Context, family: str) -> None:
    """At every position within the emulation's error, and the same greedy token where it is decided."""
    seed = context.seed % 2**31
    ids = np.random.default_rng(seed).integers(0, VOCAB, LENGTH)
    wanted = reference(family, seed, "float64")
    emulated = np.abs(reference(family, seed, context.dtype) - wanted).max()
    bound = ROOM * emulated + FLOOR[context.dtype] * np.abs(wanted).max()
    found = model_logits(context.subject, family, ids, context.dtype, seed)
    context.record("emulation_error", float(emulated))
    context.within(found, wanted, np.full(wanted.shape, bound), f"logits of {family}", "B")
    top = np.sort(wanted, -1)[:, -2:]
    decided = top[:, 1] - top[:, 0] > 2 * bound
    context.record("decided", float(decided.mean()))
    if decided.mean() < 0.9:
        raise Failed(f"only {decided.mean():.0%} of greedy tokens are decided; this is a fault of the suite")
    wrong = np.flatnonzero(decided & (found.argmax(-1) != wanted.argmax(-1)))
    if len(wrong):
        raise Failed(f"the greedy token after position {wrong[0]} of {family} is another one")


def checks(spec: BackendSpec) -> Iterator[Check]:
    """See `conformance.catalogue`."""
    for family, (_, _, profile, needs) in FAMILIES.items():
        yield Check(
            f"L4/models/{family}",
            partial(logits, family=family),
            f"logits of a tiny {family}, in chunks, mixed steps and single tokens, at every position",
            needs,
            profile=profile,
        )
