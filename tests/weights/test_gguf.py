"""GGUF files: names, row order, quantized slices, configuration, and files that lie."""

from __future__ import annotations

import random
from math import prod
from pathlib import Path
from typing import Any

import gguf.quants
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

from core.contract.errors import WeightError
from core.weights import open_checkpoint
from core.weights.gguf_header import QUANTIZED, SUPPORTED, read_header

from . import tiny_gguf as tiny

KINDS = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q8_0)


def as_stored(array: np.ndarray[Any, Any], kind: Kind) -> np.ndarray[Any, Any]:
    """What is left of a matrix's values in type `kind`."""
    if array.ndim < 2 or kind == Kind.F32:
        return array
    if kind == Kind.F16:
        return array.astype(np.float16)
    if kind == Kind.BF16:
        return array.astype(ml_dtypes.bfloat16)
    return gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_tensors_have_the_names_order_and_values_of_the_original(
    tmp_path: Path, architecture: str, kind: Kind
) -> None:
    wanted = tiny.write(tmp_path / "m.gguf", architecture, kind)
    found = open_checkpoint(tmp_path / "m.gguf")
    assert set(found.names()) == set(wanted)
    for name, array in wanted.items():
        stored = as_stored(array, kind)
        read = found.read(name)
        assert (found.shape(name), found.dtype(name), found.nbytes(name)) == (
            stored.shape,
            stored.dtype,
            stored.nbytes,
        )
        assert read.dtype == stored.dtype and np.array_equal(read, stored), name


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_a_slice_equals_that_slice_of_the_whole(tmp_path: Path, kind: Kind) -> None:
    tiny.write(tmp_path / "m.gguf", "llama", kind)
    found = open_checkpoint(tmp_path / "m.gguf")
    rng = random.Random(0)
    for name in found.names():
        whole = found.read(name)
        for _ in range(8):
            index = tuple(slice(*sorted((rng.randint(0, n), rng.randint(0, n)))) for n in whole.shape)
            part = found.read(name, index)
            assert part.shape == whole[index].shape and part.dtype == whole.dtype
            assert np.array_equal(part, whole[index]), (name, index)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"])
def test_a_slice_decodes_only_its_rows_and_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tiny.write(tmp_path / "m.gguf", "llama", Kind.Q4_1)
    found = open_checkpoint(tmp_path / "m.gguf")
    decoded: list[int] = []
    real = gguf.quants.dequantize

    def spy(data: np.ndarray[Any, Any], kind: Kind) -> np.ndarray[Any, Any]:
        out = real(data, kind)
        decoded.append(out.size)
        return out

    monkeypatch.setattr(gguf.quants, "dequantize", spy)
    found.read(name, (slice(3, 5), slice(33, 40)))
    assert decoded == [2 * 32]


def test_config_has_the_form_of_hugging_face(tmp_path: Path) -> None:
    tiny.write(tmp_path / "m.gguf", "qwen3", Kind.Q8_0, lambda w: w.add_eot_token_id(7))
    assert open_checkpoint(tmp_path / "m.gguf").config() == {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": tiny.HIDDEN,
        "num_hidden_layers": tiny.LAYERS,
        "num_attention_heads": tiny.HEADS,
        "num_key_value_heads": tiny.KV_HEADS,
        "head_dim": tiny.HEAD_SIZE,
        "intermediate_size": tiny.MLP,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": tiny.VOCAB,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": [2, 7],
        "dtype": "float32",
    }


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.BF16, "bfloat16"), (Kind.F16, "float16")])
def test_config_tells_the_dtype_of_unquantized_matrices(tmp_path: Path, kind: Kind, dtype: str) -> None:
    tiny.write(tmp_path / "m.gguf", "llama", kind)
    assert open_checkpoint(tmp_path / "m.gguf").config()["dtype"] == dtype


def test_a_head_of_its_own_unties_the_embedding(tmp_path: Path) -> None:
    head = np.ones((tiny.VOCAB, tiny.HIDDEN), np.float32)
    tiny.write(tmp_path / "m.gguf", extra=lambda w: w.add_tensor("output.weight", head))
    found = open_checkpoint(tmp_path / "m.gguf")
    assert not found.config()["tie_word_embeddings"]
    assert np.array_equal(found.read("lm_head.weight"), head)


def llama3_divisors(factor: float) -> np.ndarray[Any, Any]:
    """As transformers computes Llama 3's frequencies, relative to the unscaled ones."""
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=tiny.HIDDEN,
        num_attention_heads=tiny.HEADS,
        head_dim=tiny.HEAD_SIZE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** (-np.arange(0, tiny.HEAD_SIZE, 2) / tiny.HEAD_SIZE)
    return np.asarray(plain / scaled.numpy(), np.float32)


def test_llama3_scaling_is_found_from_its_divisors(tmp_path: Path) -> None:
    divisors = llama3_divisors(32.0)
    assert divisors[4:6].max() > 1, "one frequency must be scaled for this to test anything"
    tiny.write(tmp_path / "m.gguf", extra=lambda w: w.add_tensor("rope_freqs.weight", divisors))
    found = open_checkpoint(tmp_path / "m.gguf")
    assert found.config()["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in found.names()


def test_unknown_rotary_divisors_are_refused(tmp_path: Path) -> None:
    divisors = llama3_divisors(32.0) * np.float32(1.01)
    tiny.write(tmp_path / "m.gguf", extra=lambda w: w.add_tensor("rope_freqs.weight", divisors))
    with pytest.raises(WeightError, match="rotary factors"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling_is_passed_on(tmp_path: Path, kind: str) -> None:
    def extra(writer: GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", kind)
        writer.add_float32("llama.rope.scaling.factor", 4.0)
        writer.add_uint32("llama.rope.scaling.original_context_length", 128)

    tiny.write(tmp_path / "m.gguf", extra=extra)
    assert open_checkpoint(tmp_path / "m.gguf").config()["rope_scaling"] == {
        "rope_type": kind,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }


def test_metadata_of_every_kind_reads_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    def extra(writer: GGUFWriter) -> None:
        writer.add_int8("a", -3)
        writer.add_uint16("b", 65535)
        writer.add_int16("c", -300)
        writer.add_int64("d", -(2**40))
        writer.add_float64("e", 1.5)
        writer.add_bool("f", True)
        writer.add_array("g", [1, -2, 3])
        writer.add_array("h", ["x", "déjà", ""])
        writer.add_array("i", [0.5, 2.0])
        writer.add_array("j", [True, False])

    tiny.write(tmp_path / "m.gguf", extra=extra)
    fields = GGUFReader(tmp_path / "m.gguf").fields
    wanted = {k: f.contents() for k, f in fields.items() if not k.startswith("GGUF.")}
    assert read_header(tmp_path / "m.gguf").metadata == wanted


def write_raw(path: Path, kind: Kind, rows: np.ndarray[Any, Any]) -> None:
    """A file whose embedding is `rows` of blocks of type `kind`."""
    tiny.write(path, tensors=lambda w: w.add_tensor("token_embd.weight", rows, raw_dtype=kind))


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    write_raw(tmp_path / "m.gguf", Kind.IQ4_NL, np.zeros((8, 2 * 18), np.uint8))
    with pytest.raises(
        WeightError, match=r"m\.gguf: tensor 'token_embd\.weight' has type IQ4_NL; read are F32, F16"
    ):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", [k for k in Kind if k.name in QUANTIZED], ids=lambda k: k.name)
def test_every_quantized_type_is_decoded_by_rows_and_blocks(tmp_path: Path, kind: Kind) -> None:
    size, num_bytes = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    # Bytes below 0x78 make no infinite or undefined scale, wherever in the block the scales are.
    rows = rng.integers(0, 0x78, (24, 3 * num_bytes), dtype=np.uint8)
    write_raw(tmp_path / "m.gguf", kind, rows)
    found = open_checkpoint(tmp_path / "m.gguf")
    name, whole = "model.embed_tokens.weight", gguf.quants.dequantize(rows, kind)
    assert found.shape(name) == whole.shape == (24, 3 * size) and found.dtype(name) == np.float32
    assert len(np.unique(whole)) > 16
    assert np.array_equal(found.read(name), whole)
    for index in ((slice(5, 9), slice(size - 3, size + 2)), (slice(23, 24), slice(2 * size, 3 * size))):
        assert np.array_equal(found.read(name, index), whole[index])


def test_the_types_that_files_are_quantized_in_are_read() -> None:
    published = "Q2_K Q3_K Q4_K Q5_K Q6_K Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 F16 BF16 F32"
    assert set(published.split()) <= set(SUPPORTED)


def test_an_architecture_that_is_not_read_is_named(tmp_path: Path) -> None:
    tiny.write(tmp_path / "m.gguf", "mamba")
    with pytest.raises(WeightError, match="architecture 'mamba'"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    tiny.write(tmp_path / "m.gguf", extra=lambda w: w.add_uint16("split.count", 3))
    with pytest.raises(WeightError, match="one part of several"):
        open_checkpoint(tmp_path / "m.gguf")


def test_missing_metadata_is_named(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_embedding_length(8)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(WeightError, match=r"no metadata llama\.attention\.head_count"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    tiny.write(tmp_path / "m.gguf")
    raw = (tmp_path / "m.gguf").read_bytes()
    data = min(t.offset for t in read_header(tmp_path / "m.gguf").tensors.values())
    rng = random.Random(0)
    for count in [0, 3, 23, 24, len(raw) - 1, *(rng.randrange(data) for _ in range(40))]:
        (tmp_path / "cut.gguf").write_bytes(raw[:count])
        with pytest.raises(WeightError, match="truncated"):
            open_checkpoint(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"GGML", "begins with b'GGML'"),
        (4, (1).to_bytes(4, "little"), "version 0x1"),
        (4, (3).to_bytes(4, "big"), "version 0x3000000"),
        (8, (2**60).to_bytes(8, "little"), "wants|truncated|twice|dimensions"),
        (16, (2**60).to_bytes(8, "little"), "wants|truncated|not known"),
        (24, (2**63).to_bytes(8, "little"), "wants 9223372036854775808 bytes"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, at: int, value: bytes, message: str) -> None:
    tiny.write(tmp_path / "m.gguf")
    raw = bytearray((tmp_path / "m.gguf").read_bytes())
    raw[at : at + len(value)] = value
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(WeightError, match=message):
        open_checkpoint(tmp_path / "m.gguf")


def test_arrays_outlive_the_checkpoint_and_reading_afterwards_is_refused(tmp_path: Path) -> None:
    wanted = tiny.write(tmp_path / "m.gguf")
    found = open_checkpoint(tmp_path / "m.gguf")
    norm = found.read("model.norm.weight")
    found.close()
    found.close()
    assert np.array_equal(norm, wanted["model.norm.weight"])
    with pytest.raises(WeightError, match="closed"):
        found.read("model.norm.weight")
    with pytest.raises(WeightError, match="no tensor 'x'"):
        found.read("x")


@pytest.mark.sample
@pytest.mark.slow
def test_the_sample_model_reads_as_transformers_reads_it(sample_model: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(sample_model.parent, gguf_file=sample_model.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = load_gguf_checkpoint(str(sample_model), return_tensors=True, model_to_load=model)["tensors"]
    found = open_checkpoint(sample_model)
    assert set(found.names()) == set(wanted)
    for name, tensor in wanted.items():
        assert np.array_equal(found.read(name), tensor.numpy()), name
    ours, theirs = found.config(), config.to_dict()
    same = {k for k in ours if k in theirs} - {"architectures", "dtype", "rms_norm_eps"}
    assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}
    assert ours["rms_norm_eps"] == pytest.approx(theirs["rms_norm_eps"], rel=1e-7)
    assert prod(found.shape("model.embed_tokens.weight")) == config.vocab_size * config.hidden_size
