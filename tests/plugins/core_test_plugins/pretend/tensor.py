"""Tensors of the pretend device, and the only two doors to it: `to_device` and `to_host`.

A pretend tensor holds a CPU tensor and says that it lives elsewhere. Refused are: an op that mixes it with a
host tensor, and everything that would make the host wait for the device in the middle of a step (`item`, a
branch on a value, a boolean mask as index, a copy to the host).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

from core.contract.errors import DeviceError

NAME = "pretend"
DEVICE = f"{NAME}:0"
READS_BACK = frozenset(
    f"aten::{n}" for n in ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal")
)
_library: list[torch.library.Library] = []


class PretendTensor(torch.Tensor):
    """A tensor on the pretend device. `held`: the host memory that stands for the device's."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> PretendTensor:
        """A tensor of equal shape, strides and dtype on the device."""
        made: PretendTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """Shape and dtype; no values, since those are on the device."""
        return f"PretendTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an op on what the tensors hold, or refuse it."""
        kwargs = dict(kwargs or {})
        name: str = func._schema.name
        _refuse_reads(name, args, kwargs)
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and not isinstance(x, PretendTensor) and x.dim() > 0:
                raise DeviceError(
                    f"{name} mixes {DEVICE} with a host tensor {tuple(x.shape)}; bring it to the device first"
                )
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if func._schema.is_mutable and name.endswith("_"):
            return args[0]
        if "out" in kwargs:
            return kwargs["out"]
        return tree_map(lambda x: PretendTensor(x) if isinstance(x, torch.Tensor) else x, result)


def _refuse_reads(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    masks = name in ("aten::index", "aten::index_put_", "aten::index_put") and any(
        isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1]
    )
    target = kwargs.get("device")
    leaves = name == "aten::_to_copy" and target is not None and torch.device(target).type != NAME
    if name in READS_BACK or masks or leaves:
        raise DeviceError(
            f"{name} makes the host wait for {DEVICE} inside a step; keep the value on the device"
        )


def _held(x: Any) -> Any:
    return x.held if isinstance(x, PretendTensor) else x


def set_up() -> None:
    """Give torch the device, once in a process.

    Raises:
        DeviceError: another library has given torch its one private device.
    """
    if _library:
        return
    taken = torch._C._get_privateuse1_backend_name()
    if taken != "privateuseone":
        raise DeviceError(
            f"torch's private device is called {taken!r} in this process already; use a fresh process"
        )
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    _library.append(library)


def _empty(size: Any, dtype: Any = None, layout: Any = None, **ignored: Any) -> PretendTensor:
    return PretendTensor(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **ignored: Any) -> PretendTensor:
    return PretendTensor(torch.empty_strided(size, stride, dtype=dtype))


def to_device(host: torch.Tensor) -> PretendTensor:
    """A copy on the device."""
    return PretendTensor(host.clone())


def to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy on the host.

    Raises:
        DeviceError: it is on the host already, so something was not computed on the device.
    """
    if not isinstance(x, PretendTensor):
        raise DeviceError(f"a tensor {tuple(x.shape)} was computed on the host, not on {DEVICE}")
    return x.held.clone()
