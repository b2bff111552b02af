"""A file that was given as a model and is none is told what it is, what is wanted, and what to do."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from core.contract.errors import ConfigError, CoreError, WeightError
from core.tokenizer import load_tokenizer
from core.weights.checkpoint import open_checkpoint
from tests.weights import tiny_gguf as tiny


def zipped(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"x")
    return path.read_bytes()


FILES = {
    "safetensors": (save({"w": np.ones(3, np.float32)}), "one safetensors file", "folder that has it"),
    "pickle": (pickle.dumps([1]), "a pickle", "save_pretrained"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid x", "a pointer of Git LFS", "git lfs pull"),
    "page": (b"\n<!DOCTYPE html><html>", "a web page", "download the file itself"),
    "json": (b'{"architectures": []}', "a JSON file", "folder that it is in"),
    "gzip": (b"\x1f\x8b\x08\0", "a gzip archive", "unpack it"),
    "ggml": (b"tjgg\x03\0\0\0", "a GGML file of the time before GGUF", "convert the model"),
    "empty": (b"", "an empty file", "download it again"),
    "text": (b"some text", "no model (first bytes: b'some tex')", "check the path"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_model_is_told_what_it_is(case: str, tmp_path: Path) -> None:
    content, what, remedy = FILES[case]
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    for read in (open_checkpoint, load_tokenizer):
        with pytest.raises(ConfigError) as caught:
            read(path)
        for words in (f"{path} is {what}", "give a folder with config.json and safetensors", remedy):
            assert words in str(caught.value)
        assert repr(content[:8])[2:-1] in str(caught.value)


def test_a_zip_archive_is_told_as_one(tmp_path: Path) -> None:
    zipped(tmp_path / "model.pt")
    with pytest.raises(ConfigError, match=r"is a zip archive, such as torch\.save writes"):
        load_tokenizer(tmp_path / "model.pt")


@pytest.mark.parametrize("case", [case for case in FILES if case != "empty"])
def test_the_same_is_told_of_a_file_that_is_only_called_gguf(case: str, tmp_path: Path) -> None:
    content, what, remedy = FILES[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    for read in (open_checkpoint, load_tokenizer):
        with pytest.raises(WeightError) as caught:
            read(path)
        assert f"not b'GGUF': it is {what}" in str(caught.value) and remedy in str(caught.value)


def test_a_gguf_file_is_known_by_its_first_bytes_whatever_its_name(tmp_path: Path) -> None:
    tiny.write(tmp_path / "blob")
    assert open_checkpoint(tmp_path / "blob").names()
    with pytest.raises(CoreError, match="tokenizer") as caught:
        load_tokenizer(tmp_path / "blob")
    assert "give a folder" not in str(caught.value), "the header was not read"


def test_a_path_that_is_neither_file_nor_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent does not exist; give a folder"):
        load_tokenizer(tmp_path / "absent")
