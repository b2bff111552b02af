"""A field bound to a capability is refused for every backend that has not declared it."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from typing import Any

import pytest

import core.contract
from core.contract.errors import UnsupportedError
from core.contract.opspecs import AttentionSpec, QScale
from core.contract.spec import AttentionRules, BackendSpec, BatchRules, check_capabilities, needs
from core.contract.types import Bucket, CachePlan, Outputs, PackRequest

BARE = BackendSpec(name="bare", contract=(0, 1), summary="", framework="numpy")


def records() -> list[type]:
    """Every dataclass of the contract."""
    found: dict[str, type] = {}
    for info in pkgutil.iter_modules(core.contract.__path__):
        module = importlib.import_module(f"core.contract.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and is_dataclass(value):
                found[f"{value.__module__}.{value.__name__}"] = value
    return [found[name] for name in sorted(found)]


CASES = [(record, f) for record in records() for f in fields(record) if "capability" in f.metadata]
IDS = [f"{record.__name__}.{f.name}" for record, f in CASES]


def make(record: type, name: str, value: object) -> Any:
    """A record with one field set, and something in each field that has no default."""
    given = {
        f.name: object() for f in fields(record) if f.default is MISSING and f.default_factory is MISSING
    }
    return record(**{**given, name: value})


def other_value(f: Field[Any]) -> object:
    """A value that differs from the field's default, as its type would have it."""
    for type_name, value in (
        ("bool", not f.default),
        ("tuple", (3,)),
        ("str", "int4"),
        ("QScale", QScale(factor=0.1, floor=8)),
    ):
        if str(f.type).startswith(type_name):
            return value
    return 7


def declaring(path: str, value: object) -> BackendSpec:
    """The bare backend with one capability more."""
    head, _, tail = path.partition(".")
    if not tail:
        declared = (value,) if isinstance(getattr(BARE, head), tuple) else True
        return replace(BARE, **{head: declared})
    part = getattr(BARE, head)
    declared = (value,) if isinstance(getattr(part, tail), tuple) else True
    return replace(BARE, **{head: replace(part, **{tail: declared})})


def test_there_are_fields_bound_to_capabilities() -> None:
    assert len(CASES) >= 9


@pytest.mark.parametrize(("record", "f"), CASES, ids=IDS)
def test_a_field_is_refused_unless_its_capability_is_declared(record: type, f: Field[Any]) -> None:
    value = other_value(f)
    capability = f.metadata["capability"]
    made = make(record, f.name, value)
    with pytest.raises(UnsupportedError) as refused:
        check_capabilities(BARE, made)
    for part in (f"{record.__name__}.{f.name}", repr(value), "'bare'", capability):
        assert part in str(refused.value)
    check_capabilities(declaring(capability, value), made)


@pytest.mark.parametrize(("record", "f"), CASES, ids=IDS)
def test_a_default_needs_no_capability(record: type, f: Field[Any]) -> None:
    check_capabilities(BARE, make(record, f.name, f.default))


@pytest.mark.parametrize(("record", "f"), CASES, ids=IDS)
def test_another_capability_does_not_help(record: type, f: Field[Any]) -> None:
    value = other_value(f)
    others = {f.metadata["capability"] for _, f in CASES} - {f.metadata["capability"]}
    spec = BARE
    for path in others:
        head, _, tail = path.partition(".")
        if tail:
            spec = replace(spec, **{head: replace(getattr(spec, head), **{tail: True})})
        elif isinstance(getattr(spec, head), bool):
            spec = replace(spec, **{head: True})
    with pytest.raises(UnsupportedError):
        check_capabilities(spec, make(record, f.name, value))


def test_a_nested_record_is_checked_and_named_by_its_path() -> None:
    bucket = Bucket(
        tokens=1,
        requests=1,
        widths=(1,),
        kind="decode",
        max_query=1,
        max_seq=1,
        outputs=Outputs(hidden_layers=(2,)),
    )
    with pytest.raises(UnsupportedError, match=r"^Bucket\.outputs\.hidden_layers is \(2,\)"):
        check_capabilities(BARE, bucket)
    check_capabilities(replace(BARE, batch=BatchRules(hidden_states=True)), bucket)


def test_a_tuple_capability_holds_for_its_values_only() -> None:
    spec = replace(BARE, quantization=("int4",))
    request = PackRequest(array=None, uses=("linear",), dtype="float32", name="w", scheme="int4")
    check_capabilities(spec, request)
    with pytest.raises(UnsupportedError, match="int8"):
        check_capabilities(spec, replace(request, scheme="int8"))


def test_a_capability_of_one_feature_leaves_others_refused() -> None:
    spec = replace(BARE, attention=AttentionRules(window=True))
    attention = AttentionSpec(
        scale=1.0, num_heads=1, num_kv_heads=1, head_size=8, v_head_size=8, window=4, soft_cap=30.0
    )
    with pytest.raises(UnsupportedError, match=r"attention\.soft_cap"):
        check_capabilities(spec, attention)


def test_every_capability_names_a_field_of_the_backend_spec() -> None:
    for _, f in CASES:
        declaring(f.metadata["capability"], other_value(f))


def test_a_record_without_capabilities_passes() -> None:
    @dataclass(frozen=True)
    class Plain:
        size: int = 0

    check_capabilities(BARE, Plain(3))
    check_capabilities(BARE, CachePlan(layers=(), groups=(), group_of=(), max_requests=1))
    check_capabilities(BARE, 5)


def test_a_new_field_is_guarded_by_its_metadata_alone() -> None:
    @dataclass(frozen=True)
    class Grown:
        fast: bool = field(default=False, metadata=needs("host_batch"))

    with pytest.raises(UnsupportedError, match=r"Grown\.fast is True"):
        check_capabilities(BARE, Grown(True))
    check_capabilities(replace(BARE, host_batch=True), Grown(True))
