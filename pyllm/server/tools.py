"""Tool calls in generated text, for the formats that chat templates are known to ask for."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

MAX_CALLS = 128  # of one answer; what comes after stays text


@dataclass(frozen=True)
class Call:
    """A call that the model wants: `arguments` is JSON text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def body(self) -> dict[str, Any]:
        """As it stands in a message."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def format_of(template: str | None) -> str | None:
    """Which format a chat template teaches: "hermes" (also Qwen's) or "llama3"; None where it is not known."""
    if template is None or "tools" not in template:
        return None
    if "<tool_call>" in template:
        return "hermes"
    if "ipython" in template and '"parameters"' in template:
        return "llama3"
    return None


class CallReader:
    """Splits one completion's text, as it comes, into content and calls. What is malformed stays content."""

    def __init__(self, form: str) -> None:
        self.calls: list[Call] = []
        self._llama = form == "llama3"
        self._held = ""  # not yet known to be either
        self._began = False  # content was given

    def push(self, text: str) -> str:
        """Content that is certain now; `calls` may have grown."""
        self._held += text
        return self._read_llama() if self._llama else self._read_hermes()

    def finish(self) -> str:
        """What is left is content, unless it is a call."""
        held, self._held = self._held, ""
        if self._llama:
            self.calls, held = _llama_calls(held)
        elif held.lstrip().startswith(_OPEN) and len(self.calls) < MAX_CALLS:
            call = _call(held.lstrip()[len(_OPEN) :])  # the end mark may be missing
            if call is not None:
                self.calls.append(call)
                return ""
        return "" if self.calls and not held.strip() else held

    def _read_hermes(self) -> str:
        """Content, and spaces only where no call stands beside them."""
        content = ""
        while (at := self._held.find(_OPEN)) >= 0:
            before = self._held[:at].rstrip()
            content, self._held = content + before, self._held[len(before) :]
            end = self._held.find(_CLOSE)
            if end < 0:
                return content
            block, self._held = self._held[: end + len(_CLOSE)], self._held[end + len(_CLOSE) :]
            call = _call(block.lstrip()[len(_OPEN) : -len(_CLOSE)]) if len(self.calls) < MAX_CALLS else None
            if call is None:
                content += block
            else:
                self.calls.append(call)
        certain = self._held[: len(self._held) - _begun(self._held, _OPEN)].rstrip()
        self._held = self._held[len(certain) :]
        return content + certain

    def _read_llama(self) -> str:
        """A call is the whole answer: JSON from its first character on."""
        if not self._began and (not self._held.strip() or self._held.lstrip()[0] == "{"):
            return ""
        self._began = True
        content, self._held = self._held, ""
        return content


_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


def _begun(text: str, mark: str) -> int:
    """Characters at the end of `text` that may begin `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)


def _call(text: str) -> Call | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return _call_of(value, "arguments")


def _call_of(value: Any, arguments: str) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    given = value.get(arguments, {})
    if not isinstance(given, dict):
        return None
    try:
        return Call(value["name"], json.dumps(given, ensure_ascii=False, allow_nan=False))
    except ValueError:  # NaN and infinities, which Python reads, are no JSON
        return None


def _llama_calls(text: str) -> tuple[list[Call], str]:
    """One JSON object, or several with semicolons between them, and the text behind `MAX_CALLS`; no calls, and all of
    the text, where something in it is malformed."""
    decoder = json.JSONDecoder()
    calls: list[Call] = []
    rest = text.strip()
    while rest and len(calls) < MAX_CALLS:
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return [], text
        call = _call_of(value, "parameters")
        if call is None:
            return [], text
        calls.append(call)
        rest = rest[end:].lstrip("; \n")
    return calls, rest
