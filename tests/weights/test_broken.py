"""Broken weight files are refused by the engine's real start, each with a line that names what is wrong.

Each is refused before anything is asked of the device's memory, and but for wrong values before a device is
opened.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core.contract.errors import CoreError, WeightError
from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.executor.rank import RankWorker
from core.weights.checkpoint import open_checkpoint
from core.weights.gguf_header import read_header
from tests.models.conftest import tiny_folder

from .raw import save
from .tiny_gguf import write

__all__ = ["tiny_folder"]

Tensors = dict[str, Any]
Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
FILE = "model.safetensors"


class Spy:
    """What was asked of allocators."""

    def __init__(self) -> None:
        self.workers: list[RankWorker] = []
        self.packed = 0

    def used_bytes(self) -> int:
        return sum(w._allocator.used_bytes() for w in self.workers)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    found, real = Spy(), RankWorker.__init__

    def opened(self: RankWorker, *arguments: Any) -> None:
        real(self, *arguments)
        found.workers.append(self)
        pack = self._allocator.pack

        def counted(request: Any) -> Any:
            found.packed += 1
            return pack(request)

        monkeypatch.setattr(self._allocator, "pack", counted)

    monkeypatch.setattr(RankWorker, "__init__", opened)
    yield found


def start(folder: Path) -> None:
    Engine(EngineConfig(model=folder, backend="cpu_reference", dtype="float32", max_model_len=64)).close()


def tensors(change: Callable[[Tensors], None]) -> Callable[[Path], None]:
    """Rewrite the file with other tensors."""

    def apply(folder: Path) -> None:
        found: Tensors = load_file(folder / FILE)
        change(found)
        save(folder, found)

    return apply


def header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Rewrite the header alone."""

    def apply(folder: Path) -> None:
        raw = (folder / FILE).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        found = json.loads(raw[8 : 8 + length])
        change(found)
        text = json.dumps(found).encode()
        (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return apply


def put(name: str, make: Callable[[Any], Any]) -> Callable[[Path], None]:
    return tensors(lambda found: found.update({name: np.ascontiguousarray(make(found[name]))}))


def at(array: Any, value: float) -> Any:
    changed = array.copy()
    changed[tuple(n // 2 for n in array.shape)] = value
    return changed


def overlap(found: dict[str, Any]) -> None:
    k = Q.replace("q_proj", "k_proj")
    first = found[Q]["data_offsets"][0]
    span = found[k]["data_offsets"]
    found[k]["data_offsets"] = [first, first + span[1] - span[0]]


def shards(folder: Path, change: Callable[[dict[str, Tensors], dict[str, str]], None]) -> None:
    """The same tensors in two files under an index, then changed."""
    found: Tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {name: names[i % 2] for i, name in enumerate(sorted(found))}
    files = {file: {n: found[n] for n in found if where[n] == file} for file in names}
    change(files, where)
    for file, held in files.items():
        save_file(held, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def absent(folder: Path) -> None:
    def change(files: dict[str, Tensors], where: dict[str, str]) -> None:
        where[Q] = "model-00003-of-00003.safetensors"

    shards(folder, change)


def twice(folder: Path) -> None:
    def change(files: dict[str, Tensors], where: dict[str, str]) -> None:
        other = next(file for file in files if file != where[Q])
        files[other][Q] = files[where[Q]][Q]

    shards(folder, change)


def cut(folder: Path) -> None:
    raw = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(raw[:-1000])


def long_header(folder: Path) -> None:
    raw = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes((2**62).to_bytes(8, "little") + raw[8:])


def no_json(folder: Path) -> None:
    (folder / FILE).write_bytes((9).to_bytes(8, "little") + b"{'a': 1}}" + b"\0" * 64)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (tensors(lambda t: t.pop(DOWN)), rf"has no tensor '{DOWN}' of shape \(64, 128\)"),
    "surplus": (
        tensors(lambda t: t.update(extra=np.zeros(2, np.float32))),
        rf"{FILE}: tensor 'extra' is not",
    ),
    "duplicated": (twice, rf"of-00002\.safetensors has tensor '{Q}', which model-0000\d.* has too"),
    "shape": (put(Q, lambda a: a[:32]), rf"{FILE}: tensor '{Q}' has shape \(32, 64\), .* wants \(64, 64\)"),
    "transposed": (put(DOWN, lambda a: a.T), rf"'{DOWN}' has shape \(128, 64\), .* wants \(64, 128\)"),
    "integers": (put(Q, lambda a: a.astype(np.int8)), rf"{FILE}: tensor '{Q}' is int8, but float32"),
    "bool": (put(Q, lambda a: a > 0), rf"{FILE}: tensor '{Q}' is bool, but float32"),
    "float8": (
        put(Q, lambda a: a.astype(ml_dtypes.float8_e4m3fn)),
        rf"{FILE}: tensor '{Q}' is float8_e4m3fn, but a scale beside it",
    ),
    "truncated": (cut, rf"{FILE}: tensor '.*' ends at byte \d+, but the file has \d+; it is truncated"),
    "size": (
        header(lambda h: h[Q].update(shape=[64, 65])),
        rf"{FILE}: tensor '{Q}' of shape \(64, 65\).*16640",
    ),
    "overlap": (header(overlap), rf"{FILE}: tensor .* shares bytes with tensor"),
    "out of range": (
        header(lambda h: h[Q].update(data_offsets=[10**12, 10**12 + 4 * 64 * 64])),
        rf"{FILE}: tensor '{Q}' ends at byte 10{{5}}",
    ),
    "absent file": (
        absent,
        rf"places tensor '{Q}' in 'model-00003-of-00003\.safetensors', which is not a file",
    ),
    "header length": (long_header, rf"{FILE} has \d+ bytes, but wants a header of {2**62} bytes"),
    "no json": (no_json, rf"{FILE}: the header is not JSON"),
}
VALUES: dict[str, tuple[Callable[[Path], None], str]] = {
    "nan": (
        put(DOWN, lambda a: at(a, np.nan)),
        rf"{FILE}: tensor '{DOWN}' has 1 values of 8192 that are NaN",
    ),
    "infinite": (
        put("model.norm.weight", lambda a: at(a, -np.inf)),
        r"'model\.norm\.weight' has 1 values of 64",
    ),
    "half": (
        tensors(lambda t: t.update({n: at(a.astype(np.float16), np.inf) for n, a in t.items() if n == Q})),
        rf"'{Q}' has 1 values of 4096",
    ),
}


@pytest.fixture
def folder(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))


def test_the_whole_model_starts(folder: Path, spy: Spy) -> None:
    start(folder)
    assert spy.packed > 10


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_before_the_device_is_opened(case: str, folder: Path, spy: Spy) -> None:
    change, words = BROKEN[case]
    change(folder)
    with pytest.raises(WeightError, match=words) as caught:
        start(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not spy.workers and not spy.packed


@pytest.mark.parametrize("case", VALUES)
def test_values_that_are_no_numbers_are_refused_before_memory_is_asked_for(
    case: str, folder: Path, spy: Spy
) -> None:
    change, words = VALUES[case]
    change(folder)
    with pytest.raises(WeightError, match=words) as caught:
        start(folder)
    assert spy.workers and not spy.packed and "\n" not in str(caught.value)
    assert spy.used_bytes() == 0


def test_a_surplus_tensor_that_the_family_knows_is_ignored(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors(lambda t: t.update({name: np.ones(8, np.float32)}))(folder)
    start(folder)


def test_several_surplus_tensors_are_counted_and_the_first_named(folder: Path) -> None:
    tensors(lambda t: t.update({f"extra.{i}": np.ones(1, np.float32) for i in range(9)}))(folder)
    with pytest.raises(WeightError, match=r"'extra\.0' \(and 8 more: 'extra\.1', .*\.\.\.\) is not one"):
        start(folder)


OTHER: dict[str, tuple[str, dict[str, Any], str]] = {
    "hidden size": ("llama", {"hidden_size": 32}, "has shape"),
    "fewer layers": ("llama", {"num_hidden_layers": 1}, r"'model\.layers\.1\..* with 1 layers"),
    "more layers": ("llama", {"num_hidden_layers": 3}, r"no tensor 'model\.layers\.2\."),
    "fewer layers than of which the rest could predict": (
        "deepseek_v3",
        {"num_hidden_layers": 2},
        r"'model\.layers\.2\..* with 2 layers",
    ),
    "vocabulary": ("llama", {"vocab_size": 255}, r"embed_tokens.* \(256, 64\), .* \(255, 64\)"),
    "heads": ("llama", {"num_attention_heads": 8}, "has shape"),
    "KV heads": ("llama", {"num_key_value_heads": 4}, r"k_proj\.weight' has shape \(32, 64\)"),
    "head counts that do not divide": ("llama", {"num_attention_heads": 5, "head_dim": 16}, "5 .* 2"),
    "head size": ("qwen3", {"head_dim": 16}, "has shape"),
    "MLP width": ("llama", {"intermediate_size": 64}, "has shape"),
    "tied": ("llama", {"tie_word_embeddings": True}, r"lm_head.*differs from.*tie_word_embeddings"),
    "untied": ("llama3_rope", {"tie_word_embeddings": False}, r"no tensor 'lm_head\.weight'"),
    "biases wanted": ("llama", {"architectures": ["Qwen2ForCausalLM"]}, r"no tensor '.*q_proj\.bias'"),
    "biases surplus": ("qwen2", {"architectures": ["LlamaForCausalLM"]}, r"_proj\.bias' .*is not one"),
    "norms wanted": ("llama", {"architectures": ["Qwen3ForCausalLM"]}, r"no tensor '.*q_norm"),
    "experts": ("qwen3_moe", {"num_experts": 4}, r"mlp\.gate\.weight' has shape \(8, 64\)"),
    "no number": ("llama", {"hidden_size": "wide"}, "hidden_size|config"),
    "nothing": ("llama", {"num_hidden_layers": 0}, "num_hidden_layers|layers"),
    "negative": ("llama", {"vocab_size": -256}, "vocab"),
    "another activation": ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "more experts for a token than there are": ("qwen3_moe", {"num_experts_per_tok": 9}, "9 experts of 8"),
    "no expert for a token": ("qwen3_moe", {"num_experts_per_tok": 0}, "num_experts_per_tok|0 experts of 8"),
    "groups": ("deepseek_v3", {"topk_group": 9}, "9 of 4 groups"),
    "groups that do not divide": ("deepseek_v3", {"n_group": 3}, "3 groups"),
    "half a head": (
        "llama",
        {"num_attention_heads": 4.5},
        "num_attention_heads is 4.5, but it must be a whole number",
    ),
    "a count as a text": ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
    "a count that is true": ("llama", {"num_key_value_heads": True}, "num_key_value_heads is True"),
    "a switch as a text": (
        "llama",
        {"tie_word_embeddings": "false"},
        "tie_word_embeddings is 'false', but it must be true",
    ),
    "one architecture": (
        "llama",
        {"architectures": "LlamaForCausalLM"},
        "architectures is 'Llama.*a list of",
    ),
    "no number for theta": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}},
        "rope_theta is nan, but it must be a finite number",
    ),
    "negative factor": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -3.0}},
        "factor is -3",
    ),
    "soft cap": ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0"),
    "limit": ("gpt_oss", {"swiglu_limit": -1.0}, "swiglu_limit is -1"),
    "end": ("llama", {"eos_token_id": [1, 99999]}, "eos_token_id is 99999 .* has 256 ids"),
    "epsilon": ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps is -1"),
    "theta": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}},
        "rope_theta is 0",
    ),
}


@pytest.mark.parametrize("case", OTHER)
def test_a_folder_that_is_not_what_its_config_says_never_serves(
    case: str, tiny_folder: Callable[[str], Path], tmp_path: Path, spy: Spy
) -> None:
    family, changes, words = OTHER[case]
    folder = Path(shutil.copytree(tiny_folder(family), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CoreError, match=words) as caught:
        start(folder)
    assert "\n" not in str(caught.value)
    assert not spy.workers


def test_a_copy_of_a_tied_head_is_allowed(
    tiny_folder: Callable[[str], Path], tmp_path: Path, spy: Spy
) -> None:
    folder = Path(shutil.copytree(tiny_folder("llama3_rope"), tmp_path / "model"))
    tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))(folder)
    start(folder)


def moved(raw: bytes, place: Callable[[int], int]) -> bytes:
    """The file with another place for the tensor `output_norm.weight`."""
    name = b"output_norm.weight"
    at = raw.index(len(name).to_bytes(8, "little") + name) + 8 + len(name)
    at += 4 + 8 * int.from_bytes(raw[at : at + 4], "little") + 4
    offset = place(int.from_bytes(raw[at : at + 8], "little"))
    return raw[:at] + offset.to_bytes(8, "little") + raw[at + 8 :]


def noted(raw: bytes, *keys: bytes) -> bytes:
    """The file with further metadata: a number for each of these keys of 16 letters."""
    items = b"".join(
        len(key).to_bytes(8, "little") + key + (4).to_bytes(4, "little") + key[-4:] for key in keys
    )
    count = int.from_bytes(raw[16:24], "little") + len(keys)
    # 32 bytes each, so that the tensors stay aligned.
    return raw[:16] + count.to_bytes(8, "little") + items + raw[24:]


K, V = b"blk.0.attn_k.weight", b"blk.0.attn_v.weight"
GGUF: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda raw: raw[:-100], "truncated"),
    "half a header": (lambda raw: raw[:200], "truncated"),
    "magic": (lambda raw: b"GGUX" + raw[4:], "not b'GGUF'"),
    "tensor count": (lambda raw: raw[:8] + (2**60).to_bytes(8, "little") + raw[16:], r"m\.gguf"),
    "trailing bytes": (lambda raw: raw + bytes(1000), "has .* bytes, but tensor .* ends at byte"),
    "overlap": (lambda raw: moved(raw, lambda offset: 0), "begins at byte .*: it shares bytes with tensor"),
    "gap": (lambda raw: moved(raw, lambda offset: offset + 32), "begins at byte .*: it does not follow"),
    "unaligned": (lambda raw: moved(raw, lambda offset: offset + 3), "begins at byte"),
    "metadata twice": (
        lambda raw: noted(raw, b"general.number_a", b"general.number_a"),
        r"m\.gguf has metadata 'general.number_a' twice, but once is wanted",
    ),
    "tensor twice": (
        lambda raw: raw.replace(K, V),
        r"m\.gguf has tensor 'blk.0.attn_v.weight' twice, but once is wanted",
    ),
    "metadata count": (lambda raw: raw[:16] + (2**60).to_bytes(8, "little") + raw[24:], r"m\.gguf"),
}


@pytest.mark.parametrize("case", GGUF)
def test_a_broken_gguf_file_is_refused_before_the_device_is_opened(
    case: str, tmp_path: Path, spy: Spy
) -> None:
    path = tmp_path / "m.gguf"
    write(path)
    change, words = GGUF[case]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(WeightError, match=words) as caught:
        start(path)
    assert str(path) in str(caught.value) and not spy.workers


def test_metadata_that_nothing_reads_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path)
    names = read_header(path).tensors.keys()
    path.write_bytes(noted(path.read_bytes(), b"general.number_a", b"general.number_b"))
    found = read_header(path)
    assert {"general.number_a", "general.number_b"} <= found.metadata.keys()
    assert found.tensors.keys() == names


def test_reading_headers_touches_no_tensor(folder: Path) -> None:
    assert open_checkpoint(folder).names()
