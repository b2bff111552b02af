"""Prints to standard output whatever it does, at import too."""

from __future__ import annotations

import os
from typing import Any

from whole import Whole

from core.contract.hookspecs import hookimpl

print("hello from the vendor's library")


class Talks(Whole):
    """See above."""

    @hookimpl
    def core_ops(self, request: Any) -> Any:
        print('{"id": "L2/attend/x", "status": "pass"}')
        os.write(1, b"and from its driver\n")
        return super().core_ops(request)


backend = Talks("talks")
