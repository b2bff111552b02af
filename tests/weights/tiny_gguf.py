"""Small GGUF files, written with the gguf package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

LAYERS, HEADS, KV_HEADS, HEAD_SIZE, VOCAB, MLP = 2, 4, 2, 16, 96, 128
HIDDEN = 64

Tensors = dict[str, np.ndarray[Any, Any]]


def pair_rows(array: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of q or k in the order in which llama files store them."""
    split = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)


def model_tensors(architecture: str, seed: int = 0) -> tuple[Tensors, dict[str, str]]:
    """Tensors under Hugging Face's names, and the GGUF name of each."""
    rng = np.random.default_rng(seed)
    q, kv = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("token_embd.weight", (VOCAB, HIDDEN)),
        "model.norm.weight": ("output_norm.weight", (HIDDEN,)),
    }
    for i in range(LAYERS):
        p, g = f"model.layers.{i}", f"blk.{i}"
        shapes |= {
            f"{p}.input_layernorm.weight": (f"{g}.attn_norm.weight", (HIDDEN,)),
            f"{p}.post_attention_layernorm.weight": (f"{g}.ffn_norm.weight", (HIDDEN,)),
            f"{p}.self_attn.q_proj.weight": (f"{g}.attn_q.weight", (q, HIDDEN)),
            f"{p}.self_attn.k_proj.weight": (f"{g}.attn_k.weight", (kv, HIDDEN)),
            f"{p}.self_attn.v_proj.weight": (f"{g}.attn_v.weight", (kv, HIDDEN)),
            f"{p}.self_attn.o_proj.weight": (f"{g}.attn_output.weight", (HIDDEN, q)),
            f"{p}.mlp.gate_proj.weight": (f"{g}.ffn_gate.weight", (MLP, HIDDEN)),
            f"{p}.mlp.up_proj.weight": (f"{g}.ffn_up.weight", (MLP, HIDDEN)),
            f"{p}.mlp.down_proj.weight": (f"{g}.ffn_down.weight", (HIDDEN, MLP)),
        }
        if architecture == "qwen3":
            shapes |= {
                f"{p}.self_attn.q_norm.weight": (f"{g}.attn_q_norm.weight", (HEAD_SIZE,)),
                f"{p}.self_attn.k_norm.weight": (f"{g}.attn_k_norm.weight", (HEAD_SIZE,)),
            }
        else:
            shapes |= {
                f"{p}.self_attn.{n}_proj.bias": (f"{g}.attn_{n}.bias", (size,))
                for n, size in (("q", q), ("k", kv), ("v", kv))
            }
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, (_, shape) in shapes.items()}
    return arrays, {name: stored for name, (stored, _) in shapes.items()}


def write(
    path: Path,
    architecture: str = "llama",
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    extra: Callable[[GGUFWriter], None] = lambda writer: None,
    tensors: Callable[[GGUFWriter], None] | None = None,
) -> Tensors:
    """Write a model whose matrices have type `kind`; what a reader must find, before quantization.

    `tensors` adds all tensors in place of the usual ones.
    """
    arrays, stored = model_tensors(architecture)
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_SIZE)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    extra(writer)
    if tensors is not None:
        tensors(writer)
        arrays = {}
    for name, array in arrays.items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        if architecture == "llama" and heads:
            array = pair_rows(array, heads)
        if array.ndim > 1 and kind != GGMLQuantizationType.F32:
            writer.add_tensor(stored[name], quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored[name], array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays
