"""pyllm: transformer language models on compiled kernels.

    from pyllm import LLM, SamplingParams

    llm = LLM("path-or-hub-id")
    for out in llm.generate(["Once upon a time"], SamplingParams(max_tokens=64, temperature=0)):
        print(out.outputs[0].text)

Names below are imported when first used, so that `import pyllm` itself costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pyllm.engine.outputs import (
        CompletionOutput,
        Logprob,
        PerplexityResult,
        RequestOutput,
        Score,
        StreamOutput,
    )
    from pyllm.errors import PyllmError
    from pyllm.isa import active_isa, available_isas, build_info, default_threads, set_isa
    from pyllm.llm import LLM
    from pyllm.ops import Ops
    from pyllm.planning import Plan, plan
    from pyllm.reading import ForwardOutput
    from pyllm.sampling import SamplingParams
    from pyllm.structured import StructuredOutputs
    from pyllm.tokenizer import Tokenizer

_HOMES = {
    "pyllm.engine.outputs": (
        "CompletionOutput",
        "Logprob",
        "PerplexityResult",
        "RequestOutput",
        "Score",
        "StreamOutput",
    ),
    "pyllm.errors": ("PyllmError",),
    "pyllm.isa": ("active_isa", "available_isas", "build_info", "default_threads", "set_isa"),
    "pyllm.llm": ("LLM",),
    "pyllm.reading": ("ForwardOutput",),
    "pyllm.ops": ("Ops",),
    "pyllm.planning": ("Plan", "plan"),
    "pyllm.sampling": ("SamplingParams",),
    "pyllm.structured": ("StructuredOutputs",),
    "pyllm.tokenizer": ("Tokenizer",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "LLM",
    "CompletionOutput",
    "ForwardOutput",
    "Logprob",
    "Ops",
    "PerplexityResult",
    "Plan",
    "PyllmError",
    "RequestOutput",
    "SamplingParams",
    "Score",
    "StreamOutput",
    "StructuredOutputs",
    "Tokenizer",
    "active_isa",
    "available_isas",
    "build_info",
    "default_threads",
    "plan",
    "set_isa",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pyllm' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
