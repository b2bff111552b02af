"""Check: one test of the suite; Context: what it is given, and how it says what it saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

from conformance import SUITE
from conformance.bias import LIMIT, Bias
from conformance.subject import Subject
from conformance.tolerance import KAPPA, UNIT_ROUNDOFF, Precision, compared
from core.contract.errors import CoreError, UnsupportedError
from core.contract.spec import BackendSpec

QUALITY = 1.5
"""Ratio to a bound of rule B up to which a result is a quality warning and not a failure."""


class Failed(Exception):
    """The backend does not do what the contract says: found, wanted, where."""


class Missing(Exception):
    """What a check needs, beside the backend, is not on this machine; says what, and how to get it."""


class Inherited(Exception):
    """The backend has nothing of its own here: core's composite of plain ops stands in, which are checked."""


class Context:
    """What a running check may use. Figures that it records go into the report.

    Attributes:
        subject: the backend. seed: 64-bit, of this check alone.
        metrics: figures by name. is_poor: a result was within the quality warning's range.
    """

    def __init__(self, subject: Subject, seed: int) -> None:
        self.subject = subject
        self.seed = seed
        self.metrics: dict[str, float | int | str] = {}
        self.is_poor = False

    @property
    def spec(self) -> BackendSpec:
        """What the backend declares."""
        return self.subject.spec

    @property
    def dtype(self) -> str:
        """The compute dtype under test."""
        return self.subject.target.dtype

    @property
    def precision(self) -> Precision:
        """What the backend promises in the dtype under test."""
        return precision_of(self.spec, self.dtype)

    def rng(self) -> np.random.Generator:
        """Random numbers of this check; the same on every host."""
        return np.random.Generator(np.random.Philox(key=self.seed))

    def record(self, name: str, value: float | int | str) -> None:
        """Keep a figure; of several under one name, the largest."""
        old = self.metrics.get(name)
        if isinstance(old, int | float) and isinstance(value, int | float):
            value = max(old, value)
        self.metrics[name] = value

    def require(self, held: bool, what: str) -> None:
        """Fail with `what` (found, wanted) where it does not hold."""
        if not held:
            raise Failed(what)

    def within(self, found: Any, wanted: Any, bound: Any, what: str = "result", rule: str = "A") -> None:
        """Hold every element to its bound; records the worst ratio."""
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        if found.shape != wanted.shape:
            raise Failed(f"{what} has shape {found.shape}, but {wanted.shape} is wanted")
        ratio = ratios(found, wanted, np.asarray(bound, np.float64))
        worst = float(ratio.max(initial=0.0))
        self.record(f"ratio_{rule}", worst)
        if found.size:
            with np.errstate(invalid="ignore"):
                error = np.abs(found - wanted)
            self.record("max_error", float(np.nan_to_num(error, nan=np.inf, posinf=np.inf).max()))
        if worst <= 1:
            return
        at = tuple(int(i) for i in np.argwhere(ratio > 1)[0])
        self.record("first_wrong", str(at))
        if rule == "B" and worst <= QUALITY:
            self.is_poor = True
            return
        limit = np.broadcast_to(np.asarray(bound, np.float64), wanted.shape)[at]
        raise Failed(
            f"{what} at {at} is {found[at]:.9g}, but {wanted[at]:.9g} within {limit:.3g} is wanted by rule "
            f"{rule} ({int((ratio > 1).sum())} of {ratio.size} elements are outside, the worst by "
            f"{worst:.3g} times)"
        )

    def as_good(
        self,
        found: Any,
        wanted: Any,
        emulated: Sequence[Any],
        what: str,
        kappa: float = KAPPA,
        out: str = "",
    ) -> None:
        """Hold a whole tensor to the error of same-precision emulations (rule B); records both ratios.

        `out`: format of the result; "" = the dtype under test.
        """
        found = np.asarray(found, np.float64)
        if found.shape != wanted.shape:
            raise Failed(f"{what} has shape {found.shape}, but {wanted.shape} is wanted")
        ratio = compared(found, wanted, emulated, out or self.dtype, kappa)
        self.record("ratio_B", ratio.largest)
        self.record("ratio_B_rms", ratio.mean)
        self.is_poor |= 1 < ratio.largest <= QUALITY
        if ratio.largest > QUALITY or ratio.mean > 1:
            raise Failed(
                f"{what} has {ratio.largest:.3g} times the largest error and {ratio.mean:.3g} times the RMS "
                f"error that rule B allows beside the same computation in {self.dtype}"
            )

    def unbiased(self, found: Any, wanted: Any, allowed: float, what: str) -> None:
        """Hold the errors of a result, whose first dimension is that of independent rows, to have no trend
        and no mean but a relative one of `allowed` (rule C); records the figures.
        """
        found = np.asarray(found, np.float64)
        if found.shape != wanted.shape:
            raise Failed(f"{what} has shape {found.shape}, but {wanted.shape} is wanted")
        bias = Bias.of(found, wanted)
        z = bias.z(allowed)
        self.record("bias_z", z)
        self.record("bias_slope", abs(bias.slope))
        self.record("bias_mean", abs(bias.mean))
        if z > LIMIT:
            raise Failed(
                f"{what} is biased: its errors have slope {bias.slope:.3g} (standard error "
                f"{bias.slope_se:.2g}) and mean {bias.mean:.3g} ({bias.mean_se:.2g}), {z:.3g} standard "
                "errors beyond what rule C allows; look for a wrong factor, a dropped term, or cutting off"
            )

    def equal(self, found: Any, wanted: Any, what: str = "result") -> None:
        """Hold arrays to be equal element by element, in shape too (rule D)."""
        found, wanted = np.asarray(found), np.asarray(wanted)
        if found.shape != wanted.shape:
            raise Failed(f"{what} has shape {found.shape}, but {wanted.shape} is wanted")
        wrong = np.argwhere(~_same(found, wanted))
        if len(wrong):
            at = tuple(int(i) for i in wrong[0])
            self.record("first_wrong", str(at))
            raise Failed(
                f"{what} at {at} is {found[at]!r}, but exactly {wanted[at]!r} is wanted ({len(wrong)} of "
                f"{found.size} elements differ)"
            )

    def refused(self, call: Callable[[], Any], what: str, kind: type[CoreError] = UnsupportedError) -> str:
        """Hold a call to be refused with the typed error; its sentence."""
        try:
            found = call()
        except kind as error:
            if not str(error).strip():
                raise Failed(f"{what} raises {kind.__name__} without a sentence") from error
            return str(error)
        except Exception as error:
            raise Failed(
                f"{what} raises {type(error).__name__} ({error}), but {kind.__name__} is wanted"
            ) from error
        raise Failed(f"{what} gives a {type(found).__name__}, but {kind.__name__} is wanted")


def precision_of(spec: BackendSpec, dtype: str) -> Precision:
    """What a backend promises in a compute dtype; what it does not declare is held in the accumulator.

    An accumulator below float32 widens no bound: it is a fault, declared or not.
    """
    is_narrow = UNIT_ROUNDOFF[spec.accumulator] > UNIT_ROUNDOFF["float32"]
    sums = "float32" if is_narrow else spec.accumulator
    is_rounded = spec.attention.probability == "compute"
    return Precision(out=dtype, accumulator=sums, probability=dtype if is_rounded else sums)


def ratios(
    found: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64], bound: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """|found - wanted| / bound; equal values (infinities, too) give 0, a NaN gives infinity."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.abs(found - wanted) / bound
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    return np.where(found == wanted, 0.0, ratio)


def _same(found: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    same: npt.NDArray[np.bool_] = found == wanted
    if found.dtype.kind == "f" and wanted.dtype.kind == "f":
        same = same | (np.isnan(found) & np.isnan(wanted))
    return same


@dataclass(frozen=True)
class Check:
    """One test.

    Attributes:
        id: "L2/attend/grouped-mixed": level, family, name; unique.
        run: raises `Failed`, or returns.
        about: one sentence for `explain`: what is checked, and why.
        needs: features of the backend (`has`) without which it is not supported; `supported`: a test of the
            spec for what `needs` cannot say.
        profile: of the claim it belongs to. timeout_s: after which its worker is killed.
        is_quick: part of a quick run. is_waivable: a vendor may waive it.
    """

    id: str
    run: Callable[[Context], None] = field(repr=False, compare=False)
    about: str
    needs: tuple[str, ...] = ()
    supported: Callable[[BackendSpec], bool] = field(default=lambda spec: True, repr=False, compare=False)
    profile: str = "dense"
    timeout_s: float = 60.0
    is_quick: bool = True
    is_waivable: bool = True

    @property
    def level(self) -> int:
        """0 to 7."""
        return int(self.id[1])

    @property
    def family(self) -> str:
        """The second part of the id."""
        return self.id.split("/")[1]


def check_seed(run_seed: int, check_id: str) -> int:
    """Seed of one check of a run."""
    digest = sha256(f"{run_seed:016x}\0{SUITE}\0{check_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def has(spec: BackendSpec, feature: str) -> bool:
    """Whether a backend declares a feature.

    A feature is the path of a field of `BackendSpec` ("attention.window": it is set), or one with a value
    that it must contain or be ("dtypes:bfloat16", "shapes.kind:static"); an empty tuple of head sizes or
    cache dtypes means any.
    """
    path, _, value = feature.partition(":")
    found: Any = spec
    for part in path.split("."):
        found = getattr(found, part)
    if not value:
        return bool(found)
    if isinstance(found, tuple):
        return value in map(str, found) or (path == "attention.head_sizes" and not found)
    return str(found) == value


@dataclass(frozen=True)
class Result:
    """What became of one check.

    Attributes:
        status: a value of `Status`. message: one sentence; "" where there is nothing to say.
        log: what the worker printed, or a traceback, where it did not pass.
    """

    id: str
    status: str
    message: str = ""
    duration_s: float = 0.0
    seed: int = 0
    metrics: Mapping[str, float | int | str] = field(default_factory=dict)
    log: str = ""
    waiver: str = ""
