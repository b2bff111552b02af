"""The process that renders chat templates: a script of its own, which needs nothing but Jinja.

A template comes with the weights and may be hostile. Jinja's sandbox keeps it from Python, and the checks of
operators below stop the plain ways to make much out of little, with a message that names them. Whatever else
takes long or takes memory (filters, loops in loops, macros that call themselves) ends at this process'
limits:
the timer's signal kills it in the middle of anything.

In and out: 8 bytes of length, little-endian, then JSON. In: template, names, seconds. Out: {"text": ...}, or
{"kind": "syntax" or "refused", "message": ...}.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 1 << 24
"""Of a rendered conversation, and of any one string or list that an operator makes."""
MAX_BITS = 4096
MAX_MEMORY_BYTES = 1 << 30

_WIDE = re.compile(r"%[-+ #0]*(\*|\d{4,})|\.(\*|\d{4,})")


class Refused(Exception):
    """What the template may not do, in words for whoever sent the request."""


def render(template: str, names: dict[str, Any]) -> dict[str, str]:
    """The answer to one request."""
    try:
        return {"text": _text(_compile(template), names)}
    except jinja2.TemplateSyntaxError as e:
        return {"kind": "syntax", "message": f"line {e.lineno} ({e.message})"}
    except Refused as e:
        return {"kind": "refused", "message": str(e)}
    except SecurityError as e:
        return {"kind": "refused", "message": f"the chat template does what a template may not ({e})"}
    except MemoryError:
        message = f"the chat template takes more than {MAX_MEMORY_BYTES >> 20} MiB of memory"
        return {"kind": "refused", "message": message}
    except RecursionError:
        return {"kind": "refused", "message": "the chat template calls itself, or is nested, too deep"}
    except Exception as e:
        # Templates refuse by raise_exception, and also by failing on what they did not expect.
        return {"kind": "refused", "message": f"the chat template does not accept these messages: {e}"}


def _text(compiled: jinja2.Template, names: dict[str, Any]) -> str:
    pieces, length = [], 0
    for piece in compiled.generate(names):
        length += len(piece)
        _check_size(length)
        pieces.append(piece)
    return "".join(pieces)


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise Refused(f"the chat template made {size} characters, but {MAX_CHARACTERS} at most are allowed")


@lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    """Compiled once per template text."""

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
    return environment.from_string(template)


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
        raise Refused(f"the chat template formats with {left!r}; widths over 999 are not allowed")
    elif operator == "**" and isinstance(right, int | float):
        _check_bits(bits * abs(right))


def _check_bits(bits: float) -> None:
    if bits > MAX_BITS:
        raise Refused(f"the chat template makes a number of {bits:.0f} bits; {MAX_BITS} are allowed")


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
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def main() -> None:
    """Answer requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _limit_memory()
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while len(head := source.read(8)) == 8:
        request = json.loads(source.read(int.from_bytes(head, "little")))
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        answer = render(request["template"], request["names"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        message = json.dumps(answer).encode()
        sink.write(len(message).to_bytes(8, "little") + message)
        sink.flush()


def _limit_memory() -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MAX_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, MAX_MEMORY_BYTES)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (OSError, ValueError):
        # Not every system limits address space; the time is limited in any case.
        return


if __name__ == "__main__":
    main()
