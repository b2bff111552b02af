"""Chat templates render as transformers renders them, inside a sandbox with bounds."""

from __future__ import annotations

import enum
import resource
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from core.contract.errors import ConfigError, RequestError
from core.tokenizer import apply_chat_template, load_tokenizer
from core.tokenizer.chat_template import _PROCESS, MAX_SECONDS, MAX_TEMPLATE
from core.tokenizer.template_worker import MAX_CHARACTERS

CHATML = """{%- if tools %}
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
{% endif %}
{% for message in messages %}
    {% if message.role == 'skip' %}{% continue %}{% endif %}
    {% if loop.index0 % 2 == 1 %}|{% endif %}
    {{ bos_token + message['role'] }}: {{ message.content | trim }}{% generation %}{{ eos_token }}{%
    endgeneration %}

{% endfor %}
{% set ns = namespace(seen=0) %}{% for m in messages %}{% set ns.seen = ns.seen + 1 %}{% endfor %}
{{ ns.seen }}{% if documents is none %} none{% endif %}
{% if add_generation_prompt %}assistant:{% endif %}"""

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi <b>&'\" é\n"}],
    [
        {"role": "system", "content": "  be brief"},
        {"role": "user", "content": "<|im_end|>"},
        {"role": "skip", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"a": ["é", 1.5, None, True, "<>&'"]}}}]


def render(template: str, messages: Sequence[Any] = (), **variables: Any) -> str:
    """With markers for special tokens."""
    return apply_chat_template(template, messages, False, "<s>", "</s>", variables=variables)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_text_equals_that_of_transformers(
    chat: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool
) -> None:
    wanted, _ = render_jinja_template(
        [chat], tools, chat_template=CHATML, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
    )
    assert apply_chat_template(CHATML, chat, prompt, "<s>", "</s>", tools) == wanted[0]


@pytest.mark.sample
def test_the_samples_template_equals_that_of_transformers(sample_model: Path) -> None:
    from transformers import AutoTokenizer

    found = load_tokenizer(sample_model)
    theirs = AutoTokenizer.from_pretrained(sample_model.parent, gguf_file=sample_model.name)
    assert found.chat_template is not None
    for chat in CHATS:
        for prompt in (True, False):
            text = apply_chat_template(found.chat_template, chat, prompt, found.bos_token, found.eos_token)
            assert text == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)


def test_further_variables_reach_the_template_and_its_own_are_refused() -> None:
    template = "{{ enable_thinking }} {{ documents | length }} {{ add_generation_prompt }} {{ bos_token }}"
    variables = {"enable_thinking": False, "documents": [1, 2], "add_generation_prompt": True}
    found = apply_chat_template(template, [], False, "<s>", "</s>", variables=variables)
    assert found == "False 2 True <s>"
    for name in ("messages", "tools", "bos_token", "eos_token"):
        with pytest.raises(RequestError, match=f"'{name}' cannot be given"):
            apply_chat_template(template, [], False, "<s>", "</s>", variables={name: "x"})


def test_documents_are_none_where_none_are_given() -> None:
    assert apply_chat_template("{{ documents is none }}", [], False, "", "") == "True"


def test_a_template_that_refuses_tells_the_request_why() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    for template in (
        "{{ messages[0].content + 'x' }}",
        "{{ 1 // 0 }}",
        "{{ {}['a'].b }}",
        "{{ ([] | first).x }}",
    ):
        with pytest.raises(RequestError, match="does not accept these messages"):
            render(template, [{"role": "user"}])


def test_a_syntax_error_names_its_line() -> None:
    with pytest.raises(ConfigError, match="error in line 2"):
        render("a\n{% if %}")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append.__self__.__class__.__base__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ raise_exception.__globals__.sys }}",
        "{{ (''|attr('__class__')).x }}",
    ],
)
def test_the_sandbox_keeps_templates_from_python(template: str) -> None:
    with pytest.raises(RequestError, match=r"may not|does not accept"):
        render(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 9 }}",
        "{{ 10 ** 9 * [1] }}",
        "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ '%099999999d' % 1 }}",
        "{{ '%*d' % (99999999, 1) }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    ],
)
def test_a_template_cannot_make_much_out_of_little(template: str) -> None:
    with pytest.raises(RequestError):
        render(template)


LOOPS = "{% for i in range(99999) %}" * 2
HOSTILE = {
    "loops in loops": LOOPS + "{% endfor %}{% endfor %}",
    "loops that print nothing": LOOPS + "{% set x = i %}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "a recursive loop": "{% set ns = namespace(x=[]) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{% for y in ns.x recursive %}{{ loop(y) }}{% endfor %}",
    "doubling with a tilde": "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling in a block": "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set b %}"
    "{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = b %}{% endfor %}",
    "doubling by join": "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "doubling by replacing": "{% set ns = namespace(x='aa') %}{% for i in range(30) %}"
    "{% set ns.x = ns.x | replace('a', ns.x) %}{% endfor %}",
    "a list that holds itself often": "{% set ns = namespace(x=[]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "a wide method": "{{ 'a'.ljust(10 ** 10) | length }}",
    "a wide filter": "{{ 'a' | center(10 ** 10) | length }}",
    "a wide format": "{{ '{:>99999999999}'.format('a') | length }}",
    "a wide format filter": "{{ '%99999999999d' | format(1) | length }}",
    "an indent": "{{ [1] | tojson(indent=10 ** 10) | length }}",
    "much placeholder text": "{{ lipsum(n=10 ** 6) | length }}",
    "a large slice": "{{ 'a' | slice(10 ** 9) | list | length }}",
    "a long batch": "{{ 'a' | batch(10 ** 9, 'x') | list | length }}",
    "a slow search": "{{ ('a' * 50000 + 'b') | urlize | length }}{{ ('<' * 500000) | striptags | length }}"
    + LOOPS
    + "{% endfor %}{% endfor %}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "deep loops": "{% for i in [1] %}" * 60 + "{% endfor %}" * 60,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_template_ends_in_one_error_and_the_next_one_renders(case: str) -> None:
    assert render("{{ 1 }}") == "1"
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with pytest.raises(RequestError) as caught:
        render(HOSTILE[case])
    # The process' time is seen once it has ended.
    _PROCESS.close()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert spent < MAX_SECONDS + 0.7 and time.monotonic() - start < 20
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert render("{{ 1 }}") == "1"


def test_a_process_that_was_ended_by_others_is_replaced() -> None:
    render("x")
    child = _PROCESS._child
    assert child is not None
    child.kill()
    child.wait()
    assert render("y") == "y"


def test_threads_get_their_own_answers() -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: render("{{ messages[0].n }}" * 50, [{"n": i}]), range(100)))
    assert found == [str(i) * 50 for i in range(100)]


def test_messages_nested_too_deep_and_templates_too_long_are_refused() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RequestError, match="cannot be put into a chat template"):
        render("x", [{"content": deep}])
    with pytest.raises(ConfigError, match="characters"):
        render("x" * (MAX_TEMPLATE + 1))


def test_what_stays_within_the_bounds_is_allowed() -> None:
    assert (
        render("{{ '%03d|%s' % (7, 'x') }} {{ 7 % 4 }} {{ 2 ** 10 }} {{ '-' * 3 + 'a' }}")
        == "007|x 3 1024 ---a"
    )
    long = "x" * (MAX_CHARACTERS - 1)
    assert render("{{ messages[0].content }}", [{"content": long}]) == long
    with pytest.raises(RequestError, match="characters"):
        render("{{ messages[0].content }}{{ 'ab' }}", [{"content": long}])


def test_only_plain_values_enter_the_sandbox() -> None:
    class Role(enum.StrEnum):
        USER = "user"

    class Loud(str):
        def __str__(self) -> str:
            return "LOUD"

        def leak(self) -> str:
            return "leaked"

    assert render("{{ messages[0].role }}", [{"role": Role.USER}]) == "user"
    assert render("{{ messages[0].x }}{{ messages[0].x.leak is defined }}", [{"x": Loud("a")}]) == "aFalse"
    with pytest.raises(RequestError, match=r"holds a .*Path"):
        render("x", [{"content": Path("/")}])


def test_time_comes_in_the_form_asked_for() -> None:
    assert len(render("{{ strftime_now('%Y') }}")) == 4
