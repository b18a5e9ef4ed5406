"""Sources and the targets that a decoder learns to write about them: how they are put together, and files of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pyllm.errors import ConfigError, DataError, listed
from pyllm.generation_config import GenerationConfig
from pyllm.ops_training import IGNORED_LABEL
from pyllm.spec import ModelSpec
from pyllm.tokenizer import Tokenizer
from pyllm.train.mixture import File, Mixture, file_seed, mixture_problems
from pyllm.train.report import I32
from pyllm.train.token_store import TokenStore, end_tokens

FORMAT = 1
PairBatch = tuple[I32, I32, I32, I32, I32]


@dataclass(frozen=True)
class PairForm:
    """The special tokens of pairs.

    A source is `before`, its text and `behind`, as the tokenizer has it; a target is `before`, its text and `end`. The
    decoder is given `start` and the target but for its last token, and all of the target are its labels. What a target
    has before its text does not begin with `start` once more. Where `start` is None no encoder reads the source: it
    stands before the target in one sequence, and the target has nothing before its text.
    """

    start: int | None
    end: int
    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()

    @property
    def around_source(self) -> int:
        """Tokens that a source has more than its text."""
        return len(self.before) + len(self.behind)

    @property
    def around_target(self) -> int:
        """Tokens that a target has more than its text."""
        return len(self._before_target) + 1

    @property
    def _before_target(self) -> tuple[int, ...]:
        if self.start is None:
            return ()
        return self.before[1:] if self.before[:1] == (self.start,) else self.before

    def unbegun(self, text: I32) -> I32:
        """A text without the tokens before it, if it has them."""
        count = len(self.before)
        return text[count:] if tuple(text[:count].tolist()) == self.before else text

    def unended(self, text: I32) -> I32:
        """A text without its end token, if it has one."""
        return text[:-1] if len(text) and text[-1] == self.end else text

    def source(self, text: I32) -> I32:
        """What the encoder reads of a text."""
        return np.array([*self.before, *text, *self.behind], np.int32)

    def target(self, text: I32) -> I32:
        """What the decoder is to write of a text."""
        return np.array([*self._before_target, *text, self.end], np.int32)


def pair_form(spec: ModelSpec, tokenizer: Tokenizer | None, own: GenerationConfig | None) -> PairForm:
    """That of a model, `own` being what its folder says; raises `ConfigError` where it is not known."""
    if tokenizer is None:
        raise ConfigError("tokenizer: expected the folder of one, which says how sources and targets end, got none")
    start = None if own is None else own.decoder_start_token_id
    start = spec.decoder_start_token_id if start is None else start
    if start is None and spec.encoder is not None:
        raise ConfigError(
            "model: nothing says what its decoder's text begins with: expected decoder_start_token_id in config.json "
            "or generation_config.json; add it there"
        )
    ends = end_tokens(tokenizer) or spec.eos_token_ids
    if not ends:
        raise ConfigError("tokenizer: expected one with an end token, which targets end with, found none")
    before, behind = tokenizer.around()
    if spec.encoder is None:
        return PairForm(None, ends[0], tuple(before))
    return PairForm(start, ends[0], tuple(before), tuple(behind))


class PairWriter:
    """Writes pairs into a micro-batch of `source` and `target` tokens and at most `sequences` pairs, the last of which
    may be padding, in pieces of at most `longest` tokens."""

    def __init__(self, form: PairForm, source: int, target: int, sequences: int, longest: int) -> None:
        assert form.start is not None
        self._start, self._longest, self._sequences = form.start, longest, sequences
        self._tokens = np.zeros(target, np.int32)
        self._labels = np.full(target, IGNORED_LABEL, np.int32)
        self._source = np.zeros(source, np.int32)
        self._ends, self._source_ends = [0], [0]

    @property
    def room(self) -> tuple[int, int]:
        """Tokens that sources and targets may still have."""
        return len(self._source) - self._source_ends[-1], len(self._tokens) - self._ends[-1]

    @property
    def count(self) -> int:
        """Pairs so far."""
        return len(self._ends) - 1

    def fits(self, source: I32, target: I32) -> bool:
        """Whether there is room for a pair."""
        room = self.room
        return len(source) <= room[0] and len(target) <= room[1]

    def add(self, source: I32, target: I32) -> None:
        """Write a pair, for which there must be room."""
        at, end = self._ends[-1], self._ends[-1] + len(target)
        self._tokens[at], self._tokens[at + 1 : end] = self._start, target[:-1]
        self._labels[at:end] = target
        begin, stop = self._source_ends[-1], self._source_ends[-1] + len(source)
        self._source[begin:stop] = source
        self._ends.append(end)
        self._source_ends.append(stop)

    def finish(self) -> PairBatch:
        """The micro-batch, see :class:`pyllm.train.Data`; what remains is padding."""
        for ends, total in ((self._ends, len(self._tokens)), (self._source_ends, len(self._source))):
            ends += range(ends[-1] + self._longest, total, self._longest)
            ends += [total] * (self._sequences + 1 - len(ends))
        starts, source_starts = (np.array(ends, np.int32) for ends in (self._ends, self._source_ends))
        return self._tokens, self._labels, starts, self._source, source_starts


class JoinedWriter:
    """Writes pairs into a micro-batch of `tokens` tokens, each as one sequence in which only the target counts; the
    rest is as in a :class:`PairWriter`."""

    def __init__(self, tokens: int, sequences: int, longest: int) -> None:
        self._longest, self._sequences = longest, sequences
        self._tokens = np.zeros(tokens, np.int32)
        self._labels = np.full(tokens, IGNORED_LABEL, np.int32)
        self._ends = [0]

    @property
    def count(self) -> int:
        """Pairs so far."""
        return len(self._ends) - 1

    def fits(self, source: I32, target: I32) -> bool:
        """Whether there is room for a pair."""
        return len(source) + len(target) - 1 <= len(self._tokens) - self._ends[-1]

    def add(self, source: I32, target: I32) -> None:
        """Write a pair, for which there must be room."""
        at, end = self._ends[-1], self._ends[-1] + len(source) + len(target) - 1
        self._tokens[at:end] = np.concatenate([source, target[:-1]])
        self._labels[end - len(target) : end] = target
        self._ends.append(end)

    def finish(self) -> tuple[I32, I32, I32]:
        """The micro-batch, see :class:`pyllm.train.Data`; what remains is padding."""
        total = len(self._tokens)
        self._ends += range(self._ends[-1] + self._longest, total, self._longest)
        self._ends += [total] * (self._sequences + 1 - len(self._ends))
        return self._tokens, self._labels, np.array(self._ends, np.int32)


def padding_sequences(longest: int, *tokens: int) -> int:
    """Sequences that the padding of a micro-batch of so many tokens, of sources and of targets, may need."""
    return max(-(-count // longest) for count in tokens)


class PairedData(Mixture["Pairs"]):
    """Endless micro-batches of pairs: prompts are sources, completions targets, and only these count.

    Args:
        stores: files of pairs.
        form: special tokens of pairs.
        context: longest source, and longest target.
        tokens: of a micro-batch, sources and targets together.
        weights: shares of the tokens that each file gives; they are normalised. Default: by size.
        seed: of the order.
        shuffle: False keeps the order of the files.
        like: other data, whose shape the micro-batches get.

    Raises `DataError` for a file that holds anything but pairs, or an empty source, or a longer one than the context.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        form: PairForm,
        *,
        context: int,
        tokens: int,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        like: PairedData | None = None,
    ) -> None:
        problems = mixture_problems(stores, weights, context)
        if tokens < 2 * context:
            problems.append(
                f"batch_tokens: expected at least {2 * context}, a source and a target of the context's {context} "
                f"tokens, got {tokens}"
            )
        if problems:
            raise ConfigError(listed("data", problems))
        pairs = [Pairs(store, form, context, file_seed(seed, i), shuffle) for i, store in enumerate(stores)]
        super().__init__(pairs, weights)
        self.form, self.context, self.tokens = form, context, tokens
        self.source_tokens: int
        self.sequences: int
        if like is not None:
            self.source_tokens, self.sequences = like.source_tokens, like.sequences
        else:
            share = sum(w * p.source_total / p.total for w, p in zip(self._weights, pairs, strict=True))
            self.source_tokens = min(max(round(share * tokens), context), tokens - context)
            mean = min(p.mean_length for p in pairs)
            padding = padding_sequences(context, self.source_tokens, tokens - self.source_tokens)
            self.sequences = min(2 * int(tokens / mean) + 8, tokens) + padding
        self._identify(FORMAT, "pairs", vars(form), context, tokens, self.source_tokens, seed, shuffle, self._weights)

    def next_batch(self) -> PairBatch:
        """Tokens and labels [T], starts [B + 1], tokens [S] and starts [B + 1] of sources; see
        :class:`pyllm.train.Data`."""
        target = self.tokens - self.source_tokens
        writer = PairWriter(self.form, self.source_tokens, target, self.sequences, self.context)
        most = self.sequences - padding_sequences(self.context, self.source_tokens, target)
        while writer.count < most:
            room = writer.room
            taken = self._take(lambda pairs, index: pairs.length(index) if pairs.fits(index, room) else 0)  # noqa: B023
            if taken is None:
                break
            pairs, index = taken
            writer.add(*pairs.pair(index))
        return writer.finish()


class Pairs(File):
    """A file of which each document is a pair; raises `DataError` for one that is none, or longer than the context,
    or of which the target is longer than `longest_target` (default: the context)."""

    def __init__(
        self,
        store: TokenStore,
        form: PairForm,
        context: int,
        seed: int = 0,
        shuffle: bool = False,
        longest_target: int | None = None,
    ) -> None:
        super().__init__(store.name, store.key, seed, shuffle)
        self.store, self._form = store, form
        if store.answers is None:
            raise DataError(
                f"{self.name}: expected pairs for seq2seq, lines of `source` and `target`, or `prompt` and "
                "`completion`, found none"
            )
        self._ends = np.asarray(store.ends)
        self._begins = np.append(0, self._ends[:-1])
        self._cuts = self._ends - store.answers_between(self._begins, self._ends)
        given, wanted = self._cuts - self._begins, self._ends - self._cuts
        begun = np.full(len(given), bool(form.before))  # a chat template may begin otherwise
        for i, token in enumerate(form.before):
            begun &= store.tokens[np.minimum(self._begins + i, len(store.tokens) - 1)] == token
        given = given - begun * len(form.before)
        mixed = given > 0  # where answers stand before the cut
        mixed[mixed] = store.answers_between(self._begins[mixed], self._cuts[mixed]) > 0
        ended = store.tokens[self._ends - 1] == form.end
        self._source_lengths = given + form.around_source
        self._target_lengths = wanted - ended + form.around_target
        room = context if longest_target is None else longest_target
        for bad, what in (
            (mixed | (wanted == 0), "is no source with one target behind it: give pairs only"),
            (given <= 0, "has an empty source: give some text, or leave the pair out"),
            (self._source_lengths > context, f"has a source of more than the {context} tokens that there is room for, "
                f"the longest of all has {self._source_lengths.max()}: cut texts shorter, or raise the context"),
            (self._target_lengths > room, f"has a target of more than the {room} tokens that there is room for, "
                f"the longest of all has {self._target_lengths.max()}: cut texts shorter, or raise the context"),
        ):  # fmt: skip
            if bad.any():
                raise DataError(f"{self.name}: {store.document(int(np.argmax(bad)))} {what}")
        self.source_total = int(self._source_lengths.sum())
        self._total = self.source_total + int(self._target_lengths.sum())
        self.mean_length = self._total / len(self._ends)

    @property
    def total(self) -> int:
        """Sources and targets."""
        return self._total

    def count(self) -> int:
        """Pairs."""
        return len(self._ends)

    def length(self, index: int) -> int:
        """Source and target together."""
        return int(self._source_lengths[index] + self._target_lengths[index])

    def fits(self, index: int, room: tuple[int, int]) -> bool:
        """Whether a pair fits so many tokens of sources and of targets."""
        return bool(self._source_lengths[index] <= room[0] and self._target_lengths[index] <= room[1])

    def pair(self, index: int) -> tuple[I32, I32]:
        """Source and target."""
        tokens = self.store.tokens[self._begins[index] : self._ends[index]].astype(np.int32)
        cut = int(self._cuts[index] - self._begins[index])
        return self._form.source(self._form.unbegun(tokens[:cut])), self._form.target(self._form.unended(tokens[cut:]))
