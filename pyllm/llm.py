"""`LLM`: a model loaded and ready, the synchronous face of the engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from pyllm import isa
from pyllm.cache import CACHE_DTYPES, BlockPool, KVCache
from pyllm.cuda_limits import refusal
from pyllm.cuda_ops import CudaOps
from pyllm.device import Device, open_device, unavailable
from pyllm.encoding import Encoding
from pyllm.engine.draft_model import DraftModel
from pyllm.engine.engine import Engine, Stats
from pyllm.engine.outputs import PerplexityResult, RequestOutput, Score, StreamOutput
from pyllm.engine.runner import Runner
from pyllm.engine.session import Session
from pyllm.engine.speculative import NgramProposer, Proposer, Speculation, drafts_per_step
from pyllm.errors import ConfigError, CudaUnavailable, RequestError, shown
from pyllm.folder import read_json
from pyllm.generation_config import GenerationConfig
from pyllm.model import Model
from pyllm.models import open_checkpoint
from pyllm.ops import Ops
from pyllm.packed import pack_weights
from pyllm.planning import CATCH_UP, Plan, plan_memory
from pyllm.prompts import Prompt, Prompts, refuse_unknown
from pyllm.reading import ForwardOutput, Reader
from pyllm.sampling import SamplingParams
from pyllm.spec import ModelSpec
from pyllm.tokenizer import Tokenizer
from pyllm.weights import Checkpoint, resolve

Message: TypeAlias = dict[str, Any]


class LLM(Encoding):
    """A model in the Hugging Face folder layout, by folder or hub name, loaded for generation on the CPU or a GPU.

    Args:
        model: a folder, or a hub name ("org/name"), which is downloaded through huggingface_hub into its cache.
        dtype: of the weights: "auto" (as the checkpoint), "float32", "float16" or "bfloat16".
        quantization: "int8" (one scale for each row of a matrix) or "int4" (one for each 64 weights of a row; the
            embedding and the head become int8): round the matrices while loading, and activations to int8 where they
            meet them. None: keep them in `dtype`. What a checkpoint holds as integers already stays as it is.
        quantization_skip: shell patterns of weights that are kept in `dtype`, such as "blocks.0.*" or
            "*.mlp.down.weight".
        device: "cpu", "cuda" (an NVIDIA GPU), or "auto": the GPU where there is one that can run the model as asked,
            else the CPU. On a GPU weights are bfloat16, or float32 where `dtype` says so.
        batch_invariant: on a GPU, compute a sequence to the same bits whatever runs beside it, as the CPU always does;
            decoding is slower. Without it the same batch gives the same bits.
        max_model_len: longest prompt plus completion, in tokens; default the model's own, less where memory asks.
        seed: of requests that have none; None takes fresh entropy for each request.
        threads: default PYLLM_THREADS, else the physical cores available.
        kv_cache_dtype: "auto" (bfloat16 where `dtype` is, else float32), "float32", "bfloat16" or "int8" (a scale for
            each token and head).
        kv_cache_bytes: memory for keys and values; default what `max_num_seqs` full contexts take, at most half of what
            is free.
        max_num_seqs: completions that run together.
        max_num_batched_tokens: tokens of one step; longer prompts are taken in chunks of it.
        enable_prefix_caching: share the keys and values of equal prompt beginnings.
        prefix: run a causal decoder with a bidirectional prefix: the tokens of a prompt see all of it, those generated
            what is before them. A prompt is then computed in one step, which has room for 2048 tokens, or
            `max_num_batched_tokens` where that is more. Models that were made so need not be told.
        speculative: "ngram" guesses tokens from what the sequence holds already and checks several in one step; the
            output is the same (on a GPU with `batch_invariant`). None: off.
        draft_model: folder or hub name of a smaller model with the same vocabulary, which guesses instead; it is
            loaded with the same `dtype` and `kv_cache_dtype`, and `kv_cache_bytes` hold its keys and values too.
        num_speculative_tokens: guessed for a sequence in a step, at most; default 7 of n-grams, 4 of a draft model.
        skip_tokenizer_init: serve token ids only, from a folder that need not have a tokenizer.
        chat_template: replaces the folder's chat template.
        revision, offline: of a hub name.
        progress: called with a share in [0, 1] while weights are packed.

    Raises:
        pyllm.errors.PyllmError: the model cannot be found, read or run, or does not fit memory; the message says why.
        ValueError, TypeError: an argument is out of its range or unknown.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        quantization: str | None = None,
        quantization_skip: Sequence[str] = (),
        device: str = "auto",
        batch_invariant: bool = False,
        max_model_len: int | None = None,
        seed: int | None = None,
        threads: int | None = None,
        kv_cache_dtype: str = "auto",
        kv_cache_bytes: int | None = None,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        enable_prefix_caching: bool = True,
        prefix: bool = False,
        speculative: str | None = None,
        draft_model: str | Path | None = None,
        num_speculative_tokens: int | None = None,
        skip_tokenizer_init: bool = False,
        chat_template: str | None = None,
        revision: str | None = None,
        offline: bool = False,
        progress: Callable[[float], None] | None = None,
        **unknown: object,
    ) -> None:
        refuse_unknown("LLM", unknown, LLM.__init__.__kwdefaults__ or {})
        _check_device(device)
        self.seed = _checked_seed(seed)
        self.folder = resolve(str(model), revision=revision, offline=offline)
        self.tokenizer = None if skip_tokenizer_init else Tokenizer.load(self.folder)
        self.chat_template = chat_template
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
            raise ValueError(f"threads: expected an integer of at least 1, got {threads!r}")
        threads = threads if threads is not None else isa.default_threads()
        drafts_per_step(speculative, draft_model, num_speculative_tokens)  # said before anything is opened
        with ExitStack() as opened:
            checkpoint = opened.enter_context(open_checkpoint(self.folder))
            draft = None
            if draft_model is not None:
                draft = opened.enter_context(open_checkpoint(resolve(str(draft_model), offline=offline)))
            gpu = _gpu_for(
                device, [refusal(c.spec, dtype, quantization, kv_cache_dtype) for c in (checkpoint, draft) if c]
            )
            self.device = "cpu" if gpu is None else "cuda"
            self.plan: Plan = plan_memory(
                checkpoint,
                draft,
                dtype=dtype,
                quantization=quantization,
                quantization_skip=quantization_skip,
                kv_cache_dtype=kv_cache_dtype,
                kv_cache_bytes=kv_cache_bytes,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                prefix=prefix,
                speculative=speculative,
                num_speculative_tokens=num_speculative_tokens,
                gpu=gpu,
            )
            self.plan.check()
            self.spec = self.plan.spec
            self.ops = Ops(threads)
            if gpu is not None:
                product = CACHE_DTYPES[self.plan.precision.dtype]
                self.ops = CudaOps(gpu, product, threads=threads, invariant=batch_invariant)
            weights = pack_weights(checkpoint, self.ops, self.plan.precision, progress)
            proposer: Proposer | None = NgramProposer() if speculative is not None else None
            if draft is not None:
                proposer = _load_draft(draft, self.plan, self.ops, max_num_seqs, enable_prefix_caching)
        self.model = Model(self.spec, weights)
        self.max_model_len = self.plan.max_model_len
        cache = KVCache(
            self.spec, self.plan.cache_blocks, self.plan.cache_dtype, self.ops.allocate, shared=self.spec.is_encoder
        )
        cross = None
        if self.spec.encoder is not None:
            cross = KVCache(self.spec, self.plan.cache_blocks, self.plan.cache_dtype, self.ops.allocate, cross=True)
        self._runner = Runner(
            self.model,
            self.ops,
            cache,
            self.plan.step_tokens,
            max_num_seqs,
            self.max_model_len,
            self.plan.drafts,
            cross,
            self.plan.max_source,
        )
        own = _generation_end_ids(self.folder) if self.tokenizer is None else self.tokenizer.eos_token_ids
        end_ids = {*self.spec.eos_token_ids, *own}
        self.engine = Engine(
            self._runner,
            BlockPool(cache.blocks),
            self.tokenizer,
            sorted(i for i in end_ids if 0 <= i < self.spec.vocab_size),
            max_sequences=max_num_seqs,
            max_tokens=self.plan.step_tokens,
            max_prefix=self.plan.prefix_tokens,
            max_length=self.max_model_len,
            share_prefixes=enable_prefix_caching and not _rope_varies(self.spec),
            speculation=None if proposer is None else Speculation(proposer, self.plan.drafts, self._runner.max_rows),
            defaults=GenerationConfig.read(self.folder, self.spec.vocab_size),
        )
        self._lock = threading.RLock()
        self._prompts = Prompts(self.spec, self.tokenizer)
        self._reader = Reader(self.engine, self._lock)

    # Generation

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        **params: Any,
    ) -> list[RequestOutput]:
        """Complete prompts, all together; results in the order of the prompts.

        A prompt is text, ``{"prompt": text}`` or ``{"prompt_token_ids": [...]}``. Parameters are one `SamplingParams`
        for all, one each, or keywords of `SamplingParams`. `progress` gets (finished, all) requests.

        A model with an encoder reads the prompt as its source and writes about it; its text begins with the start token
        and a prompt's ``"target_token_ids"``. Of mBART a prompt may say ``"source_language"`` and
        ``"target_language"``. Without parameters it searches as its folder says.

        Raises `RequestError` for a prompt that is empty, too long or has ids outside the vocabulary, before anything is
        run; `NonFiniteError` when the model's logits are no numbers.
        """
        single = isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable)
        listed: list[Any] = [prompts] if single else list(prompts)
        each = self._params_for(len(listed), sampling_params, params)
        encoded = [
            (self._prompts.read(prompt), self._prompts.target(prompt), *self._prompts.towards(prompt, one))
            for prompt, one in zip(listed, each, strict=True)
        ]
        with self._session() as session:
            for prompt, target, one, start in encoded:
                session.add(prompt, one, target=target, start=start)
            return session.run(progress)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **params: Any
    ) -> Iterator[StreamOutput]:
        """Complete one prompt piece by piece. It starts with the first `next`; closing the iterator ends it.

        Parameters as those of `generate`; beams have no text to stream, so that a model with an encoder whose folder
        asks for them needs some.
        """
        [one] = self._params_for(1, sampling_params, params)
        if one.num_beams > 1:
            whose = "" if sampling_params is not None or params else ", as the model's folder says"
            raise ValueError(
                f"num_beams: expected 1, got {one.num_beams}{whose}: beams have no text to stream; use generate, or "
                "give parameters without beams"
            )
        encoded, target = self._prompts.read(prompt), self._prompts.target(prompt)
        one, start = self._prompts.towards(prompt, one)
        self.engine.rules.check_prompt(encoded.ids)

        def pieces() -> Iterator[StreamOutput]:
            with self._session() as session:
                yield from session.stream(session.add(encoded, one, target=target, start=start))

        return pieces()

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        **params: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation (or several), messages being ``{"role": ..., "content": ...}``."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = messages if several else [messages]
        prompts = [self.chat_prompt(conversation, tools=tools) for conversation in conversations]
        return self.generate(prompts, sampling_params, **params)

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None, **params: Any
    ) -> Iterator[StreamOutput]:
        """Answer a conversation piece by piece."""
        return self.stream(self.chat_prompt(messages), sampling_params, **params)

    def chat_prompt(
        self, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """The prompt that the chat template makes of a conversation; special tokens are the template's own."""
        tokenizer = self._prompts.need_tokenizer()
        text = tokenizer.apply_chat_template(messages, chat_template=self.chat_template, tools=tools)
        ids = tokenizer.encode(text, add_special_tokens=False)
        if self.spec.prefix is not None:
            ids = self.spec.prefix.completed(ids)
        return {"prompt": text, "prompt_token_ids": ids}

    # Scoring

    def score(
        self,
        texts: Sequence[str | tuple[str, str] | Mapping[str, Any]],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Score]:
        """Log-probabilities of given texts, in nats.

        An item is a text, ``{"prompt_token_ids": [...]}``, or a pair (context, continuation) of which only the tokens
        of the continuation are scored: the two are tokenized together and cut where the tokens of the context end.

        With a bidirectional prefix the context of a pair is the prefix, and a text by itself is read without one. A
        model that fills blanks is given the context as a prompt, and scores what stands in the blank. A model with an
        encoder takes pairs (source, target), or a prompt with ``"target_token_ids"``, and scores the target.
        """
        if isinstance(texts, (str, Mapping, tuple)):
            raise TypeError("score: expected a list of texts and of (context, continuation) pairs, got one by itself")
        params = SamplingParams(max_tokens=0, prompt_logprobs=0, detokenize=False)
        given = [(*self._prompts.scored(item), self._prompts.target(item)) for item in texts]
        with self._session() as session:
            for prompt, start, target in given:
                prefix = None if self.spec.fills_blanks else start
                session.add(prompt, params, prefix=prefix, target=target)
            outputs = session.run(progress)
        scores = []
        for (_, start, _), request, output in zip(given, session.requests, outputs, strict=True):
            ids = request.completions[0].sequence.tokens  # the prompt, or the target
            entries = output.prompt_logprobs or []
            values = [entry[token].logprob for token, entry in zip(ids[start:], entries[start:], strict=True) if entry]
            scores.append(Score(output.prompt, ids[start:], values))
        return scores

    def perplexity(
        self,
        text: str | Sequence[int],
        *,
        stride: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> PerplexityResult:
        """Perplexity of a text or of token ids, in windows of the context that overlap by all but `stride` tokens.

        Only tokens that no earlier window scored count (default stride: half the context).
        """
        ids = self.encode(text) if isinstance(text, str) else list(text)
        size = len(text.encode()) if isinstance(text, str) else 0
        if self.spec.encoder is not None:
            raise RequestError(
                "perplexity: expected a model that continues a text, this one has an encoder and writes about a "
                "source: score pairs (source, target)"
            )
        if len(ids) < 2:
            raise RequestError(f"the text has {len(ids)} tokens: perplexity needs at least 2")
        window = self.max_model_len
        if window < 2:
            raise RequestError(f"the context is {window} token long: perplexity needs at least 2, raise max_model_len")
        step = stride if stride is not None else max(1, window // 2)
        if isinstance(step, bool) or not isinstance(step, int) or not 1 <= step < window:
            raise ValueError(f"stride: expected an integer from 1 to {window - 1}, got {stride!r}")
        nll, scored, end = 0.0, 0, 1  # the first token has nothing before it
        for begin in range(0, len(ids), step):
            fresh = min(begin + window, len(ids)) - end
            end += fresh
            [score] = self.score([{"prompt_token_ids": ids[begin:end]}])
            nll -= sum(score.logprobs[-fresh:])
            scored += fresh
            if progress:
                progress(end, len(ids))
            if end == len(ids):
                break
        return PerplexityResult(float(np.exp(nll / scored)), nll, scored, size)

    def forward(
        self,
        token_ids: Sequence[int],
        *,
        token_type_ids: Sequence[int] | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        prefix: int | None = None,
        source_token_ids: Sequence[int] | None = None,
    ) -> ForwardOutput:
        """What the model's head gives, and what transformers calls hidden states; memory grows with T x V.

        `token_type_ids` tell which text of a pair each token belongs to, by default all to the first. The first
        `prefix` tokens see one another; None: as the model takes a prompt. Attention weights are those of texts that a
        step holds whole, else `RequestError`. Where the model has an encoder it reads `source_token_ids`, and
        `token_ids` are all of the decoder's, the start token first.
        """
        return self._reader.forward(
            token_ids, token_type_ids, output_hidden_states, output_attentions, prefix, source_token_ids
        )

    # Text

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; its special tokens are what the tokenizer adds, and the start of a blank to fill."""
        return self._prompts.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self._prompts.need_tokenizer().decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    # Figures

    @property
    def lock(self) -> AbstractContextManager[bool]:
        """Held while the engine is in use; who steps `engine` without the methods here holds it too."""
        return self._lock

    @property
    def stats(self) -> Stats:
        """Counters of the engine since it began."""
        return self.engine.stats

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one decode step reads."""
        return self.model.weights.bytes_per_token

    # Inside

    def _session(self) -> Session:
        return Session(self.engine, self._lock, self.seed)

    def _params_for(self, count: int, given: Any, keywords: Mapping[str, Any]) -> list[SamplingParams]:
        """One `SamplingParams` for each of `count` prompts; where none are given, what the model's folder says."""
        if given is not None and keywords:
            raise TypeError(
                f"give either sampling_params or keywords, not both: got also {', '.join(sorted(keywords))}"
            )
        if given is None and not keywords and self.spec.encoder is not None:
            given = self.engine.defaults.params()
        if given is None or isinstance(given, SamplingParams):
            return [given or SamplingParams(**keywords)] * count
        each = list(given)
        if len(each) != count or not all(isinstance(p, SamplingParams) for p in each):
            raise ValueError(
                f"sampling_params: expected one SamplingParams, or {count}, one for each prompt, got {len(each)}"
            )
        return each


def _load_draft(checkpoint: Checkpoint, plan: Plan, ops: Ops, sequences: int, share: bool) -> DraftModel:
    """The draft model that was planned for, with steps of so many sequences."""
    spec, planned = checkpoint.spec, plan.draft_model
    assert planned is not None
    model = Model(spec, pack_weights(checkpoint, ops, planned.precision))
    cache = KVCache(spec, plan.cache_blocks, planned.cache_dtype, ops.allocate)
    runner = Runner(model, ops, cache, plan.step_tokens, sequences, planned.max_length, CATCH_UP)
    return DraftModel(runner, cache.blocks, planned.max_length, share and not _rope_varies(spec))


def _rope_varies(spec: ModelSpec) -> bool:
    """Whether keys depend on the length of the sequence, so that equal beginnings may differ."""
    return spec.rope is not None and spec.rope.length_class(1) is not None


def _generation_end_ids(folder: Path) -> list[int]:
    """End tokens that generation_config.json names, if the folder has one."""
    path = folder / "generation_config.json"
    if not path.exists():
        return []
    ids = read_json(path, 1 << 20, ConfigError).get("eos_token_id")
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in listed):
        raise ConfigError(f"{path}: eos_token_id: expected an integer or a list of integers, found {shown(ids)}")
    return listed


def _check_device(device: str) -> None:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {device!r}")
    if device == "cuda" and (missing := unavailable()) is not None:
        raise CudaUnavailable(f"device='cuda': {missing}. Or use device='cpu'.")


def _gpu_for(device: str, refusals: Sequence[str | None]) -> Device | None:
    """The GPU to run on; None for the CPU. What a GPU cannot do is an error only where it was asked for."""
    if device == "cpu" or (device == "auto" and (unavailable() is not None or any(refusals))):
        return None
    for reason in refusals:
        if reason is not None:
            raise ValueError(f"{reason}. Or use device='cpu'.")
    return open_device()


def _checked_seed(seed: int | None) -> int | None:
    return seed if seed is None else replace(SamplingParams(), seed=seed).seed
