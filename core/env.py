"""The only module that reads the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from core.contract.errors import ConfigError


@dataclass(frozen=True)
class EnvVar:
    """An environment variable: its name, default and meaning."""

    name: str
    default: str
    meaning: str


CACHE = EnvVar("CORE_CACHE", "~/.cache/core", "folder for downloaded models and compiled programs")
DEBUG = EnvVar("CORE_DEBUG", "0", "0 quiet, 1 decisions, 2 hook calls, 3 every step's batch and result")
DISABLE = EnvVar("CORE_DISABLE_PLUGINS", "", "names of plugins that are not loaded, separated by commas")

API_KEY = EnvVar("CORE_API_KEY", "", "API key of the server where --api-key is not given")

TABLE = (API_KEY, CACHE, DEBUG, DISABLE)


def _read(variable: EnvVar) -> str:
    return os.environ.get(variable.name, variable.default)


def cache_dir() -> Path:
    """Where downloads and compiled programs are kept."""
    return Path(_read(CACHE)).expanduser()


def debug_level() -> int:
    """The debug level, 0 to 3.

    Raises:
        ConfigError: it is not such a number.
    """
    text = _read(DEBUG)
    if text not in ("0", "1", "2", "3"):
        raise ConfigError(f"{DEBUG.name} is {text!r}; set it to 0, 1, 2 or 3")
    return int(text)


def api_key() -> str | None:
    """The key that clients must send; None = anyone may ask."""
    return _read(API_KEY) or None


def disabled_plugins() -> frozenset[str]:
    """Names of plugins that are not loaded."""
    return frozenset(name.strip() for name in _read(DISABLE).split(",") if name.strip())
