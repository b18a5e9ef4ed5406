"""The paged KV cache: its memory, and the bookkeeping of its blocks.

`KVCache` is memory only. `BlockPool` is bookkeeping only: ids, reference counts and content hashes, no arrays.
A block holds the keys and values of `BLOCK_TOKENS` tokens of one sequence, in every layer.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from pyllm import _cpu
from pyllm.ops import Array, host_memory
from pyllm.spec import ModelSpec

BLOCK_TOKENS: int = _cpu.BLOCK_TOKENS
CACHE_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),  # with a bfloat16 scale for each token and head
}


class KVCache:
    """`blocks` blocks for every layer of a model, in memory that ``allocate(shape, dtype)`` gives.

    With `shared`, layers of one shape have the same memory: for models that read keys and values only in the step that
    wrote them, layer after layer. With `cross` they hold what cross attention makes of a source, once for each source.
    """

    def __init__(
        self,
        spec: ModelSpec,
        blocks: int,
        dtype: str,
        allocate: Callable[[Sequence[int], np.dtype[Any]], Array] = host_memory,
        shared: bool = False,
        *,
        cross: bool = False,
    ) -> None:
        self.dtype = dtype
        self.blocks = blocks
        self.layers: list[Array] = []
        known: dict[tuple[int, ...], Array] = {}
        for block in _block_shapes(spec, dtype, cross):
            if not shared or block not in known:
                known[block] = allocate((blocks, *block), CACHE_DTYPES[dtype])
            self.layers.append(known[block])

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (from, to), in this order."""
        for layer in self.layers:
            for source, target in pairs:
                layer[target] = layer[source]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, memory that several share counted once."""
        return sum({id(layer): layer.nbytes for layer in self.layers}.values())

    @staticmethod
    def block_bytes(spec: ModelSpec, dtype: str, shared: bool = False, *, cross: bool = False) -> int:
        """Bytes of one block over all layers."""
        shapes = _block_shapes(spec, dtype, cross)
        elements = sum(int(np.prod(shape)) for shape in (set(shapes) if shared else shapes))
        return elements * int(CACHE_DTYPES[dtype].itemsize)


def _block_shapes(spec: ModelSpec, dtype: str, cross: bool) -> list[tuple[int, int, int]]:
    """Of one block in every layer: [kv_heads, keys and values, elements], an int8 token's scale taking two."""
    pad, scale = _cpu.HEAD_PAD, 2 if dtype == "int8" else 0
    attentions = [b.cross if cross else b.attention for b in spec.blocks]
    return [(a.kv_heads, 2, BLOCK_TOKENS * (-(-a.head_dim // pad) * pad + scale)) for a in attentions if a is not None]


def blocks_for(tokens: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-tokens // BLOCK_TOKENS)


class BlockPool:
    """Hands out block numbers and shares blocks of equal content.

    A block is free (count 0) or held by one or more sequences. A full block is known by the hash of all tokens up to
    its end; it stays findable when it becomes free, until its number is handed out again, least recently freed first.
    """

    def __init__(self, blocks: int) -> None:
        self.size = blocks
        self._count = [0] * blocks
        self._hash: list[bytes | None] = [None] * blocks
        self._by_hash: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict((i, None) for i in range(blocks))
        self.copies: list[tuple[int, int]] = []  # (from, to), to be made in this order before the next step writes

    @property
    def free(self) -> int:
        """Number of blocks that can be handed out."""
        return len(self._free)

    def take(self, after: int = -1) -> int:
        """A free block, now held once; its old content is forgotten.

        The one behind block `after`, the sequence's last, where that is free and holds nothing to find again: memory is
        read faster in order.
        """
        block = after + 1
        if after >= 0 and block in self._free and self._hash[block] is None:
            del self._free[block]
        else:
            block, _ = self._free.popitem(last=False)
        assert self._count[block] == 0
        self._forget(block)
        self._count[block] = 1
        return block

    def share(self, blocks: Sequence[int]) -> None:
        """Hold each of these held blocks once more."""
        for block in blocks:
            assert self._count[block] > 0
            self._count[block] += 1

    def shared(self, block: int) -> bool:
        """Whether more than one holds the block: then nobody may write to it."""
        return self._count[block] > 1

    def take_copy(self, block: int) -> int:
        """A block of one's own with the content of a shared one, whose hold is dropped; `copies` has what to copy."""
        assert self.shared(block)
        own = self.take()
        self._count[block] -= 1
        self.copies.append((block, own))
        return own

    def give_back(self, blocks: Sequence[int]) -> None:
        """Drop one hold on each block. The last ones of a sequence are reused first: its beginning is shared most."""
        for block in reversed(blocks):
            assert self._count[block] > 0
            self._count[block] -= 1
            if self._count[block] == 0:
                self._free[block] = None
                if self._hash[block] is None:  # nothing to find in it again
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, key: bytes) -> None:
        """Make a full block findable by the hash of its content; of equal ones the first stays the one found."""
        assert self._count[block] > 0
        if key not in self._by_hash and self._hash[block] is None:
            self._hash[block] = key
            self._by_hash[key] = block

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks of the longest known prefix of `keys`, each now held once more."""
        found: list[int] = []
        for key in keys:
            block = self._by_hash.get(key)
            if block is None:
                break
            if self._count[block] == 0:
                del self._free[block]
            self._count[block] += 1
            found.append(block)
        return found

    def _forget(self, block: int) -> None:
        key = self._hash[block]
        if key is not None:
            del self._by_hash[key]
            self._hash[block] = None

    def check(self) -> None:
        """Assert the invariants; for tests."""
        assert all(count >= 0 for count in self._count)
        assert {i for i, count in enumerate(self._count) if count == 0} == set(self._free)
        assert all(self._hash[block] == key for key, block in self._by_hash.items())
        assert sum(key is not None for key in self._hash) == len(self._by_hash)


def chain_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Content hash of a full block: of its tokens and all before them (`parent`; for the first a salt, or nothing)."""
    return hashlib.blake2b(parent + np.asarray(tokens, np.int32).tobytes(), digest_size=16).digest()
