"""The step loop: admits requests, runs the model on what the scheduler planned, chooses tokens, ends completions."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from pyllm.cache import BlockPool, chain_hash
from pyllm.engine.beam import BeamSearch, best_next, check_beams
from pyllm.engine.outputs import DraftCounts, Logprob
from pyllm.engine.prompt_rules import PromptRules
from pyllm.engine.request import Completion, Request
from pyllm.engine.runner import Runner
from pyllm.engine.sampler import BadWords, Chosen, RowState, Sampler, Shared
from pyllm.engine.scheduler import Scheduler, Work
from pyllm.engine.sequence import Sequence
from pyllm.engine.sources import Source
from pyllm.engine.speculative import Speculation
from pyllm.engine.text import CompletionText
from pyllm.errors import NonFiniteError, RequestError
from pyllm.generation_config import GenerationConfig
from pyllm.ops import F32
from pyllm.pooling import KeptStates, Pool
from pyllm.sampling import SamplingParams
from pyllm.structured import GrammarCompiler
from pyllm.tokenizer import Tokenizer


@dataclass
class Stats:
    """Counters since the engine began: seconds of steps that held prompt tokens, and of pure decode steps.

    `generated_tokens` counts all, `decode_tokens` those of pure decode steps. `queried_tokens` were looked for in the
    prefix cache, `cached_tokens` of them found. With speculative decoding
    `drafted_tokens` were guessed and checked, `accepted_tokens` of them then chosen.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generation_seconds: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    queried_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens; None where nothing was drafted."""
        return DraftCounts(self.drafted_tokens, self.accepted_tokens).acceptance_rate


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
        max_prefix: int | None = None,
        share_prefixes: bool,
        use_graphs: bool = True,
        speculation: Speculation | None = None,
        defaults: GenerationConfig | None = None,
    ) -> None:
        self.runner = runner
        self.defaults = defaults or GenerationConfig()
        self.encodes = runner.model.spec.is_encoder
        source_pool = None if runner.cross is None else BlockPool(runner.cross.blocks)
        shares = share_prefixes and not self.encodes
        self.scheduler = Scheduler(pool, max_sequences, max_tokens, shares, source_pool)
        self.sampler = Sampler(runner.ops)
        self.tokenizer = tokenizer
        self.end_ids = tuple(end_ids)
        self.max_length = max_length
        prefix = max_tokens if max_prefix is None else max_prefix  # one step takes it
        self.rules = PromptRules(runner.model.spec, max_length, runner.max_source, prefix, self.defaults)
        self.use_graphs = use_graphs
        self.speculation = speculation
        self.stats = Stats()
        self._running: dict[Sequence, Completion] = {}
        self._drawn: list[Work] | None = None  # the last plan, where one recorded step gave and chose all its tokens
        self._drawing: list[Completion] = []  # for these
        self._stepping = False
        self._aborted: list[Request] = []  # during the step, to be ended after it
        self._names = itertools.count()
        self._grammars: GrammarCompiler | None = None  # made for the first request that has one

    def add(
        self,
        prompt: str | None,
        prompt_ids: Seq[int],
        params: SamplingParams,
        seed: int,
        salt: bytes = b"",
        pool: Pool | KeptStates | None = None,
        types: Seq[int] | None = None,
        shared: Shared | None = None,
        prefix: int | None = None,
        target_ids: Seq[int] = (),
        start_id: int | None = None,
    ) -> Request:
        """Queue a request; raises `RequestError` for a prompt that cannot be run, and `ValueError` for a
        grammar that cannot.

        Where the model has an encoder the prompt is its source, and the output follows the decoder's start token, or
        `start_id` in its place, and `target_ids`; what is said of prompts in `params` then goes for these.

        Equal prompt beginnings are shared with requests of the same `salt` (0 or 16 bytes) only. The hidden states of
        the prompt's tokens, after the final norm, go to `pool`; which an encoder must be given, as it generates
        nothing. `types` tell which text of a pair each token belongs to. `shared` is what `prepare` gave for the
        parameters; None: it is made here.

        Where the model has a bidirectional prefix, its length is `prefix`, or by default what the model says of the
        prompt. Its tokens have no log-probabilities: what they are computed from holds them.
        """
        if self.encodes and pool is None:
            raise RequestError(
                "this model is an encoder, which generates nothing and gives no probabilities of texts: expected a "
                "model that was trained to continue text. Embed, classify or fill masks with this one"
            )
        self.rules.check_prompt(prompt_ids, types)
        given, source = prompt_ids, None
        if self.runner.model.spec.encoder is not None:
            if pool is not None:
                raise RequestError(
                    "embed: expected an encoder or a decoder, this model is both, and writes about a source: embed "
                    "with a model that was made for it"
                )
            if params.prompt_logprobs is not None and not target_ids:
                raise RequestError(
                    "prompt_logprobs: expected target_token_ids with it, got none, and a source has no probabilities: "
                    "give them, or score pairs (source, target)"
                )
            prompt_ids, source = self.rules.decoder_ids(target_ids, start_id), Source(prompt_ids)
            salt = chain_hash(salt, source.tokens)
        rule = self.runner.model.spec.prefix
        seen = len(prompt_ids) if self.encodes else 0 if rule is None else self.rules.prefix_length(prompt_ids, prefix)
        if params.num_beams > 1:
            check_beams(params, prompt_ids, self.max_length, self.scheduler, self.speculation is not None)
        shared = self.prepare(params) if shared is None else shared
        request = Request(str(next(self._names)), prompt, list(given), params)
        request.source = source
        if request.prompt_logprobs is not None:
            request.prompt_logprobs *= max(1, seen)
        request.drafts = DraftCounts() if self.speculation is not None else None
        request.pool = pool
        vocabulary = self.runner.model.spec.vocab_size
        room = self.max_length - len(prompt_ids)
        limit = min(room, params.max_tokens if params.max_tokens is not None else room)
        if rule is not None:
            rule.check(prompt_ids, generates=limit > 0)
        ends = () if params.ignore_eos else self.end_ids
        for index in range(params.n):
            scored = params.prompt_logprobs is not None and index == 0  # the first gives those of all
            share = not scored and pool is None and self.scheduler.share_prefixes
            sequence = Sequence(prompt_ids, limit, share, salt, seen, types, source)
            detokenizer = None
            if self.tokenizer is not None and params.detokenize:
                detokenizer = self.tokenizer.stream(params.skip_special_tokens, prompt_ids)
            text = CompletionText(detokenizer, params.stop, params.include_stop_str_in_output)
            forced = self._forced(params)
            sequence.draftable = shared.matcher is None
            row = RowState(params, seed, index, prompt_ids, vocabulary, ends, limit, forced, shared)
            request.completions.append(Completion(request, index, sequence, text, row, ends))
        request.running = len(request.completions)
        started = request.completions
        if params.num_beams > 1 and limit > 0:
            started = started[:1]
            first = started[0]
            request.search = BeamSearch(params, first.sequence, first.sampling, list(first.ends))
        for completion in started:
            self._running[completion.sequence] = completion
            self.scheduler.add(completion.sequence)
        return request

    def prepare(self, params: SamplingParams) -> Shared:
        """What all completions with these parameters share: the beginning of their grammar, and their bad words.

        A grammar takes its time, the first one for the model's vocabulary too: this may run in a thread of its own,
        beside steps. Raises `ValueError` for a grammar that cannot be used, `RequestError` where none can.
        """
        bad_words = BadWords(params.bad_words, self.tokenizer) if params.bad_words else None
        if params.structured_outputs is None:
            return Shared(None, bad_words)
        if self._grammars is None:
            self._grammars = GrammarCompiler(self.tokenizer, self.runner.model.spec.vocab_size, self.end_ids)
        return Shared(self._grammars.compile(params.structured_outputs), bad_words)

    def _forced(self, params: SamplingParams) -> tuple[int | None, int | None]:
        """First and last token of an output: as asked for, or as the model's folder says, but not where a grammar
        chooses."""
        if params.structured_outputs is not None:
            return None, None
        first, last = params.forced_bos_token_id, params.forced_eos_token_id
        first = self.defaults.forced_bos_token_id if first is None else first
        last = self.defaults.forced_eos_token_id if last is None else last
        return first, None if params.ignore_eos else last

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

    def read(self, texts: Seq[Seq[int]], types: Seq[Seq[int] | None], pools: Seq[Pool | KeptStates]) -> None:
        """Compute one step of an encoder over whole texts, which `Runner.steps` put together: the hidden states of each
        go to its pool. Without requests, which would cost as much time as short texts do.

        The texts are ones that `check_prompt` took; raises `NonFiniteError` where what is kept of one is no numbers.
        """
        began = time.perf_counter()
        states = self.runner.read(texts, types)
        finite = bool(np.isfinite(states).all())
        row = 0
        for text, pool in zip(texts, pools, strict=True):
            pool.add(states[row : row + len(text)], 0)
            if not finite and not pool.finite:
                raise _not_finite()
            row += len(text)
        self.stats.prompt_tokens += row
        self.stats.prompt_seconds += time.perf_counter() - began

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
        if plan is self._drawn:
            self._step_on(plan, began)
            return
        if not plan:
            return
        if self.speculation is not None:
            vocabulary = self.runner.model.spec.vocab_size
            plan = self.speculation.extend(plan, self._running, self.scheduler, vocabulary)
        if self.scheduler.pool.copies:
            self.runner.cache.copy(self.scheduler.pool.copies)
            self.scheduler.pool.copies.clear()
        self._encode(plan)
        logits, drawn = self._compute(plan)
        self._drawn = plan if drawn is not None and self.speculation is None else None
        self._drawing = [self._running[work.sequence] for work in plan]
        self.scheduler.advance(plan)
        generated = self.stats.generated_tokens
        self._choose([work for work in plan if work.last], logits, drawn)
        self.scheduler.settle(plan)
        for work in plan:
            if not work.last and work.start + work.count == work.sequence.limit:
                self._end_prompt(self._running[work.sequence])
        self._count(plan, self.stats.generated_tokens - generated, time.perf_counter() - began)

    def _end_prompt(self, completion: Completion) -> None:
        """Nothing is to be generated: only the prompt was wanted."""
        pool = completion.request.pool
        if pool is not None and not pool.finite:
            completion.request.error = _not_finite()
        self._finish(completion, "length" if completion.request.error is None else "error")
        completion.deliver([])

    def _step_on(self, plan: list[Work], began: float) -> None:
        """What `_step` does, for the sequences of the last step, whose tokens are again given and chosen at once."""
        stats = self.stats
        generated = stats.generated_tokens
        tokens = self.runner.decode_on(plan, self.scheduler.repeats)
        for completion, token in zip(self._drawing, tokens, strict=True):
            completion.sequence.computed += 1
            self._take(completion, token)
        stats.decode_steps += 1
        stats.decode_tokens += stats.generated_tokens - generated
        stats.generation_seconds += time.perf_counter() - began

    def _encode(self, plan: list[Work]) -> None:
        """Run the encoder over the sources of these works that are new."""
        new = {work.sequence.source for work in plan}
        sources = [source for source in new if source is not None and not source.encoded]
        if sources:
            self.runner.encode(sources)

    def _compute(self, plan: list[Work]) -> tuple[F32, list[int] | None]:
        """Logits of the sequences that reach their end, in order, at their last tokens and the drafts behind them; and
        the tokens that they choose, where the step was recorded and could choose them."""
        single = self.use_graphs
        for work in plan:
            single = single and work.last and work.count == 1 and not self._scores_prompt(work)
        if single:
            return self.runner.decode(plan, [self._running[work.sequence].sampling for work in plan])
        x = self.runner.forward(plan)
        row = 0
        for work in plan:
            if self._scores_prompt(work):
                self._score_prompt(work, x, row)
            pool = self._running[work.sequence].request.pool
            if pool is not None:
                pool.add(self.runner.final_states(x[row : row + work.rows]), work.start)
            row += work.rows
        return self.runner.last_logits(plan, x), None

    def _choose(self, works: list[Work], logits: F32, drawn: list[int] | None) -> None:
        """The next token at each of these works' ends, and behind it wherever that token is the draft there."""
        beams = [row for row, work in enumerate(works) if self._running[work.sequence].request.search is not None]
        if beams:
            alone = len(beams) == len(works)
            self._choose_beams([works[row] for row in beams], logits if alone else logits[beams])
            others = [row for row in range(len(works)) if row not in beams]
            works, logits = [works[row] for row in others], logits[others]
        if self.speculation is None or not any(work.drafts for work in works):
            self._choose_next([self._running[work.sequence] for work in works], logits, drawn)
            return
        turns, row = [], 0
        for work in works:
            turns.append((self._running[work.sequence], row, work.drafts))
            row += 1 + len(work.drafts)
            self._count_drafts(self._running[work.sequence], drafted=len(work.drafts))
        while turns:
            rows = [row for _, row, _ in turns]
            completions = [completion for completion, _, _ in turns]
            tokens = self._choose_next(
                completions, logits[rows], None if drawn is None else [drawn[row] for row in rows]
            )
            going = []
            for token, (completion, row, drafts) in zip(tokens, turns, strict=True):
                if drafts and token == drafts[0]:
                    self._count_drafts(completion, accepted=1)
                    if not completion.finished:
                        going.append((completion, row + 1, drafts[1:]))
            turns = going

    def _choose_next(self, completions: list[Completion], logits: F32, drawn: list[int] | None) -> list[int]:
        """The next token of each of these completions: the one drawn already, or else one chosen from its logits; -1
        where there is none to choose."""
        if not completions:
            return []
        if drawn is not None:
            chosen = Chosen(drawn, [None] * len(drawn))
        else:
            chosen = self.sampler.sample(logits, [c.sampling for c in completions])
        for completion, token, entry in zip(completions, chosen.tokens, chosen.logprobs, strict=True):
            self._take(completion, token, entry)
        return chosen.tokens

    def _choose_beams(self, works: list[Work], logits: F32) -> None:
        """Extend the beams of these works' ends, in every search that now has the logits of all its beams."""
        searches: dict[BeamSearch, Completion] = {}
        states = []
        for work in works:
            completion = self._running[work.sequence]
            assert completion.request.search is not None
            searches[completion.request.search] = completion
            states.append(completion.request.search.state(work.sequence))
        ids, logprobs = best_next(self.runner.ops, logits, states, max(search.candidates for search in searches))
        for row, work in enumerate(works):
            if work.sequence not in self._running:  # another of its beams failed
                continue
            completion = self._running[work.sequence]
            if ids[row, 0] < 0:
                self._fail(completion, work.sequence)
            elif completion.request.search is not None:
                completion.request.search.take(work.sequence, ids[row], logprobs[row])
        for search, completion in searches.items():
            if completion.finished or not search.ready:
                continue
            for sequence in search.sequences:
                del self._running[sequence]
            search.advance(self.scheduler)
            self._running.update(dict.fromkeys(search.sequences, completion))
            self.stats.generated_tokens += 1
            if search.done:
                self._conclude(completion.request, search)

    def _conclude(self, request: Request, search: BeamSearch) -> None:
        """The best hypotheses of a search are the completions; there may be fewer than were asked for."""
        request.running -= len(request.completions) - len(search.hypotheses[: len(request.completions)])
        del request.completions[len(search.hypotheses) :]
        for completion, found in zip(request.completions, search.hypotheses, strict=False):
            output = completion.output
            output.token_ids, output.score, output.cumulative_logprob = found.token_ids, found.score, found.logprob
            end = found.token_ids[-1]
            with_end = completion.ends_in_text or not found.ended
            completion.text.waiting.extend(found.token_ids if with_end else found.token_ids[:-1])
            self._finish(completion, *(("stop", completion.ends[end]) if found.ended else ("length", None)))
            completion.deliver(found.token_ids)

    def _take(self, completion: Completion, token: int, entry: dict[int, Logprob] | None = None) -> None:
        """Take in a new token: its text, whether the completion ends with it, and what a reader gets of it."""
        if token < 0:
            self._fail(completion)
            return
        self.stats.generated_tokens += 1
        sequence, output = completion.sequence, completion.output
        sequence.tokens.append(token)
        output.token_ids.append(token)
        sampling, text = completion.sampling, completion.text
        if sampling.plain:  # nothing but the number of tokens counts
            sampling.position += 1
        else:
            sampling.append(token)
        if entry is not None:
            assert output.logprobs is not None and output.cumulative_logprob is not None
            output.logprobs.append(self._described(entry, completion.request.params))
            output.cumulative_logprob += entry[token].logprob
        length = len(sequence.tokens)
        may_stop = length >= completion.least
        ends = token in completion.ends and may_stop
        found = None
        if not ends or completion.ends_in_text:
            if text.searched:
                found = text.push([token], may_stop)
            else:
                text.waiting.append(token)
        if ends:
            self._finish(completion, "stop", completion.ends[token])
        elif found is not None:
            self._finish(completion, "stop", found)
        elif length >= sequence.limit:
            self._finish(completion, "length")
        if completion.request.streamed:
            completion.deliver([token])

    def _finish(self, completion: Completion, reason: str, stop_reason: int | str | None = None) -> None:
        self._drawn, self._drawing = None, []  # that plan does not come again: nothing that ended is held by it
        search = completion.request.search
        for sequence in [completion.sequence] if search is None else search.sequences:
            self.scheduler.remove(sequence)
            del self._running[sequence]
        if search is not None:
            search.clear()
        if self.speculation is not None:
            self.speculation.forget(completion.sequence)
        completion.end(reason, stop_reason)
        source, pool = completion.request.source, self.scheduler.source_pool
        if source is not None and pool is not None and completion.request.finished:
            source.leave(pool)
        if not isinstance(stop_reason, str):
            found = completion.text.finish(completion.sequence.generated >= completion.request.params.min_tokens)
            if found is not None and reason == "length":
                completion.end("stop", found)
        completion.output.text = completion.text.text

    def _fail(self, completion: Completion, sequence: Sequence | None = None) -> None:
        """No token can be chosen: end the completion, and say why; of a search all, `sequence` being the beam."""
        matcher = completion.sampling.matcher
        layer = self._first_bad_layer(sequence or completion.sequence)
        if layer is None and matcher is not None:
            completion.request.error = RequestError(
                f"structured_outputs: the grammar cannot go on after {completion.sequence.generated} tokens: "
                f"{matcher.error or 'no token of the model fits'}. Use a simpler one"
            )
        elif layer is None:
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
        for each in [completion] if sequence is None else completion.request.completions:
            self._finish(each, "error")
            each.deliver([])

    def _first_bad_layer(self, sequence: Sequence) -> str | None:
        """Where values stop being numbers at the last token of `sequence`; None where they do not."""
        trace: list[F32] = []
        work = Work(sequence, len(sequence.tokens) - 1, 1, True)
        x = self.runner.forward([work], trace)
        for layer, values in enumerate([*trace, x]):
            if not np.isfinite(values).all():
                return "the embedding" if layer == 0 else f"layer {layer - 1}"
        [(_, logits)] = self.runner.logits(x, np.zeros(1, np.int32))  # not those of the step, which may be needed yet
        return None if np.isfinite(logits).all() else "the head"

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

    def _count_drafts(self, completion: Completion, *, drafted: int = 0, accepted: int = 0) -> None:
        self.stats.drafted_tokens += drafted
        self.stats.accepted_tokens += accepted
        if completion.request.drafts is not None:
            completion.request.drafts.drafted += drafted
            completion.request.drafts.accepted += accepted

    def _count(self, plan: list[Work], generated: int, seconds: float) -> None:
        stats = self.stats
        stats.preemptions = self.scheduler.preemptions
        stats.queried_tokens, stats.cached_tokens = self.scheduler.prefix_queries, self.scheduler.prefix_hits
        prompt_tokens = 0
        for work in plan:
            if work.start < work.sequence.prompt_length:
                prompt_tokens += min(work.start + work.count, work.sequence.prompt_length) - work.start
        stats.prompt_tokens += prompt_tokens
        if prompt_tokens:
            stats.prompt_seconds += seconds
        else:
            stats.generation_seconds += seconds
            stats.decode_steps += 1
            stats.decode_tokens += generated

    def _reset(self) -> None:
        """End every request and forget all blocks."""
        self.runner.ops.stop()
        for request in {completion.request for completion in self._running.values()}:
            request.error = RequestError("the step that computed this request failed; run it again")
            for completion in request.completions:
                if not completion.finished:
                    completion.end("error")
                    completion.deliver([])
        self._running.clear()
        self._drawn, self._drawing = None, []
        self.scheduler.clear()
        if self.speculation is not None:
            self.speculation.clear()


def _not_finite() -> NonFiniteError:
    return NonFiniteError(
        "the model gives hidden states that are not finite for this text. Check the checkpoint, or load it with dtype "
        "float32 if it overflows in a smaller one."
    )
