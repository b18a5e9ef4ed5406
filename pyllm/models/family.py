"""What a family is: a way to read its config, and a table of its weight names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyllm.spec import ModelSpec
from pyllm.weight_names import NameTable


@dataclass(frozen=True)
class Family:
    """Everything pyllm knows about one `model_type`; `read` raises `ConfigError`.

    Where several architectures share a `model_type`, all but one have a `key` that their configs alone hold.
    """

    model_type: str
    read: Callable[[Mapping[str, Any]], ModelSpec]
    names: NameTable
    key: str | None = None
