"""How the next token is chosen: a request's parameters, and what the sampling kernel is given for each sequence."""

from __future__ import annotations

import copy
import difflib
import functools
import math
import numbers
import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pyllm import _cpu
from pyllm.structured import StructuredOutputs

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
Floats = NDArray[np.float32]
T = TypeVar("T")
State = TypeVar("State", bound="SamplingState")

MAX_N = 16
MAX_BEAMS = 16
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
GREEDY_BELOW = _cpu.GREEDY_BELOW  # temperatures below it choose the most probable token

# Hugging Face spellings, accepted with a warning. do_sample, which is no renaming, is handled beside them.
_ALIASES: dict[str, str] = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
}
# Parameters of other systems that pyllm has not, with the value that asks for nothing.
_ABSENT: dict[str, Any] = {
    "num_beam_groups": 1,
    "use_beam_search": False,
    "best_of": 1,
    "diversity_penalty": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
}


def _with_aliases(cls: type[T]) -> type[T]:
    """Let the constructor of `cls` take Hugging Face spellings, and name the parameter nearest to an unknown one."""
    construct = cls.__init__
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]

    @functools.wraps(construct)
    def init(self: T, **given: Any) -> None:
        construct(self, **_translate(given, names))

    cls.__init__ = init  # type: ignore[method-assign, assignment]
    return cls


@_with_aliases
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters of one request. Names are those of vLLM; these are pyllm's defaults:

    ============================  ========  ==================================================================
    ``n``                         1         completions of the prompt, at most 16; of a beam search the best
    ``max_tokens``                128       most tokens to generate; 0: only score the prompt; None: all that fit
    ``min_tokens``                0         tokens before which the output may not end
    ``temperature``               1.0       0 (anything below 1e-5): always the most probable token
    ``top_k``                     0         keep the k most probable and ties with the last; 0, -1: all
    ``top_p``                     1.0       keep the fewest most probable that hold this probability
    ``min_p``                     0.0       keep tokens at least this probable relative to the most probable
    ``repetition_penalty``        1.0       logits of tokens seen: divided by it, multiplied where negative
    ``no_repeat_ngram_size``      0         no sequence of so many tokens may stand twice in prompt and output; 0: off
    ``presence_penalty``          0.0       subtracted from logits of tokens in the output; -2 to 2
    ``frequency_penalty``         0.0       the same, times how often the token stands there; -2 to 2
    ``seed``                      None      of the draws; None: fresh entropy
    ``stop``                      ()        a string, or up to 16; the text ends before the first found
    ``stop_token_ids``            ()        tokens that end the output, besides the model's own
    ``include_stop_str_in_output``  False   keep the stop string at the end of the text
    ``ignore_eos``                False     go on after the model's end-of-sequence token
    ``bad_words``                 ()        strings that must not be generated
    ``allowed_token_ids``         None      the only tokens that may be generated
    ``logit_bias``                {}        token id -> number added to its logit; -100 to 100
    ``logprobs``                  None      log-probabilities of each output token and this many best, <= 20
    ``prompt_logprobs``           None      the same for the prompt
    ``detokenize``                True      produce text; without it there are only token ids
    ``skip_special_tokens``       True      leave special tokens out of the text
    ``num_beams``                 1         above 1: beam search over so many, at most 16; temperature is then 0
    ``length_penalty``            1.0       beams are compared by log-probability / length ** this
    ``early_stopping``            False     True: end with ``num_beams`` ended beams; False: when none that runs is
                                            likely to become better; "never": when none can
    ``forced_bos_token_id``       None      first token of the output; None: what the model says, if anything
    ``forced_eos_token_id``       None      last token of an output of ``max_tokens``; None: likewise
    ``structured_outputs``        None      a `StructuredOutputs`: the schema, expression, choices or grammar to match
    ============================  ========  ==================================================================

    Hugging Face spellings (``max_new_tokens``, ``do_sample``, ``stop_strings``) are accepted with a ``UserWarning``
    that names the parameter meant. An unknown name or a wrong type is a ``TypeError``, a wrong value a ``ValueError``.
    """

    n: int = 1
    max_tokens: int | None = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    bad_words: Sequence[str] = ()
    allowed_token_ids: Sequence[int] | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        """Check every value and bring it to one form: tuples, ints, floats."""
        put = functools.partial(object.__setattr__, self)
        put("n", _integer("n", self.n, 1, MAX_N))
        if self.max_tokens is not None:
            put("max_tokens", _integer("max_tokens", self.max_tokens, 0, 2**31 - 1))
        put("min_tokens", _integer("min_tokens", self.min_tokens, 0, 2**31 - 1))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens: expected at most max_tokens = {self.max_tokens}, got {self.min_tokens}")
        put("temperature", _number("temperature", self.temperature, 0, math.inf))
        put("top_k", max(0, _integer("top_k", self.top_k, -1, 2**31 - 1)))
        put("top_p", _number("top_p", self.top_p, 0, 1, above=True))
        put("min_p", _number("min_p", self.min_p, 0, 1))
        put("repetition_penalty", _number("repetition_penalty", self.repetition_penalty, 0, math.inf, above=True))
        put("presence_penalty", _number("presence_penalty", self.presence_penalty, -2, 2))
        put("frequency_penalty", _number("frequency_penalty", self.frequency_penalty, -2, 2))
        put("no_repeat_ngram_size", _integer("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, 2**31 - 1))
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            if getattr(self, name) is not None:
                put(name, _integer(name, getattr(self, name), 0, 2**31 - 1))
        if self.seed is not None:
            put("seed", _integer("seed", self.seed, 0, 2**64 - 1))
        put("stop", _strings("stop", (self.stop,) if isinstance(self.stop, str) else self.stop, MAX_STOPS))
        put("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        put("bad_words", _strings("bad_words", self.bad_words, None))
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids: expected at least one token id or None, got none")
        put("logit_bias", _biases(self.logit_bias))
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                put(name, _integer(name, value, 0, MAX_LOGPROBS))
        for name in ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.stop and not self.detokenize:
            raise ValueError(
                "stop: expected no stop strings where detokenize is False: use stop_token_ids, or let it be True"
            )
        self._check_beams()
        self._check_structured()
        if self.greedy and self.n > self.num_beams:
            expected = "1 where temperature is 0, for all completions would be equal"
            expected = expected if self.num_beams == 1 else f"at most num_beams = {self.num_beams}"
            raise ValueError(f"n: expected {expected}, got {self.n}")

    def _check_beams(self) -> None:
        """Check what belongs to beam search, and what does not go together with it."""
        put = functools.partial(object.__setattr__, self)
        put("num_beams", _integer("num_beams", self.num_beams, 1, MAX_BEAMS))
        put("length_penalty", _number("length_penalty", self.length_penalty, -1000, 1000))
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"early_stopping: expected True, False or 'never', got {self.early_stopping!r}")
        if self.num_beams == 1:
            for name, nothing in (("length_penalty", 1.0), ("early_stopping", False)):
                if getattr(self, name) != nothing:
                    raise ValueError(
                        f"{name}: only of beam search: expected {nothing!r}, or num_beams above 1, got "
                        f"{getattr(self, name)!r}"
                    )
            return
        expected: list[tuple[str, Any]] = [("logprobs", None), ("prompt_logprobs", None), ("stop", ())]
        for name, nothing in expected:
            if getattr(self, name) != nothing:
                raise ValueError(
                    f"{name}: expected none where num_beams is above 1, got {getattr(self, name)!r}: beams end by "
                    "tokens, and their scores come with the output"
                )
        if not self.greedy:
            raise ValueError(
                f"temperature: expected 0 where num_beams is {self.num_beams}, got {self.temperature}: beam search "
                "draws nothing"
            )
        if self.max_tokens == 0:
            raise ValueError(f"max_tokens: expected at least 1 where num_beams is {self.num_beams}, got 0")

    def _check_structured(self) -> None:
        """Check that nothing else decides which tokens may come, where a grammar does."""
        if self.structured_outputs is None:
            return
        if not isinstance(self.structured_outputs, StructuredOutputs):
            raise TypeError(
                f"structured_outputs: expected a StructuredOutputs or None, got {self.structured_outputs!r}"
            )
        alone: list[tuple[str, Any]] = [
            ("num_beams", 1), ("min_tokens", 0), ("ignore_eos", False), ("no_repeat_ngram_size", 0), ("bad_words", ()),
            ("allowed_token_ids", None), ("forced_bos_token_id", None), ("forced_eos_token_id", None),
        ]  # fmt: skip
        for name, nothing in alone:
            if getattr(self, name) != nothing:
                raise ValueError(
                    f"{name}: expected {nothing!r} with structured_outputs, got {getattr(self, name)!r}: the grammar "
                    "says which tokens may come and where the output may end"
                )

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always chosen."""
        return self.temperature < GREEDY_BELOW

    @functools.cached_property
    def allowed(self) -> Int32s:
        """`allowed_token_ids` as the kernel reads them, made once for all completions; none: all are allowed."""
        return np.array(self.allowed_token_ids or (), np.int32)

    @property
    def penalised(self) -> bool:
        """Whether the choice depends on the tokens before it."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _translate(given: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Arguments under pyllm's names."""
    result: dict[str, Any] = {}
    for name, value in given.items():
        if name in names:
            target = name
        elif name == "do_sample":
            if not isinstance(value, bool):
                raise TypeError(f"do_sample: expected True or False, got {value!r}")
            if value:
                if given.get("temperature") == 0:
                    raise ValueError("do_sample: True contradicts temperature = 0: give temperature alone")
                _warn(name, "temperature (above 0)")
                continue
            if "temperature" in given:
                raise ValueError(
                    "do_sample: False means temperature = 0, and temperature is given too: give temperature alone"
                )
            _warn(name, "temperature (0 chooses the most probable token)")
            target, value = "temperature", 0.0
        elif name in _ALIASES:
            target = _ALIASES[name]
            if target in given:
                raise ValueError(f"{name}: the same as {target}, which is given too: give {target} alone")
            _warn(name, target)
            if name == "eos_token_id":
                value = [value] if isinstance(value, int) else value
        elif name in _ABSENT:
            if value != _ABSENT[name] or isinstance(value, bool) != isinstance(_ABSENT[name], bool):
                raise ValueError(
                    f"{name}: pyllm does not have this yet: expected {_ABSENT[name]!r} or no {name}, got {value!r}"
                )
            warnings.warn(f"{name} has no effect in pyllm", UserWarning, stacklevel=3)
            continue
        else:
            nearest = difflib.get_close_matches(name, [*names, *_ALIASES, "do_sample"], n=1, cutoff=0.5)
            hint = f": did you mean {nearest[0]}?" if nearest else f": expected one of {', '.join(names)}"
            raise TypeError(f"unknown sampling parameter {name}{hint}")
        result[target] = value
    if result.get("num_beams", 1) != 1:
        result.setdefault("temperature", 0.0)  # beam search draws nothing
    return result


def _warn(name: str, target: str) -> None:
    warnings.warn(f"{name} is the Hugging Face spelling; pyllm's name is {target}", UserWarning, stacklevel=4)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer from {low} to {high}, got {value!r}")
    number = operator.index(value)
    if not low <= number <= high:
        raise ValueError(f"{name}: expected an integer from {low} to {high}, got {number}")
    return number


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> float:
    end = "finite" if high == math.inf else f"at most {high}"
    expected = f"a number {'above' if above else 'of at least'} {low} and {end}"
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    # The kernel's float32 must not turn it into 0 or infinity.
    single = float(np.float32(number)) if abs(number) < 3.4e38 else math.inf
    if not (low <= number <= high and math.isfinite(single)) or (above and single <= low):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return number


def _strings(name: str, values: Any, most: int | None) -> tuple[str, ...]:
    limit = f"at most {most} strings of at most {MAX_STOP_CHARS} characters" if most else "strings"
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected {limit}, got {values!r}")
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected {limit}, got {value!r} among them")
        if not value or (most and len(value) > MAX_STOP_CHARS):
            raise ValueError(f"{name}: expected {limit}, none empty, got one of {len(value)}")
    if most and len(values) > most:
        raise ValueError(f"{name}: expected {limit}, got {len(values)}")
    return tuple(values)


def _token_ids(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Sequence | np.ndarray | set | frozenset | range):
        raise TypeError(f"{name}: expected a list of token ids, got {values!r}")
    ids = [_integer(f"{name}[{i}]", value, 0, 2**31 - 1) for i, value in enumerate(values)]
    return tuple(dict.fromkeys(ids))


def _biases(values: Any) -> dict[int, float]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise TypeError(f"logit_bias: expected a mapping from token id to number, got {values!r}")
    result: dict[int, float] = {}
    for key, value in values.items():
        token = (
            int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 11 else key
        )  # JSON keys
        result[_integer("logit_bias key", token, 0, 2**31 - 1)] = _number(f"logit_bias[{key}]", value, -100, 100)
    return result


# What the sampling kernel reads for a row; the layout of SampleRow in csrc/core/sampling.h.
SAMPLE_ROW = np.dtype(
    [
        ("seed", np.uint64),
        ("position", np.uint64),
        ("stream", np.uint32),
        ("top_k", np.int32),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
    ]
)
GREEDY_ROW = np.array([(0, 0, 0, 0, 0, 1, 0, 1, 0, 0)], SAMPLE_ROW)  # chooses the largest logit


class SampleInputs(NamedTuple):
    """Arguments of :meth:`pyllm.ops.Ops.sample`; row r of a list is ids[starts[r] : starts[r + 1]]."""

    rows: NDArray[np.void]  # [R] of SAMPLE_ROW
    history: tuple[Int64s, Int32s, Int32s] | None = None  # starts [R + 1], ids, how often each stands in the output
    bias: tuple[Int64s, Int32s, Floats] | None = None  # starts [R + 1], ids, numbers to add
    allowed: tuple[Int64s, Int32s] | None = None  # starts [R + 1], ids


class SamplingState:
    """What one sequence brings to each draw: its parameters, and the tokens seen where penalties need them.

    `seed` names the request's random numbers and `stream` the completion among its `n`; the draw of output token i is
    number i of that stream, so it hangs on nothing else.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], seed: int, stream: int = 0) -> None:
        """State before the first output token."""
        self.position = 0  # of the next draw: tokens chosen so far
        self._row = np.zeros(1, SAMPLE_ROW)
        for name in SAMPLE_ROW.names or ():
            if name not in ("seed", "position", "stream"):
                self._row[name] = getattr(params, name)
        self._row["seed"], self._row["stream"] = seed, stream
        self.allowed = params.allowed
        self.bias_ids = np.array(list(params.logit_bias), np.int32)
        self.bias_values = np.array(list(params.logit_bias.values()), np.float32)
        self._place: dict[int, int] | None = None  # of a token in the history
        self._ids = self._counts = np.zeros(0, np.int32)
        if params.penalised:
            self._place = {token: i for i, token in enumerate(dict.fromkeys(prompt))}
            self._ids = np.fromiter(self._place, np.int32, len(self._place))
            self._counts = np.zeros(len(self._place), np.int32)
        self.plain = not (params.penalised or params.logit_bias or params.allowed_token_ids)  # nothing but its row
        self.greedy = params.temperature == 0  # its row chooses the largest logit

    @property
    def row(self) -> NDArray[np.void]:
        """[1] of SAMPLE_ROW for the next draw."""
        self._row["position"] = self.position
        return self._row

    @property
    def history(self) -> tuple[Int32s, Int32s]:
        """Distinct tokens of prompt and output, and how often each stands in the output; empty without penalties."""
        used = len(self._place) if self._place else 0
        return self._ids[:used], self._counts[:used]

    def fork(self: State) -> State:
        """One that goes on by itself from here."""
        twin = copy.copy(self)
        twin._row = self._row.copy()
        if self._place is not None:
            twin._place, twin._ids, twin._counts = self._place.copy(), self._ids.copy(), self._counts.copy()
        return twin

    def append(self, token: int) -> None:
        """The sequence goes on with `token`."""
        self.position += 1
        if self._place is None:
            return
        place = self._place.setdefault(token, len(self._place))
        if place >= self._ids.size:
            self._ids = np.concatenate([self._ids, np.zeros(place + 16, np.int32)])
            self._counts = np.concatenate([self._counts, np.zeros(place + 16, np.int32)])
        self._ids[place] = token
        self._counts[place] += 1


def sample_inputs(states: Sequence[SamplingState], forbidden: Sequence[Sequence[int]] | None = None) -> SampleInputs:
    """Arguments for a draw of one token for each of `states`; none of `forbidden[r]` may be chosen in row r."""
    rows = states[0].row if len(states) == 1 else np.concatenate([s.row for s in states])
    if forbidden is None and all(s.plain for s in states):
        return SampleInputs(rows)
    history = bias = allowed = None
    parts = [s.history for s in states]
    if any(ids.size for ids, _ in parts):
        starts, ids = _join([ids for ids, _ in parts])
        history = (starts, ids, np.concatenate([counts for _, counts in parts]))
    bans = (
        [np.array(f, np.int32) for f in forbidden] if forbidden is not None else [np.zeros(0, np.int32)] * len(states)
    )
    if any(s.bias_ids.size or ban.size for s, ban in zip(states, bans, strict=True)):
        starts, ids = _join([np.concatenate([s.bias_ids, ban]) for s, ban in zip(states, bans, strict=True)])
        never = [np.full(ban.size, -np.inf, np.float32) for ban in bans]
        bias = (
            starts,
            ids,
            np.concatenate([v for s, n in zip(states, never, strict=True) for v in (s.bias_values, n)]),
        )
    if any(s.allowed.size for s in states):
        allowed = _join([s.allowed for s in states])
    return SampleInputs(rows, history, bias, allowed)


def _join(lists: Sequence[Int32s]) -> tuple[Int64s, Int32s]:
    starts = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([ids.size for ids in lists], out=starts[1:])
    return starts, np.concatenate(lists)
