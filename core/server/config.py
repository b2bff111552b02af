"""ServerConfig: the options of the server beside the engine's, and what all of them come to."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import isfinite

from core.contract.errors import ConfigError
from core.engine.config import EngineConfig, check_types, option
from core.engine.resolve import Choice, Resolution


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Options of the HTTP server."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 = every one of this machine")
    port: int = option(8000, "port to listen on; 0 = any that is free")
    api_key: str | None = option(None, "clients must send it as a bearer token", "everyone may ask")
    served_model_name: str | None = option(None, "the model's name in the API", "its folder's or file's name")
    request_timeout_s: float | None = option(
        None, "a request is ended after this many seconds", "when it is done"
    )
    drain_timeout_s: float = option(
        60.0, "seconds that running requests have to end after SIGTERM before they are cut off"
    )
    max_body_bytes: int = option(16 * 2**20, "a larger request body is refused, in bytes")
    max_prompts: int = field(
        default=1024,
        metadata={"meaning": "prompts in one completion request at most", "otherwise": ""},
    )

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port is {self.port}; it must be 0 to 65535")
        if self.api_key is not None and not self.api_key:
            raise ConfigError("api_key is empty; leave it out, or set a key")
        for name in ("request_timeout_s", "drain_timeout_s", "max_body_bytes", "max_prompts"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and isfinite(value)):
                raise ConfigError(f"{name} is {value}; it must be more than 0, and finite")


def explained(
    resolution: Resolution,
    engine: EngineConfig,
    server: ServerConfig,
    *,
    model_name: str,
    key_source: str = "given",
) -> tuple[Choice, ...]:
    """Every option of a server that serves with this configuration, its value and why; the key is not shown.

    Args:
        resolution: of the engine's options. model_name: where none is set.
        key_source: where the key comes from.
    """
    found = [
        Choice(c.option, str(engine.served_max_waiting), "the server's default")
        if c.option == "max_waiting" and engine.max_waiting is None
        else c
        for c in resolution.choices
    ]
    for f in fields(server):
        value = getattr(server, f.name)
        if f.name == "api_key":
            is_set = value is not None
            text, why = ("set", key_source) if is_set else ("not set", str(f.metadata["otherwise"]))
        elif value is None:
            text = model_name if f.name == "served_model_name" else "-"
            why = str(f.metadata["otherwise"])
        else:
            text, why = str(value), "default" if value == f.default else "given"
        found.append(Choice(f.name, text, why))
    return tuple(found)
