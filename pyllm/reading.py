"""Reading texts: a model's hidden states of them, and what its head makes of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np

from pyllm.engine.engine import Engine
from pyllm.engine.runner import HEAD_ROWS
from pyllm.engine.scheduler import Work
from pyllm.engine.sequence import Sequence as EngineSequence
from pyllm.engine.session import Session
from pyllm.engine.sources import Source
from pyllm.errors import NonFiniteError, RequestError, shown
from pyllm.model import AttentionTrace
from pyllm.ops import F32
from pyllm.pooling import KeptStates, Pool
from pyllm.prompts import Encoded, checked_ids
from pyllm.sampling import SamplingParams
from pyllm.spec import HeadKind

Progress: TypeAlias = "Callable[[int, int], None] | None"  # gets (finished, all) texts
T = TypeVar("T")


@dataclass(frozen=True)
class ForwardOutput:
    """What the head gives, float32: logits [T, V] of every token, of a head of labels scores [T, N] or, for the text as
    a whole, [1, N]; None where there is no head. Hidden states as transformers gives them, L + 1 arrays [T, D]: the
    embedding, the residual stream after each block but the last, and the final norm's output. Attention weights [H, T,
    T] of each block, of each query for all keys."""

    logits: F32 | None
    hidden_states: list[F32] | None = None
    attentions: list[F32] | None = None
    encoder_hidden_states: list[F32] | None = None  # those of the encoder, where the model has one
    encoder_attentions: list[F32] | None = None  # [H, S, S]
    cross_attentions: list[F32] | None = None  # [H, T, S] of the decoder's tokens for the source's


class Reader:
    """Runs texts through the model of an engine; `lock` is held while that is in use."""

    def __init__(self, engine: Engine, lock: AbstractContextManager[Any]) -> None:
        self.engine = engine
        self.lock = lock
        self.runner = engine.runner
        self.model = engine.runner.model
        self.spec = engine.runner.model.spec

    def states(self, texts: Sequence[Encoded], pools: Sequence[Pool | KeptStates], progress: Progress) -> None:
        """Run texts through the model, the longest first, so that short ones fill up steps; the hidden states of each
        go to its pool."""
        params = SamplingParams(max_tokens=0, detokenize=False)
        ordered = sorted(zip(texts, pools, strict=True), key=lambda pair: -len(pair[0].ids))
        with Session(self.engine, self.lock) as session:
            if self.spec.is_encoder:
                self._whole(ordered, progress, session)
                return
            for text, pool in ordered:
                session.add(text, params, pool=pool)
            session.run(progress)

    def head(self, states: Iterable[F32], reduce: Callable[[F32], list[T]]) -> list[T]:
        """What `reduce` makes of the head's rows for hidden states, as pools kept them, [n, D] each; a thing for each.

        It gets few rows [R, outputs] at a time, which are numbers, in memory that is used again; `NonFiniteError` where
        they are not.
        """
        ops, found = self.runner.ops, []
        values = ops.empty(HEAD_ROWS, self.spec.outputs)
        for rows in _regrouped(states, HEAD_ROWS):
            with self.lock:
                read = self.model.before_head(ops, ops.place(rows))
                given = np.asarray(self.model.head(ops, read, out=values[: len(rows)]))
                if not np.isfinite(given).all():
                    raise NonFiniteError(
                        "the model's head gives values that are not finite for one of these texts. Check the "
                        "checkpoint, or load it with dtype float32 if it overflows in a smaller one."
                    )
                found += reduce(given)
        return found

    def forward(
        self,
        token_ids: Sequence[int],
        token_type_ids: Sequence[int] | None,
        output_hidden_states: bool,
        output_attentions: bool,
        prefix: int | None,
        source_token_ids: Sequence[int] | None,
    ) -> ForwardOutput:
        """See `LLM.forward`."""
        token_ids = checked_ids("token_ids", token_ids)
        if (source_token_ids is not None) != (self.spec.encoder is not None):
            expected = (
                "tokens for the encoder" if self.spec.encoder is not None else "none, for the model has no encoder"
            )
            raise RequestError(f"source_token_ids: expected {expected}, got {shown(source_token_ids)}")
        if prefix is not None and (self.spec.is_encoder or self.spec.encoder is not None):
            raise RequestError(
                f"prefix: expected None, got {prefix!r}: this model has an encoder, which sees its whole text anyway"
            )
        with self.lock:
            scheduler, source = self.engine.scheduler, None
            if source_token_ids is None:
                self.engine.rules.check_prompt(token_ids, token_type_ids)
            else:
                source = Source(checked_ids("source_token_ids", source_token_ids))
                self.engine.rules.check_prompt(source.tokens)
                self.engine.rules.check_target(token_ids)
            length = self.engine.rules.prefix_length(token_ids, prefix)
            sequence = EngineSequence(
                token_ids, 0, share_prefix=False, prefix=length, types=token_type_ids, source=source
            )
            try:
                if not scheduler.reserve(sequence, len(sequence.tokens)):
                    raise RequestError("no cache blocks are free: wait for running requests, or raise kv_cache_bytes")
                return self._forward(sequence, output_hidden_states, output_attentions)
            finally:
                sequence.leave(scheduler.pool)
                if source is not None and scheduler.source_pool is not None:
                    source.leave(scheduler.source_pool)

    def _whole(self, texts: Sequence[tuple[Encoded, Pool | KeptStates]], progress: Progress, session: Session) -> None:
        """Run texts through an encoder, in this order."""
        for text, _ in texts:
            self.engine.rules.check_prompt(text.ids, text.types)
        for step in self.runner.steps([len(text.ids) for text, _ in texts]):
            together = texts[step]
            with self.lock, session.interrupts:
                self.engine.read(
                    [text.ids for text, _ in together],
                    [text.types for text, _ in together],
                    [pool for _, pool in together],
                )
            if progress:
                progress(step.stop, len(texts))

    def _forward(self, sequence: EngineSequence, output_hidden_states: bool, output_attentions: bool) -> ForwardOutput:
        total, head, step = len(sequence.tokens), self.spec.head, self.runner.max_tokens
        if output_attentions and total > step:
            raise RequestError(
                f"output_attentions: expected at most {step} tokens, those of a step, got {total}: raise "
                "max_num_batched_tokens"
            )
        if output_attentions and self.runner.ops.on_gpu:
            raise RequestError("output_attentions: expected device='cpu', this model is on a GPU")
        attentions, of_encoder = (AttentionTrace() if output_attentions else None for _ in range(2))
        scored = 0 if head.kind is HeadKind.NONE else 1 if head.kind.is_pooled else total
        logits = np.empty((scored, self.spec.outputs), np.float32)
        hidden: list[list[F32]] = []
        encoder_states: list[F32] | None = None
        last: F32 | None = None
        if sequence.source is not None:
            encoder_states = [] if output_hidden_states or output_attentions else None
            last = self.runner.encode([sequence.source], encoder_states, of_encoder)
        for start in range(0, total, step):
            work = Work(sequence, start, min(step, total - start), False)
            trace: list[F32] | None = [] if output_hidden_states else None
            x = self.runner.forward([work], trace, attentions, last if output_attentions else None)
            rows = np.arange(min(work.count, scored - start), dtype=np.int32)
            for first, piece in self.runner.logits(x, rows):
                logits[start + first : start + first + len(piece)] = piece
            if trace is not None:
                hidden.append([*trace, self.runner.final_states(x)])
            sequence.computed = start + work.count
        states = [np.concatenate(parts) for parts in zip(*hidden, strict=True)] if output_hidden_states else None
        with_encoder, of_source = sequence.source is not None, None
        if output_hidden_states and encoder_states and last is not None:
            of_source = [np.asarray(each, np.float32) for each in (*encoder_states, last)]
        return ForwardOutput(
            logits if scored else None,
            states,
            attentions.own if attentions else None,
            of_source,
            of_encoder.own if of_encoder and with_encoder else None,
            attentions.cross if attentions and with_encoder else None,
        )


def _regrouped(arrays: Iterable[F32], size: int) -> Iterator[F32]:
    """The rows of all these arrays, `size` at a time; the last are fewer."""
    waiting, room = list[F32](), size
    for rows in arrays:
        while len(rows):
            waiting.append(rows[:room])
            rows, room = rows[room:], room - len(waiting[-1])
            if room == 0:
                yield np.concatenate(waiting)
                waiting, room = [], size
    if waiting:
        yield np.concatenate(waiting)
