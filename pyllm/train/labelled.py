"""Texts with labels, which classifiers are trained on: read from files, and as tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.errors import ConfigError, DataError, TokenizerError, shown
from pyllm.ops_training import IGNORED_LABEL
from pyllm.prompts import Encoded
from pyllm.spec import HeadKind, HeadSpec, Problem
from pyllm.tokenizer import Tokenizer
from pyllm.train.documents import read_records
from pyllm.train.head_loss import Labels
from pyllm.train.report import I32
from pyllm.train.token_store import content_key

KINDS = {"label": Problem.SINGLE_LABEL, "labels": Problem.MULTI_LABEL, "score": Problem.REGRESSION}
KEYS = "`text` (and `pair`, a second text), with `label` (a name or number), `labels` (a list of them) or `score`"
MOST_LABELS = 100_000  # that a number may stand for
LARGEST = 1e18  # of values, whose squares must be numbers in float32
TOGETHER = 4096  # texts that are tokenised at a time


@dataclass(frozen=True)
class Example:
    """A text, or a pair of texts, and what it is to be labelled; `at` says in which file and line it stands."""

    at: str
    text: str
    pair: str | None
    label: Any  # a name or number, a list of them, or a value


def read_examples(path: Path) -> tuple[Problem, list[Example]]:
    """What the labels of a `.jsonl` file mean, and its examples; raises `DataError`."""
    if path.suffix != ".jsonl" or not path.is_file():
        found = "another name" if path.is_file() else "no such file"
        raise DataError(f"{path}: expected a .jsonl file for classify, lines of {KEYS}, found {found}")
    examples: list[Example] = []
    kind = ""
    for record, at, _ in read_records(path, KEYS):
        kinds = [name for name in KINDS if name in record]
        if len(kinds) != 1 or not isinstance(record.get("text"), str) or set(record) - {"text", "pair", *kinds}:
            raise DataError(f"{at}: expected {KEYS}, found {', '.join(sorted(record)) or 'no keys'}")
        pair = record.get("pair")
        if pair is not None and not isinstance(pair, str):
            raise DataError(f"{at}: pair: expected a string, found {shown(pair)}")
        kind = kind or kinds[0]
        if kinds[0] != kind:
            raise DataError(f"{at}: expected `{kind}` as in the lines before, found `{kinds[0]}`")
        examples.append(Example(at, record["text"], pair, _label(record[kind], KINDS[kind], at)))
    if not examples:
        raise DataError(f"{path}: expected lines of {KEYS}, found none")
    return KINDS[kind], examples


def need_pairs(head: HeadSpec, examples: Sequence[Example]) -> None:
    """Raise `DataError` for an example of one text where the model says whether the second of two follows the first."""
    alone = next((e for e in examples if e.pair is None), None)
    if head.kind is HeadKind.NEXT and alone is not None:
        raise DataError(f"{alone.at}: expected `pair`, a second text that follows the first or does not, found none")


def _label(value: Any, problem: Problem, at: str) -> Any:
    """The value of `label`, `labels` or `score`."""
    if problem is Problem.REGRESSION:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
            raise DataError(f"{at}: score: expected a number of at most {LARGEST:.2g}, found {shown(value)}")
        return float(value)
    several = problem is Problem.MULTI_LABEL
    names = value if several and isinstance(value, list) else [value]
    for name in names:
        number = isinstance(name, int) and not isinstance(name, bool) and 0 <= name < MOST_LABELS
        if not number and not (isinstance(name, str) and name):
            expected = "a list of names or numbers" if several else "a name or a number"
            raise DataError(
                f"{at}: {'labels' if several else 'label'}: expected {expected} from 0, found {shown(value)}"
            )
    if not several:
        return value
    if len(set(names)) < len(names) or names is not value:
        raise DataError(f"{at}: labels: expected a list in which none stands twice, found {shown(value)}")
    return value


@dataclass(frozen=True)
class LabelSet:
    """The labels of a classifier, and whether one of them holds, several may, or they are values."""

    problem: Problem
    names: tuple[str, ...]

    @classmethod
    def of_head(cls, head: HeadSpec) -> LabelSet:
        """Those of a head of labels."""
        assert head.problem is not None
        return cls(head.problem, head.labels)

    @classmethod
    def of_examples(cls, problem: Problem, examples: Sequence[Example]) -> LabelSet:
        """Those that examples have: names in alphabetical order, or numbers up to the largest; raises `DataError`."""
        if problem is Problem.REGRESSION:
            return cls(problem, ("LABEL_0",))
        given = [e.label if problem is Problem.MULTI_LABEL else [e.label] for e in examples]
        found = {label for labels in given for label in labels}
        kinds = {type(label) for label in found}
        if len(kinds) > 1:
            raise DataError(f"{examples[0].at}: labels: expected names or numbers in all lines, found both")
        names = (
            tuple(sorted(found)) if kinds == {str} else tuple(f"LABEL_{i}" for i in range(max(found, default=0) + 1))
        )
        if len(names) < 2 and problem is Problem.SINGLE_LABEL:
            raise DataError(f"{examples[0].at}: expected at least two labels in the data, all lines have {names[0]!r}")
        if not found:
            raise DataError(f"{examples[0].at}: labels: expected some in the data, found none in any line")
        return cls(problem, names)

    def check(self, problem: Problem, where: str) -> None:
        """Raise `DataError` for a file whose labels mean something else."""
        if problem is not self.problem or (problem is Problem.REGRESSION and len(self.names) > 1):
            key = next(key for key, meaning in KINDS.items() if meaning is self.problem)
            raise DataError(
                f"{where}: expected `{key}` in each line for this model, whose config.json asks for "
                f"{self.problem.value} with {len(self.names)} labels, found {problem.value}"
            )

    def target(self, example: Example) -> Any:
        """The place of the example's label, the places of its labels, or its value; raises `DataError`."""
        if self.problem is Problem.REGRESSION:
            return example.label
        several = self.problem is Problem.MULTI_LABEL
        places = [self._place(label, example.at) for label in (example.label if several else [example.label])]
        return places if several else places[0]

    def _place(self, label: str | int, at: str) -> int:
        place = label if isinstance(label, int) else self.names.index(label) if label in self.names else -1
        if not 0 <= place < len(self.names):
            some = ", ".join(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
            raise DataError(
                f"{at}: label: expected one of the {len(self.names)} labels of the model ({some}) or its number, found "
                f"{shown(label)}"
            )
        return place

    def blank(self, rows: int) -> Labels:
        """Labels of so many rows, of which none counts; see :class:`pyllm.train.head_loss.HeadLoss`."""
        if self.problem is Problem.SINGLE_LABEL:
            return np.full(rows, IGNORED_LABEL, np.int32)
        return np.full((rows, len(self.names)), np.nan, np.float32)

    def write(self, labels: Labels, row: int, target: Any) -> None:
        """Give the row a target."""
        if self.problem is Problem.MULTI_LABEL:
            labels[row] = 0
            labels[row, target] = 1
        else:
            labels[row] = target


@dataclass(frozen=True)
class LabelledTexts:
    """Texts of a file as a model reads them: text i is tokens begins[i] to ends[i], its target targets[i].

    `types` uint8 tell which text of a pair each token belongs to, None where no text is a pair or the model is not
    told. `cut` texts were longer than the context.
    """

    name: str
    key: str
    tokens: I32
    types: NDArray[np.uint8] | None
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    targets: list[Any]
    cut: int

    def encoded(self) -> Iterator[Encoded]:
        """The texts as `LLM.classify` takes them."""
        for begin, end in zip(self.begins, self.ends, strict=True):
            types = None if self.types is None else self.types[begin:end].tolist()
            yield Encoded(None, self.tokens[begin:end].tolist(), types)

    def split(self, share: float, seed: int) -> tuple[LabelledTexts, LabelledTexts]:
        """All but a share of the texts, and that: drawn by the seed, as files often hold one label after the other."""
        count = len(self.begins)
        held = max(1, round(share * count))
        if held >= count:
            raise DataError(
                f"{self.name}: {count} texts cannot be split so that {share:.3g} of them are held out: give more, "
                "or held-out data of its own (--valid)"
            )
        order = np.random.Generator(np.random.PCG64([seed, count])).permutation(count)
        return self._pick(np.sort(order[held:]), f"{held}, {seed}, rest"), self._pick(np.sort(order[:held]), "held")

    def _pick(self, places: NDArray[np.intp], which: str) -> LabelledTexts:
        return replace(
            self,
            key=f"{self.key}[{which}]",
            begins=self.begins[places],
            ends=self.ends[places],
            targets=[self.targets[i] for i in places],
        )


def encode_examples(
    path: Path,
    examples: Sequence[Example],
    labels: LabelSet,
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    *,
    context: int,
    types: bool,
    progress: Callable[[float], None] | None = None,
) -> LabelledTexts:
    """The examples of a file as tokens, longer texts cut to `context` at their end, of pairs the longer one first.

    Raises `DataError`, and `ConfigError` for a context without room. With `types` the model is told the texts of a pair
    apart.
    """
    ids: list[list[int]] = []
    kinds: list[Collection[int]] = []
    cut = 0
    before, behind = tokenizer.around()
    special = len(before) + len(behind)
    if context <= special:
        raise ConfigError(f"context: expected more than the {special} special tokens of a text, got {context}")
    for first in range(0, len(examples), TOGETHER):
        chosen = examples[first : first + TOGETHER]
        alone = iter(tokenizer.encode_batch([e.text for e in chosen if e.pair is None]))
        for example in chosen:
            if example.pair is None:
                given = next(alone)
                cut += len(given) > context
                if len(given) > context:
                    given = [*given[: context - len(behind)], *behind]
                kind: Collection[int] = bytes(len(given))
            else:
                given, kind, was_cut = _pair(example, tokenizer, context)
                cut += was_cut
            if len(given) <= special:
                raise DataError(f"{example.at}: the text has no tokens: leave it out")
            ids.append(given)
            kinds.append(kind)
        if progress is not None:
            progress(min(first + TOGETHER, len(examples)) / len(examples))
    ends = np.cumsum([len(given) for given in ids], dtype=np.int64)
    typed = types and any(example.pair is not None for example in examples)
    return LabelledTexts(
        name=str(path),
        key=content_key(path, tokenizer_folder),
        tokens=np.fromiter((token for given in ids for token in given), np.int32, int(ends[-1])),
        types=np.fromiter((k for kind in kinds for k in kind), np.uint8, int(ends[-1])) if typed else None,
        begins=np.append(0, ends[:-1]),
        ends=ends,
        targets=[labels.target(example) for example in examples],
        cut=cut,
    )


def _pair(example: Example, tokenizer: Tokenizer, context: int) -> tuple[list[int], list[int], bool]:
    """Tokens and types of a pair, and whether it was cut."""
    assert example.pair is not None
    try:
        whole = tokenizer.encode_pair(example.text, example.pair)
        fits = len(whole.ids) <= context
        given = whole if fits else tokenizer.encode_pair(example.text, example.pair, context)
    except TokenizerError as error:
        raise DataError(f"{example.at}: {error}") from error
    return given.ids, given.type_ids, not fits
