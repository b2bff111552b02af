"""Small tokenizers: byte-level BPE as GGUF or folder, and one with byte fallback as older models have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from core.tokenizer.tokenizer import BYTE_LETTERS

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
BOS, EOS, TURN, TOOL = "<|bos|>", "<|eos|>", "<|turn|>", "<tool>"
TEXTS = (
    "the quick brown fox jumps over the lazy dog, 12345 times",
    "don't  stop\n\n\tthe café naïve 日本語 日本 🙂🙂🏽",
    "  two spaces   three\r\n  1 22 333",
)


def trained() -> dict[str, Any]:
    """Vocabulary and merges of a small byte-level BPE, special tokens first, as in tokenizer.json."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=420,
        special_tokens=[BOS, EOS, TURN, TOOL],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    found: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return found


def write_gguf(
    path: Path,
    pre: str | None,
    add_bos: bool | None = None,
    kind: str = "gpt2",
    words: tuple[str, ...] = (),
) -> Path:
    """A GGUF file with a vocabulary and no tensors; `words` are tokens that no merge leads to."""
    model = trained()
    tokens = [*sorted(model["vocab"], key=model["vocab"].__getitem__), *words]
    kinds = [CONTROL if t in (BOS, EOS, TURN) else USER_DEFINED if t == TOOL else NORMAL for t in tokens]
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(2)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


NEVER = {BYTE_LETTERS[b] for b in (0xC0, 0xC1, *range(0xF5, 0x100))}
"""Letters of bytes that no text in UTF-8 has."""


def byte_level(size: int | None = None) -> Tokenizer:
    """The same vocabulary, as GPT-2 cuts texts; the first `size` tokens of it, for a small embedding."""
    model = trained()
    vocab, merges = model["vocab"], [tuple(m) for m in model["merges"]]
    if size is not None:
        kept = [t for t in sorted(vocab, key=vocab.__getitem__) if t not in NEVER][:size]
        vocab = {t: i for i, t in enumerate(kept)}
        merges = [m for m in merges if "".join(m) in vocab]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in (BOS, EOS, TURN)])
    tokenizer.add_tokens([AddedToken(TOOL, normalized=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """A vocabulary of pieces with spaces inside, and raw bytes for all other characters."""
    pieces = ["<unk>", BOS, EOS, *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["\u2581", "h", "e", "l", "o", "he", "\u2581he", "lo", "\u2581o", "é", "\ufffd"]
    merges = [("h", "e"), ("\u2581", "he"), ("l", "o"), ("\u2581", "o")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", BOS, EOS)])
    return tokenizer


def metaspace() -> Tokenizer:
    """Pieces with spaces inside, and no raw bytes."""
    tokenizer = byte_fallback()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def write_folder(folder: Path, tokenizer: Tokenizer, **files: Any) -> Path:
    """A model folder with tokenizer.json and further JSON files by stem."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder
