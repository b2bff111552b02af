"""A backend of this repository once more, under another name and with its text changed.

The oracle stays as it is, since the clone's modules are modules of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType

from core.contract.errors import ConfigError
from core.plugins import Plugins

BASE = "cpu_reference"
"""The backend that faults are planted in, where they do not name another."""
Edit = tuple[str, str, str]
"""A module of the backend, a text that it has once, and what is put in its place."""


@cache
def original(base: str = BASE) -> str:
    """The package of a backend."""
    plugins = Plugins(disabled=frozenset())
    plugins.load()
    return plugins.place(base).partition(":")[0].rpartition(".")[0]


def sources(base: str = BASE) -> dict[str, str]:
    """Texts of a backend's modules by name."""
    root = Path(import_module(f"{original(base)}.plugin").__file__ or "").parent
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(root.glob("*.py"))}


def edited(texts: dict[str, str], edits: Sequence[Edit]) -> dict[str, str]:
    """The texts with edits.

    Raises:
        ConfigError: a text to be replaced is not there exactly once: the backend has changed.
    """
    found = dict(texts)
    for module, old, new in edits:
        count = found[module].count(old)
        if count != 1:
            raise ConfigError(
                f"{module}.py has {old!r} {count} times, once is wanted; follow the backend's text"
            )
        found[module] = found[module].replace(old, new)
    return found


def load(texts: dict[str, str], name: str, base: str = BASE) -> ModuleType:
    """Import the texts of backend `base` as package `name`; its module `plugin`."""
    for old in [key for key in sys.modules if key.startswith(f"{name}.")]:
        del sys.modules[old]  # of an earlier text under this name
    package = ModuleType(name)
    package.__path__ = []
    sys.modules[name] = package

    class Loader:
        def __init__(self, text: str, origin: str) -> None:
            self._text, self._origin = text, origin

        def create_module(self, spec: object) -> None:
            return None

        def exec_module(self, module: ModuleType) -> None:
            exec(compile(self._text, self._origin, "exec"), module.__dict__)

    class Finder:
        def find_spec(self, full: str, path: object = None, target: object = None) -> object:
            parent, _, stem = full.rpartition(".")
            if parent != name or stem not in texts:
                return None
            text = texts[stem].replace(original(base), name)
            return spec_from_loader(full, Loader(text, f"<{full}>"))  # type: ignore[arg-type]

    finder = Finder()
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    try:
        for stem in texts:
            if stem != "__init__":
                import_module(f"{name}.{stem}")
                setattr(package, stem, sys.modules[f"{name}.{stem}"])
    finally:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
    return sys.modules[f"{name}.plugin"]
