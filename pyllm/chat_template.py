"""Chat templates: jinja2 in an immutable sandbox, with everything a template can spend capped.

A template comes with a checkpoint, so it is not trusted. The sandbox keeps it away from Python's internals. On top of
that every value a template makes is measured, every operation that could make a large one from small ones is checked
beforehand, and loops and calls are counted, so neither time nor memory depends on the template's good will.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from types import GeneratorType
from typing import TYPE_CHECKING, Any

from pyllm.errors import TokenizerError

if TYPE_CHECKING:
    import jinja2

MAX_TEMPLATE_CHARS = 128 << 10
MAX_OUTPUT_CHARS = 8 << 20
MAX_SECONDS = 5.0

_MAX_WORK = 64 << 20  # what one rendering may make or move: a character counts 1, a list entry or a call _ENTRY
_ENTRY = 16
_MAX_DEPTH = 32
_MAX_INTEGER_BITS = 4096
_MAX_FORMAT_WIDTH = 9999
_MAX_ROUND_DIGITS = 100

_STRING_METHODS = frozenset(
    """
    capitalize casefold center count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric
    isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust
    rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill format
    """.split()  # noqa: SIM905  # a list literal would take 45 lines
)
_FILTERS = frozenset(
    """
    abs attr batch capitalize center count d default dictsort e escape first float format groupby indent int items
    join last length list lower map max min reject rejectattr replace reverse round safe select selectattr slice sort
    string sum title tojson trim truncate unique upper urlencode wordcount
    """.split()  # noqa: SIM905
)
_PADDING = frozenset({"center", "ljust", "rjust", "zfill"})


def render_chat(template: str, variables: Mapping[str, Any], max_seconds: float = MAX_SECONDS) -> str:
    """The text that `template` gives for `variables` (`messages`, `add_generation_prompt`, `bos_token`, ...).

    Raises `TokenizerError` when the template is malformed, calls `raise_exception`, reaches for what the sandbox
    forbids, or wants more than `MAX_TEMPLATE_CHARS`, `MAX_OUTPUT_CHARS` or `max_seconds`.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise TokenizerError(
            f"the chat template has {len(template)} characters, at most {MAX_TEMPLATE_CHARS} are accepted"
        )
    plain = {name: _plain(value, name) for name, value in variables.items()}
    spending = _BUDGET.set(_Budget(max_seconds))
    try:
        compiled = _compiled(template)
        parts: list[str] = []
        size = 0
        for part in compiled.generate(**plain):
            size += len(part)
            if size > MAX_OUTPUT_CHARS:
                raise _ExhaustedError(f"the text grew beyond {MAX_OUTPUT_CHARS} characters")
            parts.append(part)
        return "".join(parts)
    except _ExhaustedError as error:
        raise TokenizerError(f"the chat template was stopped: {error}. Give another with chat_template=.") from error
    except (MemoryError, RecursionError) as error:
        raise TokenizerError("the chat template was stopped: it nests too deeply or wants too much memory") from error
    except Exception as error:
        # Templates run arbitrary expressions: any of Python's errors can come out, and each is the template's fault.
        raise TokenizerError(
            f"the chat template failed: {type(error).__name__}: {error}. Check the messages against what the model "
            "expects, or give another template with chat_template=."
        ) from error
    finally:
        _BUDGET.reset(spending)


def _plain(value: Any, name: str, depth: int = 0) -> Any:
    """A deep copy made of JSON types only, so that a template never meets an object with methods of its own."""
    if depth > _MAX_DEPTH:
        raise TokenizerError(f"chat template: {name} is nested more than {_MAX_DEPTH} levels deep")
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, f"{name}[{key!r}]", depth + 1) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_plain(entry, f"{name}[{index}]", depth + 1) for index, entry in enumerate(value)]
    raise TokenizerError(
        f"chat template: {name} is of type {type(value).__name__}; expected a string, number, bool, None, list or dict"
    )


# --- what a rendering may spend ------------------------------------------------------------------------------------


class _ExhaustedError(Exception):
    """A cap was reached."""


class _Budget:
    """Work and time left to one rendering. Work is counted in characters and list entries."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._work = _MAX_WORK

    def tick(self) -> None:
        """Count one loop iteration or call."""
        self._spend(_ENTRY)
        if time.monotonic() > self._deadline:
            raise _ExhaustedError(f"it took more than {self._seconds:g} s")

    def charge(self, value: Any) -> Any:
        """Count what it took to make `value`, nested values included; gives it back."""
        self._walk(value, 0)
        return value

    def size(self, value: Any) -> int:
        """The entries and characters of `value`, which are counted once more."""
        before = self._work
        self._walk(value, 0)
        return before - self._work

    def expect(self, size: int) -> None:
        """Refuse an operation that is about to make something of `size`."""
        if size > self._work or size > MAX_OUTPUT_CHARS:
            raise _ExhaustedError(f"one operation wants {size} characters or entries")

    def _walk(self, value: Any, depth: int) -> None:
        if isinstance(value, str):
            self.expect(len(value))
            self._spend(len(value) + _ENTRY)
        elif isinstance(value, list | tuple | set | frozenset):
            self._nested(value, depth)
        elif isinstance(value, dict):
            self._nested(value.keys(), depth)
            self._nested(value.values(), depth)
        elif isinstance(value, int):
            self._spend(_ENTRY)
            if value.bit_length() > _MAX_INTEGER_BITS:
                raise _ExhaustedError(f"an integer grew beyond {_MAX_INTEGER_BITS} bits")
        else:
            self._spend(_ENTRY)

    def _nested(self, values: Any, depth: int) -> None:
        if depth >= 2 * _MAX_DEPTH:
            raise _ExhaustedError(f"a value is nested more than {2 * _MAX_DEPTH} levels deep")
        self.tick()
        for value in values:
            self._walk(value, depth + 1)

    def _spend(self, amount: int) -> None:
        self._work -= amount
        if self._work < 0:
            raise _ExhaustedError(f"it made more than {_MAX_WORK} characters, or as many entries / {_ENTRY}")


_BUDGET: ContextVar[_Budget] = ContextVar("_BUDGET")  # of the rendering under way; compiled templates outlive it


def _check_padding(budget: _Budget, text: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    for argument in (*arguments, *named.values()):
        if isinstance(argument, int):
            budget.expect(len(str(text)) + abs(argument))


def _check_replace(budget: _Budget, text: str, old: Any, new: Any) -> None:
    found = text.count(str(old)) if str(old) else len(text) + 1
    budget.expect(len(text) + found * len(str(new)))


def _check_join(budget: _Budget, separator: str, values: Any) -> None:
    values = list(values)
    budget.expect(len(separator) * len(values))
    budget.charge(values)


_WIDTHS = re.compile(r"[0-9]{5,}")
_WIDTH = re.compile(r"[0-9]{3}")


def _check_format(budget: _Budget, text: str, values: Any, modulo: bool) -> None:
    """Refuse format strings with a large width or a computed one, and those that repeat a long value often."""
    nested = re.search(r"%[^%a-zA-Z]*\*", text) if modulo else re.search(r"\{[^{}]*:[^{}]*\{", text)
    if nested or _WIDTHS.search(text):
        raise _ExhaustedError(f"a format string asks for a computed width or one beyond {_MAX_FORMAT_WIDTH}")
    fields = text.count("%" if modulo else "{")
    each = budget.size(values) + (_MAX_FORMAT_WIDTH if _WIDTH.search(text) else 99)
    budget.expect(len(text) + fields * each)


# --- the sandbox ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """The sandbox; made on first use, since only chats need jinja2."""
    from jinja2 import nodes, sandbox
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.utils import Namespace
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """`{% generation %}` marks what the assistant said, for training; the text is the same without the marks."""

        tags = {"generation"}  # noqa: RUF012  # the base class declares a plain set

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class CheckedNamespace(Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args
            Namespace.__init__(self, *rest, **kwargs)
            for name in dict(*rest, **kwargs):
                check_name(name)

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            super().__setitem__(name, value)

    def check_name(name: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace entry may not be called {name!r}: it begins with an underscore")

    class Metering(NodeTransformer):
        """Routes what makes values without passing through a hook of the environment through `meter_*` methods."""

        def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  # jinja2's naming
            self.generic_visit(node)
            tick = nodes.ExprStmt(self._call("meter_tick"), lineno=node.lineno)
            node.body.insert(0, tick)
            if node.test is not None:
                node.test = nodes.And(self._call("meter_tick"), node.test, lineno=node.lineno)
            return node

        def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
            self.generic_visit(node)
            node.nodes = [
                self._call("meter_value", nodes.Const(child.data) if isinstance(child, nodes.TemplateData) else child)
                for child in node.nodes
            ]
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
            self.generic_visit(node)
            return self._call("meter_concat", *node.nodes)

        def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
            self.generic_visit(node)
            return self._call("meter_value", node)

        def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
            self.generic_visit(node)
            return self._call("meter_value", node)

        def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
            self.generic_visit(node)
            return node if node.ctx != "load" else self._call("meter_value", node)

        def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
            self.generic_visit(node)
            return self._call("meter_value", node) if isinstance(node.arg, nodes.Slice) else node

        def _call(self, method: str, *arguments: nodes.Expr) -> nodes.Call:
            return nodes.Call(nodes.EnvironmentAttribute(method), list(arguments), [], None, None, lineno=1)

    class ChatEnvironment(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def __init__(self) -> None:
            super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
            self.filters = {name: self._metered(name, self.filters[name]) for name in _FILTERS if name in self.filters}
            self.filters["tojson"] = self._metered("tojson", self._tojson)
            self.globals = {
                "range": sandbox.safe_range,
                "dict": lambda *args, **kwargs: dict(*args, **kwargs),
                "namespace": CheckedNamespace,
                "raise_exception": self._raise_exception,
                "strftime_now": self._strftime_now,
            }

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            template: nodes.Template = Metering().visit(super()._parse(source, name, filename))
            return template

        # Everything below is called by the template.

        def meter_tick(self) -> bool:
            _BUDGET.get().tick()
            return True

        def meter_value(self, value: Any) -> Any:
            return value  # `call` has measured it

        def meter_concat(self, *values: Any) -> str:
            texts = [str(value) for value in values]
            _BUDGET.get().expect(sum(map(len, texts)))
            return "".join(texts)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            if not super().is_safe_attribute(obj, attr, value):
                return False
            if isinstance(obj, str):
                return attr in _STRING_METHODS
            return not isinstance(obj, int | float | bytes)

        def getattr(self, obj: Any, attribute: str) -> Any:
            if attribute.startswith("__"):
                return self.unsafe_undefined(obj, attribute)  # also where the object itself hides it
            return super().getattr(obj, attribute)

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed")

        def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
            wrapped = super().wrap_str_format(value)
            if wrapped is None:
                return None
            text = value.__self__

            def checked(*args: Any, **kwargs: Any) -> str:
                _check_format(_BUDGET.get(), text, [*args, *kwargs.values()], modulo=False)
                return wrapped(*args, **kwargs)

            return checked

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
            budget = _BUDGET.get()
            budget.tick()
            target = getattr(__obj, "__self__", None)
            if isinstance(target, str):
                __self._check_string_method(target, __obj.__name__, args, kwargs)
            return budget.charge(super().call(__context, __obj, *args, **kwargs))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            budget = _BUDGET.get()
            budget.tick()
            if operator == "*":
                for many, times in ((left, right), (right, left)):
                    if isinstance(times, int) and isinstance(many, str | list | tuple):
                        budget.expect(len(many) * times)
                if isinstance(left, int) and isinstance(right, int):
                    self._check_bits(left.bit_length() + right.bit_length())
            elif operator == "**" and isinstance(left, int) and isinstance(right, int):
                self._check_bits(left.bit_length() * abs(right))
            elif operator == "%" and isinstance(left, str):
                _check_format(budget, left, right, modulo=True)
            elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
                budget.expect(len(left) + len(right))
            return budget.charge(super().call_binop(context, operator, left, right))

        def _check_bits(self, bits: int) -> None:
            if bits > 2 * _MAX_INTEGER_BITS:
                raise _ExhaustedError(f"an integer grew beyond {_MAX_INTEGER_BITS} bits")

        def _check_string_method(self, text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            budget = _BUDGET.get()
            if name in _PADDING:
                _check_padding(budget, text, args, kwargs)
            elif name == "replace":
                _check_replace(budget, text, *args[:2])
            elif name == "join":
                _check_join(budget, text, *args)

        def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(function)  # keeps jinja2's marks that say whether it wants the context
            def metered(*args: Any, **kwargs: Any) -> Any:
                budget = _BUDGET.get()
                budget.tick()
                first = 1 if hasattr(function, "jinja_pass_arg") else 0
                args = (*args[:first], *(self._listed(value) for value in args[first:]))
                self._check_filter(name, args[first], args[first + 1 :], kwargs)
                return budget.charge(self._listed(function(*args, **kwargs)))

            return metered

        def _check_filter(self, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            budget = _BUDGET.get()
            values = (*args, *kwargs.values())
            widths = sum(abs(number) for number in values if isinstance(number, int))
            texts = [text for text in values if isinstance(text, str)]
            if name in ("indent", "join"):  # what may come once for every character or entry
                budget.expect(budget.size(value) + self._length(value) * (widths + sum(map(len, texts))))
            elif name == "tojson":
                indent = widths + max(map(len, texts), default=0)
                budget.expect(budget.size(value) * (1 + indent))
            elif name in ("center", "batch", "slice", "truncate"):
                budget.expect(self._length(value) + widths)
            elif name == "round" and widths > _MAX_ROUND_DIGITS:
                raise _ExhaustedError(f"round to more than {_MAX_ROUND_DIGITS} digits")
            elif name == "replace":
                old, new = (*args, *(kwargs[key] for key in ("old", "new") if key in kwargs))[:2]
                _check_replace(budget, str(value), old, new)
            elif name == "format":
                _check_format(budget, str(value), values, modulo=True)
            elif name == "sum" and any(not isinstance(entry, int | float | str) for entry in values):
                raise TypeError("sum takes numbers only")
            elif name in ("attr", "map") and any(text.startswith("_") for text in texts):
                raise SecurityError(f"{name} of a name that begins with an underscore")

        def _length(self, value: Any) -> int:
            return len(value) if hasattr(value, "__len__") else 1

        def _listed(self, value: Any) -> Any:
            """Generators become lists, each entry counted."""
            if not isinstance(value, GeneratorType):
                return value

            def counted() -> Iterator[Any]:
                for entry in value:
                    _BUDGET.get().tick()
                    yield entry

            return list(counted())

        @staticmethod
        def _tojson(
            value: Any,
            ensure_ascii: bool = False,
            indent: int | str | None = None,
            separators: tuple[str, str] | None = None,
            sort_keys: bool = False,
        ) -> str:
            return json.dumps(
                value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
            )

        @staticmethod
        def _raise_exception(message: Any = "") -> None:
            raise TemplateError(str(message))

        @staticmethod
        def _strftime_now(layout: str) -> str:
            if len(layout) > 100 or re.search(r"%[^A-Za-z%]*[0-9]", layout):
                raise SecurityError("strftime_now takes a short layout without widths")
            return datetime.now().strftime(layout)

    return ChatEnvironment()
