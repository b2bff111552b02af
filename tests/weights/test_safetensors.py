"""Safetensors folders: values, slices, shards, and files that lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core.contract.errors import ConfigError, WeightError
from core.weights import Checkpoint, open_checkpoint

DTYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.uint8, np.bool_)


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    """One tensor per dtype and rank, values that differ everywhere."""
    rng = np.random.default_rng(0)
    made = {f"model.{np.dtype(d).name}": rng.integers(0, 90, (6, 5)).astype(d) for d in DTYPES}
    return made | {
        "model.cube": rng.standard_normal((2, 3, 4)).astype(np.float32),
        "model.vector": np.arange(7, dtype=np.float32),
        "model.scalar": np.array(3.0, np.float32),
        "model.empty": np.zeros((0, 4), np.float32),
    }


def write_folder(folder: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> Path:
    """A folder with one file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "sizes": [1, 2]}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_shards(folder: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> Path:
    """The same in two files and an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    names = sorted(tensors)
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.mark.parametrize("write", [write_folder, write_shards])
def test_every_tensor_reads_as_it_was_written(tmp_path: Path, write: Callable[..., Path]) -> None:
    tensors = arrays()
    found: Checkpoint = open_checkpoint(write(tmp_path / "m", tensors))
    assert set(found.names()) == set(tensors)
    for name, array in tensors.items():
        read = found.read(name)
        assert (found.shape(name), found.dtype(name), found.nbytes(name)) == (
            array.shape,
            array.dtype,
            array.nbytes,
        )
        assert read.dtype == array.dtype and read.shape == array.shape
        assert read.tobytes() == array.tobytes()


def test_a_slice_equals_that_slice_of_the_whole(tmp_path: Path) -> None:
    tensors = arrays()
    found = open_checkpoint(write_folder(tmp_path / "m", tensors))
    for name, index in [
        ("model.bfloat16", (slice(2, 5), slice(1, 3))),
        ("model.float32", (slice(None), slice(4, None))),
        ("model.cube", (slice(1, 2), slice(0, 3), slice(2, 2))),
        ("model.vector", (slice(3, 100),)),
        ("model.empty", (slice(0, 0), slice(1, 2))),
    ]:
        part = found.read(name, index)
        assert part.shape == tensors[name][index].shape
        assert part.tobytes() == tensors[name][index].tobytes()


def test_tensors_need_no_alignment(tmp_path: Path) -> None:
    write_folder(tmp_path, {})
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (3 - len(header) % 4)
    assert len(header) % 4 == 3
    data = np.array([1.5, -2], "<f4").tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert open_checkpoint(tmp_path).read("x").tolist() == [1.5, -2]


def test_arrays_outlive_the_checkpoint_and_reading_afterwards_is_refused(tmp_path: Path) -> None:
    found = open_checkpoint(write_folder(tmp_path / "m", arrays()))
    vector = found.read("model.vector")
    found.close()
    found.close()
    assert vector.tolist() == list(range(7))
    with pytest.raises(WeightError, match="closed"):
        found.read("model.vector")


def test_config_is_a_copy_each_time(tmp_path: Path) -> None:
    found = open_checkpoint(write_folder(tmp_path / "m", arrays()))
    found.config()["sizes"].append(3)
    assert found.config() == {"model_type": "llama", "sizes": [1, 2]}


@pytest.mark.parametrize("call", ["shape", "dtype", "nbytes", "read"])
def test_a_missing_tensor_is_named_with_the_path(tmp_path: Path, call: str) -> None:
    found = open_checkpoint(write_folder(tmp_path / "m", arrays()))
    with pytest.raises(WeightError, match=r"m has no tensor 'model\.absent'"):
        getattr(found, call)("model.absent")


@pytest.mark.parametrize("index", [(slice(0, 1),), (slice(0, 1), slice(0, 4, 2))])
def test_an_index_must_fit_the_tensor(tmp_path: Path, index: tuple[slice, ...]) -> None:
    found = open_checkpoint(write_folder(tmp_path / "m", arrays()))
    with pytest.raises(WeightError, match="cannot be cut"):
        found.read("model.float32", index)


def _header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def _set(key: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: _header(folder, lambda h: h["model.float32"].__setitem__(key, value))


def _share(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        first, last = header["model.int32"]["data_offsets"]
        header["model.float32"]["data_offsets"] = [first, last]

    _header(folder, change)


def _shift(folder: Path) -> None:
    """Every tensor four bytes further on, and four bytes more."""

    def change(header: dict[str, Any]) -> None:
        for entry in header.values():
            entry["data_offsets"] = [n + 4 for n in entry["data_offsets"]]

    _header(folder, change)
    _append(folder)


def _append(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as f:
        f.write(b"abcd")


def _twice(folder: Path) -> None:
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entry = json.dumps(json.loads(raw[8 : 8 + length])["model.float32"]).encode()
    text = raw[8 : 8 + length].rstrip()[:-1] + b',"model.float32":' + entry + b"}"
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def _cut(count: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:count])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("shape", [6, 6]), r"'model\.float32' of shape \(6, 6\) in F32 takes 144 bytes.*span 120"),
        (_set("shape", [-6, -5]), r"'model\.float32' of shape \(-6, -5\)"),
        (_set("dtype", "F4"), r"'model\.float32' has dtype 'F4'"),
        (
            _set("data_offsets", [10**9, 10**9 + 120]),
            r"'model\.float32' ends at byte 10\d+, but the file has",
        ),
        (_set("data_offsets", None), "data_offsets are wanted"),
        (_set("shape", [6.0, 5]), "data_offsets are wanted"),
        (_set("shape", ["6", 5]), "data_offsets are wanted"),
        (
            _share,
            r"'model\.\w+' begins at byte \d+, but byte \d+ was wanted: it shares bytes with tensor",
        ),
        (_shift, r"begins at byte \d+, but byte \d+ was wanted: it leaves a gap after"),
        (_append, r"ends at byte \d+; the rest belongs to no tensor"),
        (_twice, r"'model\.float32' 2 times"),
        (_write("model.safetensors", (10**5).to_bytes(8, "little") + b"[" * 10**5), "nested too deep"),
        (_cut(-1), "truncated"),
        (_cut(100), "truncated"),
        (_cut(3), "truncated"),
        (_write("model.safetensors", (4).to_bytes(8, "little") + b"{][}"), "not JSON"),
        (_write("model.safetensors", (2).to_bytes(8, "little") + b"[]"), "not a JSON object"),
    ],
)
def test_a_file_that_lies_is_refused_when_opened(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    change(write_folder(tmp_path / "m", arrays()))
    with pytest.raises(WeightError, match=message) as caught:
        open_checkpoint(tmp_path / "m")
    assert str(tmp_path / "m" / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("model.extra", "absent.safetensors", "not a file of"),
        ("model.extra", "../model.safetensors", "not a file of"),
        ("model.extra", 7, "not a file of"),
        ("model.extra", "model-00001-of-00002.safetensors", r"has no tensor 'model\.extra'"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, name: str, file: Any, message: str) -> None:
    folder = write_shards(tmp_path / "m", arrays())
    (tmp_path / "model.safetensors").write_bytes(b"")
    index = folder / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"][name] = file
    index.write_text(json.dumps(found))
    with pytest.raises(WeightError, match=message) as caught:
        open_checkpoint(folder)
    assert name in str(caught.value)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", arrays())
    shards = sorted(folder.glob("*.safetensors"))
    here, there = (load_file(s) for s in shards)
    name = min(here)
    save_file({**there, name: here[name]}, shards[1])
    with pytest.raises(WeightError, match=f"has tensor '{name}', which .* has too") as caught:
        open_checkpoint(folder)
    assert all(s.name in str(caught.value) for s in shards)


def test_what_a_shard_holds_beside_the_index_is_found_too(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", arrays())
    shard = next(folder.glob("*.safetensors"))
    save_file({**load_file(shard), "model.more": np.ones(2, np.float32)}, shard)
    found = open_checkpoint(folder)
    assert "model.more" in found.names() and found.source("model.more") == shard


def test_a_path_that_is_no_model_says_what_is(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / "half").mkdir()
    for path in (tmp_path / "absent", tmp_path / "x.bin", tmp_path / "half"):
        with pytest.raises(ConfigError, match=r"safetensors|complete model folder"):
            open_checkpoint(path)
    (tmp_path / "half" / "config.json").write_text("{}")
    with pytest.raises(WeightError, match=r"neither model\.safetensors nor"):
        open_checkpoint(tmp_path / "half")


@pytest.mark.parametrize(
    "file", ["model-00002-of-00002.safetensors", "../model.safetensors", "x" * 5000, 7, None, ""]
)
def test_an_index_beside_a_single_file_names_no_absent_file(tmp_path: Path, file: Any) -> None:
    write_folder(tmp_path, {"a": np.zeros(3, np.float32)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert set(open_checkpoint(tmp_path).names()) == {"a"}
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": file}}))
    words = r"index\.json places tensor 'b' in .*, which is not a file of .* wanted; download that shard"
    with pytest.raises(WeightError, match=words) as caught:
        open_checkpoint(tmp_path)
    assert repr(file)[:100] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("where", [None, 7, [], {}, "model.safetensors", ["a"]])
def test_a_weight_map_of_another_kind_is_refused_by_file(tmp_path: Path, where: Any, single: bool) -> None:
    if single:
        write_folder(tmp_path, {"a": np.zeros(3, np.float32)})
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    words = r"model\.safetensors\.index\.json: weight_map is (.*), but an object .* wanted; download"
    with pytest.raises(WeightError, match=words):
        open_checkpoint(tmp_path)
