"""What sees every step of an engine under a profile: holds it to the rules, and its form to the oracle.

Where the backend's arrays can be read on the host (an eager backend), a form's attention gets the model's own
queries, keys and values, and what it gives replaces the backend's result, so that the tokens of the run are
those of the form. Elsewhere (compiled steps) it gets drawn ones. Either way its caches live as long as the
engine's, so chunks, prefix hits, preemption and copies of blocks are all met as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from conformance.check import Context, Failed
from conformance.constraints.forms import FORMS, Float, Inputs
from conformance.constraints.rules import Constraints, Narrowed
from conformance.constraints.shadow import Shadow, distance
from conformance.constraints.steps import violations
from core.contract.batch import StepBatch
from core.contract.errors import DeviceError
from core.contract.opspecs import AttentionSpec
from core.contract.types import CachePlan


class Watch:
    """One per subject. Engines of a check come one after the other.

    Attributes:
        profile, narrowed: the rules.
        steps: steps seen. real, drawn: layers of steps whose form was held to the oracle, with the model's
            own and with drawn inputs. worst: the largest relative error of those.
        wrong: what was found, in order.
    """

    def __init__(self, profile: Constraints, narrowed: Narrowed) -> None:
        self.profile, self.narrowed = profile, narrowed
        self._derive = FORMS[profile.name]
        self._shadow: Shadow | None = None
        self._clear()

    def _clear(self) -> None:
        self.steps = self.real = self.drawn = 0
        self.worst = 0.0
        self.wrong: list[str] = []
        self._batch: StepBatch | None = None
        self._layers: Iterator[int] = iter(())

    @contextmanager
    def over(self, context: Context) -> Iterator[None]:
        """A check's run: figures are recorded, and what was found here comes before what came of it."""
        self._clear()
        try:
            yield
        finally:
            context.record("constraints", self.profile.name)
            context.record("steps", self.steps)
            context.record("forms_of_real_inputs", self.real)
            context.record("forms_of_drawn_inputs", self.drawn)
            context.record("form_error", self.worst)
            if self.wrong:
                more = f" (and {len(self.wrong) - 1} more)" if len(self.wrong) > 1 else ""
                raise Failed(f"constraints {self.profile.name}: {self.wrong[0]}{more}")
        context.require(self.real + self.drawn > 0, "no step's form was held to the oracle")

    def allocated(self, plan: CachePlan) -> None:
        """A new engine's caches."""
        self.freed()
        self._shadow = Shadow(plan)

    def freed(self) -> None:
        """They are given back."""
        if self._shadow is not None:
            self._shadow.close()
        self._shadow = None

    def copied(self, group: int, src: Sequence[int], dst: Sequence[int]) -> None:
        """Blocks were copied."""
        self._caches().copy(group, src, dst)

    def _caches(self) -> Shadow:
        if self._shadow is None:
            raise DeviceError("a step comes before its caches were allocated")
        return self._shadow

    @contextmanager
    def step(self, batch: StepBatch, is_compiled: bool) -> Iterator[None]:
        """One step of the backend."""
        shadow, before = self._caches(), self.real
        self.steps += 1
        for what in violations(self.narrowed.spec, batch, is_compiled):
            self._note(batch, what)
        shadow.touch(batch)
        self._batch, self._layers = batch, iter(shadow.layers)
        try:
            yield
        finally:
            self._batch = None
        if self.real == before:
            for layer in shadow.paged:
                self._hold(batch, layer, shadow.drawn(batch, layer))
                self.drawn += 1

    def attend(self, inner: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """The backend's `Ops.attend`, and beside it the form's."""
        found = inner(*args, **named)
        q, k, v, _, _, spec = args[:6]
        layer = None if self._batch is None or k is None else next(self._layers, None)
        if self._batch is None or layer is None or not _is_plain(spec):
            return found
        try:
            q, k, v = (np.asarray(y).astype(np.float64) for y in (q, k, v))
            result = np.asarray(found[0])
        except Exception:
            return found  # an array that the host cannot read, such as a traced one
        own = self._hold(self._batch, layer, Inputs(q, k, v, spec.scale))
        self.real += 1
        if own is not None and result.flags.writeable:
            result[: len(own)] = own
        return found

    def _hold(self, batch: StepBatch, layer: int, x: Inputs) -> Float | None:
        """The result of the form's attention; None where there is none."""
        shadow = self._caches()
        wanted = shadow.wanted(batch, layer, x)
        try:
            found = shadow.found(batch, layer, x, self._derive)
        except (ValueError, IndexError, TypeError) as reason:
            self._note(batch, f"its form cannot be used: {reason}")
            return None
        error, token = distance(found, wanted)
        self.worst = max(self.worst, error)
        if token >= 0:
            self._note(
                batch,
                f"attention from its form is {error:.3g} away from the oracle's, first at token {token} of "
                f"row {int(batch.row_of_token[token])}",
            )
        return found

    def _note(self, batch: StepBatch, what: str) -> None:
        self.wrong.append(f"step {batch.step_id} ({batch.bucket.kind}): {what}")


def _is_plain(spec: AttentionSpec) -> bool:
    """Whether forms cover it; windows, caps and sinks are the kernel's, and the form says nothing of them."""
    has_more = spec.window or spec.chunk or spec.soft_cap or spec.sinks or spec.q_scale
    return spec.causal and not has_more
