"""The add-on that puts `conformance` and `new-backend` among the commands of `core`."""

from __future__ import annotations

from core.contract import CONTRACT as CONTRACT
from core.contract.hookspecs import hookimpl
from core.contract.requests import CliRequest


@hookimpl
def core_cli(request: CliRequest) -> None:
    """See `core.contract.hookspecs`."""
    from conformance.cli import app, new_backend

    request.app.add_typer(app, name="conformance")
    request.app.command("new-backend")(new_backend)
