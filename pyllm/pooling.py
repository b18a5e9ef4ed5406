"""Embeddings of texts: how the hidden states of a text's tokens become one vector, and what a folder says about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyllm.errors import ConfigError, RequestError
from pyllm.folder import read_json, read_json_list
from pyllm.ops import F32
from pyllm.spec import Pooling

_MAX_BYTES = 1 << 20  # of the small files that describe pooling


@dataclass(frozen=True)
class EmbeddingRule:
    """How a text is embedded. `normalize`: the vector has Euclidean length 1. `max_tokens`: of a text, if limited."""

    pooling: Pooling
    normalize: bool = False
    max_tokens: int | None = None

    def vector(self, pool: Pool) -> F32:
        """float32 [D] of a text whose states are all in `pool`."""
        vector = pool.vector()
        if self.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        return vector.astype(np.float32)

    def check(self, tokens: int) -> None:
        """Raise `RequestError` where a text has more tokens than the model was made for."""
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise RequestError(
                f"the text has {tokens} tokens, and the model embeds at most {self.max_tokens} (max_seq_length of "
                "sentence_bert_config.json): cut it"
            )


class Pool:
    """Takes in the hidden states of a text piece by piece; the cut into pieces does not change the result."""

    def __init__(self, pooling: Pooling) -> None:
        self.pooling = pooling
        self.tokens = 0
        self._kept: NDArray[np.float64] | None = None

    def add(self, states: F32, start: int) -> None:
        """States [n, D] of the tokens from `start` on; those known already are left out."""
        rows = states[self.tokens - start :]  # after a preemption tokens come again
        if not len(rows):
            return
        first = self._kept is None
        self.tokens += len(rows)
        if self.pooling is Pooling.LAST:
            self._kept = rows[-1].astype(np.float64)
        elif self.pooling is Pooling.CLS:
            self._kept = rows[0].astype(np.float64) if first else self._kept
        else:
            reduce = np.add.reduce if self.pooling is Pooling.MEAN else np.maximum.reduce
            together = rows if self._kept is None else np.concatenate([self._kept[None], rows])
            self._kept = reduce(together, axis=0, dtype=np.float64)  # row after row, whatever the pieces

    def vector(self) -> NDArray[np.float64]:
        """What they make together, float64 [D]."""
        assert self._kept is not None
        return self._kept / self.tokens if self.pooling is Pooling.MEAN else self._kept

    @property
    def finite(self) -> bool:
        """Whether the vector is one of numbers."""
        return bool(np.isfinite(self.vector()).all())


class KeptStates:
    """Takes in the hidden states of a text piece by piece, and keeps those at the positions that are wanted."""

    def __init__(self, positions: Sequence[int] | None = None) -> None:
        """Keep those at `positions`, in rising order; None: all."""
        self.positions = positions
        self.tokens = 0
        self._kept: list[F32] = []

    def add(self, states: F32, start: int) -> None:
        """States [n, D] of the tokens from `start` on; those known already are left out."""
        rows = states[self.tokens - start :]
        if self.positions is not None:
            end = self.tokens + len(rows)
            self._kept.append(rows[[at - self.tokens for at in self.positions if self.tokens <= at < end]])
        else:
            self._kept.append(rows.copy())
        self.tokens += len(rows)

    @property
    def rows(self) -> F32:
        """What was kept, float32 [positions, D]."""
        return np.concatenate(self._kept)

    @property
    def finite(self) -> bool:
        """Whether all of it are numbers."""
        return bool(np.isfinite(self.rows).all())


def says_how(folder: Path) -> bool:
    """Whether the folder itself says how texts are embedded."""
    return (folder / "modules.json").exists()


def embedding_rule(folder: Path, pooling: str | None = None, normalize: bool | None = None) -> EmbeddingRule:
    """What the arguments say, or else the folder's files in the layout of sentence-transformers.

    Raises `ValueError` for an unknown `pooling` or where there is none at all, `ConfigError` for files that ask for
    something else than pooling and normalising.
    """
    if pooling is not None and pooling not in {kind.value for kind in Pooling}:
        raise ValueError(f"pooling: expected {', '.join(kind.value for kind in Pooling)} or None, got {pooling!r}")
    found = _read(folder) if says_how(folder) else None
    if pooling is None and found is None:
        raise ValueError(
            "pooling: the model's folder does not say how its texts are embedded (it has no modules.json); give one of "
            f"{', '.join(kind.value for kind in Pooling)}. Models made for embeddings say which on their card."
        )
    chosen = Pooling(pooling) if pooling is not None or found is None else found.pooling
    if normalize is None:
        normalize = found.normalize if found is not None else False
    return EmbeddingRule(chosen, normalize, found.max_tokens if found is not None else None)


def _read(folder: Path) -> EmbeddingRule:
    path = folder / "modules.json"
    pooling, normalize = None, False
    for module in read_json_list(path, _MAX_BYTES, ConfigError):
        if not isinstance(module, dict):
            raise ConfigError(f"{path}: expected a list of objects, found {type(module).__name__} in it")
        kind = str(module.get("type")).rpartition(".")[2]
        if kind == "Pooling":
            name = str(module.get("path"))
            if Path(name).name != name:
                raise ConfigError(f"{path}: path: expected the name of a folder beside it, found {name!r}")
            pooling = _read_pooling(folder / name / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise ConfigError(
                f"{path}: expected Transformer, Pooling and Normalize, found {kind}, which is not supported"
            )
    if pooling is None:
        raise ConfigError(f"{path}: expected a module of type Pooling, found none")
    limit = None
    if (folder / "sentence_bert_config.json").exists():
        limit = read_json(folder / "sentence_bert_config.json", _MAX_BYTES, ConfigError).get("max_seq_length")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise ConfigError(
                f"{folder}/sentence_bert_config.json: max_seq_length: expected at least 1, found {limit!r}"
            )
    return EmbeddingRule(pooling, normalize, limit)


_MODES = {
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_max_tokens": Pooling.MAX,
    "pooling_mode_lasttoken": Pooling.LAST,
}


def _read_pooling(path: Path) -> Pooling:
    config = read_json(path, _MAX_BYTES, ConfigError)
    modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    if len(modes) != 1 or modes[0] not in _MODES:
        raise ConfigError(f"{path}: expected one of {', '.join(_MODES)} to be true, found {', '.join(modes) or 'none'}")
    if config.get("include_prompt") is False:
        raise ConfigError(f"{path}: include_prompt: expected true, found false: prompts are always pooled too")
    return _MODES[modes[0]]
