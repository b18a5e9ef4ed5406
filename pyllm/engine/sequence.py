"""One running completion: its tokens and what of them is in the cache. Ids and counts only, no model arrays."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence as Seq

import numpy as np

from pyllm.batch import I32
from pyllm.cache import BLOCK_TOKENS, BlockPool, blocks_for, chain_hash
from pyllm.engine.sources import Source
from pyllm.prefix import Place

_RESIDENCES = itertools.count(1)  # no two sequences of the process have the same


class Sequence:
    """Tokens of prompt and completion; the first `computed` of them have keys and values in `blocks`.

    The first `prefix` tokens, part of the prompt, see one another: they are computed in one step, and shared only with
    sequences that have the same ones. `types` tell which text of a pair each token of the prompt belongs to; None: the
    first. `source` is what cross attention reads, where the model has an encoder.
    """

    def __init__(
        self,
        prompt: Seq[int],
        max_tokens: int,
        share_prefix: bool,
        salt: bytes = b"",
        prefix: int = 0,
        types: Seq[int] | None = None,
        source: Source | None = None,
    ) -> None:
        self.tokens = list(prompt)
        self.types = types
        self.prompt_length = len(self.tokens)
        self.limit = self.prompt_length + max_tokens
        self.share_prefix = share_prefix  # may start from blocks that others of the same salt computed
        self.salt = salt  # 0 or 16 bytes
        self.prefix = prefix
        # What hashes begin with. The tag keeps that of a prefix apart from a block's: what is hashed is never as long.
        self.origin = chain_hash(b"prefix" + salt, self.tokens[:prefix]) if prefix else salt
        self.source = source
        self.draftable = True  # False with a grammar: what it forbids would be drafted in vain
        self.computed = 0
        self.cached = 0  # of the prompt, taken from the prefix cache when it first got blocks
        self.blocks: list[int] = []
        self.table: I32 = np.zeros(blocks_for(self.limit), np.int32)  # blocks again, as the kernels read them
        self.place: Place | None = None  # of the last token that was given two positions, where the model counts twice
        self.residence = next(_RESIDENCES)  # another one whenever its blocks are others, and not only more
        self.seats = 1  # of those that run together: one, or what its search may fork into
        self.forked = False  # whether its last block may be shared, and has to be copied before a write
        self._hashes: list[bytes] = []  # of full blocks
        self._published = 0  # blocks that others can find

    @property
    def output_ids(self) -> list[int]:
        """Tokens generated so far."""
        return self.tokens[self.prompt_length :]

    @property
    def generated(self) -> int:
        """How many tokens were generated so far."""
        return len(self.tokens) - self.prompt_length

    def adopt_prefix(self, pool: BlockPool) -> None:
        """Start from the longest computed prefix that the pool knows; the last token is always computed anew."""
        assert not self.blocks and self.computed == 0
        if self.share_prefix:
            full = (len(self.tokens) - 1) // BLOCK_TOKENS
            self._hash_until(full)
            self._append(pool.find(self._hashes[:full]))
        self._published = len(self.blocks)
        self.computed = len(self.blocks) * BLOCK_TOKENS
        if self.generated == 0:
            self.cached = self.computed
        self.residence = next(_RESIDENCES)

    def reserve(self, pool: BlockPool, tokens: int) -> bool:
        """Hold blocks for the first `tokens` tokens, those to be written alone; False, with nothing taken, where the
        pool has too few."""
        if tokens <= len(self.blocks) * BLOCK_TOKENS and not self.forked:
            return True
        missing = max(0, blocks_for(tokens) - len(self.blocks))
        partial = self.computed // BLOCK_TOKENS if self.forked and self.computed % BLOCK_TOKENS else None
        shared = partial is not None and pool.shared(self.blocks[partial])
        if missing + shared > pool.free:
            return False
        if partial is not None and shared:
            self.blocks[partial] = self.table[partial] = pool.take_copy(self.blocks[partial])
            self.residence = next(_RESIDENCES)
        self.forked = False
        last = self.blocks[-1] if self.blocks else -1
        taken = []
        for _ in range(missing):
            last = pool.take(after=last)
            taken.append(last)
        self._append(taken)
        return True

    def publish(self, pool: BlockPool, until: int) -> None:
        """Make the blocks that are full once `until` tokens are computed findable for others."""
        full = until // BLOCK_TOKENS
        if full <= self._published:
            return
        self._hash_until(full)
        for i in range(self._published, full):
            pool.publish(self.blocks[i], self._hashes[i])
        self._published = full

    def settle(self, pool: BlockPool) -> None:
        """All tokens but the newest are in the cache; blocks beyond them, taken for what was not accepted, go back."""
        self.computed = len(self.tokens) - 1
        kept = blocks_for(len(self.tokens))
        if kept < len(self.blocks):
            pool.give_back(self.blocks[kept:])
            del self.blocks[kept:]

    def fork(self, pool: BlockPool) -> Sequence:
        """One with the same tokens that goes on by itself; it shares the blocks if all of them are computed."""
        twin = copy.copy(self)
        twin.residence = next(_RESIDENCES)
        twin.tokens, twin.table, twin._hashes = self.tokens.copy(), self.table.copy(), self._hashes.copy()
        if self.computed == len(self.tokens):
            twin.blocks = self.blocks.copy()
            pool.share(twin.blocks)
            self.forked = twin.forked = True
        else:
            twin.blocks = []
            twin.computed = twin._published = 0
            twin.forked = False
        return twin

    def leave(self, pool: BlockPool) -> None:
        """Give all blocks back; what was computed is forgotten, but may be found again by its hash."""
        pool.give_back(self.blocks)
        self.blocks.clear()
        self.computed = self._published = 0
        self.forked = False

    def _append(self, blocks: Seq[int]) -> None:
        self.table[len(self.blocks) : len(self.blocks) + len(blocks)] = blocks
        self.blocks.extend(blocks)

    def _hash_until(self, full: int) -> None:
        while len(self._hashes) < full:
            start = len(self._hashes) * BLOCK_TOKENS
            parent = self._hashes[-1] if self._hashes else self.origin
            self._hashes.append(chain_hash(parent, self.tokens[start : start + BLOCK_TOKENS]))
