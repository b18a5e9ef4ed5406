"""Request bodies: what clients may send, checked, and the prompts and `SamplingParams` that it means. No HTTP here."""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from pyllm.errors import ConfigError
from pyllm.generation_config import GenerationConfig
from pyllm.sampling import SamplingParams
from pyllm.server.errors import ApiError, api_error, refused
from pyllm.server.limits import Limits
from pyllm.structured import StructuredOutputs

COMPLETION_TOKENS = 16  # of /v1/completions where the request says nothing, as in OpenAI's interface
MAX_LISTED = 1024  # entries of logit_bias, bad_words, stop_token_ids; tokens of a prompt are limited by the body alone
MAX_ALLOWED = 1 << 14  # entries of allowed_token_ids, which every step reads

# Taken and without effect: they concern OpenAI's own bookkeeping, not the text.
_Ignored = Any
_Word = Annotated[str, StringConstraints(min_length=1, max_length=256)]
# Of a list only the first fault is kept: a body of 8 MiB may have millions.
_Texts = Annotated[list[str], Field(fail_fast=True)]
_Ids = Annotated[list[int], Field(fail_fast=True)]
_Prompts = str | _Texts | _Ids | Annotated[list[_Ids], Field(fail_fast=True)]


def _few(value: Any) -> Any:
    """A mapping whose entries may be looked at: faults of all of them would be kept."""
    if isinstance(value, dict) and len(value) > MAX_LISTED:
        raise PydanticCustomError("too_long", f"expected at most {MAX_LISTED} entries, got {len(value)}")
    return value


class Body(BaseModel):
    """A request body: unknown fields are refused, and so are values of another type than the documented one."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        """Refuses the first unknown field; pydantic would keep an error for each."""
        if not isinstance(value, dict):
            return value
        known = _fields(cls)
        unknown = next((name for name in value if name not in known), None)
        if unknown is None:
            return value
        near = difflib.get_close_matches(unknown[:100], known, 1)
        hint = f"; did you mean {near[0]}?" if near else ": leave it out"
        raise PydanticCustomError(_UNKNOWN, "this field is not supported{hint}", {"hint": hint, "name": unknown})


@functools.cache
def _fields(kind: type[Body]) -> tuple[str, ...]:
    return tuple(field.alias or name for name, field in kind.model_fields.items())


_UNKNOWN = "unknown_field"


Request = TypeVar("Request", bound=Body)


class StreamOptions(Body):
    """`include_usage`: one more event, before the last, that counts tokens."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Structure(Body):
    """What the output must match, as vLLM has it; exactly one is given."""

    json_: dict[str, Any] | bool | str | None = Field(None, alias="json")
    json_object: bool = False
    regex: str | None = None
    choice: _Texts | None = None
    grammar: str | None = None


class GenerationBody(Body):
    """What completions and chat completions have in common: OpenAI's fields, then those that vLLM added.

    None is the same as leaving a field out. `cache_salt` keeps the cached beginnings of prompts apart from those of
    requests with another salt, as different API keys do anyhow.
    """

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | _Texts | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_few)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: Annotated[list[int], Field(fail_fast=True, max_length=MAX_LISTED)] | None = None
    bad_words: Annotated[list[_Word], Field(fail_fast=True, max_length=MAX_LISTED)] | None = None
    allowed_token_ids: Annotated[list[int], Field(fail_fast=True, max_length=MAX_ALLOWED)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: Structure | None = None
    cache_salt: Annotated[str, StringConstraints(max_length=256)] | None = None

    response_format: dict[str, Any] | None = None

    user: _Ignored = None
    metadata: _Ignored = None
    store: _Ignored = None
    service_tier: _Ignored = None
    safety_identifier: _Ignored = None
    prompt_cache_key: _Ignored = None
    prompt_cache_retention: _Ignored = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a count of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _params(
        self, limits: Limits, max_tokens: int | None, defaults: GenerationConfig | None = None, **more: Any
    ) -> SamplingParams:
        """What is not given is as in `SamplingParams`, or as `defaults` say.

        Raises `ApiError` 400 for values out of their range or beyond the limits, and for defaults that cannot be
        followed.
        """
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "expected only with stream = true")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        _at_most("n", self.n, limits.max_n)
        _at_most("stop", len(stops), limits.max_stop_strings, " strings")
        _at_most("stop", max(map(len, stops), default=0), limits.max_stop_chars, " characters each")
        _at_most(self._given_as("max_tokens"), max_tokens, limits.max_tokens)
        values = {name: getattr(self, name) for name in _SAMPLING}
        values = {name: value for name, value in values.items() if value is not None}
        if "seed" in values:
            values["seed"] %= 1 << 64  # OpenAI's seeds are signed
        try:
            values |= {"structured_outputs": wanted} if (wanted := self._structured()) else {}
            if defaults is not None:
                return self._searched(limits, defaults, {"max_tokens": max_tokens, "stop": stops, **values, **more})
            max_tokens = limits.max_tokens if max_tokens is None else max_tokens
            return SamplingParams(max_tokens=max_tokens, stop=stops, **values, **more)
        except ConfigError as error:
            raise api_error(error) from error
        except (ValueError, TypeError) as error:
            name, colon, reason = str(error).partition(":")
            field, inside = re.match(r"(\w*)(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
            if not colon or field not in SamplingParams.__dataclass_fields__:
                raise ApiError(400, str(error)) from error
            given = self._given_as(field)
            raise ApiError(400, f"{given}{inside}:{reason}", param=given) from error

    def _searched(self, limits: Limits, defaults: GenerationConfig, values: dict[str, Any]) -> SamplingParams:
        """How to search with these values, where given, and else by the defaults; without beams where they could not do
        what is asked for."""
        given = {name: value for name, value in values.items() if value not in (None, [])}
        if self.stream or given.get("temperature") or not given.keys().isdisjoint(_NOT_WITH_BEAMS):
            given["num_beams"] = 1
        params = defaults.params(given)
        most = limits.max_tokens
        if most is not None and (params.max_tokens is None or params.max_tokens > most):
            return defaults.params({**given, "max_tokens": most})
        return params

    def _given_as(self, field: str) -> str:
        """The request's field that became this one of `SamplingParams`."""
        return "response_format" if field == "structured_outputs" and self.structured_outputs is None else field

    def _structured(self) -> StructuredOutputs | None:
        """What the output must match, given in OpenAI's way or in vLLM's."""
        form = self.response_format or {"type": "text"}
        kind = form.get("type")
        schema = form.get("json_schema")
        if kind == "text" and self.structured_outputs is not None:
            return StructuredOutputs(**self.structured_outputs.model_dump(by_alias=True))
        if self.structured_outputs is not None:
            raise refused("response_format", "the output has structured_outputs already: give one of them alone")
        if kind == "json_schema" and isinstance(schema, dict) and isinstance(schema.get("schema"), dict):
            return StructuredOutputs(json=schema["schema"])
        if kind not in ("text", "json_object"):
            expected = '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema"}}'
            raise refused("response_format", f"expected {expected}")
        return StructuredOutputs(json_object=True) if kind == "json_object" else None


_SAMPLING = (
    "n", "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "logit_bias", "top_k", "min_p",
    "repetition_penalty", "min_tokens", "stop_token_ids", "bad_words", "allowed_token_ids", "ignore_eos",
    "include_stop_str_in_output", "skip_special_tokens",
)  # fmt: skip


_NOT_WITH_BEAMS = ("stop", "logprobs", "prompt_logprobs")


class CompletionBody(GenerationBody):
    """Body of ``POST /v1/completions``."""

    prompt: _Prompts
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """One text or list of token ids for each prompt."""
        return _texts_or_ids("prompt", self.prompt)

    def sampling_params(self, limits: Limits, defaults: GenerationConfig | None = None) -> SamplingParams:
        """What is not given is as `defaults` say, if any. Raises `ApiError` 400 for what cannot be done."""
        if self.suffix is not None:
            raise refused("suffix", "text cannot be inserted before a suffix: leave it out")
        if self.best_of not in (None, self.n or 1):
            raise refused("best_of", f"expected {self.n or 1} (= n) or none: choosing among more is not supported")
        _at_most("logprobs", self.logprobs, limits.max_logprobs)
        max_tokens = COMPLETION_TOKENS if self.max_tokens is None and defaults is None else self.max_tokens
        if self.max_tokens is None and max_tokens is not None and limits.max_tokens is not None:
            max_tokens = min(max_tokens, limits.max_tokens)
        if max_tokens == 0 and not self.echo:
            raise refused("max_tokens", "expected at least 1 without echo, got 0")
        scored = self.logprobs if self.echo else None
        return self._params(limits, max_tokens, defaults, logprobs=self.logprobs, prompt_logprobs=scored)


class FunctionCall(Body):
    """A tool's name and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call that an earlier answer made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class TextPart(Body):
    """A piece of a message; only text is understood."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One message of a conversation; `developer` is another name of `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None

    def for_template(self, index: int) -> dict[str, Any]:
        """As chat templates expect it: text as one string, arguments of calls as values."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        if content is None and self.role != "assistant":
            raise refused(f"messages[{index}].content", f"expected a text in a message of role {self.role}")
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content or ""}
        message |= {key: value for key in ("name", "tool_call_id") if (value := getattr(self, key)) is not None}
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": _with_values(call.function, index)}
                for call in self.tool_calls
            ]
        return message


class Function(Body):
    """A tool that may be called; `parameters` is a JSON schema."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; only functions exist."""

    type: Literal["function"]
    function: Function


class ChatBody(GenerationBody):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as chat templates expect them."""
        return [message.for_template(index) for index, message in enumerate(self.messages)]

    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools as chat templates expect them, None where none may be called."""
        if self.tool_choice not in (None, "auto", "none"):
            raise refused("tool_choice", "expected 'auto' or 'none': calls cannot be forced")
        if self.tool_choice == "none" or not self.tools:
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    def sampling_params(self, limits: Limits) -> SamplingParams:
        """Raises `ApiError` 400 for what cannot be done."""
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs", "expected only with logprobs = true")
        _at_most("top_logprobs", self.top_logprobs, limits.max_logprobs)
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise refused("max_tokens", "the same as max_completion_tokens, which is given too: give one of them alone")
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if max_tokens is not None and max_tokens < 1:
            raise refused(self._given_as("max_tokens"), f"expected at least 1, got {max_tokens}")
        return self._params(limits, max_tokens, logprobs=(self.top_logprobs or 0) if self.logprobs else None)

    def _given_as(self, field: str) -> str:
        if field == "max_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return "top_logprobs" if field == "logprobs" else super()._given_as(field)


class EmbeddingBody(Body):
    """Body of ``POST /v1/embeddings``."""

    model: str | None = None
    input: _Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: _Ignored = None

    def prompts(self) -> list[str | list[int]]:
        """One text or list of token ids for each embedding."""
        return _texts_or_ids("input", self.input)


class TokenizeBody(Body):
    """Body of ``POST /tokenize``: a text, or a conversation that the chat template makes one of."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)] | None = None
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    """Body of ``POST /detokenize``."""

    model: str | None = None
    tokens: _Ids


_ADDED = ("str", "nullable")  # by pydantic, to the place of a fault
_PROMPTS = "a text, a list of texts, a list of token ids, or a list of lists of token ids"
_EITHER = {
    "prompt": _PROMPTS,
    "input": _PROMPTS,
    "stop": "a text or a list of texts",
    "content": "a text or a list of parts of type text",
}  # of these types pydantic names the first alone
_JSON_NAMES = {
    str: "a string", list: "a list", dict: "an object", int: "an integer", float: "a number", bool: "a bool",
    type(None): "null",
}  # fmt: skip


def parse(kind: type[Request], body: bytes) -> Request:
    """The request in a body; raises `ApiError` 400 that names the first field at fault."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body: expected JSON in UTF-8: {error}") from error
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _explained(error) from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply: expected what the route's documentation shows") from error


def _explained(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    # Without what pydantic adds for the alternatives of a type.
    place = [part for part in first["loc"] if isinstance(part, int) or (part.isidentifier() and part not in _ADDED)]
    if first["type"] == _UNKNOWN:
        place.append(first["ctx"]["name"])
    message = first["msg"]
    if first["type"].endswith("_type"):
        expected = _EITHER.get(str(place[-1])) if first["type"] == "string_type" and place else None
        message = f"expected {expected}" if expected else message
        got = _JSON_NAMES.get(type(first["input"]), "another value")
        message += f", got {got}{' of others' if expected and got == 'a list' else ''}"
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")[:200]
    return ApiError(400, f"{param}: {message}" if param else message, param=param or None)


def _at_most(field: str, value: int | None, limit: int | None, of: str = "") -> None:
    if value is not None and limit is not None and value > limit:
        raise refused(field, f"expected at most {limit}{of} (a limit of this server), got {value}")


def _with_values(function: FunctionCall, index: int) -> Mapping[str, Any]:
    try:
        arguments = json.loads(function.arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise refused(f"messages[{index}].tool_calls", "expected arguments that are JSON") from error
    return {"name": function.name, "arguments": arguments}


def _texts_or_ids(field: str, given: str | Sequence[Any]) -> list[str | list[int]]:
    """One text or list of token ids for each prompt in `given`."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise refused(field, "expected a text, token ids, or a list of them, got an empty list")
    listed: list[Any] = list(given)
    return [listed] if isinstance(listed[0], int) else listed
