"""An error of another process comes back as the same type with the same sentence."""

from __future__ import annotations

import pytest

from core.contract import errors
from core.contract.errors import CoreError, DeviceError, EngineDead, OutOfMemoryError
from core.executor.failure import Failure
from core.executor.wire import decode, encode

PLAIN = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, CoreError) and kind is not OutOfMemoryError
]


def crossed(error: Exception) -> CoreError:
    try:
        raise error
    except Exception as raised:
        found: Failure = decode(encode(Failure.of(raised, "loading")))
    return found.error(DeviceError)


@pytest.mark.parametrize("kind", PLAIN, ids=lambda k: k.__name__)
def test_errors_of_the_contract_keep_type_and_sentence(kind: type[CoreError]) -> None:
    found = crossed(kind("the thing is 3; make it 4"))
    assert type(found) is kind
    assert str(found) == "the thing is 3; make it 4"
    assert any("loading" in note and "Traceback" in note for note in found.__notes__)


def test_what_did_not_fit_in_memory_is_kept() -> None:
    error = OutOfMemoryError("the KV cache", 2**30, None)
    found = crossed(error)
    assert isinstance(found, OutOfMemoryError)
    assert (str(found), found.wanted_bytes, found.free_bytes) == (str(error), 2**30, None)


def test_other_errors_become_what_the_caller_says_and_name_their_type() -> None:
    found = crossed(ZeroDivisionError("by zero"))
    assert type(found) is DeviceError
    assert str(found) == "ZeroDivisionError: by zero"


def test_a_name_that_is_no_error_is_not_looked_up() -> None:
    failure = Failure(kind="annotations", sentence="x", memory=(), trace="", phase="")
    assert type(failure.error(EngineDead)) is EngineDead
