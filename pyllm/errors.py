"""The errors pyllm raises on purpose.

Each message is one paragraph that says what was wrong, what was expected, what was found and what to do; the command
line prints it as it is. Several problems of one file are reported together, one per line.
"""

from __future__ import annotations

from collections.abc import Sequence


class PyllmError(Exception):
    """Base of every error that pyllm raises on purpose."""


class ConfigError(PyllmError):
    """A model's description (config.json or a spec) is malformed, contradictory or not supported."""


class ModelNotFoundError(PyllmError):
    """The model named by the user is neither a local folder nor a repository that could be fetched."""


class CheckpointError(PyllmError):
    """The weights of a model are missing, malformed, or do not fit its config."""


class TokenizerError(PyllmError):
    """A tokenizer or chat template is missing, malformed or not supported, or cannot be applied to the input."""


class InsufficientMemoryError(PyllmError):
    """What was asked for does not fit the memory that is free."""


class RequestError(PyllmError):
    """A prompt cannot be run as it is."""


class CudaUnavailable(PyllmError):  # noqa: N818 a state of the machine, not a mistake
    """No GPU can be used here; the message says what is missing."""


class DataError(PyllmError):
    """Training data is missing, malformed, too short, or not what a run began with."""


class NonFiniteError(PyllmError):
    """The model's values are no longer numbers."""


def listed(heading: str, problems: Sequence[str], limit: int = 40) -> str:
    """One message for all problems: inline when there is one, else one line each, the rest counted beyond `limit`."""
    if len(problems) == 1:
        return f"{heading}: {problems[0]}"
    shown = [f"  - {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        shown.append(f"  - and {len(problems) - limit} more")
    return "\n".join([f"{heading}, {len(problems)} problems:", *shown])


def require(holds: bool, what: str, expected: str, found: object) -> None:
    """Raise `ConfigError` unless what a model is described by holds."""
    if not holds:
        raise ConfigError(f"{what}: expected {expected}, found {found}")


def shown(value: object, limit: int = 80) -> str:
    """A value from outside, safe to print: escaped and cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
