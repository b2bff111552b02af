"""Rule C: is a result, within its error, an unbiased one?

Rounding errors have mean zero, so over many elements they cancel; a wrong factor, a dropped term or cutting
off in place of rounding do not. The errors r = found - exact are regressed on the exact values y: the slope
shows a factor, the mean what is added. Elements of one row share errors (the root of a norm, the scores of an
attention), so their standard errors are those of sums over rows, which are independent:

    se(slope)^2 = sum_g (sum_{i in g} (y_i - ybar) r_i)^2 / (sum (y_i - ybar)^2)^2
    se(mean)^2  = sum_g (sum_{i in g} (r_i - rbar))^2 / n^2

(Liang and Zeger, Longitudinal data analysis using generalized linear models, 1986). What may be biased is
allowed for: see `allowance`. docs/conformance/tolerance.md has the derivations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from conformance.tolerance import Precision

Array = npt.NDArray[np.float64]

LIMIT = 5.0
"""Standard errors beyond which a bias is no accident: a chance of 6e-7 for each of the two figures."""


@dataclass(frozen=True)
class Bias:
    """Figures of a result of n elements in G rows.

    Attributes:
        slope: of the errors on the exact values; 0.001 = a factor of 1.001. mean: signed error.
        slope_se, mean_se: their standard errors. size: mean of the exact values' absolute values.
    """

    slope: float
    slope_se: float
    mean: float
    mean_se: float
    size: float

    @classmethod
    def of(cls, found: Array, exact: Array) -> Bias:
        """Of found and exact [G, ...], whose first dimension is that of independent rows."""
        y = exact.reshape(len(exact), -1)
        r = found.reshape(y.shape) - y
        centred, spread = y - y.mean(), float(((y - y.mean()) ** 2).sum())
        if not np.isfinite(r).all() or not spread:
            return cls(np.inf, 0.0, np.inf, 0.0, float(np.abs(y).mean()))
        slope, mean = float((centred * r).sum()) / spread, float(r.mean())
        rest = r - mean - slope * centred
        slope_se = float(np.sqrt(((centred * rest).sum(1) ** 2).sum())) / spread
        mean_se = float(np.sqrt((rest.sum(1) ** 2).sum())) / y.size
        return cls(slope, slope_se, mean, mean_se, float(np.abs(y).mean()))

    def z(self, allowed: float) -> float:
        """The larger of both figures in standard errors, after a relative bias of `allowed` is taken off."""
        return max(
            _in_errors(abs(self.slope) - allowed, self.slope_se),
            _in_errors(abs(self.mean) - allowed * self.size, self.mean_se),
        )


def _in_errors(excess: float, se: float) -> float:
    if excess <= 0:
        return 0.0
    return excess / se if se else np.inf


def allowance(p: Precision, roundings: int, functions: bool) -> float:
    """The relative bias that correct arithmetic may have.

    A constant that is rounded (a scale, 1 / D) is off for all elements alike, by u_acc; so may a function be
    (exp, tanh, ...), by its declared error. A rounding to nearest with steps of up to 2 u |y| shifts the
    mean by the slope of the density within a step, which is of second order: u^2 at most for each of the
    `roundings` to the compute dtype or to that of attention's weights.
    """
    return (1 + (p.exp if functions else 0)) * p.u_acc + roundings * max(p.u_out, p.u_p) ** 2
