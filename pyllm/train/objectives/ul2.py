"""UL2's mixture of denoisers (Tay et al. 2022, https://arxiv.org/abs/2205.05131, section 3.1.2 and table 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyllm.train.objectives.denoising import (
    Denoising,
    Pair,
    check_amounts,
    check_sentinels,
    corrupted,
    refuse_sentinels,
    tokens_taken,
)
from pyllm.train.pairs import PairForm
from pyllm.train.report import I32, Data


@dataclass(frozen=True)
class Denoiser:
    """A way to damage a text, which the `mode` before a source names: `share` of its tokens are taken out in spans of
    `mean_span`, or, where that is None, from its end."""

    mode: str
    share: float
    mean_span: float | None


REGULAR, SEQUENTIAL, EXTREME = "[NLU]", "[S2S]", "[NLG]"
DENOISERS = (
    Denoiser(REGULAR, 0.15, 3.0),
    Denoiser(REGULAR, 0.15, 8.0),
    Denoiser(SEQUENTIAL, 0.25, None),
    Denoiser(EXTREME, 0.5, 3.0),
    Denoiser(EXTREME, 0.5, 8.0),
    Denoiser(EXTREME, 0.15, 64.0),
    Denoiser(EXTREME, 0.5, 64.0),
)


class MixedDenoisers(Denoising):
    """UL2's: each text is damaged by one of `denoisers`, all of them as likely, whose mode stands before the source.

    Spans are T5's. What is taken from the end of a text is a sentinel there, and the target alone, without one.

    Args:
        modes: the tokens of each mode.
    """

    def __init__(
        self,
        data: Data,
        form: PairForm,
        sentinels: Sequence[int],
        modes: Mapping[str, Sequence[int]],
        denoisers: Sequence[Denoiser] = DENOISERS,
        **options: Any,
    ) -> None:
        check_sentinels(sentinels, "ul2")
        for denoiser in denoisers:
            check_amounts(denoiser.share, 1 if denoiser.mean_span is None else denoiser.mean_span)
        self._sentinels, self._denoisers = np.array(sentinels, np.int32), tuple(denoisers)
        self._modes = {d.mode: np.array(modes[d.mode], np.int32) for d in denoisers}
        super().__init__(data, form, **options)

    @property
    def how(self) -> list[Any]:
        """See :attr:`Denoising.how`."""
        return [[d.mode, d.share, d.mean_span] for d in self._denoisers]

    def damage(self, text: I32, rng: np.random.Generator) -> Pair:
        """See :meth:`Denoising.damage`."""
        denoiser = self._denoisers[int(rng.integers(len(self._denoisers)))]
        if denoiser.mean_span is not None:
            source, target = corrupted(text, self._sentinels, denoiser.share, denoiser.mean_span, rng)
        else:
            refuse_sentinels(text, self._sentinels)
            cut = len(text) - tokens_taken(len(text), denoiser.share)
            source, target = np.append(text[:cut], self._sentinels[:1]), text[cut:]
        return np.concatenate([self._modes[denoiser.mode], source]), target
