"""Errors as the OpenAI API writes them: a status and {"error": {message, type, param, code}}."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from core.contract.errors import ConfigError, CoreError, EngineDead, QueueFullError, RequestError


def body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an exception: the client's fault 4xx, a full queue 429, the engine's 5xx."""
    if isinstance(error, QueueFullError):
        return 429, body(str(error), "rate_limit_error", code="queue_full")
    if isinstance(error, RequestError | ConfigError):
        return 400, body(str(error), "invalid_request_error")
    if isinstance(error, EngineDead):
        return 503, body(str(error), "server_error", code="engine_dead")
    if isinstance(error, CoreError):
        return 500, body(str(error), "server_error")
    return 500, body(f"unexpected {type(error).__name__}: {error}", "server_error")


def of_validation(problems: Sequence[Any], known: Sequence[str]) -> dict[str, Any]:
    """JSON of the first of pydantic's complaints, as a sentence; an unknown field gets the nearest name."""
    first = problems[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    name = ".".join(where)
    if not where and first["type"] != "json_invalid":
        return body("the body must be a JSON object", "invalid_request_error")
    if first["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(where[-1], known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "leave it out"
        return body(f"there is no field {name!r}; {hint}", "invalid_request_error", param=name)
    if first["type"] == "missing":
        return body(f"the field {name!r} is missing", "invalid_request_error", param=name)
    if first["type"] == "json_invalid":
        return body("the body is not JSON", "invalid_request_error")
    return body(f"{name or 'body'}: {first['msg']}", "invalid_request_error", param=name or None)
