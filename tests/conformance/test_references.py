"""The references that all else is judged by: three texts of every op agree, and tiny cases agree with 50
digits.
"""

from __future__ import annotations

from collections.abc import Iterator

import mpmath
import numpy as np
import pytest
import torch

from conformance import dense
from conformance.bench import Bench
from conformance.dense import Bounded
from conformance.emulation import EmulatedOps
from conformance.levels.kernels import expected, oracle, widened
from conformance.opcases import cached, fused, plain
from conformance.opcases.base import Case, exactly, rotary, set_run
from conformance.opcases.cached import attention_spec
from conformance.tolerance import Precision, worst
from core.contract.batch import Step
from core.contract.ops import OPS
from core.contract.opspecs import LatentSpec, QScale, RouteSpec, ScanSpec
from tests.conformance.torch_reference import TorchOps

AGREE = 1e-12
F64 = Precision(out="float64", accumulator="float64")
CASES = {case.name: case for case in (*plain.cases(), *cached.cases(), *fused.cases())}


@pytest.fixture(autouse=True)
def plain_run() -> Iterator[None]:
    yield
    set_run(0, "float32")


def in_torch(case: Case) -> np.ndarray:
    """A case's result by the torch reference, all sequences in one step."""
    world = case.world
    (rows,) = world.whole()
    batch = world.batch(rows, oracle().spec.batch)
    step = Step.of(batch.layout, world.plan, batch.flat, np.zeros(world.plan.max_requests + 1, np.int32))
    weights = {name: torch.tensor(x.array, dtype=torch.float64) for name, x in case.inputs.items()}
    out, _ = case.fn(TorchOps(), weights, tuple([] for _ in world.layers), step)
    found = np.asarray(out, np.float64)
    return found[: world.num_tokens]


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference, in parts of the largest value."""
    assert one.shape == other.shape and np.isfinite(one).all()
    return float(np.abs(one - other).max() / max(float(np.abs(other).max()), 1e-300))


@pytest.mark.parametrize("name", CASES)
def test_numpy_and_torch_agree(name: str) -> None:
    case = CASES[name]
    ours = expected(case, case.world, "whole")
    assert apart(ours, in_torch(case)) <= AGREE
    assert apart(ours, case.exact(F64).value) <= AGREE


def test_every_op_has_a_case_in_both() -> None:
    assert {case.op for case in CASES.values()} == set(OPS)


def emulated(case: Case, schedule: str, p: Precision, expand: bool = False) -> np.ndarray:
    """A case's result in a precision."""
    bench = Bench(
        oracle(),
        "float64",
        widened(case.world),
        case.inputs,
        case.fn,
        exact=True,
        table=lambda ops: EmulatedOps(ops, p, expand=expand),
    )
    return bench.run(getattr(case.world, schedule)())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_the_emulation_is_within_rule_a(name: str, dtype: str) -> None:
    """Where the emulation rounds, the bound counts it."""
    set_run(2, dtype)
    by_name = {c.name: c for c in (*plain.cases(), *cached.cases(), *fused.cases()) if c.op == CASES[name].op}
    case, p = by_name[name], Precision(out=dtype, probability=dtype)
    for expand in (False, True) if "latent" in case.op else (False,):
        for schedule in case.schedules:
            found = emulated(case, schedule, p, expand)
            assert worst(found, expected(case, case.world, schedule), case.exact(p).error) <= 1


@pytest.mark.parametrize("name", CASES)
def test_an_emulation_in_float64_is_the_reference(name: str) -> None:
    case = CASES[name]
    for expand in (False, True) if "latent" in case.op else (False,):
        found = emulated(case, case.schedules[-1], F64, expand)
        assert apart(found, expected(case, case.world, case.schedules[-1])) <= AGREE


@pytest.mark.parametrize("name", ["attend-grouped-out", "attend_latent-out", "linear-plain", "state_scan"])
def test_the_emulation_rounds_what_is_declared_to_be_rounded(name: str) -> None:
    case = CASES[name]
    exact = expected(case, case.world, "whole")

    def error(out: str, weights: str) -> float:
        found = emulated(case, "whole", Precision(out=out, probability=weights))
        return float(np.sqrt(((found - exact) ** 2).mean()))

    assert error("bfloat16", "bfloat16") > 1000 * error("float32", "float32") > 0
    if "attend" in name:
        assert error("float32", "bfloat16") > 1000 * error("float32", "float32")


# 50 digits


def vector(x: np.ndarray) -> list[mpmath.mpf]:
    return [mpmath.mpf(float(v)) for v in x]


def dot(a: list[mpmath.mpf], b: list[mpmath.mpf]) -> mpmath.mpf:
    return mpmath.fdot(a, b)


def close(found: np.ndarray, wanted: list[mpmath.mpf], part: float = 4e-15, least: float = 0.0) -> None:
    """Every element within a few roundings of float64, in parts of the largest, or of `least`."""
    size = max(least, *(abs(w) for w in wanted))
    assert len(found) == len(wanted)
    for f, w in zip(found, wanted, strict=True):
        assert abs(mpmath.mpf(float(f)) - w) <= part * size, (f, w)


@pytest.fixture(autouse=True)
def fifty_digits() -> Iterator[None]:
    with mpmath.workdps(50):
        yield


RNG = np.random.default_rng(12)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "sigmoid"])
def test_activations_to_fifty_digits(activation: str) -> None:
    far = [] if activation == "gelu_tanh" else [-30.0, 300.0]
    x = np.concatenate([RNG.normal(size=20) * 3, [-9.0, -1e-8, 0.0, 1e-8, 9.0], far])

    def exact(v: mpmath.mpf) -> mpmath.mpf:
        if activation == "gelu":
            return v * mpmath.erfc(-v / mpmath.sqrt(2)) / 2
        if activation == "gelu_tanh":
            inner = mpmath.sqrt(2 / mpmath.pi) * (v + mpmath.mpf(0.044715) * v**3)
            return v * (1 + mpmath.tanh(inner)) / 2
        return (1 if activation == "sigmoid" else v) / (1 + mpmath.exp(-v))

    found = dense.activate(Bounded(x), activation, F64).value  # type: ignore[arg-type]
    for f, v in zip(found, vector(x), strict=True):
        # The argument of the exponential is rounded, and its size times that is the result's error.
        size = 1 + v * v / 2 + (abs(v) ** 3 / 9 if activation == "gelu_tanh" else 0)
        assert abs(mpmath.mpf(float(f)) - exact(v)) <= 2e-15 * size * abs(exact(v)) + 1e-300, v


def test_products_and_norms_to_fifty_digits() -> None:
    x, w, n, b = RNG.normal(size=9), RNG.normal(size=(4, 9)), RNG.normal(size=9), RNG.normal(size=4)
    mx = vector(x)
    found = dense.linear(Bounded(x[None]), w, F64, b).value[0]
    close(found, [dot(mx, vector(row)) + mpmath.mpf(float(c)) for row, c in zip(w, b, strict=True)])
    root = mpmath.sqrt(dot(mx, mx) / 9 + mpmath.mpf(1e-5))
    found = dense.norm(Bounded(x[None]), n, 1e-5, F64).value[0]
    close(found, [v * c / root for v, c in zip(mx, vector(n), strict=True)])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_to_fifty_digits(interleaved: bool) -> None:
    x, table, position = RNG.normal(size=(1, 1, 6)), rotary(8, 4), 5
    found = dense.rope(Bounded(x), np.array([position]), 4, interleaved, table, F64).value[0, 0]
    cos, sin = vector(table[position, :2]), vector(table[position, 2:])
    v, wanted = vector(x[0, 0]), vector(x[0, 0])
    for i in range(2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + 2)
        wanted[a], wanted[b] = v[a] * cos[i] - v[b] * sin[i], v[b] * cos[i] + v[a] * sin[i]
    close(found, wanted)


def attention(
    q: list[mpmath.mpf],
    keys: list[list[mpmath.mpf]],
    values: list[list[mpmath.mpf]],
    scale: mpmath.mpf,
    cap: float | None = None,
    sink: mpmath.mpf | None = None,
) -> tuple[list[mpmath.mpf], mpmath.mpf]:
    """One query over the keys that it sees."""
    scores = [scale * dot(q, k) for k in keys]
    if cap is not None:
        scores = [cap * mpmath.tanh(s / cap) for s in scores]
    e = [mpmath.exp(s) for s in scores]
    total = mpmath.fsum(e) + (mpmath.exp(sink) if sink is not None else 0)
    out = [dot(e, [v[h] for v in values]) / total for h in range(len(values[0]))]
    return out, mpmath.log(total)


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 2}, {"soft_cap": 1.5}, {"sinks": True}, {"q_scale": QScale(factor=0.4, floor=2)}],
    ids=["plain", "window", "soft-cap", "sinks", "q-scale"],
)
def test_attention_to_fifty_digits(options: dict) -> None:
    n, spec = 4, attention_spec(2, 1, 4, Hv=3, **options)
    q, k, v = RNG.normal(size=(n, 2, 4)), RNG.normal(size=(n, 1, 4)), RNG.normal(size=(n, 1, 3))
    sinks = RNG.normal(size=2) if spec.sinks else None
    out, lse = dense.attend(Bounded(q), Bounded(k), Bounded(v), spec, sinks, F64)
    for i in range(n):
        first = 0 if spec.window is None else max(0, i - spec.window + 1)
        keys, values = ([vector(row[0]) for row in x[first : i + 1]] for x in (k, v))
        grown = mpmath.mpf(1)
        if spec.q_scale is not None:
            grown += mpmath.mpf(0.4) * mpmath.log(1 + (i + 1) // 2)
        for h in range(2):
            sink = None if sinks is None else mpmath.mpf(float(sinks[h]))
            query = [grown * x for x in vector(q[i, h])]
            y, log = attention(query, keys, values, mpmath.mpf(spec.scale), spec.soft_cap, sink)
            close(out.value[i, h], y)
            close(lse.value[i, h : h + 1], [log], least=1.0)


def test_latent_attention_to_fifty_digits() -> None:
    s = LatentSpec(scale=0.3, num_heads=1, nope_size=2, rope_size=2, v_head_size=2, latent_size=3)
    n = 3
    q_nope, q_rope = RNG.normal(size=(n, 1, 2)), RNG.normal(size=(n, 1, 2))
    c, r, w_k, w_v = (RNG.normal(size=shape) for shape in ((n, 3), (n, 2), (2, 3), (2, 3)))
    given = (Bounded(x) for x in (q_nope, q_rope, c, r))
    found = dense.attend_latent(*given, w_k, w_v, s, F64)[0].value
    expand = [
        ([dot(vector(row), vector(c[j])) for row in w_k], [dot(vector(row), vector(c[j])) for row in w_v])
        for j in range(n)
    ]
    for i in range(n):
        keys = [expand[j][0] + vector(r[j]) for j in range(i + 1)]
        query = vector(q_nope[i, 0]) + vector(q_rope[i, 0])
        y, _ = attention(query, keys, [expand[j][1] for j in range(i + 1)], mpmath.mpf(0.3))
        close(found[i, 0], y, 1e-14)


def test_the_delta_rule_to_fifty_digits() -> None:
    spec = ScanSpec(kind="gated_delta", num_k_heads=1, num_v_heads=1, k_size=2, v_size=2, scale=0.7)
    n = 4
    q, k, v = (RNG.normal(size=(n, 1, 2)) for _ in range(3))
    a, b, a_log, dt = RNG.normal(size=(n, 1)), RNG.normal(size=(n, 1)), RNG.normal(size=1), RNG.normal(size=1)
    found = dense.gated_delta(q, k, v, a, b, a_log, dt, spec, F64).value
    S = [[mpmath.mpf(0)] * 2 for _ in range(2)]
    eps = mpmath.mpf(spec.l2_norm_eps or 0)
    for t in range(n):
        query, key = (
            [x / mpmath.sqrt(dot(row, row) + eps) for x in row] for row in (vector(q[t, 0]), vector(k[t, 0]))
        )
        step = mpmath.log(1 + mpmath.exp(mpmath.mpf(float(a[t, 0])) + mpmath.mpf(float(dt[0]))))
        decay = mpmath.exp(-mpmath.exp(mpmath.mpf(float(a_log[0]))) * step)
        beta = 1 / (1 + mpmath.exp(-mpmath.mpf(float(b[t, 0]))))
        S = [[decay * x for x in row] for row in S]
        seen = [dot(key, [S[0][j], S[1][j]]) for j in range(2)]
        update = [beta * (mpmath.mpf(float(v[t, 0, j])) - seen[j]) for j in range(2)]
        S = [[S[i][j] + key[i] * update[j] for j in range(2)] for i in range(2)]
        close(found[t, 0], [mpmath.mpf(0.7) * dot(query, [S[0][j], S[1][j]]) for j in range(2)], 1e-14)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_topk"])
def test_routing_weights_to_fifty_digits(scoring: str) -> None:
    logits = exactly(RNG.normal(size=(1, 5)))
    spec = RouteSpec(num_experts=5, top_k=2, scoring=scoring, scale=1.5)  # type: ignore[arg-type]
    ids, weights = plain.routed(logits, spec, None, F64)
    e = [mpmath.exp(x) for x in vector(logits[0])]
    scores = [x / (1 + x) for x in e] if scoring == "sigmoid" else e
    assert list(ids[0]) == sorted(range(5), key=lambda i: -scores[i])[:2]
    chosen = [scores[i] for i in ids[0]]
    close(weights.value[0], [mpmath.mpf(1.5) * s / mpmath.fsum(chosen) for s in chosen], 1e-14)
