"""Chat templates: a model's Jinja template, rendered in a sandbox.

A template comes with the weights and a message comes over the network, so neither may reach Python: values
are rebuilt from plain JSON types, attributes are checked by Jinja's sandbox, and what a template can make is
bounded in size. Time is not bounded: a template that loops long is the model's fault.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from core.contract.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from jinja2 import Template

MAX_CHARACTERS = 1 << 24
"""Of a rendered conversation, and of any one string or list that an operator makes."""
MAX_BITS = 4096

_WIDE = re.compile(r"%[-+ #0]*(\*|\d{4,})|\.(\*|\d{4,})")


def apply_chat_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    bos_token: str,
    eos_token: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Text of a conversation, ready for `Tokenizer.encode(..., add_special_tokens=False)`.

    Args:
        messages: in order, each with `role`, `content` and what else the template knows; JSON values.
        add_generation_prompt: end with the opening of the model's turn.
        tools: JSON schemas of functions. variables: further names for the template (`enable_thinking`).

    Raises:
        ConfigError: the template is not valid, or does what the sandbox forbids.
        RequestError: the template refuses these messages, they are not JSON values, or the text grows past
        `MAX_CHARACTERS`.
    """
    from jinja2.exceptions import SecurityError, TemplateError

    compiled = _compile(template)
    names = {
        **(variables or {}),
        "messages": list(messages),
        "tools": None if tools is None else list(tools),
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token,
        "eos_token": eos_token,
    }
    pieces, length = [], 0
    try:
        for piece in compiled.generate(_plain(names)):
            length += len(piece)
            _check_size(length)
            pieces.append(piece)
    except SecurityError as e:
        raise ConfigError(f"the chat template does what a template may not ({e}); use another one") from None
    except (
        TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as e:
        # Templates refuse by raise_exception, and also by failing on what they did not expect.
        raise RequestError(
            f"the chat template does not accept these messages: {e}; check their roles and contents"
        ) from None
    return "".join(pieces)


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise RequestError(
            f"the chat template made {size} characters, but {MAX_CHARACTERS} at most are allowed; shorten "
            "the messages"
        )


def _plain(value: Any) -> Any:
    """A copy in exact JSON types, without the methods that subclasses may carry into the sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    raise RequestError(
        f"a message holds a {type(value).__name__}; only JSON values can be put into a chat template"
    )


@lru_cache(maxsize=32)
def _compile(template: str) -> Template:
    """Compiled once per template text.

    Raises:
        ConfigError: a syntax error; names the line.
    """
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        """Operators that can make much out of little are checked before they run."""

        intercepted_binops = frozenset({"*", "**", "+", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operator(operator, left, right)
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        """`{% generation %}` marks the model's own words for training; here it is its contents."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as e:
        raise ConfigError(
            f"the chat template has an error in line {e.lineno} ({e.message}); use another template"
        ) from None


def _check_operator(operator: str, left: Any, right: Any) -> None:
    bits = left.bit_length() if isinstance(left, int) else 64
    if operator == "*":
        for many, times in ((left, right), (right, left)):
            if isinstance(many, str | list | tuple) and isinstance(times, int):
                _check_size(len(many) * times)
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(bits + right.bit_length())
    elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        _check_size(len(left) + len(right))
    elif operator == "%" and isinstance(left, str) and _WIDE.search(left):
        raise RequestError(f"the chat template formats with {left!r}; widths over 999 are not allowed")
    elif operator == "**" and isinstance(right, int | float):
        _check_bits(bits * abs(right))


def _check_bits(bits: float) -> None:
    if bits > MAX_BITS:
        raise RequestError(f"the chat template makes a number of {bits:.0f} bits; {MAX_BITS} are allowed")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's own escapes for HTML, which models were not trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
