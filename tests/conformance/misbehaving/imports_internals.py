"""Looks into the engine."""

from __future__ import annotations

from whole import Whole

from core.scheduler import scheduler

backend = Whole("imports_internals", summary=f"made for {scheduler.__name__}")
