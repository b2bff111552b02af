"""Blocks and state slots: who holds which, what the prefix cache keeps, and what may be reused when."""

from core.block_manager.errors import BlockManagerError
from core.block_manager.manager import BlockManager
from core.block_manager.records import BlockCopy, BlockMetrics, CacheGroup, GroupMetrics, PrefixHit

__all__ = [
    "BlockCopy",
    "BlockManager",
    "BlockManagerError",
    "BlockMetrics",
    "CacheGroup",
    "GroupMetrics",
    "PrefixHit",
]
