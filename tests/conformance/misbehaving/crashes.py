"""Its attention kernel ends badly: os.abort()."""

from __future__ import annotations

import os
from typing import Any

from whole import Whole

from backends.cpu_reference.ops import ReferenceOps
from core.contract.hookspecs import hookimpl


class Ending(ReferenceOps):
    """Attention that does not come back."""

    def attend(self, *arguments: Any, **named: Any) -> Any:
        os.abort()


class Ends(Whole):
    """See above."""

    @hookimpl
    def core_ops(self, request: Any) -> Any:
        return Ending(request.dtype)


backend = Ends("crashes")
