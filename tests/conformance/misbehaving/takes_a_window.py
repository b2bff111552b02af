"""Declares no sliding windows, and computes something when it is given one."""

from __future__ import annotations

from dataclasses import replace

from whole import Whole

from backends.cpu_reference.plugin import SPEC

backend = Whole("takes_a_window", attention=replace(SPEC.attention, window=False))
