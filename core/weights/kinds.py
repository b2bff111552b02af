"""What a file is that was given as a model and is none, by its first bytes."""

from __future__ import annotations

from pathlib import Path

from core.contract.errors import ConfigError

GGUF = b"GGUF"
WANTED = "give a folder with config.json and safetensors, or a .gguf file"

_FIRST = 512
_SAVE = "save the model with save_pretrained and give that folder"
_UNPACK = "unpack it and give the folder"
# In order: first bytes, what begins so, what to do.
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive, such as torch.save writes; pickles are not read", _SAVE),
    *((bytes((0x80, n)), "a pickle; pickles are not read", _SAVE) for n in (2, 3, 4, 5)),
    (b"\x89HDF\r\n", "an HDF5 file", _SAVE),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "run `git lfs pull` there"),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"\xfd7zXZ", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    *(
        (magic, "a GGML file of the time before GGUF", "convert the model to GGUF, or take its safetensors")
        for magic in (b"lmgg", b"fmgg", b"tjgg", b"algg")
    ),
)


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that begins as GGUF files do, or is called one."""
    return path.is_file() and (path.suffix == ".gguf" or _first(path).startswith(GGUF))


def not_a_model(path: Path) -> ConfigError:
    """The error for a path that is no folder and no GGUF file: what it is, what is wanted, what to do."""
    if not path.exists():
        return ConfigError(f"{path} does not exist; {WANTED}")
    if not path.is_file():
        return ConfigError(f"{path} is neither a folder nor a file; {WANTED}")
    what, remedy = kind_of(path)
    return ConfigError(f"{path} is {what}; {WANTED}: {remedy}")


def kind_of(path: Path) -> tuple[str, str]:
    """What a file is as far as its name and first bytes tell, and what to do, as parts of a sentence."""
    first = _first(path)
    shown = f"(first bytes: {first[:8]!r})"
    if not first:
        return "an empty file", "download it again"
    if path.suffix == ".safetensors" or first[8:10] == b'{"':
        return (
            f"one safetensors file, which lacks the model's configuration {shown}",
            "give the folder that has it, with config.json and the tokenizer",
        )
    for magic, what, remedy in _KINDS:
        if first.startswith(magic):
            return f"{what} {shown}", remedy
    text = first.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return f"a web page {shown}", "download the file itself"
    if text.startswith(b"{"):
        return f"a JSON file {shown}", "give the folder that it is in"
    return f"no model (first bytes: {first[:8]!r})", "check the path, or download the model again"


def _first(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_FIRST)
    except OSError as e:
        raise ConfigError(f"{path} cannot be read ({e}); check who may read it") from None
