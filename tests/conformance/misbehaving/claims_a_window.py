"""Declares sliding windows, and attends to everything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from whole import Whole

from backends.cpu_reference.ops import ReferenceOps
from core.contract.hookspecs import hookimpl


class NoWindow(ReferenceOps):
    """Attention that does not look at the window."""

    def attend(
        self, q: Any, k: Any, v: Any, cache: Any, step: Any, spec: Any, *rest: Any, **named: Any
    ) -> Any:
        return super().attend(q, k, v, cache, step, replace(spec, window=None), *rest, **named)


class ClaimsAWindow(Whole):
    """See above."""

    @hookimpl
    def core_ops(self, request: Any) -> Any:
        return NoWindow(request.dtype)


backend = ClaimsAWindow("claims_a_window")
