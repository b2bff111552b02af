"""GGUF files of the llama, qwen2 and qwen3 architectures, under Hugging Face's names, order and
configuration.

Two things differ from a Hugging Face folder beyond names. The llama architecture stores the rows of q and k
in the order that interleaved rotary pairs want; they are put back. Llama 3's rotary scaling is stored as one
divisor per frequency; its parameters are found again from them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from math import pi, prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from core.contract.errors import WeightError
from core.weights.checkpoint import Index, check_index
from core.weights.gguf_header import QUANTIZED, Header, TensorInfo, end_ids, read_header

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
# Llama 3.1's publication fixes these three; the factor alone differs between its models.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_ORIGINAL_LENGTH = 1.0, 4.0, 8192

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def hf_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; the name itself where none is known."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if block is None or block[2] not in _BLOCK:
        return name
    return f"model.layers.{block[1]}.{_BLOCK[block[2]]}.{kind}"


class GGUFCheckpoint:
    """One GGUF file, mapped. Quantized tensors are read as float32, only the rows and blocks wanted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        header = read_header(path)
        self._architecture = str(header.metadata.get("general.architecture"))
        if self._architecture not in ARCHITECTURES:
            raise WeightError(
                f"{path} has architecture {self._architecture!r}; GGUF files are read of "
                f"{', '.join(ARCHITECTURES)}: take the model's safetensors folder"
            )
        if int(header.metadata.get("split.count", 1)) > 1:
            raise WeightError(f"{path} is one part of several; merge them into one file")
        self._data: np.memmap[Any, Any] | None = np.memmap(path, np.uint8, mode="r")
        self._tensors = {hf_name(n): t for n, t in header.tensors.items() if n != ROPE_FACTORS}
        factors = header.tensors.get(ROPE_FACTORS)
        self._config = _config(
            path, header, None if factors is None else self._rows(factors).astype(np.float64)
        )
        # Rows per head of tensors that were stored in the order of interleaved pairs.
        self._paired = self._config["head_dim"] if self._architecture == "llama" else 0

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def names(self) -> Collection[str]:
        """See `Checkpoint`."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        return self._find(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """See `Checkpoint`."""
        return _DTYPES.get(self._find(name).type, np.dtype(np.float32))

    def nbytes(self, name: str) -> int:
        """See `Checkpoint`."""
        return prod(self.shape(name)) * self.dtype(name).itemsize

    def read(self, name: str, index: Index | None = None) -> npt.NDArray[Any]:
        """See `Checkpoint`."""
        found = self._find(name)
        ranges = check_index(self._path, name, found.shape, index)
        if any(r.start == r.stop for r in ranges):
            return np.empty(tuple(r.stop - r.start for r in ranges), self.dtype(name))
        if not ranges:
            return self._rows(found)[()]
        rows: slice | npt.NDArray[np.intp] = ranges[0]
        if self._paired and re.search(r"\.self_attn\.[qk]_proj\.", name):
            rows = _paired_rows(np.arange(ranges[0].start, ranges[0].stop), self._paired)
        if len(ranges) == 1:
            return self._rows(found)[rows]
        # Whole blocks around the wanted columns are decoded, and no others.
        first = ranges[-1].start // found.block_size
        last = -(-ranges[-1].stop // found.block_size)
        columns = slice(
            ranges[-1].start - first * found.block_size, ranges[-1].stop - first * found.block_size
        )
        return self._rows(found, rows, slice(first, last))[(slice(None), *ranges[1:-1], columns)]

    def config(self) -> dict[str, Any]:
        """See `Checkpoint`."""
        return json.loads(json.dumps(self._config))  # type: ignore[no-any-return]

    def close(self) -> None:
        """See `Checkpoint`."""
        self._data = None

    def _find(self, name: str) -> TensorInfo:
        found = self._tensors.get(name)
        if found is None:
            raise WeightError(f"{self._path} has no tensor {name!r}; it has {len(self._tensors)} others")
        return found

    def _rows(
        self,
        tensor: TensorInfo,
        rows: slice | npt.NDArray[np.intp] = slice(None),
        blocks: slice = slice(None),
    ) -> npt.NDArray[Any]:
        """Rows (first dimension) and blocks (of the last) of a tensor, decoded."""
        if self._data is None:
            raise WeightError(f"{self._path} was closed; open the checkpoint again")
        if tensor.type not in QUANTIZED:
            whole = np.ndarray(tensor.shape, _DTYPES[tensor.type], buffer=self._data, offset=tensor.offset)
            return whole[rows, ..., blocks] if len(tensor.shape) > 1 else whole[...]
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        packed_shape = (*tensor.shape[:-1], tensor.shape[-1] // tensor.block_size, tensor.block_bytes)
        packed = np.ndarray(packed_shape, np.uint8, buffer=self._data, offset=tensor.offset)
        part = packed[rows, ..., blocks, :] if len(tensor.shape) > 1 else packed[blocks]
        flat = np.ascontiguousarray(part).reshape(*part.shape[:-2], part.shape[-2] * tensor.block_bytes)
        decoded: npt.NDArray[Any] = dequantize(flat, GGMLQuantizationType[tensor.type])
        return decoded


def _paired_rows(wanted: npt.NDArray[np.intp], head_size: int) -> npt.NDArray[np.intp]:
    """Stored rows of q or k that hold `wanted` rows of Hugging Face's order.

    A head's first half holds the first element of each rotary pair, its second half the second; the file
    has pairs side by side.
    """
    head, row = np.divmod(wanted, head_size)
    second, pair = np.divmod(row, head_size // 2)
    return np.asarray(head * head_size + 2 * pair + second, np.intp)


def _config(path: Path, header: Header, factors: npt.NDArray[np.float64] | None) -> dict[str, Any]:
    found, tensors = header.metadata, header.tensors
    architecture = str(found["general.architecture"])

    def get(key: str, default: Any = None) -> Any:
        value = found.get(f"{architecture}.{key}", default)
        if value is None:
            raise WeightError(f"{path} has no metadata {architecture}.{key}; convert the model again")
        if isinstance(value, list):
            raise WeightError(
                f"{path}: {architecture}.{key} differs by layer ({value}); it must be one number"
            )
        return value

    if "token_embd.weight" not in tensors:
        raise WeightError(f"{path} has no tensor 'token_embd.weight'; convert the model again")
    hidden, heads = int(get("embedding_length")), int(get("attention.head_count"))
    end = end_ids(found)
    config = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_size": hidden,
        "num_hidden_layers": int(get("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(get("attention.head_count_kv", heads)),
        "head_dim": int(get("attention.key_length", hidden // heads)),
        "intermediate_size": int(get("feed_forward_length")),
        "hidden_act": "silu",
        "rms_norm_eps": _short(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(get("rope.freq_base", 10000.0)),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": int(get("context_length")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": architecture == "llama" and "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "bos_token_id": found.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(end) if len(end) > 1 else next(iter(end), None),
        "dtype": _dtype_name(tensors),
    }
    scaling = _rope_scaling(path, found, architecture)
    if factors is not None:
        scaling = _llama3_scaling(path, factors, config)
    return config if scaling is None else config | {"rope_scaling": scaling}


def _short(value: Any) -> float:
    """The shortest decimal that is this float32: 1e-05, where the file's 4 bytes widen to 9.99999975e-06."""
    return float(str(np.float32(value)))


def _dtype_name(tensors: Mapping[str, TensorInfo]) -> str:
    """bfloat16 or float16 where matrices are stored so, else float32."""
    kinds = {t.type for t in tensors.values() if len(t.shape) > 1}
    return {frozenset({"BF16"}): "bfloat16", frozenset({"F16"}): "float16"}.get(frozenset(kinds), "float32")


def _rope_scaling(path: Path, found: Mapping[str, Any], architecture: str) -> dict[str, Any] | None:
    prefix = f"{architecture}.rope.scaling"
    kind = found.get(f"{prefix}.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn") or f"{prefix}.factor" not in found:
        raise WeightError(
            f"{path}: {prefix}.type is {kind!r} with factor {found.get(f'{prefix}.factor')}; wanted none, or "
            "linear or yarn with a factor"
        )
    scaling = {"rope_type": kind, "factor": _short(found[f"{prefix}.factor"])}
    if f"{prefix}.original_context_length" in found:
        scaling["original_max_position_embeddings"] = int(found[f"{prefix}.original_context_length"])
    return scaling


def _llama3_scaling(
    path: Path, factors: npt.NDArray[np.float64], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Llama 3's scaling parameters, from the number by which the file divides each frequency."""
    factor, size = float(factors.max()), int(config["head_dim"])
    waves = LLAMA3_ORIGINAL_LENGTH / (2 * pi) * config["rope_theta"] ** (-np.arange(0, size, 2) / size)
    kept = np.clip((waves - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0.0, 1.0)
    expected = 1.0 / ((1.0 - kept) / factor + kept)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4, atol=0):
        raise WeightError(
            f"{path}: tensor {ROPE_FACTORS!r} of shape {factors.shape} does not hold the rotary factors of "
            "Llama 3, the only ones known; take the model's safetensors folder"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_ORIGINAL_LENGTH,
    }
