"""Fields of a folder's JSON files that the tokenizer reads: of another kind, they are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.contract.errors import ConfigError
from core.tokenizer import load_tokenizer

from . import small

TOKENS = {"bos_token": small.BOS, "eos_token": {"content": small.EOS}}
WRONG: dict[str, dict[str, tuple[Any, ...]]] = {
    "tokenizer_config": {
        "bos_token": (1, ["<s>"], {}, {"content": 3}, True),
        "eos_token": (2, [2], 1.5),
        "add_bos_token": ("true", 1, []),
        "add_eos_token": ("false", 0),
        "legacy": ("x", 1),
        "tokenizer_class": (7, [], ""),
        "chat_template": (7, True, ["x"], [{"name": "default"}], {"default": 1}),
        "added_tokens_decoder": (7, "x", [{"content": "x"}], {"x": {"content": "x"}}, {"1": "x"}),
    },
    "config": {
        "vocab_size": ("256", 256.5, 0, -1, True, [256]),
        "eos_token_id": ("2", 1.5, -1, [1, "2"], True, {}),
        "text_config": ("x", [], 7),
    },
    "generation_config": {"eos_token_id": ("x", "2", 2.5, -1, [None], True, {"a": 1})},
    "chat_template": {"chat_template": (7, [1])},
}
CASES = [(f, n, v) for f, fields in WRONG.items() for n, values in fields.items() for v in values]


@pytest.mark.parametrize(("file", "name", "value"), CASES)
def test_a_field_of_another_kind_is_refused_by_file_and_name(
    file: str, name: str, value: Any, tmp_path: Path
) -> None:
    files = {"tokenizer_config": TOKENS, "config": {"vocab_size": 1000, "eos_token_id": 1}}
    files[file] = {**files.get(file, {}), name: value}
    small.write_folder(tmp_path, small.byte_level(), **files)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / file}.json: the config's {name} is {value!r}, but it must be ")
    assert "\n" not in message and "; check" in message


@pytest.mark.parametrize(
    ("name", "value"), [("content", 7), ("special", "true"), ("rstrip", 1), ("normalized", [])]
)
def test_an_added_token_of_another_kind_is_refused_by_its_id(name: str, value: Any, tmp_path: Path) -> None:
    entry = {"content": small.BOS, "special": True, name: value}
    config = {**TOKENS, "added_tokens_decoder": {"0": entry}}
    small.write_folder(tmp_path, small.byte_level(), tokenizer_config=config)
    words = rf"tokenizer_config\.json: the config's added_tokens_decoder\.0\.{name} is .*, but it must be"
    with pytest.raises(ConfigError, match=words):
        load_tokenizer(tmp_path)


def test_nulls_count_as_left_out(tmp_path: Path) -> None:
    nulls: dict[str, dict[str, Any]] = {file: dict.fromkeys(fields) for file, fields in WRONG.items()}
    small.write_folder(tmp_path, small.byte_level(), **nulls)
    found = load_tokenizer(tmp_path)
    assert (found.bos_token_id, found.eos_token_ids, found.chat_template) == (None, (), None)


def test_templates_by_name_and_tokens_as_objects_are_taken(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    config = json.loads(json.dumps({**TOKENS, "chat_template": templates}))
    found = load_tokenizer(small.write_folder(tmp_path, small.byte_level(), tokenizer_config=config))
    assert (found.chat_template, found.tool_template) == ("a", "b")
    assert found.eos_token == small.EOS
