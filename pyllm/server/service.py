"""What every route needs: the model, its engine thread, limits and metrics."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pyllm.engine.sampler import Shared
from pyllm.errors import PyllmError
from pyllm.llm import LLM
from pyllm.pooling import EmbeddingRule
from pyllm.sampling import SamplingParams
from pyllm.server.engine_thread import EngineThread, Generation, Prompt, late, stopped
from pyllm.server.errors import ApiError, api_error, refused
from pyllm.server.limits import Limits
from pyllm.server.metrics import Metrics
from pyllm.server.tools import format_of
from pyllm.spec import Pooling

T = TypeVar("T")
Log = Callable[[dict[str, Any]], None]
_AT_ONCE = 4096  # characters or tokens that are worked on in the event loop itself; more of them in a thread


class Service:
    """A model being served under the name `model` to whoever has one of `keys` (to everyone where there are none).

    `hosts` are the names, without ports, by which requests may call this server; none: whatever they call it.
    """

    def __init__(
        self,
        llm: LLM,
        model: str,
        limits: Limits,
        keys: Sequence[str],
        log: Log,
        embedding: EmbeddingRule | None = None,
        hosts: Sequence[str] = (),
    ) -> None:
        self.llm, self.model, self.limits, self.log = llm, model, limits, log
        self.hosts = tuple(hosts)
        self.keys = [key.encode() for key in keys]
        self.embedding = embedding  # None: the model is not for embeddings
        self.created = int(time.time())
        self.metrics = Metrics(llm.engine, model)
        self.engine = EngineThread(llm, limits.max_queue, self.metrics.ended, log)
        own = llm.tokenizer.chat_template if llm.tokenizer is not None else None
        self.template = llm.chat_template if llm.chat_template is not None else own
        self.tool_format = format_of(self.template)
        self._secret = secrets.token_bytes(32)
        self._grammars = ThreadPoolExecutor(1, "pyllm-grammars")  # costly ones hold up each other, and no step

    def check_model(self, model: str | None) -> None:
        """Raise `ApiError` 404 where a request asks for another model."""
        if model not in (None, self.model):
            raise ApiError(
                404,
                f"model: expected {self.model!r}, which is served here, or none, got {str(model)[:100]!r}",
                param="model",
                code="model_not_found",
            )

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises `ApiError` 400."""
        try:
            return await aside(len(text), lambda: self.llm.encode(text, add_special_tokens=add_special_tokens))
        except PyllmError as error:
            raise api_error(error) from error

    def token_text(self, token: int) -> str:
        """Of one token, special or not."""
        return self.llm.decode([token], skip_special_tokens=False)

    async def prompts(
        self, field: str, given: Sequence[str | list[int]], n: int = 1, echo: bool = False
    ) -> list[Prompt]:
        """Texts or token ids of the request's `field`, checked, with `n` completions of each to be asked for; with
        `echo` token ids have their text too. Raises `ApiError` 400, 429 or 503.
        """
        self.engine.admit(len(given) * n)  # before the work of reading them

        def read() -> list[Prompt]:
            return [self._prompt(field, one, echo) for one in given]

        try:
            return await aside(sum(map(len, given)) + len(given), read)
        except PyllmError as error:
            raise api_error(error) from error

    def _prompt(self, field: str, given: str | list[int], echo: bool) -> Prompt:
        if isinstance(given, str):
            return self._checked(field, Prompt(self.llm.encode(given), given))
        prompt = self._checked(field, Prompt(given))
        return Prompt(given, self.llm.decode(given)) if echo else prompt

    async def decode(self, ids: list[int]) -> str:
        """The text of token ids, special ones included. Raises `ApiError` 400."""
        vocabulary = self.llm.spec.vocab_size

        def text() -> str:
            for index, token in enumerate(ids):
                if not 0 <= token < vocabulary:
                    raise refused(f"tokens[{index}]", f"expected an id in [0, {vocabulary}), got {token}")
            return self.llm.decode(ids, skip_special_tokens=False)

        return await aside(len(ids), text)

    async def chat_prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> Prompt:
        """What the chat template makes of a conversation. Raises `ApiError` 400."""
        if self.template is None:
            raise ApiError(400, "this model has no chat template: use /v1/completions, or serve with --chat-template")
        if tools and self.tool_format is None:
            raise refused(
                "tools", "the chat template of this model asks for tool calls in no known format, so none can be read"
            )
        values = [value for message in messages for value in message.values()]
        size = sum(len(value) if isinstance(value, str) else _AT_ONCE for value in values)  # calls are of any size
        size += _AT_ONCE if tools else 0

        def read() -> Prompt:
            made = self.llm.chat_prompt(messages, tools=tools)
            return self._checked("messages", Prompt(made["prompt_token_ids"], made["prompt"]))

        try:
            return await aside(size, read)
        except PyllmError as error:
            raise api_error(error) from error

    async def submit(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        streamed: bool,
        arrival: float,
        key: bytes,
        salt: str | None,
        pooling: Pooling | None = None,
    ) -> Generation:
        """Queue prompts of the client with this API key, of a request that came at `arrival` (monotonic clock).

        Raises `ApiError` 429 or 503, and 400 for a grammar. Where it is cancelled nothing is queued.
        """
        deadline = arrival + self.limits.max_seconds
        shared = None
        if params.bad_words:
            size = sum(map(len, params.bad_words))
            shared = await aside(size, lambda: self.llm.engine.prepare(params))
        if params.structured_outputs is not None:
            self.engine.admit(len(prompts) * params.n)
            compiled = asyncio.wrap_future(self._grammars.submit(_calmly, lambda: self._compiled(params)))
            try:
                shared = await asyncio.wait_for(compiled, deadline - time.monotonic())
            except asyncio.TimeoutError as error:
                raise late() from error
            except PyllmError as error:
                raise api_error(error) from error
        return self.engine.submit(
            prompts,
            params,
            streamed=streamed,
            deadline=deadline,
            salt=self._salt(key, salt or ""),
            pooling=pooling,
            shared=shared,
        )

    def _compiled(self, params: SamplingParams) -> Shared:
        if not self.engine.ready:  # however many wait, the server's end does not wait for them
            raise stopped()
        try:
            return self.llm.engine.prepare(params)
        except ValueError as error:  # what is wrong with the grammar
            raise ApiError(400, str(error), param="structured_outputs") from error

    def _salt(self, key: bytes, salt: str) -> bytes:
        """What begins the hash chains of a client's cached prompts: others neither share nor guess them."""
        if not key and not salt:
            return b""
        text = b"%d:%b%b" % (len(key), key, salt.encode())
        return hashlib.blake2b(text, key=self._secret, digest_size=16).digest()

    def _checked(self, field: str, prompt: Prompt) -> Prompt:
        limit = self.limits.max_prompt_tokens
        if limit is not None and len(prompt.ids) > limit:
            raise refused(
                field, f"expected at most {limit} tokens (a limit of this server), got {len(prompt.ids)}: shorten it"
            )
        try:
            self.llm.engine.rules.check_prompt(prompt.ids)
        except PyllmError as error:
            raise ApiError(400, str(error), param=field) from error
        return prompt


async def aside(size: int, job: Callable[[], T]) -> T:
    """The job's result; from a thread where `size`, in characters, says that it may take long."""
    return _calmly(job) if size <= _AT_ONCE else await asyncio.to_thread(_calmly, job)


def _calmly(job: Callable[[], T]) -> T:
    """The job's result; a panic of an extension, which is no `Exception`, is a `RuntimeError`."""
    try:
        return job()
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise RuntimeError("an extension panicked: expected a result or an Exception") from error
