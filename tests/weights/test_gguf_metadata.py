"""Metadata of another kind than wanted is refused by file and key, whichever key it is."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import core
from core import LLM
from core.contract.errors import ConfigError, WeightError
from core.executor.rank import read_model
from core.tokenizer import load_tokenizer
from core.weights import open_checkpoint
from core.weights.gguf_metadata import Metadata
from tests.tokenizer import small, test_gguf_vocab

from . import gguf_models as models
from . import tiny_gguf as tiny
from .gguf_edit import with_metadata

Changed = Callable[[str, dict[str, Any]], Path]


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Changed:
    """A file with other metadata: of a case of `gguf_models`, or of "tiny", "gpt2" and "spm" alone."""
    raw: dict[str, bytes] = {}
    folder = tmp_path_factory.mktemp("gguf")

    def get(name: str, changes: dict[str, Any]) -> Path:
        path = folder / "m.gguf"
        if name not in raw:
            if name == "tiny":
                tiny.write(path, "llama")
            elif name == "gpt2":
                small.write_gguf(path, "smollm", True)
            elif name == "spm":
                test_gguf_vocab.write(path, add_space_prefix=True, add_eos_token=True)
            else:
                models.to_gguf(path, name, *models.original(name, folder))
            raw[name] = path.read_bytes()
        path.write_bytes(with_metadata(raw[name], changes))
        return path

    return get


def read(path: Path) -> None:
    """All that core reads of a file but its tensors."""
    found = open_checkpoint(path)
    read_model(found)
    found.close()


TOKENIZERS = ("gpt2", "spm")
OF_MODEL: dict[str, tuple[Any, ...]] = {
    "general.architecture": (7, ["llama"], 1.5, ""),
    "general.alignment": (True, "x", 0, -32, 24, [32, 64]),
    "split.count": ("two", [], 1.5, True, -1),
    "tokenizer.ggml.eos_token_id": ("two", 2.5, -1, True),
    "tokenizer.ggml.eot_token_id": ("two", 2.7, [1, 2]),
    "tokenizer.ggml.bos_token_id": ("two", 2.7, -1),
    "tokenizer.ggml.tokens": (7, "a", [1, 2]),
    "tokenizer.ggml.token_type": (7, ["a"], [1.5]),
    "llama.block_count": ("x", 2.5, 0, -2, True, 2**31, [2, 3], []),
    "llama.nextn_predict_layers": ("x", 2, -1),
    "llama.context_length": ("x", 0, 1.5, 2**40),
    "llama.embedding_length": ("x", 0),
    "llama.feed_forward_length": ("x", 0, [128, 64], ["x", "x"]),
    "llama.attention.head_count": ("x", 0, -4, [4, 8], [True, True]),
    "llama.attention.head_count_kv": ("x", 0, 1.5, [2, 1], [], ["2", "2"]),
    "llama.attention.key_length": ("x", 0, True),
    "llama.attention.sliding_window": ("x", -1, 1.5),
    "llama.attention.layer_norm_rms_epsilon": ("x", True, float("nan"), float("inf"), 1e300, []),
    "llama.rope.freq_base": ("x", float("nan"), [1.0, 2.0]),
    "llama.rope.dimension_count": ("x", 8, 1.5),
    "llama.rope.scaling.type": (7, True),
    "llama.expert_count": ("x", 1.5, True),
}
OF_TOKENIZER: dict[str, tuple[Any, ...]] = {
    "tokenizer.ggml.tokens": (7, "a", [1, 2]),
    "tokenizer.ggml.token_type": (7, "a", ["a"], [1.5], [True]),
    "tokenizer.ggml.model": (7, ["gpt2"]),
    "tokenizer.ggml.pre": (7, ["default"]),
    "tokenizer.ggml.merges": (7, "a b", [1]),
    "tokenizer.ggml.bos_token_id": ("two", 2.7, -1, 10**6),
    "tokenizer.ggml.eos_token_id": ("two", 2.7, -1, 10**6),
    "tokenizer.ggml.eot_token_id": ("two", 2.7, 10**6),
    "tokenizer.ggml.add_bos_token": ("true", 1, [True]),
    "tokenizer.ggml.add_eos_token": ("true", 0),
    "tokenizer.chat_template": (7, True, ["{{ messages }}"]),
    "tokenizer.chat_template.tool_use": (7,),
}
OF_SENTENCEPIECE: dict[str, tuple[Any, ...]] = {
    "tokenizer.ggml.scores": (7, "a", ["a"], [True]),
    "tokenizer.ggml.unknown_token_id": ("x", -1, 10**6, 0.5),
    "tokenizer.ggml.add_space_prefix": ("x", 1),
    "tokenizer.ggml.tokens": (7, [1.5]),
}
TABLE = [
    (name, key, value)
    for name, table in (("tiny", OF_MODEL), ("gpt2", OF_TOKENIZER), ("spm", OF_SENTENCEPIECE))
    for key, values in table.items()
    for value in values
]


@pytest.mark.parametrize(("name", "key", "value"), TABLE)
def test_a_value_of_another_kind_is_refused_by_file_and_key(
    name: str, key: str, value: Any, changed: Changed
) -> None:
    path = changed(name, {key: value})
    with pytest.raises(WeightError) as caught:
        (load_tokenizer if name in TOKENIZERS else read)(path)
    shown = str(value)[:40].rstrip("]") if isinstance(value, list) else repr(value)
    parts = re.fullmatch(r"(.*): metadata (\S+) is (.*), but (.+) is wanted; (.+)", str(caught.value))
    assert parts is not None, caught.value
    assert (parts[1], parts[2]) == (str(path), key) and parts[3].startswith(shown)
    assert parts[5] == "convert the model again"


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("tiny", "split.count", "two"),
        ("llama_bias", "llama.rope.scaling.factor", "x"),
        ("tiny", "tokenizer.ggml.eot_token_id", 2.7),
    ],
)
def test_whoever_opens_such_a_model_is_told_so(name: str, key: str, value: Any, changed: Changed) -> None:
    path = changed(name, {key: value, "tokenizer.ggml.model": "gpt2"})
    with pytest.raises((WeightError, ConfigError), match=rf"m\.gguf: metadata {key} is ") as caught:
        LLM(path, backend="cpu_reference", dtype="float32", tokenizer=_NoTokenizer())
    assert "\n" not in str(caught.value)


class _NoTokenizer:
    """Nothing asks it before the model is refused."""


def test_equal_values_for_every_layer_count_as_one(changed: Changed) -> None:
    read(changed("tiny", {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [128, 128]}))


WRONG: dict[str, tuple[Any, ...]] = {
    "whole": ("x", 2.5, True, -1, ["x"], [], [1, 2]),
    "number": ("x", True, float("nan"), ["x"], []),
    "flag": ("x", 1, 0.5, ["x"]),
    "text": (7, 0.5, True, ["x"]),
    "texts": ("x", 7, True, [7]),
    "wholes": ("x", 7, 0.5, ["x"]),
    "numbers": ("x", 7, True, ["x"]),
}
"""By the getter that reads a key, what it must refuse."""
ANY = ("x", 7, -1, 0, 0.5, -1.0, True, 2**62, [7], ["x"], [])


def keys_read(
    path: Path, use: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> set[tuple[str, str]]:
    """Every key that is read, with the getter that reads it."""
    found: set[tuple[str, str]] = set()

    def spied(getter: str) -> Callable[..., Any]:
        real = getattr(Metadata, getter)

        def spy(self: Metadata, key: str, *args: Any, **options: Any) -> Any:
            found.add((self._prefix + key, getter))
            return real(self, key, *args, **options)

        return spy

    with monkeypatch.context() as patch:
        for getter in WRONG:
            patch.setattr(Metadata, getter, spied(getter))
        use(path)
    return found


@pytest.mark.parametrize("name", [*models.CASES, *TOKENIZERS])
def test_no_key_that_is_read_brings_an_error_without_a_type(
    name: str, changed: Changed, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = load_tokenizer if name in TOKENIZERS else read
    keys = keys_read(changed(name, {}), use, monkeypatch)
    assert len(keys) > 12
    for key, getter in sorted(keys):
        for value in (*WRONG[getter], *ANY):
            refused = ""
            try:
                use(changed(name, {key: value}))
            except (WeightError, ConfigError) as e:
                refused = str(e)
                assert "\n" not in refused and "m.gguf" in refused and "cannot be read as that" not in refused
            if any(value is wrong for wrong in WRONG[getter]):
                assert f"metadata {key} is " in refused, (key, value)


def test_metadata_is_read_through_the_getters_alone() -> None:
    """But for the header's own parser, nothing in core takes a value out of the mapping itself."""
    root = Path(core.__file__).parent
    for file in (*root.glob("weights/gguf*.py"), *root.glob("tokenizer/*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            taken = (
                node.value
                if isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Load)
                else None
            )
            assert not (isinstance(taken, ast.Attribute) and taken.attr == "metadata"), (file, node.lineno)
