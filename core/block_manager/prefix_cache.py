"""PrefixCache: which prefixes are in which blocks.

A node stands for one prefix: its parent's tokens, then its own `base_size` tokens. Nodes are found by a keyed
hash over (parent's hash, own tokens), and believed only if parent and tokens are the very same, so a
collision is a miss, never a hit. Each cache group attaches its block at the node where the block ends; state
groups attach checkpoint slots. A node lives as long as something is attached to it, or a child or a request
needs it.
"""

from __future__ import annotations

import hashlib

from core.block_manager.pool import BlockPool


def chain_digest(key: bytes, parent: bytes, data: bytes) -> bytes:
    """Keyed BLAKE2b (RFC 7693) of a parent's digest and the data that follow it; 16 bytes."""
    return hashlib.blake2b(parent + data, key=key, digest_size=16).digest()


def root_data(salt: str | bytes, adapter: str) -> bytes:
    """What a chain's root stands for; different salts or adapters never give the same bytes.

    A text salt is its UTF-8 bytes.
    """
    raw = salt if isinstance(salt, bytes) else salt.encode(errors="surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + adapter.encode(errors="surrogatepass")


class Node:
    """One prefix. `blocks[g]` is the group's block or checkpoint that ends here, -1 = none."""

    __slots__ = ("attached", "blocks", "children", "data", "digest", "holders", "parent")

    def __init__(self, parent: Node | None, data: bytes, digest: bytes, num_groups: int) -> None:
        self.parent = parent
        self.data = data
        self.digest = digest
        self.blocks = [-1] * num_groups
        self.attached = 0
        self.children = 0
        self.holders = 0

    def ancestor(self, steps: int) -> Node:
        """The node of a prefix that is `steps` nodes shorter."""
        node = self
        for _ in range(steps):
            if node.parent is None:
                return node
            node = node.parent
        return node


class PrefixCache:
    """The tree of known prefixes.

    Attributes:
        base_size: tokens per node.
        pools: one per group, set by the owner.
        owners: per group, the node that each hittable block is attached to.
        bound_group: checkpoints live only as long as this group's block at their node; None = alone.
    """

    def __init__(
        self, base_size: int, num_groups: int, state_groups: list[int], bound_group: int | None, key: bytes
    ) -> None:
        self.base_size = base_size
        self.pools: list[BlockPool] = []
        self.owners: list[dict[int, Node]] = [{} for _ in range(num_groups)]
        self.nodes: dict[bytes, Node] = {}
        self.state_groups = state_groups
        self.bound_group = bound_group
        self.key = key

    # Finding

    def root(self, salt: str | bytes, adapter: str) -> Node | None:
        """The empty prefix of this salt and adapter; None where nothing of it is known."""
        return self._find(None, root_data(salt, adapter))[1]

    def make_root(self, salt: str | bytes, adapter: str) -> Node | None:
        """As `root`, made if need be; None on a hash collision."""
        return self._find_or_make(None, root_data(salt, adapter))

    def walk(self, root: Node, data: bytes, limit: int) -> list[Node]:
        """Known nodes of the prefix with these int32 token bytes, at most `limit` of them, root excluded."""
        step = 4 * self.base_size
        found: list[Node] = []
        node = root
        for start in range(0, min(len(data) // step, limit) * step, step):
            child = self._find(node, data[start : start + step])[1]
            if child is None:
                break
            found.append(child)
            node = child
        return found

    def child(self, parent: Node, data: bytes) -> Node | None:
        """The node after `parent` with these token bytes, made if need be; None on a hash collision."""
        return self._find_or_make(parent, data)

    def _find(self, parent: Node | None, data: bytes) -> tuple[bytes, Node | None]:
        digest = chain_digest(self.key, parent.digest if parent is not None else b"", data)
        node = self.nodes.get(digest)
        if node is None or not self.is_same(node, parent, data):
            return digest, None
        return digest, node

    @staticmethod
    def is_same(node: Node, parent: Node | None, data: bytes) -> bool:
        """Whether a node that was found by its hash is really this prefix."""
        return node.parent is parent and node.data == data

    def _find_or_make(self, parent: Node | None, data: bytes) -> Node | None:
        digest, node = self._find(parent, data)
        if node is not None or digest in self.nodes:
            return node
        node = self.nodes[digest] = Node(parent, data, digest, len(self.owners))
        if parent is not None:
            parent.children += 1
        return node

    # Attaching

    def attach(self, node: Node, group: int, block: int) -> bool:
        """Make a used block of a group hittable at a node; False where either has a partner already."""
        if node.blocks[group] >= 0 or block in self.owners[group]:
            return False
        node.blocks[group] = block
        node.attached += 1
        self.owners[group][block] = node
        self.pools[group].mark(block)
        return True

    def attach_checkpoint(self, node: Node, group: int, slot: int) -> bool:
        """As `attach`, for a state slot; False also where the block that it would be bound to is unknown."""
        if self.bound_group is not None and node.blocks[self.bound_group] < 0:
            return False
        return self.attach(node, group, slot)

    def evicted(self, group: int, block: int) -> None:
        """A pool takes a cached block for other use: forget it, and the checkpoints that are bound to it."""
        node = self.owners[group].pop(block)
        node.blocks[group] = -1
        node.attached -= 1
        if group == self.bound_group:
            self.drop_checkpoints(node)
        self._prune(node)

    def forget(self, node: Node) -> None:
        """Forget the blocks and checkpoints of a node, whoever holds them. The caller holds the node."""
        for group, block in enumerate(node.blocks):
            if block >= 0 and group not in self.state_groups:
                node.blocks[group] = -1
                node.attached -= 1
                del self.owners[group][block]
                self.pools[group].unmark(block)
        self.drop_checkpoints(node)

    def drop_checkpoints(self, node: Node) -> None:
        """Forget all checkpoints of a node."""
        for group in self.state_groups:
            slot = node.blocks[group]
            if slot >= 0:
                node.blocks[group] = -1
                node.attached -= 1
                del self.owners[group][slot]
                self.pools[group].unmark(slot)

    def hold(self, node: Node) -> None:
        """A request continues from this node."""
        node.holders += 1

    def drop(self, node: Node) -> None:
        """It does so no longer."""
        node.holders -= 1
        self._prune(node)

    def _prune(self, node: Node | None) -> None:
        while node is not None and not (node.attached or node.children or node.holders):
            if self.nodes.get(node.digest) is not node:
                return
            del self.nodes[node.digest]
            node = node.parent
            if node is not None:
                node.children -= 1

    def clear(self) -> None:
        """Forget everything. Requests must drop their nodes before."""
        for group, owners in enumerate(self.owners):
            for block in owners:
                self.pools[group].unmark(block)
            owners.clear()
        self.nodes.clear()
