"""Chat templates render as transformers renders them, inside a sandbox with bounds."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from core.contract.errors import ConfigError, RequestError
from core.tokenizer import apply_chat_template, load_tokenizer
from core.tokenizer.chat_template import MAX_CHARACTERS

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


def test_further_variables_reach_the_template_but_do_not_replace_its_own() -> None:
    template = "{{ enable_thinking }} {{ bos_token }} {{ messages | length }}"
    variables = {"enable_thinking": False, "bos_token": "x", "messages": [1, 2]}
    assert apply_chat_template(template, [], False, "<s>", "</s>", variables=variables) == "False <s> 0"


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
    with pytest.raises((ConfigError, RequestError)):
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
