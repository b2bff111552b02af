"""The server's options: what is refused at start, and what `core serve --explain` tells of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from core.cli.app import app
from core.contract.errors import ConfigError
from core.engine.config import SERVED_MAX_WAITING, EngineConfig
from core.server.config import ServerConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("request_timeout_s", "drain_timeout_s") for value in (0.0, -5.0)),
        ("request_timeout_s", float("nan")),
        ("drain_timeout_s", float("inf")),
        ("max_body_bytes", 0),
        ("max_prompts", -1),
        ("port", 65536),
        ("api_key", ""),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        ServerConfig(**{name: value})


@pytest.mark.parametrize("given", [("--request-timeout-s", "0"), ("--port", "70000"), ("--api-key", "")])
def test_it_is_refused_before_anything_else_is_done(
    monkeypatch: pytest.MonkeyPatch, given: tuple[str, str]
) -> None:
    monkeypatch.setenv("CORE_API_KEY", "from the environment")
    monkeypatch.setattr("core.server.run.bind", lambda config: pytest.fail("it went on"))
    with pytest.raises(ConfigError, match=given[0][2:].replace("-", "_")):
        CliRunner().invoke(app, ["serve", "no-such-model", *given], catch_exceptions=False)


@pytest.fixture
def explained(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, tuple[str, str]]]:
    """What `core serve --explain` prints: option to value and why."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("CORE_API_KEY", raising=False)

    def run(*given: str) -> dict[str, tuple[str, str]]:
        command = ["serve", str(tiny_folder("llama")), "--backend", "null", "--explain", *given]
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        names = {f.name for record in (EngineConfig, ServerConfig) for f in fields(record)}
        rows = [
            [part.strip() for part in line.split("  ") if part.strip()] for line in done.output.splitlines()
        ]
        return {row[0]: (row[1], row[2] if len(row) > 2 else "") for row in rows if row and row[0] in names}

    return run


def test_every_option_of_engine_and_server_is_explained(
    explained: Callable[..., dict[str, tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = explained()
    assert set(found) == {f.name for record in (EngineConfig, ServerConfig) for f in fields(record)}
    assert found["host"] == ("127.0.0.1", "default") and found["port"] == ("8000", "default")
    assert found["api_key"] == ("not set", "everyone may ask")
    assert found["served_model_name"][1] == "its folder's or file's name"
    assert found["request_timeout_s"] == ("-", "when it is done")
    assert found["max_waiting"] == (str(SERVED_MAX_WAITING), "the server's default")
    given = explained(
        "--port", "1234", "--api-key", "secret", "--max-waiting", "7", "--request-timeout-s", "9"
    )
    assert given["port"] == ("1234", "given") and given["max_waiting"] == ("7", "given")
    assert given["api_key"] == ("set", "given") and given["request_timeout_s"] == ("9.0", "given")
    monkeypatch.setenv("CORE_API_KEY", "secret")
    assert explained()["api_key"] == ("set", "CORE_API_KEY")
