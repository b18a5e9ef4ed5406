"""What every route needs: the model, its engine thread, limits and metrics."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pyllm.errors import PyllmError
from pyllm.llm import LLM
from pyllm.pooling import EmbeddingRule
from pyllm.sampling import SamplingParams
from pyllm.server.engine_thread import EngineThread, Generation, Prompt, stopped
from pyllm.server.errors import ApiError, api_error, refused
from pyllm.server.limits import Limits
from pyllm.server.metrics import Metrics
from pyllm.server.tools import format_of
from pyllm.spec import Pooling
from pyllm.structured import Matcher

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
                f"model {str(model)[:100]!r} is not served here: {self.model!r} is",
                param="model",
                code="model_not_found",
            )

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises `ApiError` 400."""
        try:
            return await _aside(len(text), lambda: self.llm.encode(text, add_special_tokens=add_special_tokens))
        except PyllmError as error:
            raise api_error(error) from error

    def token_text(self, token: int) -> str:
        """Of one token, special or not."""
        return self.llm.decode([token], skip_special_tokens=False)

    async def prompt(self, given: str | list[int], field: str = "prompt") -> Prompt:
        """A text or token ids of the request's `field`, checked. Raises `ApiError` 400."""
        if isinstance(given, str):
            return self._checked(field, Prompt(await self.encode(given), given))
        return self._checked(field, Prompt(given))

    async def decode(self, ids: list[int]) -> str:
        """The text of token ids, special ones included."""
        return await _aside(len(ids), lambda: self.llm.decode(ids, skip_special_tokens=False))

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
        try:
            made = await _aside(size, lambda: self.llm.chat_prompt(messages, tools=tools))
        except PyllmError as error:
            raise api_error(error) from error
        return self._checked("messages", Prompt(made["prompt_token_ids"], made["prompt"]))

    async def submit(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        streamed: bool,
        key: bytes,
        salt: str | None,
        pooling: Pooling | None = None,
    ) -> Generation:
        """Queue prompts of the client with this API key. Raises `ApiError` 429 or 503, and 400 for a grammar."""
        matcher = None
        if params.structured_outputs is not None:
            try:
                matcher = await asyncio.wrap_future(self._grammars.submit(self._matcher, params))
            except Exception as error:
                raise api_error(error) from error
        return self.engine.submit(
            prompts,
            params,
            streamed=streamed,
            seconds=self.limits.max_seconds,
            salt=self._salt(key, salt or ""),
            pooling=pooling,
            matcher=matcher,
        )

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        if not self.engine.ready:  # however many wait, the server's end does not wait for them
            raise stopped()
        return self.llm.engine.matcher(params)

    def _salt(self, key: bytes, salt: str) -> bytes:
        """What begins the hash chains of a client's cached prompts: others neither share nor guess them."""
        if not key and not salt:
            return b""
        text = b"%d:%b%b" % (len(key), key, salt.encode())
        return hashlib.blake2b(text, key=self._secret, digest_size=16).digest()

    def _checked(self, field: str, prompt: Prompt) -> Prompt:
        limit = self.limits.max_prompt_tokens
        if limit is not None and len(prompt.ids) > limit:
            raise refused(field, f"{len(prompt.ids)} tokens, at most {limit} are taken (a limit of this server)")
        try:
            self.llm.engine.check_prompt(prompt.ids)
        except PyllmError as error:
            raise ApiError(400, str(error), param=field) from error
        return prompt


async def _aside(size: int, job: Callable[[], T]) -> T:
    """The job's result; from a thread where `size`, in characters, says that it may take long."""
    return job() if size <= _AT_ONCE else await asyncio.to_thread(job)
