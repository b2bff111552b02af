"""A client of the server, for the demo and for benchmarks: streams of one chat or completion each, timed."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from core.contract.errors import CoreError, DeviceError, QueueFullError, RequestError


@dataclass
class Answer:
    """One request's answer so far, with the times of its events in seconds since it was sent.

    Attributes:
        times: when each piece of text came. prompt_tokens, completion_tokens: from the server's usage.
    """

    text: str = ""
    finish_reason: str | None = None
    times: list[float] = field(default_factory=list)
    total_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def first_s(self) -> float:
        """Time to the first text; the whole time where there was none."""
        return self.times[0] if self.times else self.total_s

    @property
    def per_token_s(self) -> float:
        """Mean time of a token after the first."""
        return (self.total_s - self.first_s) / max(1, self.completion_tokens - 1)


class Client:
    """Connections to one server. Close it in the end."""

    def __init__(self, base_url: str, *, api_key: str | None = None, timeout_s: float | None = None) -> None:
        import httpx

        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(
            base_url=base_url.removesuffix("/v1"), headers=headers, timeout=timeout_s, limits=limits
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def model(self) -> str:
        """The name of the server's model."""
        found = await self._get("/v1/models")
        name: str = json.loads(found)["data"][0]["id"]
        return name

    async def metrics(self) -> dict[str, float]:
        """The server's metrics that have one value each, by name without labels."""
        figures: dict[str, float] = {}
        for line in (await self._get("/metrics")).splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                figures[name.split("{")[0]] = float(value)
        return figures

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncGenerator[Answer]:
        """The answer to a request, given again whenever it has grown.

        Raises:
            RequestError: the server refused it. QueueFullError: it has too many. DeviceError: it failed.
        """
        answer, start = Answer(), time.perf_counter()
        wanted = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async with self._http.stream("POST", path, json=wanted) as response:
            if response.status_code != 200:
                raise _error(response.status_code, (await response.aread()).decode(errors="replace"))
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise DeviceError(event["error"]["message"])
                if _take(answer, event):
                    answer.times.append(time.perf_counter() - start)
                answer.total_s = time.perf_counter() - start
                yield answer

    async def ask(self, path: str, body: dict[str, Any]) -> Answer:
        """The whole answer, streamed all the same, so that it has times."""
        found = Answer()
        async for answer in self.stream(path, body):
            found = answer
        return found

    async def _get(self, path: str) -> str:
        response = await self._http.get(path)
        if response.status_code != 200:
            raise _error(response.status_code, response.text)
        return response.text


def _take(answer: Answer, event: dict[str, Any]) -> bool:
    """Take an event; whether it brought text."""
    usage = event.get("usage")
    if usage:
        answer.prompt_tokens, answer.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        answer.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
    text = ""
    for choice in event["choices"]:
        text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason
    answer.text += text
    return bool(text)


def _error(status: int, text: str) -> CoreError:
    try:
        sentence = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        sentence = f"the server answered {status}: {text[:200]}"
    kind = QueueFullError if status == 429 else RequestError if status < 500 else DeviceError
    return kind(sentence)
