"""Tokenizers from the vocabulary in a GGUF file's metadata: byte-level BPE, and SentencePiece's BPE.

SentencePiece merges the pair whose result scores highest, from single characters upwards, and the tokenizers
package the pair that comes first in a list. The list is made here: every way to join two tokens into a
third, by that one's score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.contract.errors import ConfigError
from core.tokenizer.gguf_pre import PRE_TOKENIZERS, PreTokenizer
from core.tokenizer.tokenizer import FastTokenizer
from core.weights.gguf_header import end_ids, read_header

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

SPACE = "\u2581"
"""What SentencePiece writes for a space."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, their kinds, and the metadata they came with; `path` is for messages."""

    path: Path
    metadata: Mapping[str, Any]
    tokens: Sequence[str]
    kinds: Sequence[int]

    @property
    def ids(self) -> dict[str, int]:
        """Id of each token.

        Raises:
            ConfigError: a token is there twice.
        """
        found = {token: i for i, token in enumerate(self.tokens)}
        if len(found) != len(self.tokens):
            raise ConfigError(
                f"{self.path} has {len(self.tokens) - len(found)} tokens twice; convert it again"
            )
        return found

    def of_kinds(self, *kinds: int) -> list[str]:
        """Tokens of these kinds, in order."""
        return [t for t, kind in zip(self.tokens, self.kinds, strict=True) if kind in kinds]


def from_gguf(path: Path) -> FastTokenizer:
    """The tokenizer of a GGUF file.

    Raises:
        ConfigError: its kind or its pre-tokenizer is not known, or a part is missing.
        WeightError: the file is broken.
    """
    header = read_header(path)
    found, embedding = header.metadata, header.tensors.get("token_embd.weight")
    num_tokens = len(found.get("tokenizer.ggml.tokens") or ())
    if embedding is not None and num_tokens > embedding.shape[0]:
        raise ConfigError(
            f"{path} has {num_tokens} tokens, but its embedding has {embedding.shape[0]} rows; convert it "
            "again"
        )
    kind = found.get("tokenizer.ggml.model")
    if kind == "gpt2":
        pre = _pre_tokenizer(path, found)
        backend, add_bos = byte_level(_vocabulary(path, found), pre), pre.add_bos
    elif kind == "llama":
        backend, add_bos = sentence_piece(_vocabulary(path, found)), True
    else:
        raise ConfigError(
            f"{path} has a tokenizer of kind {kind!r}; from GGUF files 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece) are read: take the model's folder with tokenizer.json"
        )
    bos, ends = found.get("tokenizer.ggml.bos_token_id"), end_ids(found)
    before = [bos] if bos is not None and found.get("tokenizer.ggml.add_bos_token", add_bos) else []
    after = [ends[0]] if ends and found.get("tokenizer.ggml.add_eos_token", False) else []
    if before or after:
        backend.post_processor = template(backend, before, after)
    return FastTokenizer(
        backend=backend,
        bos_token_id=bos,
        eos_token_ids=ends,
        chat_template=found.get("tokenizer.chat_template"),
        tool_template=found.get("tokenizer.chat_template.tool_use"),
    )


def template(backend: Any, before: list[int], after: list[int]) -> Any:
    """A post-processor that puts these ids around a text."""
    from tokenizers.processors import TemplateProcessing

    names = {i: backend.id_to_token(i) for i in (*before, *after)}
    # As a list, because a token in a string would be cut at its spaces.
    single = [*(f"{names[i]}:0" for i in before), "$A:0", *(f"{names[i]}:0" for i in after)]
    return TemplateProcessing(single=single, special_tokens=[(token, i) for i, token in names.items()])


def _pre_tokenizer(path: Path, found: Mapping[str, Any]) -> PreTokenizer:
    pre = found.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise ConfigError(
            f"{path} has pre-tokenizer {pre!r}; known are {', '.join(PRE_TOKENIZERS)}: take the model's "
            "folder with tokenizer.json"
        )
    return PRE_TOKENIZERS[pre]


def _vocabulary(path: Path, found: Mapping[str, Any]) -> Vocabulary:
    tokens = found.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ConfigError(f"{path} lacks tokenizer.ggml.tokens; convert it again")
    kinds = found.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise ConfigError(f"{path} has {len(tokens)} tokens but {len(kinds)} token types; convert it again")
    return Vocabulary(path, found, tokens, kinds)


def byte_level(v: Vocabulary, pre: PreTokenizer) -> Any:
    """Byte-level BPE; merges, "left right" each, are the metadata's `tokenizer.ggml.merges`.

    Raises:
        ConfigError: merges are missing, or make no token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    merges = v.metadata.get("tokenizer.ggml.merges")
    if merges is None:
        raise ConfigError(f"{v.path} lacks tokenizer.ggml.merges; convert it again")
    ids = v.ids
    backend = Tokenizer(BPE(vocab=ids, merges=pairs(v.path, merges, ids), ignore_merges=pre.ignore_merges))
    if pre.compose:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre.build()
    backend.decoder = decoders.ByteLevel()
    special, plain = v.of_kinds(UNKNOWN, CONTROL), v.of_kinds(USER_DEFINED)
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in plain])
    return backend


def pairs(path: Path, merges: list[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
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


def sentence_piece(v: Vocabulary) -> Any:
    """SentencePiece's BPE with bytes for what is no token; scores are the metadata's.

    Raises:
        ConfigError: scores or byte tokens are missing.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    # Files differ in how they write runs of spaces that are tokens by themselves; texts have spaces.
    v = Vocabulary(v.path, v.metadata, _with_spaces(v), v.kinds)
    ids = v.ids
    missing = [t for t in (f"<0x{b:02X}>" for b in range(256)) if t not in ids]
    if missing:
        raise ConfigError(
            f"{v.path} lacks {len(missing)} of 256 byte tokens, first {missing[0]!r}; convert it again"
        )
    unknown = v.tokens[int(v.metadata.get("tokenizer.ggml.unknown_token_id", 0))]
    model = BPE(vocab=ids, merges=merges(v), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    prefixed = bool(v.metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefixed else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefixed else [])])
    special, plain = v.of_kinds(UNKNOWN, CONTROL), v.of_kinds(USER_DEFINED)
    # Phi-3's marks of a turn swallow what space follows them; its file does not say so.
    strips = v.metadata.get("general.architecture") == "phi3"
    bare = {unknown, "<s>", "<|endoftext|>"}
    backend.add_special_tokens(
        [AddedToken(t, normalized=False, special=True, rstrip=strips and t not in bare) for t in special]
    )
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in plain])
    return backend


def _with_spaces(v: Vocabulary) -> list[str]:
    pairs = zip(v.tokens, v.kinds, strict=True)
    return [t.replace(SPACE, " ") if kind == USER_DEFINED else t for t, kind in pairs]


def merges(v: Vocabulary) -> list[tuple[str, str]]:
    """Every way to join two ordinary tokens into a third, by its score; equal ones by id.

    Raises:
        ConfigError: scores are missing.
    """
    scores = v.metadata.get("tokenizer.ggml.scores") or []
    if len(scores) != len(v.tokens):
        raise ConfigError(f"{v.path} has {len(v.tokens)} tokens but {len(scores)} scores; convert it again")
    ids = {t: i for i, (t, kind) in enumerate(zip(v.tokens, v.kinds, strict=True)) if kind == NORMAL}
    found = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[i], i, left, right))
    found.sort()
    return [(v.tokens[left], v.tokens[right]) for _, _, left, right in found]
