"""From the tensors of a GGUF file to those of Hugging Face: one table per architecture.

What differs beyond names: the llama architecture stores rows of q and k in the order of interleaved rotary
pairs; Gemma's norms are stored with the 1 added that Hugging Face's model adds; experts of a layer are one
tensor; DeepSeek's kv_b_proj is two, and gpt-oss' gate_up_proj too. All are put back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from core.contract.errors import WeightError
from core.weights.gguf_header import Header, TensorInfo
from core.weights.gguf_metadata import Metadata
from core.weights.gguf_tensors import Joined, Reshaped, Stored, View

ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that belong to the configuration."""

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_DENSE = _ATTENTION | _MLP | {"ffn_norm": "post_attention_layernorm"}
_SHARED = {f"ffn_{n}_shexp": f"mlp.shared_experts.{n}_proj" for n in ("gate", "up", "down")}
_ROUTED = {"ffn_gate_inp": "mlp.gate", "exp_probs_b": "mlp.gate.e_score_correction_bias"}
_EXPERTS = {n: f"mlp.experts.{{}}.{n}_proj" for n in ("gate", "up", "down")}
_GEMMA = (
    _ATTENTION
    | _MLP
    | {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
)
_PHI3 = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_DEEPSEEK2 = (
    _DENSE
    | _SHARED
    | _ROUTED
    | {
        "attn_q_a": "self_attn.q_a_proj",
        "attn_q_b": "self_attn.q_b_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        "attn_kv_b": "self_attn.kv_b_proj",
    }
)
_GPT_OSS = _ATTENTION | {
    "attn_sinks": "self_attn.sinks",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.router",
}
_GLM4_MOE = (
    _ATTENTION
    | _MLP
    | _SHARED
    | _ROUTED
    | {
        "post_attention_norm": "post_attention_layernorm",
        "nextn.eh_proj": "eh_proj",
        "nextn.embed_tokens": "embed_tokens",
        "nextn.enorm": "enorm",
        "nextn.hnorm": "hnorm",
        "nextn.shared_head_head": "shared_head.head",
        "nextn.shared_head_norm": "shared_head.norm",
    }
)
# Names that are a parameter by themselves at Hugging Face, with no ".weight" or ".bias" behind.
_BARE = ("e_score_correction_bias", "sinks")


@dataclass(frozen=True)
class Family:
    """How an architecture's tensors are named and stored.

    Attributes:
        block: stem of a GGUF name below `blk.N.` -> stem below `model.layers.N.`.
        experts: Hugging Face's stem of expert {}'s gate, up and down.
        paired: rows of q and k lie in the order of interleaved rotary pairs.
        norm_shift: added to norm weights to give Hugging Face's.
    """

    block: Mapping[str, str]
    experts: Mapping[str, str] = field(default_factory=dict)
    paired: bool = False
    norm_shift: float = 0.0


FAMILIES: Mapping[str, Family] = {
    "llama": Family(_DENSE, paired=True),
    "mixtral": Family(
        _ATTENTION | {"ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "block_sparse_moe.gate"},
        {n: f"block_sparse_moe.experts.{{}}.{w}" for n, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))},
        paired=True,
    ),
    "qwen2": Family(_DENSE),
    "qwen3": Family(_DENSE),
    "qwen3moe": Family(_DENSE | _ROUTED, _EXPERTS),
    "gemma2": Family(_GEMMA, norm_shift=-1.0),
    "gemma3": Family(_GEMMA, norm_shift=-1.0),
    "phi3": Family(_PHI3),
    "deepseek2": Family(_DEEPSEEK2, _EXPERTS),
    "gpt-oss": Family(_GPT_OSS),
    "glm4moe": Family(_GLM4_MOE, _EXPERTS),
}
"""GGUF's architecture -> family; a llama file with experts is "mixtral"."""


def family_name(m: Metadata) -> str:
    """The key of `FAMILIES` for a file; its architecture itself where none fits.

    Raises:
        WeightError: it names none, or metadata is of another kind than wanted.
    """
    found = m.text("general.architecture")
    if not found:
        raise m.wrong("general.architecture", "the architecture's name")
    return "mixtral" if found == "llama" and m.whole("llama.expert_count") else found


def views(path: Path, header: Header, family: Family, head_size: int) -> dict[str, View]:
    """Every tensor under its Hugging Face name; one that the family does not know keeps its own.

    Raises:
        WeightError: two tensors have one name, or only one of a pair is there.
    """
    found: dict[str, View] = {}
    for name, info in header.tensors.items():
        if name in ROPE_FACTORS:
            continue
        for hf, view in _views(path, header.tensors, family, head_size, name, info).items():
            if hf in found:
                raise WeightError(
                    f"{path} has tensor {hf!r} twice, once as {name!r}; convert the model again"
                )
            found[hf] = view
    return found


def _views(
    path: Path, tensors: Mapping[str, TensorInfo], family: Family, head_size: int, name: str, info: TensorInfo
) -> dict[str, View]:
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return {f"{_TOP[stem]}.{kind}": Stored(info, shift=_shift(family, stem))}
    place = re.fullmatch(r"blk\.(\d+)\.([\w.]+)", stem)
    if place is None:
        return {name: Stored(info)}
    layer, below = f"model.layers.{place[1]}", place[2]
    if below in family.block:
        hf = f"{layer}.{family.block[below]}"
        paired = head_size if family.paired and below in ("attn_q", "attn_k") else 0
        view = Stored(info, paired=paired, shift=_shift(family, below))
        return {hf if hf.endswith(_BARE) else f"{hf}.{kind}": view}
    experts = _expert_views(family, layer, below, kind, info)
    return experts or _joined_views(path, tensors, family, name, info, layer)


def _shift(family: Family, stem: str) -> float:
    return family.norm_shift if stem.endswith("norm") else 0.0


def _expert_views(family: Family, layer: str, below: str, kind: str, info: TensorInfo) -> dict[str, View]:
    """Experts of one tensor, or a single one as old files of Mixtral have them."""
    part = re.fullmatch(r"ffn_(gate|up|down)(_exps|\.\d+)", below)
    if part is None or not family.experts:
        return {}
    stem = family.experts[part[1]]
    if part[2] != "_exps":
        return {f"{layer}.{stem.format(part[2][1:])}.{kind}": Stored(info)}
    return {f"{layer}.{stem.format(e)}.{kind}": Stored(info, lead=e) for e in range(info.shape[0])}


def _joined_views(
    path: Path, tensors: Mapping[str, TensorInfo], family: Family, name: str, info: TensorInfo, layer: str
) -> dict[str, View]:
    """Tensors that Hugging Face has as one; given at the first of the two, nothing at the second."""

    def other(this: str, that: str) -> Stored:
        wanted = name.replace(this, that)
        if wanted not in tensors:
            raise WeightError(f"{path} has tensor {name!r} but not {wanted!r}; convert the model again")
        return Stored(tensors[wanted])

    if family is FAMILIES["deepseek2"]:
        if name.endswith(".attn_k_b.weight"):
            v, (_, _, k_size) = other("attn_k_b", "attn_v_b"), info.shape
            both = Joined(Reshaped(Stored(info), swap=True), v, axis=1, counts=(k_size, v.shape[1]))
            return {f"{layer}.self_attn.kv_b_proj.weight": Reshaped(both, flat=True)}
        if name.endswith(".attn_v_b.weight"):
            other("attn_v_b", "attn_k_b")
            return {}
    if family is FAMILIES["gpt-oss"]:
        suffix = "" if name.endswith(".weight") else "_bias"
        if ".ffn_down_exps." in name:
            down: View = Stored(info) if suffix else Reshaped(Stored(info), swap=True)
            return {f"{layer}.mlp.experts.down_proj{suffix}": down}
        if ".ffn_gate_exps." in name:
            up = other("ffn_gate_exps", "ffn_up_exps")
            both = Joined(Stored(info), up, axis=1, counts=(1, 1), swap=not suffix)
            return {f"{layer}.mlp.experts.gate_up_proj{suffix}": both}
        if ".ffn_up_exps." in name:
            other("ffn_up_exps", "ffn_gate_exps")
            return {}
    return {name: Stored(info)}
