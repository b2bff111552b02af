"""What rules A, B and C of the conformance suite see of small faults, by simulation.

    python tools/sensitivity.py            print the tables
    python tools/sensitivity.py --write    put them into docs/conformance/tolerance.md

Each fault is planted in the suite's bfloat16 emulation and judged as a backend would be. Of the clean
emulation the largest figure over the seeds is shown, of a faulty one the smallest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conformance import dense  # noqa: E402 - found beside this file's folder
from conformance.bench import Bench  # noqa: E402
from conformance.bias import LIMIT, Bias, allowance  # noqa: E402
from conformance.check import QUALITY  # noqa: E402
from conformance.dense import Bounded  # noqa: E402
from conformance.emulation import EmulatedOps  # noqa: E402
from conformance.levels.accuracy import Exact  # noqa: E402
from conformance.levels.kernels import oracle, widened  # noqa: E402
from conformance.opcases import bulk  # noqa: E402
from conformance.opcases.base import EPS, per_sequence, set_run  # noqa: E402
from conformance.opcases.bulk import Bulk  # noqa: E402
from conformance.opcases.cached import attention_spec  # noqa: E402
from conformance.tolerance import Precision, compared, worst  # noqa: E402

DTYPE = "bfloat16"
PRECISION = Precision(out=DTYPE, probability=DTYPE)
PAGE = ROOT / "docs" / "conformance" / "tolerance.md"
BEGIN, END = "<!-- sensitivity: begin -->", "<!-- sensitivity: end -->"


@dataclass(frozen=True)
class Figures:
    """What the rules say of one result: ratios to the bounds of A and B, standard errors beyond those of C.

    `a` is None where the bulk case has no bound of rule A.
    """

    a: float | None
    b: float
    rms: float
    z: float

    @property
    def found_by(self) -> str:
        """The rules that a backend with these figures fails."""
        found = [
            "A" if self.a is not None and self.a > 1 else "",
            "B" if self.b > QUALITY or self.rms > 1 else "",
            "C" if self.z > LIMIT else "",
        ]
        return ", ".join(filter(None, found)) or "none"


def toward_zero(x: Any) -> Any:
    """float32 cut off to bfloat16."""
    bits = np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def downward(x: Any) -> Any:
    """float32 rounded down to bfloat16."""
    cut = toward_zero(x)
    lower = np.nextafter(cut.astype(ml_dtypes.bfloat16), ml_dtypes.bfloat16(-np.inf)).astype(np.float64)
    return np.where(cut > np.asarray(x, np.float64), lower, cut)


class Scaled(EmulatedOps):
    """Products, activations and softmax scales are off by a factor."""

    factor = 1.0

    def _product(self, x: Any, w: Any, bias: Any = None) -> Any:
        return (super()._product(x, w, bias) * self.factor).astype(self._acc)

    def _glu(self, x: Any, activation: Any, limit: Any) -> Any:
        return super()._glu(x, activation, limit) * self._acc.type(self.factor)

    def _scores(self, q: Any, keys: Any) -> Any:
        return super()._scores(q, keys) * self._acc.type(self.factor)


def scaled(by: float) -> type[EmulatedOps]:
    """A table that is off by a factor."""
    return type(f"Scaled{by}", (Scaled,), {"factor": by})


class CutOff(EmulatedOps):
    """Results are cut off."""

    def _rounded(self, x: Any) -> Any:
        return toward_zero(x)


class RoundedDown(EmulatedOps):
    """Results are rounded down."""

    def _rounded(self, x: Any) -> Any:
        return downward(x)


class NoEps(EmulatedOps):
    """The norm forgets its eps."""

    def norm(self, x: Any, n: Any, eps: float) -> Any:
        return super().norm(x, n, 0.0)


class NarrowSums(EmulatedOps):
    """Products are summed in float32 over 32 of them, and from there on in bfloat16."""

    def _product(self, x: Any, w: Any, bias: Any = None) -> Any:
        total = np.zeros((*x.shape[:-1], len(w)), self._acc)
        for at in range(0, x.shape[-1], 32):
            piece = super()._product(x[..., at : at + 32], w[:, at : at + 32])
            total = (total + piece).astype(self._out).astype(self._acc)
        return total if bias is None else total + self._wide(bias)


class TanhForm(EmulatedOps):
    """gelu in its tanh form, where the exact one is asked for."""

    def _glu(self, x: Any, activation: Any, limit: Any) -> Any:
        return super()._glu(x, "gelu_tanh", limit)


class NarrowScores(EmulatedOps):
    """Scores are rounded to bfloat16 before the softmax."""

    def _scores(self, q: Any, keys: Any) -> Any:
        return super()._scores(q, keys).astype(self._out).astype(self._acc)


FAULTS: dict[tuple[str, str], type[EmulatedOps]] = {
    ("linear", "none"): EmulatedOps,
    ("linear", "factor 1.02"): scaled(1.02),
    ("linear", "factor 1.005"): scaled(1.005),
    ("linear", "factor 1.001"): scaled(1.001),
    ("linear", "factor 1.0002"): scaled(1.0002),
    ("linear", "cut off, not rounded"): CutOff,
    ("linear", "rounded down"): RoundedDown,
    ("linear", "bfloat16 sums of 32 products"): NarrowSums,
    ("norm", "none"): EmulatedOps,
    ("norm", "eps dropped, 0.1 % of the mean square"): NoEps,
    ("norm", "cut off, not rounded"): CutOff,
    ("glu-silu", "none"): EmulatedOps,
    ("glu-silu", "factor 1.001"): scaled(1.001),
    ("glu-silu", "cut off, not rounded"): CutOff,
    ("glu-gelu", "none"): EmulatedOps,
    ("glu-gelu", "tanh form"): TanhForm,
    ("attend-whole", "none"): EmulatedOps,
    ("attend-whole", "softmax scale times 1.005"): scaled(1.005),
    ("attend-whole", "softmax scale times 1.001"): scaled(1.001),
    ("attend-whole", "cut off, not rounded"): CutOff,
    ("attend-whole", "scores in bfloat16"): NarrowScores,
    ("experts", "none"): EmulatedOps,
    ("experts", "factors 1.001 thrice"): scaled(1.001),
}


class Judge:
    """A bulk case of a seed, with its exact result, bound and clean emulation."""

    def __init__(self, name: str, seed: int) -> None:
        set_run(seed, DTYPE)
        self.case = next(case for case in bulk.cases() if case.name == name)
        self.exact = Exact(self.case)(self.case.world)
        self.clean = self.emulated(EmulatedOps)

    def emulated(self, table: Callable[..., EmulatedOps]) -> Any:
        """The case's result by a table."""
        case = self.case
        bench = Bench(
            oracle(),
            "float64",
            widened(case.world),
            case.inputs,
            case.fn,
            exact=True,
            table=lambda ops: table(ops, PRECISION),
        )
        return bench.run(case.world.whole())

    def figures(self, table: type[EmulatedOps]) -> Figures:
        """What the rules say of a table."""
        found, case = self.emulated(table), self.case
        ratio = compared(found, self.exact, [self.clean], DTYPE, case.kappa)
        allowed = allowance(PRECISION, case.roundings, case.functions)
        error = bound(case)
        a = None if error is None else worst(found, self.exact, error)
        return Figures(a, ratio.largest, ratio.mean, Bias.of(found, self.exact).z(allowed))


def bound(case: Bulk) -> Any:
    """Rule A's bound, for the ops whose inputs are plain columns; None for others."""
    arrays = {name: x.array.astype(np.float64) for name, x in case.inputs.items()}
    x, p = arrays["x"], PRECISION
    if case.op == "linear":
        return dense.linear(Bounded(x), arrays["w"], p, arrays["b"]).error
    if case.op == "norm":
        return dense.norm(Bounded(x), arrays["n"], EPS, p).error
    if case.op == "glu":
        return dense.glu(Bounded(x), case.name.removeprefix("glu-"), p).error  # type: ignore[arg-type]
    if case.name == "attend-whole":
        q, k, v = (y.reshape(len(x), -1, 64) for y in np.split(x, [8 * 64, 10 * 64], 1))
        spec = attention_spec(8, 2, 64)
        parts = per_sequence(
            case.world, lambda t: dense.attend(Bounded(q[t]), Bounded(k[t]), Bounded(v[t]), spec, None, p)[0]
        )
        return parts.error
    return None


def rows(seeds: Sequence[int]) -> Iterator[tuple[str, str, Figures]]:
    """Op, fault and figures: the largest of the clean table, the smallest of a faulty one."""
    for name in dict.fromkeys(name for name, _ in FAULTS):
        judges = [Judge(name, seed) for seed in seeds]
        for (op, fault), table in FAULTS.items():
            if op != name:
                continue
            found = [judge.figures(table) for judge in judges]
            pick = max if fault == "none" else min
            total = Figures(*(pick(getattr(f, k) for f in found) for k in ("b", "b", "rms", "z")))
            known = [f.a for f in found if f.a is not None]
            yield op, fault, replace(total, a=pick(known) if known else None)


def false_alarms(count: int) -> tuple[int, float, float]:
    """Trials of rule C on correctly rounded normal numbers that share a factor per row; alarms and largest
    z. The factor 1 + u N(0, 1) / 4 stands for what the elements of a row have in common.
    """
    rng, worst_z, alarms = np.random.default_rng(0), 0.0, 0
    for _ in range(count):
        y = rng.normal(size=(208, 100))
        off = 1 + 2.0**-10 * rng.normal(size=(208, 1))
        z = Bias.of((y * off).astype(ml_dtypes.bfloat16).astype(np.float64), y).z(2.0**-16)
        worst_z, alarms = max(worst_z, z), alarms + (z > LIMIT)
    return alarms, worst_z, count


def tables(seeds: Sequence[int], trials: int) -> str:
    """Markdown."""
    lines = [
        f"bfloat16, 100,000 results and more a case, seeds {seeds[0]} to {seeds[-1]}:",
        "",
        "| case | fault | A, worst ratio | B, largest | B, RMS | C, z | found by |",
        "|---|---|---|---|---|---|---|",
    ]
    for op, fault, f in rows(seeds):
        a = "" if f.a is None else f"{f.a:.2f}"
        lines.append(f"| {op} | {fault} | {a} | {f.b:.2f} | {f.rms:.2f} | {f.z:.1f} | {f.found_by} |")
    alarms, worst_z, count = false_alarms(trials)
    lines += [
        "",
        f"False alarms of rule C in {count} simulated clean tensors: {alarms}; largest z {worst_z:.1f}.",
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run the command; gives the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/conformance/tolerance.md")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=2000)
    args = parser.parse_args(arguments)
    text = tables(range(args.seeds), args.trials)
    if not args.write:
        print(text)
        return 0
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
