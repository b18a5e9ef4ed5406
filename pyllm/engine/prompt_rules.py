"""What a model and the sizes of its engine can run: checks of prompts, sources and targets before they are queued."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from pyllm.errors import RequestError, shown
from pyllm.generation_config import GenerationConfig
from pyllm.spec import ModelSpec


class PromptRules:
    """Raises `RequestError` for what cannot be run.

    Args:
        spec: of the model.
        max_length: tokens that a sequence may have, of a prompt and behind it.
        max_source: tokens that the model's encoder takes, where it has one.
        max_prefix: tokens that see one another which one step has room for.
        defaults: what the model's folder says of generating.
    """

    def __init__(
        self, spec: ModelSpec, max_length: int, max_source: int, max_prefix: int, defaults: GenerationConfig
    ) -> None:
        self.spec = spec
        self.max_length = max_length
        self.max_source = max_source
        self.max_prefix = max_prefix
        self.defaults = defaults

    def check_prompt(self, prompt_ids: Seq[int], types: Seq[int] | None = None) -> None:
        """Raise `RequestError` for a prompt, or token types, that cannot be run."""
        if not len(prompt_ids):
            raise RequestError("the prompt is empty: expected at least one token (text, or a start token of the model)")
        if self.spec.encoder is not None:
            if len(prompt_ids) > self.max_source:
                raise RequestError(
                    f"the source has {len(prompt_ids)} tokens, more than the {self.max_source} that the encoder takes: "
                    "shorten it, or raise max_model_len (--ctx-size) where the model and memory allow"
                )
        elif len(prompt_ids) > self.max_length:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens, more than the context of {self.max_length}: shorten it, "
                "or raise max_model_len (--ctx-size) where the model and memory allow"
            )
        self._check_ids("prompt", prompt_ids)
        if types is None:
            return
        known = self.spec.embedding.types
        if len(types) != len(prompt_ids) or not all(0 <= kind < max(known, 1) for kind in types):
            raise RequestError(
                f"token types: expected one in [0, {max(known, 1)}) for each of the {len(prompt_ids)} tokens, got "
                f"{shown(list(types))}"
            )

    def decoder_ids(self, target_ids: Seq[int] = (), start: int | None = None) -> list[int]:
        """What the decoder of a model with an encoder is given: its start token, which `start` replaces, and these
        tokens behind it."""
        start = self.defaults.decoder_start_token_id if start is None else start
        start = self.spec.decoder_start_token_id if start is None else start
        if start is None:
            raise RequestError(
                "the model has an encoder, but nothing says what its decoder's text begins with: expected "
                "decoder_start_token_id in config.json or generation_config.json; add it there"
            )
        ids = [start, *target_ids]
        self.check_target(ids)
        return ids

    def check_target(self, ids: Seq[int]) -> None:
        """Raise `RequestError` for tokens that the decoder of a model with an encoder cannot be given."""
        if not len(ids):
            raise RequestError("the decoder's text is empty: expected at least its start token")
        self._check_ids("decoder", ids)
        if len(ids) > self.max_length:
            raise RequestError(
                f"the decoder's text has {len(ids)} tokens, more than the context of {self.max_length}: shorten it, or "
                "raise max_model_len (--ctx-size) where the model and memory allow"
            )

    def prefix_length(self, prompt_ids: Seq[int], length: int | None = None) -> int:
        """Tokens of a prompt that see one another: `length`, or what the model says; `RequestError` for too many."""
        rule = self.spec.prefix
        if length is None:
            length = 0 if rule is None else rule.length(prompt_ids)
        if not 0 <= length <= len(prompt_ids):
            raise RequestError(f"prefix: expected 0 to the {len(prompt_ids)} tokens of the prompt, got {length}")
        if length > self.max_prefix:
            raise RequestError(
                f"the prompt's bidirectional prefix has {length} tokens, which one step must hold, and a step has room "
                f"for {self.max_prefix}: shorten it, or raise max_num_batched_tokens"
            )
        return length

    def _check_ids(self, whose: str, ids: Seq[int]) -> None:
        vocabulary = self.spec.vocab_size
        if min(ids) >= 0 and max(ids) < vocabulary:
            return
        i, token = next((i, token) for i, token in enumerate(ids) if not 0 <= token < vocabulary)
        raise RequestError(f"{whose} token {i}: expected an id in [0, {vocabulary}), got {token}")
