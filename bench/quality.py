"""What fewer bits cost: perplexity of one model in every precision, and the errors of rounding, side by side.

    python bench/quality.py stories260K --skip '*.down_proj'

Text is that of --text, or else what the model itself writes in float32 (drawn at temperature 1 from fixed seeds): a
quantized model that finds it less likely has moved away from the model. Another part of it is the calibration text.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyllm import LLM
from pyllm.cache import CACHE_DTYPES
from pyllm.convert import convert


def main() -> None:
    """Print one table of perplexities and one of rounding errors, as markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("--text", type=Path, help="UTF-8 text; its last tenth is used for calibration only")
    parser.add_argument("--stories", type=int, default=120, help="without --text: how many texts the model writes")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens to score at most")
    parser.add_argument("--group-size", type=int, default=None, help="of int4 in converted folders")
    parser.add_argument("--skip", action="append", default=[], help="modules that convert leaves alone")
    options = parser.parse_args()
    exact = LLM(options.model, dtype="float32", kv_cache_dtype="float32", seed=0)
    ids, calibration = _from_file(exact, options.text) if options.text else _written(exact, options.stories)
    ids = ids[: options.tokens]
    with tempfile.TemporaryDirectory() as scratch:
        base = exact.perplexity(ids).perplexity
        print(f"{len(ids)} tokens\n\n| weights | cache | perplexity | over float32 |\n|---|---|---|---|")
        print(f"| float32 | float32 | {base:.4f} | |")
        errors = []
        for name, model, arguments in _variants(options, Path(scratch), calibration, errors):
            llm = LLM(model, **arguments)
            perplexity = llm.perplexity(ids).perplexity
            print(f"| {name} | {llm.plan.cache_dtype} | {perplexity:.4f} | {perplexity / base - 1:+.2%} |", flush=True)
        print("\n| rounding | relative RMS error | round to nearest |\n|---|---|---|")
        for name, error in errors:
            print(f"| {name} | {error.relative:.3%} | {error.relative_nearest:.3%} |")


def _variants(
    options: argparse.Namespace, scratch: Path, calibration: str, errors: list[Any]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, folder and arguments of every model to score; what is converted on the way adds to `errors`."""
    for dtype in ("float16", "bfloat16"):
        yield dtype, options.model, {"dtype": dtype, "kv_cache_dtype": "float32"}
    for cache in (dtype for dtype in CACHE_DTYPES if dtype != "float32"):
        yield "float32", options.model, {"dtype": "float32", "kv_cache_dtype": cache}
    for quantization in ("int8", "int4"):
        arguments = {"dtype": "float32", "quantization": quantization, "kv_cache_dtype": "float32"}
        yield f"{quantization}, rounded at load", options.model, arguments
        for how, text in (("converted", None), ("converted with calibration", calibration)):
            out = scratch / f"{quantization}-{text is None}"
            size = options.group_size if quantization == "int4" else None
            done = convert(options.model, out, quantization=quantization, group_size=size, calibration=text,
                           skip=options.skip)  # fmt: skip
            errors.append((f"{quantization}, {how}", done.error))
            yield f"{quantization}, {how}", str(out), {"dtype": "float32", "kv_cache_dtype": "float32"}


def _from_file(llm: LLM, path: Path) -> tuple[list[int], str]:
    text = path.read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    return llm.encode(text[:cut]), text[cut:]


def _written(llm: LLM, count: int) -> tuple[list[int], str]:
    """Token ids of what the model writes, one text after the other, and a few more texts for calibration."""
    prompt = {"prompt_token_ids": llm.encode("")}
    texts: list[list[int]] = []
    for seed in range(count + 20):
        [result] = llm.generate(prompt, max_tokens=llm.max_model_len - 8, temperature=1.0, seed=seed)
        texts.append([*prompt["prompt_token_ids"], *result.outputs[0].token_ids])
    calibration = "\n".join(llm.decode(ids) for ids in texts[count:])
    return [token for ids in texts[:count] for token in ids], calibration


if __name__ == "__main__":
    main()
