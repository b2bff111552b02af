"""What clients may send: the requests of the OpenAI API, checked field by field, and this engine's additions.

A field that neither the API nor this server knows is refused: a parameter that is silently ignored gives a
wrong answer. Fields of the API that cannot change the answer (`user`, `metadata`, `store`) are taken and not
used.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from core.contract.errors import RequestError
from core.sampling.params import SamplingParams


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False, protected_namespaces=())


class StreamOptions(_Request):
    """Of a streamed answer."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class CommonRequest(_Request):
    """Fields of both kinds of request. None = the default of SamplingParams."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """A field that is null is one that was left out, as the API has it."""
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given

    model: str | None = None
    n: int = Field(1, ge=1, le=128)
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None

    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    bad_words_ids: list[list[int]] | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    cache_salt: str = ""
    queue_timeout: float | None = Field(None, gt=0)
    timeout: float | None = Field(None, gt=0)
    return_token_ids: bool = False

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def sampling(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The parameters as the engine takes them.

        Raises:
            RequestError: a value is out of range.
        """
        given: dict[str, Any] = {
            "n": self.n,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self.logit_bias or None,
            "allowed_token_ids": None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            "bad_words": tuple(self.bad_words or ()),
            "bad_words_ids": tuple(map(tuple, self.bad_words_ids or ())),
            "seed": self.seed,
            "logprobs": logprobs,
            "prompt_logprobs": self.prompt_logprobs,
            "max_tokens": max_tokens,
            "min_tokens": self.min_tokens,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "ignore_eos": self.ignore_eos,
            "skip_special_tokens": self.skip_special_tokens,
        }
        return SamplingParams(**given)


class CompletionRequest(CommonRequest):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0)
    add_special_tokens: bool = True
    best_of: int | None = None
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """One or several prompts.

        Raises:
            RequestError: there is none.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise RequestError("prompt is empty; give a text, or a list of texts or of token ids")
        if isinstance(self.prompt[0], int):
            return [[i for i in self.prompt if isinstance(i, int)]]
        return [p for p in self.prompt if not isinstance(p, int)]

    def check(self) -> None:
        """Refuse what this server does not do."""
        if self.suffix:
            raise RequestError("suffix is not supported; put it into the prompt as the model wants it")
        if self.best_of not in (None, self.n):
            raise RequestError(f"best_of is {self.best_of}; it must equal n, {self.n}, or be left out")


class ResponseFormat(_Request):
    """How the answer is written; only free text so far."""

    type: str = "text"
    json_schema: dict[str, Any] | None = None


class ChatRequest(CommonRequest):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: Literal[False] = False

    def template_variables(self) -> dict[str, Any]:
        """Names for the chat template beside messages and tools.

        Raises:
            RequestError: a name is given twice, with different values.
        """
        found = dict(self.chat_template_kwargs or {})
        for name in ("add_generation_prompt", "reasoning_effort"):
            if name not in self.model_fields_set:
                continue
            value = getattr(self, name)
            if found.setdefault(name, value) != value:
                raise RequestError(
                    f"{name} is {value!r}, but {found[name]!r} in chat_template_kwargs; give it once"
                )
        return found

    def check(self) -> None:
        """Refuse what this server does not do."""
        if self.response_format is not None and self.response_format.type != "text":
            raise RequestError(
                f"response_format {self.response_format.type!r} is not supported; leave it out or use 'text'"
            )
        if self.parallel_tool_calls is False:
            raise RequestError("parallel_tool_calls is not supported; leave it out")
        if self.tools and self.tool_choice not in (None, "none"):
            raise RequestError("tool_choice is not supported; leave it out, and tools are shown to the model")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true")
