"""`core new-backend NAME`: a package of its own that is green at level 0 and says what to fill in."""

from __future__ import annotations

import keyword
import re
from importlib.metadata import entry_points
from pathlib import Path

from core.contract import CONTRACT
from core.contract.errors import ConfigError

_FILES = Path(__file__).parent / "files"
_PLACES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "github.yml": ".github/workflows/conformance.yml",
    "gitlab.yml": ".gitlab-ci.yml",
    "init.py": "core_{name}/__init__.py",
    "plugin.py": "core_{name}/plugin.py",
    "device.py": "core_{name}/device.py",
    "allocator.py": "core_{name}/allocator.py",
    "ops.py": "core_{name}/ops.py",
    "compiler.py": "core_{name}/compiler.py",
    "waivers.toml": "core_{name}/waivers.toml",
    "gitignore": ".gitignore",
}


_RESERVED = ("auto", "core")
"""Words that the command line and the packages of core have."""


def write_backend(name: str, folder: Path) -> list[Path]:
    """Write the package of backend `name` to `folder`; the paths written.

    Raises:
        ConfigError: the name is none that a backend may have, or the folder holds files. Nothing was written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(
            f"a backend cannot be named {name!r}; use lower case letters, digits and _, such as my_chip"
        )
    taken = sorted(point.name for point in entry_points(group="core.backends"))
    if name in (*taken, *_RESERVED) or keyword.iskeyword(name):
        raise ConfigError(f"a backend cannot be named {name!r}: the name is taken; choose another one")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty; give another folder, so that nothing is overwritten")
    written = []
    for template, place in _PLACES.items():
        text = (_FILES / f"{template}.txt").read_text(encoding="utf-8")
        path = folder / place.format(name=name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("$name", name).replace("$contract", repr(CONTRACT)), encoding="utf-8")
        written.append(path)
    return written
