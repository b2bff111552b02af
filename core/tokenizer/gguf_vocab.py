"""Tokenizers from the vocabulary in a GGUF file's metadata: byte-level BPE, and SentencePiece's BPE.

SentencePiece merges the pair whose result scores highest, from single characters upwards, and the tokenizers
package the pair that comes first in a list. The list is made here: every way to join two tokens into a
third, by that one's score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.contract.errors import ConfigError
from core.tokenizer.gguf_pre import PRE_TOKENIZERS, PreTokenizer
from core.tokenizer.tokenizer import FastTokenizer
from core.weights.gguf_header import end_ids, read_header
from core.weights.gguf_metadata import Metadata

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

SPACE = "\u2581"
"""What SentencePiece writes for a space."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, their kinds, and what else the file says of them; `path` is for messages.

    Attributes:
        merges: "left right" each, in order; None = there are none. scores: of the tokens, likewise.
        unknown_id: what stands for a character that is no token. prefixed: a space is put before a text.
        strips: marks of a turn swallow the space behind them.
    """

    path: Path
    tokens: Sequence[str]
    kinds: Sequence[int]
    merges: Sequence[str] | None = None
    scores: Sequence[float] | None = None
    unknown_id: int = 0
    prefixed: bool = True
    strips: bool = False

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
    m, embedding = Metadata(path, header.metadata), header.tensors.get("token_embd.weight")
    num_tokens = len(m.texts("tokenizer.ggml.tokens") or ())
    if embedding is not None and num_tokens > embedding.shape[0]:
        raise ConfigError(
            f"{path} has {num_tokens} tokens, but its embedding has {embedding.shape[0]} rows; convert it "
            "again"
        )
    kind = m.text("tokenizer.ggml.model")
    if kind == "gpt2":
        pre = _pre_tokenizer(m)
        backend, add_bos = byte_level(_vocabulary(m), pre), pre.add_bos
    elif kind == "llama":
        backend, add_bos = sentence_piece(_vocabulary(m)), True
    else:
        raise ConfigError(
            f"{path} has a tokenizer of kind {kind!r}; from GGUF files 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece) are read: take the model's folder with tokenizer.json"
        )
    bos, ends = _token_id(m, "bos", num_tokens), end_ids(m)
    for name in ("eos", "eot", "eom"):
        _token_id(m, name, num_tokens)
    before = [bos] if m.flag("tokenizer.ggml.add_bos_token", add_bos) and bos is not None else []
    after = [ends[0]] if m.flag("tokenizer.ggml.add_eos_token", False) and ends else []
    if before or after:
        backend.post_processor = template(backend, before, after)
    return FastTokenizer(
        backend=backend,
        bos_token_id=bos,
        eos_token_ids=ends,
        chat_template=m.text("tokenizer.chat_template"),
        tool_template=m.text("tokenizer.chat_template.tool_use"),
    )


def _token_id(m: Metadata, name: str, num_tokens: int) -> int | None:
    return m.whole(f"tokenizer.ggml.{name}_token_id", most=num_tokens - 1)


def template(backend: Any, before: list[int], after: list[int]) -> Any:
    """A post-processor that puts these ids around a text."""
    from tokenizers.processors import TemplateProcessing

    names = {i: backend.id_to_token(i) for i in (*before, *after)}
    # As a list, because a token in a string would be cut at its spaces.
    single = [*(f"{names[i]}:0" for i in before), "$A:0", *(f"{names[i]}:0" for i in after)]
    return TemplateProcessing(single=single, special_tokens=[(token, i) for i, token in names.items()])


def _pre_tokenizer(m: Metadata) -> PreTokenizer:
    pre = m.text("tokenizer.ggml.pre")
    if pre is None:
        pre = "default"
    if pre not in PRE_TOKENIZERS:
        raise ConfigError(
            f"{m.path} has pre-tokenizer {pre!r}; known are {', '.join(PRE_TOKENIZERS)}: take the model's "
            "folder with tokenizer.json"
        )
    return PRE_TOKENIZERS[pre]


def _vocabulary(m: Metadata) -> Vocabulary:
    tokens = m.texts("tokenizer.ggml.tokens")
    if not tokens:
        raise ConfigError(f"{m.path} lacks tokenizer.ggml.tokens; convert it again")
    kinds = m.wholes("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise ConfigError(f"{m.path} has {len(tokens)} tokens but {len(kinds)} token types; convert it again")
    return Vocabulary(
        path=m.path,
        tokens=tokens,
        kinds=kinds,
        merges=m.texts("tokenizer.ggml.merges"),
        scores=m.numbers("tokenizer.ggml.scores"),
        unknown_id=_token_id(m, "unknown", len(tokens)) or 0,
        prefixed=m.flag("tokenizer.ggml.add_space_prefix", True),
        # Phi-3's file does not say so.
        strips=m.text("general.architecture") == "phi3",
    )


def byte_level(v: Vocabulary, pre: PreTokenizer) -> Any:
    """Byte-level BPE.

    Raises:
        ConfigError: merges are missing, or make no token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    if v.merges is None:
        raise ConfigError(f"{v.path} lacks tokenizer.ggml.merges; convert it again")
    ids = v.ids
    backend = Tokenizer(BPE(vocab=ids, merges=pairs(v.path, v.merges, ids), ignore_merges=pre.ignore_merges))
    if pre.compose:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre.build()
    backend.decoder = decoders.ByteLevel()
    special, plain = v.of_kinds(UNKNOWN, CONTROL), v.of_kinds(USER_DEFINED)
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in plain])
    return backend


def pairs(path: Path, merges: Sequence[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
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
    """SentencePiece's BPE with bytes for what is no token; merges are made from scores.

    Raises:
        ConfigError: scores or byte tokens are missing.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    # Files differ in how they write runs of spaces that are tokens by themselves; texts have spaces.
    v = replace(v, tokens=_with_spaces(v))
    ids = v.ids
    missing = [t for t in (f"<0x{b:02X}>" for b in range(256)) if t not in ids]
    if missing:
        raise ConfigError(
            f"{v.path} lacks {len(missing)} of 256 byte tokens, first {missing[0]!r}; convert it again"
        )
    unknown = v.tokens[v.unknown_id]
    model = BPE(vocab=ids, merges=merges(v), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if v.prefixed else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if v.prefixed else [])])
    special, plain = v.of_kinds(UNKNOWN, CONTROL), v.of_kinds(USER_DEFINED)
    bare = {unknown, "<s>", "<|endoftext|>"}
    backend.add_special_tokens(
        [AddedToken(t, normalized=False, special=True, rstrip=v.strips and t not in bare) for t in special]
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
    scores = v.scores or []
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
