"""Sources: texts that an encoder reads once for a request. Ids and counts only, no model arrays.

The keys and values that cross attention makes of a source stand in blocks of a cache of their own. All completions and
beams of a request read the same ones; they are kept until the request has ended, also while its sequences wait.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from pyllm.batch import I32
from pyllm.cache import BlockPool, blocks_for


class Source:
    """The tokens of a source, and where its cross keys and values stand once it is `encoded`."""

    def __init__(self, tokens: Seq[int]) -> None:
        self.tokens = list(tokens)
        self.blocks: list[int] = []
        self.table: I32 = np.zeros(blocks_for(len(self.tokens)), np.int32)  # blocks again, as the kernels read them
        self.encoded = False

    def reserve(self, pool: BlockPool) -> bool:
        """Hold blocks for all tokens; False, with nothing taken, where the pool has too few."""
        if self.blocks:
            return True
        if len(self.table) > pool.free:
            return False
        last = -1
        for i in range(len(self.table)):
            last = pool.take(after=last)
            self.blocks.append(last)
            self.table[i] = last
        return True

    def leave(self, pool: BlockPool) -> None:
        """Give all blocks back."""
        pool.give_back(self.blocks)
        self.blocks.clear()
        self.encoded = False
