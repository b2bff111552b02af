"""What the process that takes requests and the engine's own process tell each other.

Everything here is checked when it is made, so a message that decodes has values of the right types.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.engine.metrics import EngineMetrics
from core.engine.stream import StreamEvent
from core.executor.failure import Failure
from core.sampling.params import SamplingParams

# To the engine's process


@dataclass(frozen=True, kw_only=True)
class AddRequest:
    """Queue a request. Answered by events, or by `Refused`.

    Attributes:
        request_id: unique among all requests that the engine was ever given.
        params: with a seed.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    queue_timeout_s: float | None = None
    timeout_s: float | None = None
    salt: str = ""

    def __post_init__(self) -> None:
        _check("request_id", self.request_id, str)
        _check("params", self.params, SamplingParams)
        _check("priority", self.priority, int)
        _check("salt", self.salt, str)
        for name in ("queue_timeout_s", "timeout_s"):
            _check(name, getattr(self, name), float | int | None)
        _check("prompt_ids", self.prompt_ids, tuple)
        wrong = next((i for i in self.prompt_ids if type(i) is not int), None)
        if wrong is not None:
            raise TypeError(f"prompt_ids holds {wrong!r}; it must hold ints")


@dataclass(frozen=True)
class AbortRequest:
    """End every continuation of a request. Nothing happens where it is not known (any more)."""

    request_id: str

    def __post_init__(self) -> None:
        _check("request_id", self.request_id, str)


@dataclass(frozen=True)
class EndChoice:
    """A continuation's text reached a stop text."""

    request_id: str
    choice: int

    def __post_init__(self) -> None:
        _check("request_id", self.request_id, str)
        _check("choice", self.choice, int)


@dataclass(frozen=True)
class Close:
    """End the process."""


# From the engine's process


@dataclass(frozen=True)
class Progress:
    """A line for people while the engine starts."""

    text: str


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What there is to know of a running engine; sent when it begins to serve.

    Attributes:
        name: the model's folder or file. max_model_len: prompt and output tokens of a sequence at most.
        max_requests: sequences that run at once at most, by configuration and by the backend's rules.
        cache_tokens: tokens that the KV cache holds.
        backend, backend_reason: which, and why it was chosen.
    """

    name: str
    architecture: str
    vocab_size: int
    max_model_len: int
    max_requests: int
    cache_tokens: int
    dtype: str
    backend: str
    backend_reason: str


@dataclass(frozen=True)
class Ready:
    """The engine takes requests."""

    model: ModelFacts
    metrics: EngineMetrics


@dataclass(frozen=True)
class Refused:
    """A request was not queued."""

    request_id: str
    failure: Failure


@dataclass(frozen=True)
class StepEvents:
    """What a step brought, in order, and the figures after it."""

    events: tuple[StreamEvent, ...]
    metrics: EngineMetrics

    def __post_init__(self) -> None:
        if not all(type(event) is StreamEvent for event in self.events):
            object.__setattr__(self, "events", tuple(StreamEvent(*row) for row in self.events))


@dataclass(frozen=True)
class Ended:
    """The engine cannot go on; the process ends."""

    failure: Failure


MESSAGES = (
    AddRequest,
    AbortRequest,
    EndChoice,
    Close,
    Progress,
    ModelFacts,
    Ready,
    Refused,
    StepEvents,
    Ended,
)


def _check(name: str, value: object, kind: object) -> None:
    if not isinstance(value, kind):  # type: ignore[arg-type]
        raise TypeError(f"{name} is {value!r}; it must be {getattr(kind, '__name__', kind)}")
