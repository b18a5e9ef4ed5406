"""What the user hands over: prompts from arguments, files and stdin, and the objects made of options."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pyllm.cli.output import note, progress_bar
from pyllm.errors import RequestError

if TYPE_CHECKING:
    from pyllm.generation_config import GenerationConfig
    from pyllm.llm import LLM
    from pyllm.sampling import SamplingParams
    from pyllm.structured import StructuredOutputs

MAX_TEXT_BYTES = 1 << 30


def given_text(argument: str | None, file: Path | None, what: str = "prompt") -> str:
    """The text that was given as argument, as - for stdin, or as file: exactly one of them, and not empty."""
    if (argument is None) == (file is None):
        raise typer.BadParameter(f"give the {what} either as argument (- for stdin) or with --file.")
    text = _read(argument, file)
    if not text:
        where = file or ("stdin" if argument == "-" else "the argument")
        raise typer.BadParameter(f"the {what} is empty: {where} holds no text; give a {what} of one character or more.")
    return text


def given_texts(arguments: list[str] | None, file: Path | None) -> list[str]:
    """The texts of the arguments, or the lines of a file or of stdin that are not empty."""
    if arguments and arguments != ["-"]:
        if file is not None:
            raise typer.BadParameter("give texts either as arguments (- for stdin) or with --file.")
        return [checked(text, "the command line") for text in arguments]
    lines = given_text("-" if arguments else None, file, "texts").splitlines()
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise typer.BadParameter("there is no text: every line is empty.")
    return texts


def given_pairs(arguments: list[str] | None, file: Path | None, second: str | None) -> list[str | tuple[str, str]]:
    """Texts, or pairs of each with a second one; a `.jsonl` file holds texts and pairs, as training reads them."""
    if file is None or file.suffix != ".jsonl":
        texts = given_texts(arguments, file)
        pair = None if second is None else checked(second, "--pair")
        return [*texts] if pair is None else [(text, pair) for text in texts]
    if arguments or second is not None:
        raise typer.BadParameter(f"{file} holds all texts and pairs: expected no other text and no --pair beside it.")
    from pyllm.errors import DataError
    from pyllm.train.documents import read_records

    keys = "text, and pair where there is a second text"
    found: list[str | tuple[str, str]] = []
    for record, at, _ in read_records(file, keys):
        texts = [record[key] for key in ("text", "pair") if record.get(key) is not None]
        if not isinstance(record.get("text"), str) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{at}: expected strings named {keys}, found {', '.join(sorted(record)) or 'no keys'}")
        found.append(texts[0] if len(texts) == 1 else (texts[0], texts[1]))
    if not found:
        raise typer.BadParameter(f"there is no text: {file} is empty.")
    return found


def _read(argument: str | None, file: Path | None) -> str:
    if file is not None:
        with file.open("rb") as stream:
            return decoded(stream.read(MAX_TEXT_BYTES), str(file))
    if argument == "-":
        if sys.stdin is None:
            raise OSError(9, "standard input is closed", "stdin")
        return decoded(sys.stdin.buffer.read(MAX_TEXT_BYTES), "stdin")
    assert argument is not None
    return checked(argument, "the command line")


def decoded(data: bytes, source: str) -> str:
    """UTF-8 text; says where it is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{source} is not valid UTF-8: {error.reason} at byte {error.start} (0x{data[error.start]:02x}). "
            "Convert it, for example with iconv -t UTF-8."
        ) from error


def checked(text: str, source: str) -> str:
    """Text of an argument: what was not UTF-8 there came as lone surrogates."""
    decoded(text.encode("utf-8", "surrogateescape"), source)
    return text


def load(
    model: str | None,
    *,
    device: str | None,
    dtype: str | None,
    quantization: str | None,
    quantization_skip: list[str] | None,
    threads: int | None,
    ctx_size: int | None,
    kv_cache_dtype: str | None,
    revision: str | None,
    offline: bool,
    chat_template: Path | None = None,
    verbose: bool = False,
    sequences: int = 1,
    **more: Any,
) -> LLM:
    """The model that the options describe, for `sequences` completions at a time; with a progress bar on a terminal.

    Without a model, that of the package. Options that are None keep the defaults of `LLM`; `more` are further arguments
    of it.
    """
    from pyllm.default_model import default_model
    from pyllm.isa import active_isa
    from pyllm.llm import LLM

    given = present(
        {
            "device": device,
            "dtype": dtype,
            "quantization": quantization,
            "quantization_skip": quantization_skip,
            "threads": threads,
            "max_model_len": ctx_size,
            "kv_cache_dtype": kv_cache_dtype,
            "revision": revision,
            "chat_template": given_text(None, chat_template, "template") if chat_template is not None else None,
        }
    )
    with progress_bar("loading") as progress:
        llm = LLM(model or default_model(), offline=offline, max_num_seqs=sequences, progress=progress, **given, **more)
    if verbose:
        plan = llm.plan
        note(f"model: {plan.dtype}, cache {plan.cache_dtype}, context {plan.max_model_len}, {llm.ops.threads} threads")
        note(f"kernels: {active_isa()}")
    return llm


def sampling(
    seed: int | None, *, model: str | None, revision: str | None, offline: bool, verbose: bool, **values: Any
) -> tuple[SamplingParams, int]:
    """Parameters from the options that were given, and the seed, which is drawn when none was given.

    For options that were not given stands in, without a model, what suits that of the package; of an encoder-decoder
    what its folder says.
    """
    from dataclasses import fields

    from pyllm.default_model import MAX_TOKENS, TEMPERATURE
    from pyllm.sampling import SamplingParams

    if model is None:
        suited: dict[str, Any] = {"max_tokens": MAX_TOKENS}
        if values.get("num_beams") in (None, 1):  # beam search draws nothing
            suited["temperature"] = TEMPERATURE
        values = {**values, **{name: value for name, value in suited.items() if values.get(name) is None}}
    chosen = seed if seed is not None else secrets.randbits(32)
    given = {"seed": chosen, **present(values)}
    defaults = None
    if model is None or (defaults := _search_defaults(model, revision, offline)) is None:
        params = SamplingParams(**given)
    else:
        params = defaults.params(given)
    if verbose:
        shown = ", ".join(f"{f.name}={getattr(params, f.name)!r}" for f in fields(params))
        note(f"sampling: {shown}")
    return params, chosen


def _search_defaults(model: str, revision: str | None, offline: bool) -> GenerationConfig | None:
    """What the folder of an encoder-decoder says of generation; None for other models."""
    from pyllm.folder import resolve
    from pyllm.generation_config import GenerationConfig
    from pyllm.models import read_spec

    folder = resolve(model, revision, offline)
    spec = read_spec(folder)
    return None if spec.encoder is None else GenerationConfig.read(folder, spec.vocab_size)


def structured(
    schema: Path | None, regex: str | None, choice: list[str] | None, grammar: Path | None
) -> StructuredOutputs | None:
    """What the output must match, from the options of which at most one is given."""
    from pyllm.structured import StructuredOutputs

    given: dict[str, Any] = present(
        {
            "json": None if schema is None else given_text(None, schema, "schema"),
            "regex": regex,
            "choice": choice or None,
            "grammar": None if grammar is None else given_text(None, grammar, "grammar"),
        }
    )
    if len(given) > 1:
        raise typer.BadParameter("give one of --json-schema, --regex, --choice and --grammar alone.")
    return StructuredOutputs(**given) if given else None


def present(options: dict[str, Any]) -> dict[str, Any]:
    """Without the options that were not given."""
    return {name: value for name, value in options.items() if value is not None}
