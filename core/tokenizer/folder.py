"""The tokenizer of a model folder: tokenizer.json, or what models ship in its place.

| file | which models | read as |
|---|---|---|
| tokenizer.json | nearly all | by the tokenizers package |
| tekken.json | newer Mistral | byte-level BPE; a merge's rank is that of its result |
| tokenizer.model | Llama 2, older Mistral, Phi-3, Gemma | SentencePiece's BPE with byte fallback |
| vocab.json and merges.txt | Qwen2, GPT-2 | byte-level BPE; the tokenizer's class says how texts are cut |
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.contract.errors import ConfigError
from core.models.config import eos_ids
from core.models.fields import FLAG, TEXT, Kind, check_fields
from core.tokenizer.gguf_pre import PRE_TOKENIZERS, PreTokenizer
from core.tokenizer.gguf_vocab import (
    CONTROL,
    NORMAL,
    UNUSED,
    Vocabulary,
    byte_level,
    merges,
    sentence_piece,
    template,
)
from core.tokenizer.sentencepiece import read_sentencepiece
from core.tokenizer.tokenizer import BYTE_LETTERS, FastTokenizer

# tokenizer_class without "Fast" -> name in PRE_TOKENIZERS.
_CLASSES = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt-2", "CodeGenTokenizer": "gpt-2"}
# Of files that do not list them, as Mistral's first ones.
_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "<pad>", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
)


_OF_MODEL = ("vocab_size", "eos_token_id", "text_config")
"""What is read of config.json."""


def _is_token(value: Any) -> bool:
    text = value.get("content") if isinstance(value, dict) else value
    # Some files say that there is none by false.
    return isinstance(text, str) or text is False


def _is_template(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(t, dict) and isinstance(t.get("template"), str) for t in value)
    found = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(text, str) for text in found)


_TOKEN = Kind("a token's text, or an object with it as content", _is_token)
_TEMPLATE = Kind("a text, or texts by name", _is_template)
_ENTRIES = Kind(
    "an object with an object for each token's id",
    lambda v: isinstance(v, dict) and all(i.isdecimal() and isinstance(t, dict) for i, t in v.items()),
)
_CONFIG: Mapping[str, Kind] = {
    "bos_token": _TOKEN,
    "eos_token": _TOKEN,
    "add_bos_token": FLAG,
    "add_eos_token": FLAG,
    "legacy": FLAG,
    "tokenizer_class": TEXT,
    "added_tokens_decoder": _ENTRIES,
    "chat_template": _TEMPLATE,
}
"""What is read of tokenizer_config.json."""
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
_ENTRY: Mapping[str, Kind] = {"content": TEXT, "special": FLAG, **dict.fromkeys(_FLAGS, FLAG)}


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, held against what its fields may be; {} where there is none."""
    file = folder / "tokenizer_config.json"
    found = _read(file)
    check_fields(found, file, kinds=_CONFIG)
    for i, entry in (found.get("added_tokens_decoder") or {}).items():
        check_fields(entry, file, f"added_tokens_decoder.{i}.", _ENTRY)
    return found


@dataclass(frozen=True)
class _Read:
    """A tokenizer as its file has it, and the texts of its special tokens where no configuration tells."""

    backend: Any
    bos: str | None = None
    eos: str | None = None


def from_folder(path: Path, *, or_bytes: bool = False) -> FastTokenizer:
    """The tokenizer of a folder; `or_bytes`: as in `load_tokenizer`, where `path` may be the config.json.

    Raises:
        ConfigError: as `load_tokenizer`.
    """
    folder = path if path.is_dir() else path.parent
    config, model = _tokenizer_config(folder), _read(folder / "config.json")
    check_fields({name: model.get(name) for name in _OF_MODEL}, folder / "config.json")
    file = next((folder / name for name in _READERS if (folder / name).is_file()), None)
    if file is not None:
        found = _READERS[file.name](file, config)
    elif or_bytes and model:
        found = _of_bytes(_vocab_size(model))
    else:
        raise ConfigError(
            f"{folder} has no tokenizer.json, and none of {', '.join(list(_READERS)[1:])}; save the model's "
            "tokenizer in the first form (the fast form of transformers)"
        )
    backend = found.backend
    bos = _token_id(backend, config.get("bos_token", found.bos))
    eos = _token_id(backend, config.get("eos_token", found.eos))
    generation = {"eos_token_id": _read(folder / "generation_config.json").get("eos_token_id")}
    check_fields(generation, folder / "generation_config.json")
    ends = eos_ids(generation) or eos_ids(model) or eos_ids(_text(model))
    # The tokenizer's own end first: it is the one that chat templates close a turn with.
    all_ends = tuple(dict.fromkeys([*([] if eos is None else [eos]), *ends]))
    if file is not None:
        _check_size(file, backend, model, [i for i in (bos, eos) if i is not None])
    default, tools = _templates(folder, config)
    return FastTokenizer(backend, bos, all_ends, default, tools)


def _check_size(file: Path, backend: Any, model: Mapping[str, Any], special: list[int]) -> None:
    """Refuse more tokens than the embedding has rows.

    Tokens that were added to the vocabulary may be beyond it: some publishers share one tokenizer among
    models that know pictures and models that do not. A prompt with such a token is refused when it comes.
    """
    size = _vocab_size(model)
    added = backend.get_added_tokens_decoder()
    ids = [i for i in backend.get_vocab(with_added_tokens=False).values() if i not in added]
    last = max([*ids, *special], default=-1)
    if size and last >= size:
        raise ConfigError(
            f"{file} has token {backend.id_to_token(last)!r} with id {last}, but the embedding of the "
            f"model's config has {size} rows; take the tokenizer that belongs to these weights"
        )


def _text(model: Mapping[str, Any]) -> Mapping[str, Any]:
    found = model.get("text_config")
    return found if isinstance(found, dict) else {}


def _vocab_size(model: Mapping[str, Any]) -> int:
    """Rows of the embedding, 0 where the config does not say."""
    size = _text(model).get("vocab_size") or model.get("vocab_size")
    return int(size or 0)


def _fast(file: Path, config: Mapping[str, Any]) -> _Read:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(file))
    except Exception as e:  # the package raises bare Exception
        raise ConfigError(f"{file} cannot be read ({e}); download it again, or upgrade tokenizers") from None
    backend.no_truncation()
    backend.no_padding()
    return _Read(backend)


def _of_bytes(size: int) -> _Read:
    """Bytes as ids, and a name for every further id."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*BYTE_LETTERS, *(f"<{i}>" for i in range(len(BYTE_LETTERS), size))]
    backend = Backend(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _Read(backend)


def _sentencepiece(file: Path, config: Mapping[str, Any]) -> _Read:
    from tokenizers.pre_tokenizers import Metaspace

    model = read_sentencepiece(file)
    added = _added(file.parent, config)
    listed = {t.content for t in added}
    # What the configuration lists is added with the flags that it has there.
    kinds = [UNUSED if p in listed else kind for p, kind in zip(model.pieces, model.kinds, strict=True)]
    backend = sentence_piece(
        Vocabulary(
            path=file,
            tokens=model.pieces,
            kinds=kinds,
            scores=model.scores,
            unknown_id=max(model.unk_id, 0),
            prefixed=model.prefixed,
        )
    )
    if model.prefixed and config.get("legacy", True) is False:
        # Only the beginning of a text gets a space, not what follows a special token.
        backend.normalizer = None
        backend.pre_tokenizer = Metaspace("\u2581", prepend_scheme="first", split=False)
    _add(file, backend, added)
    bos, eos = (model.pieces[i] if 0 <= i < len(model.pieces) else None for i in (model.bos_id, model.eos_id))
    return _around(_Read(backend, bos, eos), config, add_bos=True)


def _tekken(file: Path, config: Mapping[str, Any]) -> _Read:
    found = _read(file)
    try:
        rules = found["config"]
        num_special = int(rules["default_num_special_tokens"])
        count = int(rules["default_vocab_size"]) - num_special
        ranked = sorted(found["vocab"], key=lambda t: int(t["rank"]))[:count]
        pieces = [
            "".join(BYTE_LETTERS[b] for b in base64.b64decode(t["token_bytes"], validate=True))
            for t in ranked
        ]
        special = [f"<SPECIAL_{i}>" for i in range(num_special)]
        named = found.get("special_tokens")
        for i, text in enumerate(_TEKKEN_SPECIAL[:num_special] if named is None else ()):
            special[i] = text
        for t in named or ():
            special[int(t["rank"])] = str(t["token_str"])
        pattern = str(rules["pattern"])
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise ConfigError(
            f"{file} is not Mistral's table of tokens ({type(e).__name__}: {e}); download it again"
        ) from None
    tokens = [*special, *pieces]
    kinds = [*(CONTROL for _ in special), *(NORMAL for _ in pieces)]
    # The lower a token's rank, the earlier it is made: its score, in SentencePiece's words.
    scored = Vocabulary(file, tokens, kinds, scores=[float(-i) for i in range(len(tokens))])
    joined = [f"{left} {right}" for left, right in merges(scored)]
    vocabulary = Vocabulary(file, tokens, kinds, merges=joined)
    backend = byte_level(vocabulary, PreTokenizer((pattern,), ignore_merges=True))
    return _around(_Read(backend, "<s>", "</s>"), config, add_bos=True)


def _vocab_and_merges(file: Path, config: Mapping[str, Any]) -> _Read:
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    if kind not in _CLASSES:
        raise ConfigError(
            f"{file}: the tokenizer's class is {kind}, but from vocab.json only {', '.join(_CLASSES)} are "
            "read: put the model's tokenizer.json beside it"
        )
    merged = file.parent / "merges.txt"
    try:
        lines = merged.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as e:
        raise ConfigError(f"{merged} cannot be read ({e}); vocab.json is of no use without it") from None
    ids = {str(t): i for t, i in _read(file).items() if type(i) is int}
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[t] for t in tokens] != list(range(len(tokens))):
        raise ConfigError(
            f"{file} does not give its {len(tokens)} tokens the ids from 0 on; download it again"
        )
    joined = [line for line in lines if line and not line.startswith("#version")]
    v = Vocabulary(file, tokens, [NORMAL] * len(tokens), merges=joined)
    backend = byte_level(v, PRE_TOKENIZERS[_CLASSES[kind]])
    _add(file, backend, _added(file.parent, config))
    return _around(_Read(backend, eos="<|endoftext|>"), config, add_bos=False)


_READERS: Mapping[str, Callable[[Path, Mapping[str, Any]], _Read]] = {
    "tokenizer.json": _fast,
    "tekken.json": _tekken,
    "tokenizer.model": _sentencepiece,
    "vocab.json": _vocab_and_merges,
}


def _around(found: _Read, config: Mapping[str, Any], *, add_bos: bool) -> _Read:
    """With BOS and EOS put around a text where the configuration, or else the kind, wants them."""
    bos = _token_id(found.backend, config.get("bos_token", found.bos))
    eos = _token_id(found.backend, config.get("eos_token", found.eos))
    before = [bos] if bos is not None and config.get("add_bos_token", add_bos) else []
    after = [eos] if eos is not None and config.get("add_eos_token", False) else []
    if before or after:
        found.backend.post_processor = template(found.backend, before, after)
    return found


@dataclass(frozen=True)
class _Added:
    """A token beside the vocabulary proper: it is cut out of a text before all else."""

    id: int
    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


def _added(folder: Path, config: Mapping[str, Any]) -> list[_Added]:
    """Added tokens by id, from tokenizer_config.json or the older added_tokens.json."""
    listed = config.get("added_tokens_decoder")
    special = _special_texts(folder, config)
    try:
        if isinstance(listed, dict):
            found = [
                _Added(
                    int(i), str(t["content"]), bool(t.get("special")), **{f: bool(t.get(f)) for f in _FLAGS}
                )
                for i, t in listed.items()
            ]
        else:
            older = _read(folder / "added_tokens.json")
            found = [_Added(int(i), str(t), str(t) in special) for t, i in older.items()]
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ConfigError(
            f"{folder}: the added tokens cannot be read ({type(e).__name__}: {e}); check "
            "tokenizer_config.json"
        ) from None
    return sorted(found, key=lambda t: t.id)


def _special_texts(folder: Path, config: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()
    for source in (config, _read(folder / "special_tokens_map.json")):
        for name, value in source.items():
            values = value if isinstance(value, list) else [value] if name.endswith("_token") else []
            found |= {str(v["content"] if isinstance(v, dict) and "content" in v else v) for v in values}
    return found


def _add(file: Path, backend: Any, tokens: Iterable[_Added]) -> None:
    from tokenizers import AddedToken

    for t in tokens:
        made = AddedToken(
            t.content,
            lstrip=t.lstrip,
            rstrip=t.rstrip,
            single_word=t.single_word,
            normalized=t.normalized,
            special=t.special,
        )
        (backend.add_special_tokens if t.special else backend.add_tokens)([made])
        if backend.token_to_id(t.content) != t.id:
            raise ConfigError(
                f"{file}: the added token {t.content!r} comes to id {backend.token_to_id(t.content)}, but "
                f"{t.id} is wanted; check tokenizer_config.json"
            )


def _templates(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The chat template, and that for tools where there is one of its own.

    A file goes before the field of tokenizer_config.json, as in transformers.
    """
    named: dict[str, Any] = {}
    beside = {"chat_template": _read(folder / "chat_template.json").get("chat_template")}
    check_fields(beside, folder / "chat_template.json", kinds=_CONFIG)
    found = beside["chat_template"] or config.get("chat_template")
    if isinstance(found, list):
        named = {str(t.get("name")): t.get("template") for t in found if isinstance(t, dict)}
    elif isinstance(found, dict):
        named = dict(found)
    else:
        named["default"] = found
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        named[file.stem] = _read_text(file)
    if (folder / "chat_template.jinja").is_file():
        named["default"] = _read_text(folder / "chat_template.jinja")
    default, tools = (named.get(name) for name in ("default", "tool_use"))
    return default if isinstance(default, str) else None, tools if isinstance(tools, str) else None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise ConfigError(f"{file} cannot be read as UTF-8 ({e}); download it again") from None


def _read(file: Path) -> dict[str, Any]:
    """A JSON object, {} where the file is absent."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{file} cannot be read as JSON ({e}); download it again") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds a {type(found).__name__}, not a JSON object; download it again")
    return found


def _token_id(backend: Any, token: Any) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    found = backend.token_to_id(text) if isinstance(text, str) else None
    return None if found is None else int(found)
