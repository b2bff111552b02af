"""Byte-level BPE tokenizers from the vocabulary in a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.contract.errors import ConfigError
from core.tokenizer.tokenizer import FastTokenizer
from core.weights.gguf_header import end_ids, read_header

# tokenizer.ggml.token_type
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"

# How a text is cut before merges apply, by tokenizer.ggml.pre. "digits" takes every digit by itself and
# then cuts the rest as GPT-2 does; "gpt2" only does the latter.
PRE_TOKENIZERS = {
    "default": "gpt2",
    "gpt-2": "gpt2",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def from_gguf(path: Path) -> FastTokenizer:
    """The tokenizer of a GGUF file.

    Raises:
        ConfigError: it is not byte-level BPE, its pre-tokenizer is not known, or a part is missing.
        WeightError: the file is broken.
    """
    found = read_header(path).metadata
    kind, pre = found.get("tokenizer.ggml.model"), found.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise ConfigError(
            f"{path} has a tokenizer of kind {kind!r}; from GGUF files only 'gpt2' (byte-level BPE) is read: "
            "take the model's folder with tokenizer.json"
        )
    if pre not in PRE_TOKENIZERS:
        raise ConfigError(
            f"{path} has pre-tokenizer {pre!r}; known are {', '.join(PRE_TOKENIZERS)}: take the model's "
            "folder with tokenizer.json"
        )
    backend = _backend(path, found, pre)
    bos = found.get("tokenizer.ggml.bos_token_id")
    # Llama 3 files leave the flag out and still want BOS.
    if bos is not None and found.get("tokenizer.ggml.add_bos_token", PRE_TOKENIZERS[pre] == _LLAMA3):
        from tokenizers.processors import TemplateProcessing

        token = backend.id_to_token(bos)
        # As a list, because a token in a string would be cut at its spaces.
        backend.post_processor = TemplateProcessing(
            single=[f"{token}:0", "$A:0"], special_tokens=[(token, bos)]
        )
    return FastTokenizer(
        backend=backend,
        bos_token_id=bos,
        eos_token_ids=end_ids(found),
        chat_template=found.get("tokenizer.chat_template"),
    )


def _backend(path: Path, found: Mapping[str, Any], pre: str) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    tokens, merges = found.get("tokenizer.ggml.tokens"), found.get("tokenizer.ggml.merges")
    if not tokens or merges is None:
        raise ConfigError(f"{path} lacks tokenizer.ggml.tokens or tokenizer.ggml.merges; convert it again")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ConfigError(f"{path} has {len(tokens) - len(vocab)} tokens twice; convert it again")
    kinds = found.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise ConfigError(f"{path} has {len(tokens)} tokens but {len(kinds)} token types; convert it again")
    # Llama 3 takes a whole word that is in the vocabulary even where no merge leads to it.
    model = BPE(vocab=vocab, merges=_pairs(path, merges, vocab), ignore_merges=PRE_TOKENIZERS[pre] == _LLAMA3)
    backend = Tokenizer(model)
    if PRE_TOKENIZERS[pre] == _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(PRE_TOKENIZERS[pre])
    backend.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind in (UNKNOWN, CONTROL)]
    plain = [t for t, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in plain])
    return backend


def _pairs(path: Path, merges: list[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Merges as pairs. Checked here, because the package panics on a merge outside the vocabulary."""
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):
            raise ConfigError(
                f"{path} has merge {merge!r}, whose parts or result are no tokens; convert it again"
            )
        pairs.append((left, right))
    return pairs


def _pre_tokenizer(kind: str) -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if kind == "gpt2":
        return ByteLevel(add_prefix_space=False)
    if kind == "digits":
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    split = Split(Regex(kind), behavior="isolated")
    return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
