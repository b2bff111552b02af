"""Declares sliding windows, and refuses them."""

from __future__ import annotations

from typing import Any

from whole import Whole

from backends.cpu_reference.ops import ReferenceOps
from core.contract.errors import UnsupportedError
from core.contract.hookspecs import hookimpl


class Refusing(ReferenceOps):
    """Attention that wants no window."""

    def attend(
        self, q: Any, k: Any, v: Any, cache: Any, step: Any, spec: Any, *rest: Any, **named: Any
    ) -> Any:
        if spec.window is not None:
            raise UnsupportedError(f"window is {spec.window}, but this kernel has none; leave it out")
        return super().attend(q, k, v, cache, step, spec, *rest, **named)


class RefusesAWindow(Whole):
    """See above."""

    @hookimpl
    def core_ops(self, request: Any) -> Any:
        return Refusing(request.dtype)


backend = RefusesAWindow("refuses_a_window")
