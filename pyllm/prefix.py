"""Decoders whose first tokens see one another: where that prefix ends, and the two positions that some of them count.

Sizes: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyllm.errors import RequestError, require

I32 = NDArray[np.int32]


class Place(NamedTuple):
    """Number of a token in its sequence, and both of its positions."""

    at: int
    first: int
    second: int


@dataclass(frozen=True)
class PrefixSpec:
    """A bidirectional prefix: the tokens before the first `start_id`; where that is None or absent, the whole prompt.

    With a `start_id` the model fills blanks (Du et al. 2022, arXiv 2103.10360): the prefix holds a mask for each, and
    what follows a start token is the content of one. `mask_ids` are the kinds of masks in groups; the first group that
    occurs in the prefix says where the blanks are. Where `restarts`, every start token begins the next blank, the last
    mask serving all further ones; else what follows the first start token is one blank.
    """

    start_id: int | None = None
    mask_ids: tuple[tuple[int, ...], ...] = ()
    restarts: bool = False

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        require((self.start_id is None) == (not self.mask_ids), "masks of a prefix", "some with a start token, none "
                "without", self.mask_ids)  # fmt: skip

    def length(self, prompt: Sequence[int]) -> int:
        """Tokens of the prompt that are its prefix."""
        if self.start_id is None or self.start_id not in prompt:
            return len(prompt)
        return list(prompt).index(self.start_id)

    def positions(self, tokens: Sequence[int] | I32) -> tuple[I32, I32]:
        """First and second positions of all tokens, int32 [T] each.

        In the prefix they are the index and 0; in a blank the index of its mask, and 1, 2, ... from the start token on.
        """
        ids = np.asarray(tokens, np.int32)
        first, second = np.arange(len(ids), dtype=np.int32), np.zeros(len(ids), np.int32)
        starts = np.flatnonzero(ids == self.start_id)
        if not len(starts):
            return first, second
        if not self.restarts:
            starts = starts[:1]
        masks = self._masks(ids[: starts[0]])
        blank = np.searchsorted(starts, first[starts[0] :], side="right") - 1
        second[starts[0] :] = first[starts[0] :] - starts[blank] + 1
        first[starts[0] :] = masks[np.minimum(blank, len(masks) - 1)]
        return first, second

    def positions_after(self, place: Place, tokens: Sequence[int]) -> Place:
        """Those of the token behind `place`, one of `tokens`: in time that does not grow with them, but where a blank
        begins."""
        at, first, second = place.at + 1, place.first, place.second
        if tokens[at] == self.start_id and (self.restarts or not second):
            return self.place(tokens[: at + 1])
        return Place(at, first, second + 1) if second else Place(at, at, 0)

    def place(self, tokens: Sequence[int] | I32) -> Place:
        """Those of the last of `tokens`."""
        first, second = self.positions(tokens)
        return Place(len(first) - 1, int(first[-1]), int(second[-1]))

    def check(self, prompt: Sequence[int], generates: bool) -> None:
        """Raise `RequestError` for a prompt that has a start token without a mask before it, or none to generate at."""
        if self.start_id is None:
            return
        if self.start_id in prompt:
            self._masks(np.asarray(prompt[: self.length(prompt)], np.int32))
        elif generates:
            raise RequestError(
                f"the prompt has no start token (id {self.start_id}): this model fills blanks, so expected a mask "
                f"(id {self._mask_names()}) in the text and the start token behind it"
            )

    def completed(self, prompt: Sequence[int]) -> list[int]:
        """The prompt of a text: with the first kind of mask behind it where it has none, and with the start token."""
        ids = list(prompt)
        if self.start_id is None or self.start_id in ids:
            return ids
        known = {mask for group in self.mask_ids for mask in group}
        return [*ids, *([] if known.intersection(ids) else self.mask_ids[0][:1]), self.start_id]

    def _masks(self, prefix: I32) -> NDArray[np.intp]:
        """Where the masks stand in the prefix."""
        for group in self.mask_ids:
            places = np.flatnonzero(np.isin(prefix, group))
            if len(places):
                return places
        raise RequestError(
            f"the prompt has no mask before its start token (id {self.start_id}): expected one of the ids "
            f"{self._mask_names()} where the blank is"
        )

    def _mask_names(self) -> str:
        return ", ".join(str(mask) for group in self.mask_ids for mask in group)
