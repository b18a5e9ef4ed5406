"""Prompts and texts as token ids: what `LLM` is given, as the model reads it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from pyllm.errors import RequestError, TokenizerError, shown
from pyllm.sampling import SamplingParams
from pyllm.spec import ModelSpec
from pyllm.tokenizer import Tokenizer
from pyllm.tokenizer_backend import Span

Prompt: TypeAlias = "str | Mapping[str, Any]"  # text, {"prompt": text} or {"prompt_token_ids": [...]}
PROMPT_KEYS = ("prompt", "prompt_token_ids", "target_token_ids", "source_language", "target_language")


@dataclass(frozen=True)
class Encoded:
    """A text as the model reads it: `types` tell which text of a pair each token belongs to."""

    text: str | None
    ids: list[int]
    types: list[int] | None = None


@dataclass(frozen=True)
class Prompts:
    """How a model's prompts become token ids; without a tokenizer they hold ids already."""

    spec: ModelSpec
    tokenizer: Tokenizer | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, see `LLM.encode`."""
        ids = self.need_tokenizer().encode(text, add_special_tokens=add_special_tokens)
        if not add_special_tokens or self.spec.prefix is None:
            return ids
        return self.spec.prefix.completed(ids)

    def read(self, prompt: Prompt | Encoded) -> Encoded:
        """A prompt; for a model with an encoder it is the source. `TypeError` for what is none."""
        if isinstance(prompt, Encoded):
            return prompt
        if isinstance(prompt, str):
            return Encoded(prompt, self.encode(prompt))
        if not isinstance(prompt, Mapping) or not any(key in prompt for key in PROMPT_KEYS[:2]):
            expected = "a string, {'prompt': ...} or {'prompt_token_ids': [...]}"
            raise TypeError(f"prompt: expected {expected}, got {type(prompt).__name__}")
        unknown = {key: None for key in prompt if key not in PROMPT_KEYS}
        refuse_unknown("prompt", unknown, dict.fromkeys(PROMPT_KEYS))
        text, language = prompt.get("prompt"), prompt.get("source_language")
        if "prompt_token_ids" in prompt:
            if language is not None:
                raise RequestError(f"source_language: expected none beside token ids, got {language!r}: mark them so")
            return Encoded(text, checked_ids("prompt_token_ids", prompt["prompt_token_ids"]))
        if language is None:
            return self.read(str(text))
        return Encoded(str(text), self.need_tokenizer().encode_in(str(text), str(language)))

    def pair(self, task: str, pair: tuple[str, str]) -> Encoded:
        """A pair of texts, which the model reads as one."""
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise TypeError(f"{task}: expected pairs of two texts, got {shown(pair)}")
        encoding = self.need_tokenizer().encode_pair(*pair)
        return Encoded(None, encoding.ids, encoding.type_ids if self.spec.embedding.types > 1 else None)

    def spans(self, prompt: Prompt) -> list[Span | None] | None:
        """Which characters each token of a prompt stands for, see `Tokenizer.spans`; None where it has token ids."""
        if isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
            return None
        return self.need_tokenizer().spans(prompt if isinstance(prompt, str) else str(prompt["prompt"]))

    def target(self, prompt: Prompt | tuple[str, str]) -> list[int]:
        """What a decoder's text about a source begins with: the second of a pair, or as a prompt says."""
        if isinstance(prompt, tuple):
            return [] if self.spec.encoder is None else self.encode(prompt[1])
        if not isinstance(prompt, Mapping) or "target_token_ids" not in prompt:
            return []
        if self.spec.encoder is None:
            raise RequestError(
                "target_token_ids: expected none, for the model has no encoder: put them into the prompt"
            )
        return checked_ids("target_token_ids", prompt["target_token_ids"])

    def towards(self, prompt: Prompt, params: SamplingParams) -> tuple[SamplingParams, int | None]:
        """The parameters of a prompt that asks for a language, and the start token of the decoder's text, if not the
        model's: the language's mark is the one where marks stand behind texts, else the first token of the output."""
        language = prompt.get("target_language") if isinstance(prompt, Mapping) else None
        if language is None:
            return params, None
        if self.spec.encoder is None:
            raise RequestError(f"target_language: expected none, for the model has no encoder, got {language!r}")
        mark = self.need_tokenizer().language_id(str(language))
        if self.need_tokenizer().marks_behind:
            return params, mark
        return replace(params, forced_bos_token_id=mark), None

    def scored(self, item: str | tuple[str, str] | Mapping[str, Any]) -> tuple[Encoded, int]:
        """A text to score, and the first of its tokens that counts; for a model with an encoder the source."""
        if self.spec.encoder is not None:
            pair = isinstance(item, tuple) and len(item) == 2
            if not pair and not (isinstance(item, Mapping) and "target_token_ids" in item):
                raise RequestError(
                    "score: this model has an encoder: expected pairs (source, target), or prompts with "
                    f"'target_token_ids', got {shown(item)}"
                )
            return self.read(item[0] if isinstance(item, tuple) else item), 1
        if isinstance(item, tuple):
            context, continuation = _with_space_moved(item)
            ids = self.encode(context)
            if not self.spec.fills_blanks:
                text = context + continuation
                return Encoded(text, self.encode(text)), max(1, len(ids))
            ids, start = ids + self.encode(continuation, add_special_tokens=False), len(ids)
            return Encoded(context + continuation, ids), start
        prompt = self.read(item)
        if not self.spec.fills_blanks:
            return prompt, 1
        assert self.spec.prefix is not None
        start = self.spec.prefix.length(prompt.ids) + 1
        if start >= len(prompt.ids):
            raise RequestError(
                f"score: this model predicts what stands behind its start token (id {self.spec.prefix.start_id}), and "
                "nothing does here: give a pair (context, continuation), or token ids with a start token"
            )
        return prompt, start

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer, or an error that says why there is none."""
        if self.tokenizer is None:
            raise TokenizerError(
                "this model was loaded with skip_tokenizer_init: give prompts as {'prompt_token_ids': [...]}"
            )
        return self.tokenizer


def checked_ids(name: str, ids: Any) -> list[int]:
    """Token ids as Python's integers; `TypeError` for what is none."""
    if isinstance(ids, (str, bytes)) or not isinstance(ids, (Sequence, np.ndarray)):
        raise TypeError(f"{name}: expected a list of integers, got {shown(ids)}")
    if set(map(type, ids)) == {int}:
        return list(ids)
    return [_checked_id(name, index, token) for index, token in enumerate(ids)]


def refuse_unknown(where: str, unknown: Mapping[str, object], known: Mapping[str, object]) -> None:
    """`TypeError` for the first unknown argument, with the nearest known one."""
    for name in unknown:
        nearest = difflib.get_close_matches(str(name), list(known), 1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(known)}"
        raise TypeError(f"{where}: unknown argument {name!r}{hint}")


def _checked_id(name: str, index: int, token: Any) -> int:
    if isinstance(token, (bool, float, str)) or not hasattr(token, "__index__"):
        raise TypeError(f"{name}[{index}]: expected an integer, got {token!r}")
    return int(token)


def _with_space_moved(pair: tuple[str, str]) -> tuple[str, str]:
    """Spaces at the end of the context belong to the continuation: that is how tokenizers cut words."""
    if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
        raise TypeError(f"score: expected a pair (context, continuation) of strings, got {shown(pair)}")
    context = pair[0].rstrip()
    return context, pair[0][len(context) :] + pair[1]
