"""Between numpy and torch: dtype names, and arrays with numpy's bfloat16 (of ml_dtypes), bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from core.contract.errors import UnsupportedError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def torch_dtype(name: str, what: str) -> torch.dtype:
    """The torch dtype named `name`.

    Raises:
        UnsupportedError: this backend does not compute in it; names `what` wanted it.
    """
    if name not in DTYPES:
        raise UnsupportedError(
            f"{what} has dtype {name!r}; backend 'cpu' has {', '.join(DTYPES)}: choose one of them"
        )
    return DTYPES[name]


def to_numpy(x: torch.Tensor) -> npt.NDArray[Any]:
    """A host copy of equal dtype and bits."""
    x = x.detach().contiguous()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
    return x.numpy().copy()


def to_torch(array: npt.ArrayLike, dtype: torch.dtype) -> torch.Tensor:
    """A new contiguous tensor of `dtype`; bits are kept where the dtypes are equal."""
    host = np.ascontiguousarray(array).reshape(np.shape(array))
    if host.dtype == ml_dtypes.bfloat16:
        source = torch.from_numpy(host.view(np.int16).copy()).view(torch.bfloat16)
        return source.to(dtype)
    if not host.flags.writeable:  # torch warns about read-only memory that it shares
        host = host.copy()
    return torch.from_numpy(host).to(dtype, copy=True)


def index(values: Sequence[int]) -> torch.Tensor:
    """int64 [n], for indexing on the host."""
    return torch.as_tensor(list(values), dtype=torch.int64)
