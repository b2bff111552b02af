"""The block manager's error."""

from __future__ import annotations


class BlockManagerError(RuntimeError):
    """A call broke the block manager's rules, or its books do not add up.

    The message names the thing, what was found and what was wanted.
    """
