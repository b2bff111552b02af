"""Which parameters stay in their quantization scheme, what the loader gives of them, and that a model
computes
the same with them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from core.contract.types import PackRequest
from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.executor.rank import read_model
from core.parallel.sharding import Shard
from core.sampling.params import SamplingParams
from core.weights import open_checkpoint
from core.weights.checkpoint import BLOCKS, PackedCheckpoint
from core.weights.loader import load_model, weight_bytes

from . import gguf_models as models

ALL = tuple(BLOCKS)


@pytest.fixture(scope="module")
def gguf_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Kind], Path]:
    """A quantized file of a case of `gguf_models`."""

    def get(name: str, kind: Kind) -> Path:
        folder = tmp_path_factory.mktemp(name)
        config, tensors = models.original(name, folder)
        models.to_gguf(folder / "m.gguf", name, config, tensors, kind)
        return folder / "m.gguf"

    return get


def requests(path: Path, schemes: tuple[str, ...], shard: Shard | None = None) -> list[PackRequest]:
    """What `pack` is given of a file, in order; with the estimate of its bytes checked."""
    checkpoint = open_checkpoint(path)
    definition, c = read_model(checkpoint)
    found: list[PackRequest] = []
    load_model(
        definition, c, checkpoint, found.append, dtype="float32", max_length=8, shard=shard, schemes=schemes
    )
    expected = weight_bytes(definition, c, "float32", shard or Shard(), checkpoint, schemes)
    sizes = [r.array.size * (1 if r.scheme else 4) for r in found if r.uses != ("constant",)]
    assert sum(sizes) == expected
    return found


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0], ids=lambda k: k.name)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3"])
def test_blocks_decode_to_what_is_packed_otherwise(
    name: str, kind: Kind, gguf_of: Callable[[str, Kind], Path]
) -> None:
    path = gguf_of(name, kind)
    kept, plain = requests(path, ALL), requests(path, ())
    assert not any(r.scheme for r in plain)
    schemes = {r.name: r.scheme for r in kept}
    assert set(schemes.values()) == {"", kind.name.lower()}
    for a, b in zip(kept, plain, strict=True):
        assert (a.name, a.uses, a.dtype) == (b.name, b.uses, b.dtype)
        values = dequantize(np.ascontiguousarray(a.array), kind) if a.scheme else a.array
        assert np.array_equal(values, b.array), a.name
    uses = {use for r in kept if r.scheme for use in r.uses}
    assert uses == {"embed", "linear"} | ({"experts"} if name != "llama" else set())


def test_a_matrix_of_which_heads_are_picked_is_decoded(tmp_path: Path) -> None:
    """Attention multiplies by the halves of kv_b_proj in a way of its own."""
    config, tensors = models.original("deepseek_v2", tmp_path)
    path = tmp_path / "m.gguf"
    models.to_gguf(path, "deepseek_v2", config, tensors, Kind.Q8_0, whole_kv_b=True)
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, PackedCheckpoint) and checkpoint.scheme(name) == "q8_0"
    assert [r.scheme for r in requests(path, ALL) if r.name == name] == ["", ""]


@pytest.mark.parametrize(
    ("kind", "schemes"), [(Kind.Q4_1, ("q4_0", "q8_0")), (Kind.Q5_0, ALL), (Kind.F16, ALL)]
)
def test_a_scheme_that_is_not_asked_for_is_decoded(
    kind: Kind, schemes: tuple[str, ...], gguf_of: Callable[[str, Kind], Path]
) -> None:
    assert not any(r.scheme for r in requests(gguf_of("qwen2", kind), schemes))


def test_parts_of_different_schemes_are_decoded_together(
    gguf_of: Callable[[str, Kind], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = gguf_of("qwen2", Kind.Q8_0)
    from core.weights.gguf import GGUFCheckpoint

    own = GGUFCheckpoint.scheme
    monkeypatch.setattr(
        GGUFCheckpoint,
        "scheme",
        lambda self, n: "" if n.endswith("0.self_attn.v_proj.weight") else own(self, n),
    )
    found = {r.name: r.scheme for r in requests(path, ALL)}
    assert found["model.layers.0.self_attn.q_proj.weight"] == ""
    assert found["model.layers.1.self_attn.q_proj.weight"] == "q8_0"


def test_a_share_stays_packed_where_it_is_cut_between_blocks(
    gguf_of: Callable[[str, Kind], Path],
) -> None:
    """Columns of o_proj are cut to 32 of 64, and of down_proj to 64 of 128: whole blocks."""
    path = gguf_of("llama", Kind.Q4_0)
    whole = {r.name: r for r in requests(path, ALL)}
    shares = [{r.name: r for r in requests(path, ALL, Shard(i, 2))} for i in range(2)]
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        assert all(share[name].scheme == "q4_0" for share in shares)
        joined = np.concatenate([share[name].array for share in shares], -1)
        assert joined.dtype == np.uint8
        assert np.array_equal(joined, whole[name].array)


def test_a_share_cut_through_a_block_is_decoded(gguf_of: Callable[[str, Kind], Path]) -> None:
    """Of four ranks each has 16 of o_proj's 64 columns."""
    path = gguf_of("qwen2", Kind.Q4_0)
    found = {r.name: r for r in requests(path, ALL, Shard(1, 4))}
    plain = {r.name: r for r in requests(path, (), Shard(1, 4))}
    name = "model.layers.0.self_attn.o_proj.weight"
    assert found[name].scheme == "" and np.array_equal(found[name].array, plain[name].array)
    assert found["model.layers.0.mlp.down_proj.weight"].scheme == "q4_0"


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_model_computes_the_same_with_packed_weights(
    name: str, gguf_of: Callable[[str, Kind], Path]
) -> None:
    pytest.importorskip("torch")
    path = gguf_of(name, Kind.Q8_0)
    found = {q: generated(path, q) for q in ("packed", "dequantized")}
    assert found["packed"][0] == found["dequantized"][0] and len(set(found["packed"][0])) > 3
    assert found["packed"][1] < 0.5 * found["dequantized"][1]


def generated(path: Path, quantized: Any) -> tuple[list[int], int]:
    """Greedy tokens of two prompts on backend cpu, and the bytes of weights."""
    config = EngineConfig(model=path, backend="cpu", quantized=quantized, max_model_len=64, max_requests=2)
    engine = Engine(config)
    try:
        tokens: list[int] = []
        for i, prompt in enumerate([[5, 9, 33, 17, 60], [1] * 20]):
            engine.add(str(i), prompt, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
            while engine.has_work:
                tokens += [event.token for event in engine.step() if event.token >= 0]
        return tokens, engine.report.weight_bytes
    finally:
        engine.close()
