"""The backends of this repository under the suite's bench."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any

import backends
from conformance.bench import Bench as _Bench
from conformance.bench import CaseFunction, Input
from conformance.subject import Subject, Target
from conformance.world import World
from core.contract.requests import SpecRequest
from core.contract.spec import BackendSpec
from core.plugins import Plugins

__all__ = ["BACKENDS", "REFERENCE", "Bench", "Input", "device_of", "plugin", "spec_of", "subject_of"]

REFERENCE = "cpu_reference"
BACKENDS = sorted({p.parent.name for root in backends.__path__ for p in Path(root).glob("*/plugin.py")})


@cache
def plugin(name: str) -> Any:
    """A backend's entry module."""
    return importlib.import_module(f"backends.{name}.plugin")


@cache
def spec_of(name: str) -> BackendSpec:
    """What a backend declares."""
    spec: BackendSpec = plugin(name).core_backend_spec(SpecRequest(contract=(0, 1)))
    return spec


@cache
def subject_of(name: str) -> Subject:
    """A backend and its first device, opened once."""
    options = {"platform": "cpu"} if spec_of(name).framework == "jax" else {}
    plugins = Plugins(disabled=frozenset())
    return Subject(Target(name, options=options), plugins.register_backend(plugin(name), name))


def device_of(name: str) -> Any:
    """A backend's first device."""
    return subject_of(name).device


class Bench(_Bench):
    """The suite's bench, by a backend's name."""

    def __init__(
        self, name: str, dtype: str, world: World, inputs: Any, fn: CaseFunction, *, exact: bool = False
    ) -> None:
        super().__init__(subject_of(name), dtype, world, inputs, fn, exact=exact)
