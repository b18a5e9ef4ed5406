"""The step loop: admits requests, runs the model on what the scheduler planned, chooses tokens, ends completions."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from pyllm.cache import BlockPool
from pyllm.engine.outputs import Logprob
from pyllm.engine.request import Completion, Request
from pyllm.engine.runner import Runner
from pyllm.engine.sampler import RowState, Sampler
from pyllm.engine.scheduler import Scheduler, Work
from pyllm.engine.sequence import Sequence
from pyllm.engine.text import CompletionText
from pyllm.errors import NonFiniteError, RequestError
from pyllm.ops import F32
from pyllm.sampling import SamplingParams
from pyllm.tokenizer import Tokenizer


@dataclass
class Stats:
    """Counters since the engine began: seconds of steps that held prompt tokens, and of pure decode steps."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generation_seconds: float = 0.0
    decode_steps: int = 0
    cached_tokens: int = 0
    preemptions: int = 0


class Engine:
    """Runs requests to their end, many at a time. Not thread-safe: `LLM` holds the lock."""

    def __init__(
        self,
        runner: Runner,
        pool: BlockPool,
        tokenizer: Tokenizer | None,
        end_ids: Seq[int],
        *,
        max_sequences: int,
        max_tokens: int,
        max_length: int,
        share_prefixes: bool,
        use_graphs: bool = True,
    ) -> None:
        self.runner = runner
        self.scheduler = Scheduler(pool, max_sequences, max_tokens, share_prefixes)
        self.sampler = Sampler(runner.ops)
        self.tokenizer = tokenizer
        self.end_ids = tuple(end_ids)
        self.max_length = max_length
        self.use_graphs = use_graphs
        self.stats = Stats()
        self._running: dict[Sequence, Completion] = {}
        self._stepping = False
        self._aborted: list[Request] = []  # during the step, to be ended after it
        self._names = itertools.count()

    def add(self, prompt: str | None, prompt_ids: Seq[int], params: SamplingParams, seed: int) -> Request:
        """Queue a request; raises `RequestError` for a prompt that cannot be run."""
        self.check_prompt(prompt_ids)
        request = Request(str(next(self._names)), prompt, list(prompt_ids), params)
        vocabulary = self.runner.model.spec.vocab_size
        room = self.max_length - len(prompt_ids)
        limit = min(room, params.max_tokens if params.max_tokens is not None else room)
        ends = () if params.ignore_eos else self.end_ids
        for index in range(params.n):
            share = params.prompt_logprobs is None and self.scheduler.share_prefixes
            sequence = Sequence(prompt_ids, limit, share)
            detokenizer = None
            if self.tokenizer is not None and params.detokenize:
                detokenizer = self.tokenizer.stream(params.skip_special_tokens, prompt_ids)
            text = CompletionText(detokenizer, params.stop, params.include_stop_str_in_output)
            row = RowState(params, seed, index, prompt_ids, vocabulary, self.tokenizer, ends)
            request.completions.append(Completion(request, index, sequence, text, row))
        for completion in request.completions:
            self._running[completion.sequence] = completion
            self.scheduler.add(completion.sequence)
        return request

    def abort(self, request: Request) -> None:
        """End a request; what it held is free before this returns, or after the step that is being computed."""
        if self._stepping:
            self._aborted.append(request)
            return
        for completion in request.completions:
            if not completion.finished:
                self._finish(completion, "abort")
                completion.deliver([])

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or running."""
        return not self._running

    def step(self) -> None:
        """Compute one step and deliver what it gave to the requests.

        Whatever fails in it (memory, Ctrl-C) ends every request: half a step leaves nothing in the cache to trust.
        """
        self._stepping = True
        try:
            self._step()
        except BaseException:
            self._reset()
            raise
        finally:
            self._stepping = False
            while self._aborted:
                self.abort(self._aborted.pop())

    def _step(self) -> None:
        began = time.perf_counter()
        plan = self.scheduler.schedule()
        if not plan:
            return
        logits, drawn = self._compute(plan)
        self.scheduler.advance(plan)
        self._choose([self._running[work.sequence] for work in plan if work.last], logits, drawn)
        for work in plan:
            if not work.last and work.start + work.count == work.sequence.limit:
                self._finish(self._running[work.sequence], "length")  # nothing to generate: only the prompt was wanted
        self._count(plan, time.perf_counter() - began)

    def _compute(self, plan: list[Work]) -> tuple[F32, list[int] | None]:
        """Logits of the sequences that reached their end, in order; of a recorded step also what it drew from them."""
        if self.use_graphs and all(w.last and w.count == 1 and not self._scores_prompt(w) for w in plan):
            return self.runner.decode(plan, [self._running[work.sequence].sampling for work in plan])
        x = self.runner.forward(plan)
        row = 0
        for work in plan:
            if self._scores_prompt(work):
                self._score_prompt(work, x, row)
            row += work.count
        return self.runner.last_logits(plan, x), None

    def _choose(self, completions: list[Completion], logits: F32, drawn: list[int] | None) -> None:
        """The next token of each of these completions."""
        if not completions:
            return
        chosen = self.sampler.sample(logits, [c.sampling for c in completions], drawn)
        for completion, token, entry in zip(completions, chosen.tokens, chosen.logprobs, strict=True):
            if token < 0:
                self._fail(completion)
                continue
            completion.sequence.tokens.append(token)
            completion.output.token_ids.append(token)
            completion.sampling.append(token)
            if entry is not None:
                assert completion.output.logprobs is not None and completion.output.cumulative_logprob is not None
                completion.output.logprobs.append(self._described(entry, completion.request.params))
                completion.output.cumulative_logprob += entry[token].logprob
            self._advance(completion, token)

    def _advance(self, completion: Completion, token: int) -> None:
        """Take in a new token: its text, whether the completion ends with it, and what a reader gets of it."""
        params, sequence = completion.request.params, completion.sequence
        may_stop = sequence.generated >= params.min_tokens
        ends = may_stop and token in self.end_ids and not params.ignore_eos
        stops = may_stop and token in params.stop_token_ids
        found = None
        if params.include_stop_str_in_output or not (ends or stops):
            found = completion.text.push([token], may_stop)
        if ends or stops:
            self._finish(completion, "stop", token if stops and not ends else None)
        elif found is not None:
            self._finish(completion, "stop", found)
        elif len(sequence.tokens) >= sequence.limit:
            self._finish(completion, "length")
        if completion.request.streamed:
            completion.deliver([token])

    def _finish(self, completion: Completion, reason: str, stop_reason: int | str | None = None) -> None:
        self.scheduler.remove(completion.sequence)
        del self._running[completion.sequence]
        completion.output.finish_reason = reason
        completion.output.stop_reason = stop_reason
        if not isinstance(stop_reason, str):
            found = completion.text.finish(completion.sequence.generated >= completion.request.params.min_tokens)
            if found is not None and reason == "length":
                completion.output.finish_reason, completion.output.stop_reason = "stop", found
        completion.output.text = completion.text.text

    def _fail(self, completion: Completion) -> None:
        """No token can be chosen: end the completion, and say why."""
        layer = self._first_bad_layer(completion.sequence)
        if layer is None:
            completion.request.error = RequestError(
                "no token is left to choose from: expected allowed_token_ids, bad_words, logit_bias, stop_token_ids "
                "and min_tokens that together allow at least one; relax one of them"
            )
        else:
            completion.request.error = NonFiniteError(
                f"the model gives no finite logits after {len(completion.sequence.tokens)} tokens: values are not "
                f"finite from {layer} on. Check the checkpoint, or load it with dtype float32 if it overflows in a "
                "smaller one."
            )
        self._finish(completion, "error")
        completion.deliver([])

    def _first_bad_layer(self, sequence: Sequence) -> str | None:
        """Where values stop being numbers at the last token of `sequence`; None where they do not."""
        trace: list[F32] = []
        work = Work(sequence, len(sequence.tokens) - 1, 1, True)
        x = self.runner.forward([work], trace)
        for layer, values in enumerate([*trace, x]):
            if not np.isfinite(values).all():
                return "the embedding" if layer == 0 else f"layer {layer - 1}"
        return None if np.isfinite(self.runner.last_logits([work], x)).all() else "the head"

    def _scores_prompt(self, work: Work) -> bool:
        if work.start >= work.sequence.prompt_length - 1:
            return False
        request = self._running[work.sequence].request
        return request.prompt_logprobs is not None and request.completions[0].sequence is work.sequence

    def _score_prompt(self, work: Work, x: F32, row: int) -> None:
        """Log-probabilities of the prompt tokens that follow this work's tokens, whose first row of x is `row`."""
        request = self._running[work.sequence].request
        assert request.prompt_logprobs is not None
        known = len(request.prompt_logprobs)  # recomputed tokens were scored before
        first, end = max(work.start, known - 1), min(work.start + work.count, work.sequence.prompt_length - 1)
        rows = np.arange(row + first - work.start, row + max(first, end) - work.start, dtype=np.int32)
        ids = np.array(work.sequence.tokens[first + 1 : max(first, end) + 1], np.int32)
        for at, logits in self.runner.logits(x, rows):
            piece = ids[at : at + len(logits)]
            entries = self.sampler.logprobs(logits, piece, request.params.prompt_logprobs or 0)
            request.prompt_logprobs.extend(self._described(entry, request.params) for entry in entries)

    def _described(self, entry: dict[int, Logprob], params: SamplingParams) -> dict[int, Logprob]:
        """With the tokens' text, where text is wanted."""
        if self.tokenizer is None or not params.detokenize:
            return entry
        decode = self.tokenizer.decode
        return {
            token: Logprob(value.logprob, value.rank, decode([token], skip_special_tokens=False))
            for token, value in entry.items()
        }

    def check_prompt(self, prompt_ids: Seq[int]) -> None:
        """Raise `RequestError` for a prompt that cannot be run."""
        if not len(prompt_ids):
            raise RequestError("the prompt is empty: expected at least one token (text, or a start token of the model)")
        vocabulary = self.runner.model.spec.vocab_size
        for i, token in enumerate(prompt_ids):
            if not 0 <= token < vocabulary:
                raise RequestError(f"prompt token {i}: expected an id in [0, {vocabulary}), got {token}")
        if len(prompt_ids) > self.max_length:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens, more than the context of {self.max_length}: shorten it, "
                "or raise max_model_len (--ctx-size) where the model and memory allow"
            )

    def _count(self, plan: list[Work], seconds: float) -> None:
        stats = self.stats
        stats.preemptions = self.scheduler.preemptions
        prompt_tokens = 0
        for work in plan:
            stats.generated_tokens += work.last
            if work.start < work.sequence.prompt_length:
                prompt_tokens += min(work.start + work.count, work.sequence.prompt_length) - work.start
                if 0 < work.start == work.sequence.cached:
                    stats.cached_tokens += work.start
        stats.prompt_tokens += prompt_tokens
        if prompt_tokens:
            stats.prompt_seconds += seconds
        else:
            stats.generation_seconds += seconds
            stats.decode_steps += 1

    def _reset(self) -> None:
        """End every request and forget all blocks."""
        self.runner.ops.stop()
        for completion in self._running.values():
            completion.request.error = RequestError("the step that computed this request failed; run it again")
            completion.output.finish_reason = "error"
            completion.deliver([])
        self._running.clear()
        self.scheduler.clear(BlockPool(self.scheduler.pool.size))
